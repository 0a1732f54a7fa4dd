"""Budgets in FLOPs and seconds: counted as torch counts them, measured once, spent where they bring most."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import ecospa_fx as eco
from ecospa_fx.budget import latency
from ecospa_fx.budget.allocate import choose
from ecospa_fx.budget.cost import Flops, GraphCost
from ecospa_fx.budget.graph_cost import NarrowedOps, Operation, flops
from ecospa_fx.budget.latency import Latency, LatencyTable
from ecospa_fx.budget.removal_order import Bounds
from ecospa_fx.coupling.couplings import Couplings
from ecospa_fx.coupling.types import Coupling
from ecospa_fx.errors import PlanError
from ecospa_fx.importance.scores import Scores
from ecospa_fx.importance.sensitivity import Curves
from tests.support.demonstration import shallow
from tests.support.exported_once import exported_once
from tests.support.tiny import tiny, tiny_couplings


class Fused(nn.Module):
    """GPT-2's way: queries, keys and values from one matrix; a bias of its own for every head in the mask."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 40), nn.Linear(40, 16)
        self.slopes = nn.Buffer(torch.rand(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (4, 4)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        mask = self.slopes * torch.arange(x.shape[1], dtype=x.dtype)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(4, x.shape[1], -1))
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        result: Tensor = x + self.down(nn.functional.gelu(self.up(x)))
        return result


class Convolved(nn.Module):
    """A depthwise convolution, whose number of groups follows its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.deep = nn.Conv1d(6, 24, 1), nn.Conv1d(24, 24, 3, padding=1, groups=24)
        self.last = nn.Conv1d(24, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(torch.relu(self.deep(torch.relu(self.first(x)))))
        return result


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "grouped queries, rotary": lambda: (shallow(), torch.randint(0, 256, (2, 24))),
    "fused, masked": lambda: (Fused(), torch.randn(2, 7, 16)),
    "einsum, packed experts": lambda: (tiny().float(), torch.randint(0, 10, (2, 5))),
    "convolutions": lambda: (Convolved(), torch.randn(2, 6, 9)),
}
FOUND: dict[str, tuple[nn.Module, Tensor, Couplings]] = {}


def found(name: str) -> tuple[nn.Module, Tensor, Couplings]:
    if name not in FOUND:
        model, sample = MODELS[name]()
        FOUND[name] = (model.eval(), sample, eco.detect(model, (sample,)))
    return FOUND[name]


def counted(model: nn.Module, sample: Tensor) -> int:
    """FLOPs of a call; torch does not count the CPU's own attention kernel."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(sample)
    return int(counter.get_total_flops())


def shares(couplings: Couplings, plan: eco.Plan) -> tuple[float, float]:
    """FLOPs that a plan frees, and those of all products that its couplings narrow."""
    unit, chosen = Flops.of(couplings), [couplings[s.name] for s in plan]
    unit.ready(chosen)
    return unit.removed({}, {s.name: s.kept for s in plan}), unit.total(chosen)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_flops_are_those_that_torch_counts(name: str) -> None:
    model, sample, couplings = found(name)
    # where one position is left, einsum multiplies elementwise, of which torch counts nothing
    within = 0.01 if name.startswith("einsum") else 1e-9
    every: list[dict[str, Any]] = [{}, {"scores": "random", "seed": 1}, {"uniform": True, "ratio": 0.5}]
    with exported_once():
        for options in every:
            made = eco.plan(couplings, **{"ratio": 0.3, "scores": "magnitude", **options}, budget="flops")
            small = eco.shrink(model, made, (sample,), passes=())  # zeros that a kernel asks for are counted as well
            freed, held = shares(couplings, made)
            assert freed == pytest.approx(counted(model, sample) - counted(small, sample), rel=within)
            assert freed > 0.15 * held


@settings(max_examples=25, deadline=None)
@given(st.floats(0.05, 0.5), st.integers(1, 4), st.booleans(), st.integers(0, 9))
def test_a_budget_of_flops_is_met(ratio: float, round_to: int, uniform: bool, seed: int) -> None:
    _, _, couplings = found("grouped queries, rotary")
    made = eco.plan(couplings, ratio, "random", seed, round_to, uniform=uniform, budget="flops", kinds=["ffn", "vo"])
    freed, held = shares(couplings, made)
    steps = [Flops.of(couplings)]
    steps[0].ready([couplings[s.name] for s in made])
    step = max(float(steps[0].freed(couplings[s.name], [s.size - 2 * round_to]).max()) for s in made)
    assert abs(freed - ratio * held) <= step * (5 if uniform else 1)
    assert all(s.kept == s.size or s.kept % round_to == 0 for s in made)


def test_flops_weigh_attention_by_its_tokens() -> None:
    """The longer the example, the dearer are head dimensions; parameters do not know that."""
    model = shallow()
    kept = []
    for length in (8, 512):
        couplings = eco.detect(model, (torch.zeros(1, length, dtype=torch.long),))
        values = {c.name: torch.full((c.carriers, c.size), c.parameters / c.size) for c in couplings.offered}
        made = eco.plan(couplings, 0.3, Scores("mine", values), budget="flops")
        kept.append(sum(s.kept / s.size for s in made if s.kind != "ffn"))
    assert kept[1] < kept[0]


def test_refuses_units_that_are_unknown_or_have_no_graph() -> None:
    couplings = tiny_couplings(tiny())
    with pytest.raises(PlanError, match=r"^budget='bytes' is unknown: use 'parameters', 'flops' or 'latency'$"):
        eco.plan(couplings, budget="bytes", scores="magnitude")  # type: ignore[arg-type]
    for budget in ("flops", "latency"):
        with pytest.raises(PlanError, match=rf"^budget='{budget}' needs the graph: pass the couplings that detect\(\)"):
            eco.plan(couplings, budget=budget, scores="magnitude")
    model, sample, _ = found("fused, masked")
    shadow = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)).to("meta")
    with pytest.raises(PlanError, match="the model is on meta, where nothing takes time: load it, or use budget="):
        eco.plan(eco.detect(shadow, (sample.to("meta"),)), scores="random", budget="latency")
    assert eco.plan(eco.detect(shadow, (sample.to("meta"),)), scores="random", budget="flops")
    with pytest.raises(PlanError, match=r"of the FLOPs of the products that the couplings narrow to remove: ask for"):
        eco.plan(eco.detect(model, (sample,)), 0.9, floor=0.5, budget="flops", scores="magnitude")


