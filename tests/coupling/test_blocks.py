"""Whole blocks: branches that leave the graph with all that feeds them alone, exactly as if they were masked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ecospa_fx as eco
from ecospa_fx.coupling.couplings import Couplings
from ecospa_fx.errors import PlanError
from ecospa_fx.passes.shrink.shrink_couplings import ShrinkCouplings
from ecospa_fx.verify import masked, masked_error
from tests.support.exported_once import exported_once

ALL = ("block", "ffn", "heads", "qk", "vo")
NONE = torch.zeros(1, 1, dtype=torch.bool)
WORDS, WIDTH = 11, 8


class Layer(nn.Module):
    """Attention, and an FFN whose result is scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.RMSNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.qkv, self.o = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)
        self.gamma = nn.Parameter(torch.randn(WIDTH))
        self.gates = (1.0, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(self.norms[0](x)).chunk(3, -1))
        x = x + self.gates[0] * self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        result: Tensor = x + self.gates[1] * (self.gamma * self.down(F.gelu(self.up(self.norms[1](x)))))
        return result


class Net(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layers = nn.Embedding(WORDS, WIDTH), nn.ModuleList(Layer() for _ in range(2))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, WORDS)

    def forward(self, words: Tensor) -> Tensor:
        x = self.table(words)
        for layer in self.layers:
            x = layer(x)
        result: Tensor = self.head(self.norm(x))
        return result


def loss(output: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), args[0].flatten())


@pytest.fixture(scope="module")
def net() -> Iterator[tuple[Net, Tensor, Couplings]]:
    torch.manual_seed(0)
    model, words = Net().double().eval(), torch.randint(WORDS, (2, 5))
    with exported_once():
        yield model, words, eco.detect(model, (words,))


Case = tuple[Net, Tensor, Couplings]


def dropped(couplings: Couplings, *names: str, **widths: object) -> eco.Plan:
    """The plan that drops some blocks, and keeps some units of other couplings."""
    keep: dict[str, object] = dict.fromkeys(names, NONE)
    return eco.Plan.keeping(couplings.asked("block"), {**keep, **widths})


def check(model: nn.Module, plan: eco.Plan, *args: Tensor) -> nn.Module:
    """The smaller model, which equals the masked one and has the parameters that the masks keep."""
    small = eco.shrink(model, plan, args)
    assert masked_error(model, small, plan, args) < 1e-12
    left = sum(p.numel() for p in model.parameters()) - plan.removed_parameters
    assert sum(p.numel() for p in small.parameters()) == left
    return small


def test_a_block_holds_all_that_goes_with_it(net: Case) -> None:
    """The norm in front, what is inside, and the matrix and bias that make the result, which alone are consumers."""
    blocks = net[2].blocks
    assert [b.name for b in blocks] == [f"layers.{i}.block{end}" for i in (0, 1) for end in ("", ".2")]
    first, second = ({m.parameter.removeprefix("layers.0."): m.role for m in b.members} for b in blocks[:2])
    assert first == {
        "norms.0.weight": "producer", "qkv.weight": "producer", "qkv.bias": "producer",
        "o.weight": "consumer", "o.bias": "consumer",
    }  # fmt: skip
    assert second == {
        "gamma": "producer", "norms.1.weight": "producer", "norms.1.bias": "producer", "up.weight": "producer",
        "up.bias": "producer", "down.weight": "consumer", "down.bias": "consumer",
    }  # fmt: skip
    assert blocks[0].parameters == 8 + 24 * 9 + 8 * 9
    assert all((b.size, b.carriers, b.kind) == (1, 1, "block") for b in blocks)


def test_blocks_are_asked_for(net: Case) -> None:
    """No part of what is detected or planned by default; `kinds` and `select` reach them."""
    _, _, couplings = net
    assert all(c.kind != "block" for c in couplings)
    assert all(s.kind != "block" for s in eco.plan(couplings, 0.5, "random"))
    only = couplings.select(kinds="block")
    assert [c.name for c in only] == [c.name for c in couplings.blocks]
    assert only.select(kinds=["block"], names="layers.1.*").whole is not None
    assert {s.kind for s in eco.plan(couplings, 0.5, "random", kinds="block")} == {"block"}
    assert len(couplings.asked(["ffn", "block"])) == len(couplings) + 4
    assert couplings.asked("ffn") is couplings
    both = eco.plan(couplings, 0.5, "random", kinds=["block", "ffn"], exclude=["layers.0"])
    assert {s.layer for s in both} == {"layers.1"}


