"""Widths that a device likes: multiples of its bytes, whatever a unit is."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from functools import cache
from typing import Any, Literal

import pytest
import torch
from torch import nn

import ecospa_fx as eco
from ecospa_fx.budget import alignment
from ecospa_fx.budget.alignment import ENGINES, engine_multiple, preferred_multiple
from ecospa_fx.coupling.couplings import Couplings
from ecospa_fx.coupling.types import Box, Coupling, Member
from ecospa_fx.errors import PlanError, TrainingError
from ecospa_fx.plan import Plan
from tests.support.hugging import tiny


@pytest.fixture(autouse=True)
def likes(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine's CPU likes what a GPU does."""
    monkeypatch.setitem(alignment.ROW_BYTES, "cpu", 16)


def model(dtype: torch.dtype, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    """A LLaMA with heads of 32, two query heads for each pair of keys and values."""
    made, kwargs = tiny("llama", head_dim=32, **options)
    return made.to(dtype), kwargs


@cache
def detected(dtype: torch.dtype, layers: int = 1) -> tuple[nn.Module, dict[str, Any], Couplings]:
    """The model with what is found in it. No test changes it."""
    made, kwargs = model(dtype, num_hidden_layers=layers)
    return made, kwargs, eco.detect(made, (), kwargs)


def steps(plan: Plan) -> dict[str, set[int]]:
    """By kind, what the kept numbers of couplings that lost anything are multiples of, up to 8."""
    found: dict[str, set[int]] = defaultdict(set)
    for s in plan:
        if s.kept < s.size:
            found[s.kind].add(next(step for step in (8, 4, 2, 1) if s.kept % step == 0))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "step", "uniform"),
    [(torch.bfloat16, 8, False), (torch.float32, 4, False), (torch.float64, 2, False), (torch.bfloat16, 8, True)],
    ids=["2 bytes", "4 bytes", "8 bytes", "uniform"],
)
def test_units_of_every_width_make_whole_vectors(dtype: torch.dtype, step: int, uniform: bool) -> None:
    made, kwargs, couplings = detected(dtype, layers=1 + uniform)
    parameters = dict(made.named_parameters())
    pairs = max(step // 2, 1)  # one unit of qk is a rotary pair
    wanted = {"ffn": step, "vo": step, "qk": pairs, "heads": 1}
    wanted |= {"residual": step} if step > 2 else {}  # its norms add up in float32, which float64 weights cannot prove
    assert {c.kind: preferred_multiple(c, parameters) for c in couplings.offered} == wanted
    plan = eco.plan(couplings, 0.4, round_to=None, uniform=uniform, scores="magnitude")
    assert plan.removed_parameters
    assert all(s.kept == s.size or s.kept % wanted[s.kind] == 0 for s in plan)
    small = eco.shrink(made, plan, (), kwargs)
    for name, parameter in small.named_parameters():
        assert all(size % step == 0 for size in parameter.shape if size not in made.get_parameter(name).shape)


def test_a_number_of_ones_own_is_kept_to_and_plans_are_as_before() -> None:
    _, _, couplings = detected(torch.bfloat16)
    assert eco.plan(couplings, 0.4, scores="magnitude") == eco.plan(couplings, 0.4, round_to=1, scores="magnitude")
    assert 1 in steps(eco.plan(couplings, 0.35, scores="magnitude"))["ffn"]
    assert steps(eco.plan(couplings, 0.4, round_to=2, kinds=["qk"], floor=0, scores="magnitude"))["qk"] <= {2, 4, 8}


def test_a_device_that_likes_any_width(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, couplings = detected(torch.bfloat16)
    monkeypatch.delitem(alignment.ROW_BYTES, "cpu")
    assert eco.plan(couplings, 0.4, round_to=None, scores="magnitude") == eco.plan(couplings, 0.4, scores="magnitude")


@pytest.mark.slow
@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_training_keeps_widths_that_the_device_likes(allocation: Literal["global", "uniform"]) -> None:
    made, kwargs = model(torch.float32, num_hidden_layers=1)
    optimizer = torch.optim.SGD(made.parameters(), lr=1e-3)
    sparse = eco.SparseTraining(
        made, (), kwargs, optimizer=optimizer, target=0.45, schedule=eco.Constant(every=1, part=0.5), window=1,
        allocation=allocation,
    )  # fmt: skip
    halved = dict(
        model(torch.bfloat16, num_hidden_layers=1)[0].named_parameters()
    )  # such are the products under autocast
    wanted = {c.name: preferred_multiple(c, halved) for c in sparse.couplings.offered}
    for _ in range(2):
        torch.autograd.backward(sparse.model(**kwargs).logits.square().mean())
        sparse.step()
        optimizer.step()
        optimizer.zero_grad()
    assert sparse.removed > 0.3
    assert all(s.kept == s.size or s.kept % wanted[s.name] == 0 for s in sparse.plan)


def test_training_says_what_the_device_likes_where_that_leaves_nothing_to_remove() -> None:
    mlp = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    optimizer = torch.optim.SGD(mlp.parameters(), lr=1e-3)
    with pytest.raises(TrainingError, match=r"round_to=None, which is 8 here, leave at most 0.000 to remove"):
        eco.SparseTraining(mlp, (torch.randn(4, 8),), optimizer=optimizer, target=0.5, total_steps=10)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["magnitude", "gate-fisher", "second-order"])
def test_compress_keeps_widths_that_the_device_likes(method: str) -> None:
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(8, 61), nn.GELU(), nn.Linear(61, 8))
    data: list[Any] = [((torch.randn(4, 8),), {}) for _ in range(8)]

    def kept(**options: Any) -> int:
        recipe: dict[str, Any] = {"distillation": 0} if method == "second-order" else {}
        wanted: dict[str, Any] = {"batches": data, "loss": lambda y, args, kwargs: y.square().mean()}
        small = eco.compress(mlp, data[0][0], ratio=0.3, method=method, **wanted, **recipe, **options)
        return small.get_parameter("0.weight").shape[0]

    assert (kept(), kept(round_to=1), kept(round_to=16)) == (44, 43, 48)