# -- limits --------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 4), st.booleans(), st.sampled_from(["random", "magnitude"]))
def test_no_coupling_loses_more_than_its_kind_may(
    ffn: float, qk: float, round_to: int, uniform: bool, scores: Any
) -> None:
    couplings = tiny_couplings(tiny())
    try:
        made = eco.plan(couplings, 0.3, scores, 0, round_to, uniform=uniform, limits={"ffn": ffn, "qk": qk})
    except PlanError:
        made = eco.plan(couplings, 0.01, scores, limits={"ffn": 1, "qk": 1})  # nothing but the limits was in the way
        return
    for s in made:
        limit = {"ffn": ffn, "qk": qk}.get(s.kind, 1)
        assert s.size - s.kept <= limit * s.size + 1e-6


def test_a_limit_is_reached_to_the_unit() -> None:
    """0.7 · 10 is a little less than 7 in floating point."""
    assert Bounds(1, 0.0, {"a": 0.7}).widths(sized(10))[-1] == 3
    assert Bounds(1, 0.0, {"a": 0}).widths(sized(10)) == []
    assert Bounds(4, 0.0, {"a": 0.7}).widths(sized(10)) == [8, 4]
    assert Bounds(1, 0.0, {"a": 1}).widths(sized(10))[-1] == 1


def test_what_is_tied_keeps_to_the_limits_of_each() -> None:
    """A coupling of 5 units and one of 10 that keeps twice as many and may lose 0.3 of them."""
    five, ten = (replace(sized(units), name=f"{units}") for units in (5, 10))
    assert Bounds(1, 0.0, {"10": 0.3}).widths(five, (five, ten)) == [4]
    assert Bounds(1, 0.0, {"5": 0.5, "10": 0.7}).widths(five, (five, ten)) == [4, 3]


def sized(units: int) -> Coupling:
    return Coupling("a", "ffn", "", units, 1, "permutation", (), 10 * units)


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        ({"ffn": 1.5}, "limits['ffn']=1.5 is not a share of units to remove at most: give a number from 0 to 1"),
        ({"ffn": "half"}, "limits['ffn']='half' is not a share of units to remove at most: give a number from 0 to 1"),
        (
            {"fnn": 0.5},
            "limits names 'fnn', which is no kind that is chosen (experts, ffn, qk, vo) and matches no module: near it "
            "are 'layers.0.ffn', 'layers.1.ffn'",
        ),
        (0.5, "limits=0.5 is no mapping: give a share per kind or module, like {'ffn': 0.5, 'lm_head': 0}"),
    ],
)
def test_refuses_limits(limits: Any, text: str) -> None:
    with pytest.raises(PlanError) as error:
        eco.plan(tiny_couplings(tiny()), limits=limits, scores="magnitude")
    assert str(error.value) == text