@pytest.mark.parametrize("names", [[0, 1], [1, 2], [0, 1, 2, 3]], ids=str)
def test_dropping_is_masking(net: Case, names: list[int]) -> None:
    """One block, one layer, blocks of two layers, all; and nothing of a layer that is gone is left in its place."""
    model, words, couplings = net
    small = check(model, dropped(couplings, *(couplings.blocks[i].name for i in names)), words)
    for i in names:
        assert not {m.parameter for m in couplings.blocks[i].members} & set(small.state_dict())
    assert small(torch.randint(WORDS, (3, 7))).shape == (3, 7, WORDS)


def test_blocks_and_widths_in_one_budget(net: Case, tmp_path: Path) -> None:
    """Elements are counted once; what is inside of a block that goes need not lose units too; a file holds it."""
    model, words, couplings = net
    for ratio, seed in ((0.5, 1), (0.5, 2), (0.7, 3)):
        plan = eco.plan(couplings, ratio, "random", kinds=ALL, seed=seed)
        assert plan.removed_parameters / plan.coupled_parameters == pytest.approx(ratio, abs=0.15)
        gone = {m.parameter for s in plan if s.kind == "block" and not s.kept for m in s.members}
        assert all(s.kept == s.size for s in plan if s.kind != "block" and gone >= {m.parameter for m in s.members})
        small = check(model, plan, words)
    assert gone
    assert eco.Plan.from_json(plan.to_json()) == plan
    eco.save(small, tmp_path / "small")
    assert torch.equal(eco.load(tmp_path / "small", model=lambda: Net().double())(words), small(words))
    residual = eco.plan(couplings, 0.4, "random", kinds=["block", "residual"], seed=1)
    check(model, residual, words)


def test_limits_and_floors(net: Case) -> None:
    """A block has no floor; a limit keeps all blocks, or all in a module."""
    _, _, couplings = net
    kept = eco.plan(couplings, 0.2, "random", kinds=ALL, limits={"block": 0})
    assert all(s.kept for s in kept)
    most = eco.plan(couplings, 0.95, "random", kinds="block", floor=0.9)
    assert not any(s.kept for s in most)
    some = eco.plan(couplings, 0.4, "random", kinds="block", limits={"layers.1": 0.5})
    assert [s.kept for s in some] == [0, 0, 1, 1]


def test_the_score_is_that_of_a_gate(net: Case) -> None:
    """The mean over samples of the squared derivative by a factor on the branch, a scale in it counted once."""
    model, _, couplings = net
    batches: list[tuple[tuple[Tensor], dict[str, Any]]] = [((torch.randint(WORDS, (1, 5)),), {}) for _ in range(3)]
    scores = eco.score(model, couplings.select(kinds="block"), batches, loss=loss)
    want = torch.zeros(4, dtype=torch.float64)
    try:
        for args, _ in batches:
            gates = torch.ones(4, dtype=torch.float64, requires_grad=True)
            for i in (0, 1):
                layer = model.get_submodule(f"layers.{i}")
                layer.gates = gates[2 * i : 2 * i + 2]
            (slope,) = torch.autograd.grad(loss(model(*args), args, {}), gates)
            want += slope.square() / len(batches)
    finally:
        for layer in model.layers:
            layer.gates = (1.0, 1.0)  # type: ignore[assignment]
    got = torch.stack([scores[b.name].squeeze() for b in couplings.blocks])
    assert torch.allclose(got, want, rtol=1e-9)
    assert eco.score(model, couplings.select(kinds="block"), method="magnitude")["layers.0.block"].item() == 296
    plan = eco.plan(couplings, 0.25, scores, kinds="block")
    assert not plan[couplings.blocks[int((want / torch.tensor([296.0, 236, 296, 236])).argmin())].name].kept


