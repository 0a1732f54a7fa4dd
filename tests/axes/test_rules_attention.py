"""Fused attention: head dims are free, the scale stays, and what normalises or masks is blocked."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as attend

import ecospa_fx as eco
from ecospa_fx.runtime.layer import GraphLayer
from tests.support.oracle import Case, check_exact, check_literal, check_rule, prepared, tagged


class Attention(nn.Module):
    """Self-attention with `heads` query heads, `groups` key-value heads of width 4, and fused attention."""

    def __init__(self, heads: int = 4, groups: int = 4, mask: str = "", **options: Any) -> None:
        super().__init__()
        self.heads, self.groups, self.mask, self.options = heads, groups, mask, options
        self.q, self.k, self.v = (nn.Linear(6, n * 4) for n in (heads, groups, groups))
        self.o = nn.Linear(heads * 4, 5)
        self.register_parameter("bias", nn.Parameter(torch.randn(heads, 1, 1)) if mask == "heads" else None)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        mask: Any = self.bias
        if self.mask == "causal":
            mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        result: Tensor = self.o(attend(q, k, v, mask, **self.options).transpose(1, 2).flatten(2))
        return result


def case(offers: str, label: str, *arguments: Any, blocked: str = "", **options: Any) -> Case:
    return Case(
        "aten.scaled_dot_product_attention", lambda: Attention(*arguments, **options), offers, blocked, label=label
    )


CASES = [
    case("heads 4, qk 4×4, vo 4×4", "plain"),
    case("heads 4, qk 4×4, vo 4×4", "causal", is_causal=True),
    case("heads 4, qk 4×4, vo 4×4", "scale", scale=0.7),
    case("heads 4, qk 4×4, vo 4×4", "bool-mask", 4, 4, "causal"),
    case("heads 4, qk 4×4, vo 4×4", "head-bias", 4, 4, "heads"),
    case("heads 2, heads 3×2, qk 4×2, vo 4×2", "grouped", 6, 2, enable_gqa=True),
    case("heads 4, qk 4, vo 4", "one-group", 4, 1, enable_gqa=True),
]


def test_literal(case: Case) -> None:
    check_literal(case)


@pytest.mark.slow
def test_exact(case: Case) -> None:
    check_exact(case, seeds=(0, 1, 2))


@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"enable_gqa": True}])
def test_one_call(options: dict[str, Any]) -> None:
    groups = 2 if options.get("enable_gqa") else 4
    shapes = [(2, 4, 3, 6), (2, groups, 5, 6), (2, groups, 5, 8)]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, **options)

    assert check_rule(call, [tagged(*s).sin() for s in shapes]) >= 4


def test_the_default_scale_stays_what_it_was() -> None:
    model, args, couplings = prepared(CASES[0])
    small = eco.shrink(model, eco.plan(couplings, 0.5, "random", kinds=["qk"]), args)
    sources = [m._graph_code.source for m in small.modules() if isinstance(m, GraphLayer)]
    scales = [float(found) for source in sources for found in re.findall(r"scale = ([\d.]+)", source)]
    assert scales == [pytest.approx(0.5)]


def test_sequence_positions_are_refused() -> None:
    class Learnt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.keys, self.values = (nn.Parameter(torch.randn(1, 1, 7, 6)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return attend(x[:, None], self.keys, self.values)

    found = eco.detect(Learnt(), (torch.randn(2, 3, 6),))
    messages = {c.blocked.message for c in found.blocked if c.blocked}
    assert "attention weights are normalised over it; nothing lifts this" in messages