@pytest.mark.slow
def test_compress_passes_budget_and_limits_on() -> None:
    model, sample, _ = found("fused, masked")
    data: list[Any] = [((sample[:1],), {}), ((sample[1:],), {})]

    def loss(output: Tensor, args: object, kwargs: object) -> Tensor:
        return output.square().mean()

    for method in ("second-order", "magnitude", "gate-fisher"):
        options: dict[str, Any] = {"budget": "flops", "limits": {"qk": 0}, "method": method}
        options |= {"distillation": 0} if method == "second-order" else {}
        small = eco.compress(model, (sample,), ratio=0.3, batches=data, loss=loss, **options)
        assert small.get_parameter("qkv.weight").shape[0] >= 32
        assert counted(small, sample) < 0.8 * counted(model, sample)


# -- latency -------------------------------------------------------------------------------------------------------


class Stairs(GraphCost):
    """Seconds that rise in steps of so many units, whatever else."""

    unit = "the stairs"

    def __init__(self, couplings: Couplings, step: int) -> None:
        super().__init__(NarrowedOps.of(couplings, "flops"))
        self.step = step

    def grid(self, size: int, couplings: int) -> list[int]:
        return list(range(1, size + 1))

    def prices(self, operations: Sequence[Operation]) -> list[float]:
        return [float(-(-min(o.operands[1].shape) // self.step)) for o in operations]


@cache
def mlp(width: int = 32) -> Couplings:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, width), nn.GELU(), nn.Linear(width, 64))
    return eco.detect(model, (torch.randn(128, 64),))


def test_units_go_from_edge_to_edge_of_a_staircase() -> None:
    couplings = mlp()
    (ffn,) = couplings.offered
    for ratio, kept in ((0.01, 24), (0.25, 24), (0.26, 16), (0.7, 8)):
        made = eco.plan(couplings, ratio, "magnitude", budget=Stairs(couplings, 8))
        assert made[ffn.name].kept == kept
    with pytest.raises(PlanError, match=r"ratio=0.8 is out of reach .* leave at most 0.7500 of the stairs to remove"):
        eco.plan(couplings, 0.8, "magnitude", budget=Stairs(couplings, 8))


class EqualWidths(Stairs):
    """A kernel for equal widths of queries, keys and values; other widths cost ten times as much."""

    def grid(self, size: int, couplings: int) -> list[int]:
        return list(range(2, size + 1, 2))

    def prices(self, operations: Sequence[Operation]) -> list[float]:
        found = []
        for o in operations:
            last = {blank.shape[-1] for blank in o.operands[:3]}
            attention = "attention" in str(o.operator)
            found.append(float(max(last) * (10 if len(last) > 1 else 1)) if attention else 0.0)
        return found


def test_couplings_that_meet_in_one_kernel_are_chosen_together() -> None:
    """Greedy allocation over either coupling alone would never leave the dense widths."""
    _, _, couplings = found("fused, masked")
    unit = EqualWidths(couplings, 1)
    made = eco.plan(couplings, 0.5, "magnitude", budget=unit, floor=0)
    assert {s.kind: s.kept for s in made} == {"qk": 2, "vo": 2, "ffn": 40}
    groups = [[c.kind for c in group] for group in unit.together([couplings[s.name] for s in made])]
    assert sorted(map(sorted, groups)) == [["ffn"], ["qk", "vo"]]


@pytest.mark.parametrize("kinds", [["heads", "vo"], ["heads", "vo", "qk"], ["heads", "qk", "ffn"]])
@pytest.mark.parametrize("ratio", [0.2, 0.45, 0.6])
def test_couplings_that_overlap_free_at_least_the_ratio(kinds: list[str], ratio: float) -> None:
    """A head and its dimensions free less together than each by itself, so that more has to go than prices say."""
    _, _, couplings = found("fused, masked")
    chosen = [c for c in couplings.offered if c.kind in kinds]
    rises = {c.name: tuple((k, (1 - k / c.size) ** 2) for k in range(c.size - 1, 0, -1)) for c in chosen}
    values = {c.name: torch.ones(c.carriers, c.size, dtype=torch.float64) for c in chosen}
    made = eco.plan(couplings, ratio, Scores("own", values), kinds=kinds, allocation=Curves(rises))
    assert made.removed_parameters >= ratio * made.coupled_parameters


def table_of(folder: Path) -> LatencyTable:
    return LatencyTable(torch.device("cpu"), folder)


OPERATION = Operation(torch.ops.aten.mm.default, ())


def test_what_was_measured_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def measured(operations: Sequence[Operation], device: torch.device) -> list[float]:
        asked.append(len(operations))
        return [0.25] * len(operations)

    monkeypatch.setattr(latency, "measured", measured)
    assert table_of(tmp_path).seconds([OPERATION]) == {OPERATION: 0.25}
    again = table_of(tmp_path)
    assert again.seconds([OPERATION]) == {OPERATION: 0.25}
    assert asked == [1]
    whole = again.path.read_text()
    other = {**json.loads(whole), "environment": {}}
    endless = whole.replace("0.25", "Infinity")
    for damaged in ("", "{", whole[:-20], "[1]", json.dumps(other), endless, whole.replace("0.25", '"0.25"')):
        again.path.write_text(damaged)
        assert table_of(tmp_path).seconds([OPERATION]) == {OPERATION: 0.25}
        assert table_of(tmp_path).path.read_text() == whole
    assert asked == [1] * 8
    assert [p.name for p in tmp_path.iterdir()] == [again.path.name]


def test_the_folder_of_the_table_is_a_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "measured", lambda asked, device: [float(sum(o.operands[1].shape)) for o in asked])
    monkeypatch.setenv("ECOSPA_FX_CACHE", str(tmp_path / "by-environment"))
    couplings = mlp()
    eco.plan(couplings, 0.2, budget="latency", round_to=4, scores="magnitude")
    assert len(list((tmp_path / "by-environment").glob("latency-*.json"))) == 1
    eco.plan(
        couplings, 0.2, round_to=4, budget=Latency.of(couplings, 4, cache=tmp_path / "by-argument"), scores="magnitude"
    )
    assert len(list((tmp_path / "by-argument").glob("latency-*.json"))) == 1
    (tmp_path / "file").write_text("")
    with pytest.raises(PlanError, match=r"^measured latencies cannot be kept in .*; set ECOSPA_FX_CACHE to a folder"):
        eco.plan(couplings, 0.2, budget=Latency.of(couplings, cache=tmp_path / "file"), scores="magnitude")