def test_refusals(net: Case) -> None:
    """In place, in other budgets and allocations, in ragged plans, and of another model; nothing changes."""
    model, words, couplings = net
    plan, before = dropped(couplings, "layers.0.block"), {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(PlanError, match=r"'layers.0.block' is a whole block, which is not taken out of a module's own"):
        eco.shrink_(model, plan, (words,))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    options: list[dict[str, Any]] = [
        {"budget": "flops"}, {"allocation": "ragged"}, {"uniform": True}, {"expressible_in": "module"},
    ]  # fmt: skip
    for option in options:
        with pytest.raises(PlanError, match="cannot be said of whole blocks"):
            eco.plan(couplings, 0.5, "random", kinds=ALL, **option)
    with pytest.raises(PlanError, match="cannot be said of whole blocks"):
        eco.plan(couplings, scores="random", kinds="block", widths={"layers.0.block": 1})
    ragged = dropped(couplings, "layers.0.block", **{"layers.1.vo": [[0, 1], [0, 1, 2]]})
    with pytest.raises(PlanError, match="which no ragged plan drops"):
        eco.shrink(model, ragged, (words,))
    x = torch.randn(2, WIDTH)
    plan = dropped(eco.detect(Branch(), (x,)), "block")
    with pytest.raises(PlanError, match="'block' of the plan cannot be shrunk in this graph: it is not there"):
        eco.shrink(Branch("mul"), plan, (x,))
    with pytest.raises(PlanError, match="no offered coupling is of kind 'block'"):
        eco.plan(eco.detect(Branch("mul"), (x,)), 0.5, "random", kinds="block")


def test_graph_modules(net: Case) -> None:
    """The pass on a graph module drops parameters too."""
    model, words, couplings = net
    module = torch.export.export(model, (words,), strict=False).module()
    plan = dropped(couplings, "layers.0.block.2", "layers.1.block")
    ShrinkCouplings(plan).run(module)
    assert not [n for n, _ in module.named_parameters() if n.startswith(("layers.0.up", "layers.1.qkv"))]
    with masked(model, plan):
        assert torch.allclose(module(words), model(words), rtol=1e-12)


WAYS: dict[str, tuple[int, Callable[[Any, Tensor, Tensor], Any]]] = {
    "add": (1, lambda net, x, y: x + y),
    "second": (1, lambda net, x, y: y + x),
    "times": (1, lambda net, x, y: torch.add(x, y, alpha=3)),
    "less": (1, lambda net, x, y: x - y),
    "more": (0, lambda net, x, y: torch.add(y, x, alpha=3)),
    "negative": (0, lambda net, x, y: y - x),
    "mul": (0, lambda net, x, y: x * y),
    "returned": (0, lambda net, x, y: (x + y, y)),
    "again": (0, lambda net, x, y: x + y + net.made(x + y)),
    "broadcast": (0, lambda net, x, y: x[:1] + y),
    "written": (0, lambda net, x, y: x + y.mul_(2)),
    "shifted": (0, lambda net, x, y: x + (y + 1)),
    "apart": (0, lambda net, x, y: x.sin() + y),
    "other": (1, lambda net, x, y: net.up(x).sum(-1, keepdim=True) * (x + y)),
}
"""How many blocks there are where x and an FFN of x meet in some way."""


class Branch(nn.Module):
    """An FFN beside its input."""

    def __init__(self, how: str = "add") -> None:
        super().__init__()
        self.up, self.down, self.how = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH), how

    def made(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(self.up(x).relu())
        return result

    def forward(self, x: Tensor) -> Any:
        x = x * 2
        return WAYS[self.how][1](self, x, self.made(x))


@pytest.mark.parametrize("how", WAYS)
def test_what_is_a_block(how: str) -> None:
    """A branch is added to what it is computed from, is 0 where its matrix and bias are, and nothing else reads it."""
    model, x = Branch(how).double().eval(), torch.randn(3, WIDTH, dtype=torch.float64)
    couplings = eco.detect(model, (x,))
    assert len(couplings.blocks) == WAYS[how][0]
    if couplings.blocks and how != "second":
        small = check(model, dropped(couplings, couplings.blocks[0].name), x)
        assert set(small.state_dict()) == ({"up.weight", "up.bias"} if how == "other" else set())