def test_what_has_fewer_units_stays_whole_and_the_refusal_says_why() -> None:
    mlp = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)).bfloat16()
    couplings = eco.detect(mlp, (torch.randn(2, 8, dtype=torch.bfloat16),))
    with pytest.raises(PlanError, match=r"round_to=None leave at most 0.0000 .*: ask for less, or lower them"):
        eco.plan(couplings, 0.5, round_to=None, scores="magnitude")
    assert eco.plan(couplings, 0.5, round_to=1, scores="magnitude").selections[0].kept == 4


@pytest.mark.slow
def test_couplings_in_step_are_aligned_each() -> None:
    made, kwargs = tiny("gpt2", n_embd=64, n_head=2, n_layer=1)
    couplings = eco.detect(made.bfloat16(), (), kwargs)
    plan = eco.plan(couplings, 0.3, round_to=None, expressible_in="module", scores="magnitude")
    assert plan.removed_parameters
    assert all(s.kept % 8 == 0 for s in plan if s.kind in ("qk", "vo"))


def test_carriers_count_by_themselves_and_parts_of_an_axis_too() -> None:
    held = {"w": torch.zeros(96, 8, dtype=torch.float16)}

    def coupling(*boxes: Box, carriers: int, units: int) -> Coupling:
        made = eco.detect(nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 8)), (torch.randn(2, 8),)).offered[0]
        return replace(made, size=units, members=(Member("w", 0, "producer", None, boxes, carriers, units),))

    assert preferred_multiple(coupling(Box(0, ((4, 24),), 1, ((1, 1),)), carriers=4, units=24), held) == 8
    halves = Box(0, (), 1, ((1, 1),)), Box(48, (), 1, ((1, 1),))  # gate and up in one weight
    assert preferred_multiple(coupling(*halves, carriers=1, units=48), held) == 8
    assert preferred_multiple(coupling(Box(0, (), 1, ((6, 16),)), carriers=1, units=16), held) == 4


# -- engines -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "gguf"), [(2559, 32), (2560, 256), (3072, 256)], ids=["below ten blocks", "ten blocks", "more"]
)
def test_blocks_of_quantised_rows_are_whole_where_that_is_fine_enough(width: int, gguf: int) -> None:
    mlp = nn.Sequential(nn.Linear(8, width), nn.GELU(), nn.Linear(width, 8))
    couplings = eco.detect(mlp, (torch.randn(2, 8),))
    want = dict(zip(ENGINES, (gguf, 128, 8), strict=True))
    parameters = dict(mlp.named_parameters())
    assert {engine: engine_multiple(engine, couplings.offered[0], parameters) for engine in ENGINES} == want
    for engine in ENGINES:
        plan = eco.plan(couplings, 0.5, "magnitude", round_to=engine)
        assert plan["ffn"].kept % want[engine] == 0
        assert abs(plan["ffn"].kept - width / 2) <= want[engine]


def test_engines_count_the_numbers_of_all_heads() -> None:
    """Two heads of keys and values, of 32: every multiple makes whole axes fit."""
    made, _, couplings = detected(torch.float32)
    parameters, first = dict(made.named_parameters()), dict[str, Coupling]()
    for c in couplings.offered:
        first.setdefault(c.kind, c)
    for engine in ("gguf", "marlin"):
        for c in first.values():
            multiple = engine_multiple(engine, c, parameters)
            for member in (m for m in c.members if parameters[m.parameter].dim() > 1):
                whole = parameters[member.parameter].shape[member.axis]
                wanted = 32 if engine == "gguf" else 64 if member.role == "producer" else 128
                assert whole * multiple % (wanted * c.size) == 0, (engine, c.name, member.parameter)
    assert engine_multiple("gguf", first["vo"], parameters) == 16  # in two heads of values
    assert engine_multiple("gguf", first["qk"], parameters) == 8  # pairs, in two heads of keys
    assert engine_multiple("tensor-cores", first["qk"], parameters) == 4  # pairs, in one head
    assert engine_multiple("gguf", first["heads"], parameters) == 1


@pytest.mark.parametrize("rounding", ["awq", "", "GGUF"])
def test_engines_that_are_unknown_are_refused(rounding: Any) -> None:
    couplings = detected(torch.float32)[2]
    with pytest.raises(PlanError, match=r"round_to='.*' is unknown: give a number of units, or one of 'gguf'"):
        eco.plan(couplings, 0.5, "magnitude", round_to=rounding)