def test_products_are_measured_as_shrink_leaves_them() -> None:
    _, _, couplings = found("grouped queries, rotary")
    node, names = next(
        (n, x) for n, x in NarrowedOps.of(couplings, "flops").calls.items() if "attention" in str(n.target)
    )
    narrow = {name: 8 for name in names if name.endswith(".vo")}
    for widths, pads in (({}, 0), (narrow, 1)):
        operation = NarrowedOps.of(couplings, "flops").operation(node, widths)
        call = latency.as_shrunk(operation, torch.device("cpu"))
        assert sum("pad" in str(n.target) for n in call.graph.nodes) == pads
        tensors = operation.filled(torch.device("cpu"))
        assert call(*tensors).shape[-1] == tensors[2].shape[-1]


def test_a_budget_of_seconds_is_measured_here(tmp_path: Path) -> None:
    couplings = mlp(256)
    unit = Latency.of(couplings, 32, cache=tmp_path)
    made = eco.plan(couplings, 0.5, round_to=32, budget=unit, scores="magnitude")
    assert made[couplings.offered[0].name].kept in range(32, 256, 32)
    known = json.loads(next(tmp_path.iterdir()).read_text())["seconds"]
    assert len(known) == 15  # eight widths of two layers, which at one width are the same
    assert all(0 < seconds < 1 for seconds in known.values())


@given(st.integers(2, 400), st.integers(1, 4), st.sampled_from([1, 3, 8, 64]))
def test_grids_hold_their_ends_and_what_is_rounded(size: int, couplings: int, round_to: int) -> None:
    model = mlp()
    unit = Latency(NarrowedOps.of(model, "flops"), torch.device("cpu"), round_to)
    grid = unit.grid(size, couplings)
    assert grid == sorted(set(grid))
    assert grid[-1] == size > grid[0] >= 1
    assert len(grid) <= latency.INTERVALS + 2
    assert all(width % round_to == 0 for width in grid[1:-1])


def test_what_is_no_product_costs_nothing() -> None:
    model, sample, couplings = found("grouped queries, rotary")
    told = {str(node.target) for node in NarrowedOps.of(couplings, "flops").calls}
    assert told == {"aten.linear.default", "aten.scaled_dot_product_attention.default"}
    total = sum(
        flops(NarrowedOps.of(couplings, "flops").operation(node, {}))
        for node in NarrowedOps.of(couplings, "flops").calls
    )
    assert total == counted(model, sample)
    head = 2 * sample.numel() * 256 * 192  # which the residual width narrows, and nothing else
    unit, chosen = Flops.of(couplings), choose(couplings, containers=True)
    unit.ready(chosen)
    assert unit.total(chosen) == total - head
