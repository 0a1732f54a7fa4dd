"""Operators that call functions: attention with functions inside has a rule, branches and loops are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops import scan, while_loop
from torch._higher_order_ops.map import map as map_rows
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import ecospa_fx as eco
from ecospa_fx.coupling.couplings import Couplings
from ecospa_fx.errors import CaptureError
from ecospa_fx.verify import masked_error

HIDDEN, UNITS, HEADS, WIDTH, LENGTH = 12, 8, 4, 6, 5
X = torch.randn(2, LENGTH, HIDDEN, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Beside(nn.Module):
    """Something, and a pair that has nothing to do with it."""

    def __init__(self, something: nn.Module) -> None:
        super().__init__()
        self.something, self.free, self.back = something, nn.Linear(HIDDEN, 5), nn.Linear(5, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.something(x) + self.back(self.free(x).relu())
        return out


def proven(something: nn.Module) -> tuple[str, Couplings]:
    """What is offered, by a random plan that is exact, and all couplings."""
    torch.manual_seed(0)
    model = Beside(something).double().requires_grad_(False)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    couplings = eco.detect(model, (X,))
    plan = eco.plan(couplings, ratio=0.5, scores="random")
    assert masked_error(model, eco.shrink(model, plan, (X,)), plan, (X,)) <= 1e-9
    return ", ".join(sorted(f"{c.kind} {c.size}×{c.carriers}" for c in couplings.offered)), couplings


# -- flex attention --------------------------------------------------------------------------------------------------


class Flexible(nn.Module):
    """Attention with options."""

    def __init__(self, groups: int = HEADS, **options: Any) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(HIDDEN, n * WIDTH) for n in (HEADS, groups, groups))
        self.o, self.options = nn.Linear(HEADS * WIDTH, HIDDEN), {"enable_gqa": groups < HEADS, **options}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, WIDTH)).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed: Any = flex_attention(q, k, v, **self.options)
        out: Tensor = self.o(mixed.transpose(1, 2).flatten(2))
        return out


class Biased(Flexible):
    """With a bias per head that is learnt."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(HEADS))
        self.options["score_mod"] = lambda score, b, h, i, j: score + self.bias[h] * (i - j)


def relative(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return score * 0.5 + (i - j)


def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i >= j


FLEXIBLE: dict[str, Callable[[], nn.Module]] = {
    "plain": Flexible,
    "score": lambda: Flexible(score_mod=relative),
    "mask": lambda: Flexible(block_mask=create_block_mask(causal, None, None, LENGTH, LENGTH, device="cpu")),
    "learnt": Biased,
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FLEXIBLE)
def test_flex_attention_passes_head_dimensions(kind: str) -> None:
    offered, couplings = proven(FLEXIBLE[kind]())
    assert offered == "ffn 5×1, qk 6×4, vo 6×4"
    (refusal,) = {c.blocked for c in couplings.blocked if c.blocked and c.blocked.operator == "flex_attention"}
    assert refusal.message == "a function inside the attention reads its positions; nothing lifts this"
    assert f"{__file__}:" in refusal.source


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_flex_attention_in_groups_shares_head_dimensions_within_each() -> None:
    assert proven(Flexible(groups=2))[0] == "ffn 5×1, qk 6×2, vo 6×2"


@pytest.mark.filterwarnings("ignore")
def test_flex_attention_that_torch_cannot_trace_says_what_to_do() -> None:
    with pytest.raises(CaptureError, match=r"test_higher_order.py:\d+.* does not support backward on CPU. Please set"):
        eco.detect(Flexible(), (X.float(),))


# -- branches and loops ------------------------------------------------------------------------------------------------


class Around(nn.Module):
    """linear → operation → linear."""

    def __init__(self, middle: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.middle = nn.Linear(HIDDEN, UNITS), nn.Linear(UNITS, HIDDEN), middle

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.middle(self.up(x)))
        return out


def branch(h: Tensor) -> Tensor:
    out: Tensor = torch.cond(h.sum() > 0, lambda y: y.relu(), lambda y: y.tanh(), (h,))
    return out


def rows(h: Tensor) -> Tensor:
    out: Tensor = map_rows(lambda row, *_: row.tanh(), h)
    return out


def running(h: Tensor) -> Tensor:
    out: Tensor = scan(lambda held, row: (held * 0.5 + row, held + row), torch.zeros_like(h[0]), h, dim=0)[1]
    return out


def repeated(h: Tensor) -> Tensor:
    start, loop = (torch.zeros((), dtype=torch.long), h), cast(Any, while_loop)
    out: Tensor = loop(lambda i, y: i < 3, lambda i, y: (i + 1, y.tanh()), start)[1]
    return out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("middle", "operator"), [(branch, "cond"), (rows, "map_impl"), (running, "scan"), (repeated, "while_loop")]
)
def test_a_branch_or_loop_is_refused_where_it_is(middle: Callable[[Tensor], Tensor], operator: str) -> None:
    offered, couplings = proven(Around(middle))
    assert offered == "ffn 5×1"
    (refusal,) = {c.blocked for c in couplings.blocked if c.blocked and c.blocked.operator == operator}
    assert refusal.message == (
        "the graph that it calls is not followed; write the branch or loop out, or choose it by the example inputs"
    )
    assert refusal.node.startswith(operator)
    assert refusal.source.startswith(f"{__file__}:")
