"""What the whole smaller model stays within: parameters, bytes, FLOPs, seconds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import ecospa_fx as eco
from ecospa_fx.budget import ceiling
from ecospa_fx.budget.cost import Bytes, Flops
from ecospa_fx.budget.latency import Latency
from ecospa_fx.budget.removal_order import GreedySchedule, RemovalOrder, each_alone
from ecospa_fx.coupling.couplings import Couplings
from ecospa_fx.errors import OptionError, PlanError
from tests.support.counting import Tokens, data, loss_of

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
IDS = data()[0][0]


class Mixed(nn.Module):
    """Two MLPs, the second in another type, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 8, bias=False))
        self.second = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)).to(torch.bfloat16)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second((self.first(x) * self.scale).bfloat16())
        return out


MIXED = eco.detect(Mixed(), (X,))


@pytest.fixture(scope="module")
def tokens() -> Couplings:
    return eco.detect(Tokens(), IDS)


def flops_of(model: nn.Module, args: Any) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*args)
    return int(counter.get_total_flops())


def largest_step(plan: eco.Plan, amount: Any) -> float:
    """What one more kept unit of each carrier of some coupling would add at most."""
    return max(float(amount(s)) / s.size for s in plan)


@pytest.mark.parametrize("options", [{}, {"allocation": "ragged"}, {"uniform": True}, {"round_to": 4}], ids=str)
@pytest.mark.parametrize("share", [0.95, 0.8, 0.613])
def test_parameters(tokens: Couplings, options: dict[str, Any], share: float) -> None:
    """The whole model has at most as many, and little fewer."""
    dense = sum(p.numel() for p in tokens.model.parameters())
    wanted = dense * share
    plan = eco.plan(tokens, scores="magnitude", within={"parameters": wanted}, **options)
    left = dense - plan.removed_parameters
    step = largest_step(plan, lambda s: tokens[s.name].parameters) * options.get("round_to", 1)
    assert wanted - step * (6 if options.get("uniform") else 1) <= left <= wanted


def test_the_smaller_module_has_what_was_asked_for(tokens: Couplings) -> None:
    dense = sum(p.numel() for p in tokens.model.parameters())
    plan = eco.plan(tokens, scores="magnitude", within={"parameters": dense - 1})
    small = eco.shrink(tokens.model, plan, IDS)
    assert sum(p.numel() for p in small.parameters()) == dense - plan.removed_parameters < dense


def test_it_is_met_exactly_where_it_can_be() -> None:
    """A ceiling that is the size of some plan gives that plan: it is at most, or equal."""
    plan = eco.plan(MIXED, 0.4, scores="magnitude")
    same = sum(p.numel() for p in MIXED.model.parameters()) - plan.removed_parameters
    assert eco.plan(MIXED, scores="magnitude", within={"parameters": same}) == plan
    less = eco.plan(MIXED, scores="magnitude", within={"parameters": same - 1})
    assert less.removed_parameters > plan.removed_parameters


def _bytes(model: nn.Module, plan: eco.Plan) -> int:
    parameters, masks = dict(model.named_parameters()), plan.masks(model)
    kept = {n: int(masks[n].sum()) if n in masks else p.numel() for n, p in parameters.items()}
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    return sum(kept[n] * p.element_size() for n, p in parameters.items()) + buffers


@pytest.mark.parametrize("text", ["1.5kB", "1500 B", "1.5KB"])
@pytest.mark.parametrize("allocation", ["global", "ragged"])
def test_bytes_are_of_parameters_in_their_types_and_of_buffers(text: str, allocation: Any) -> None:
    plan = eco.plan(MIXED, scores="magnitude", within=text, allocation=allocation)
    small = eco.shrink(MIXED.model, plan, (X,))
    size = sum(t.numel() * t.element_size() for t in (*small.parameters(), *small.buffers()))
    assert size == _bytes(MIXED.model, plan)
    assert 1500 - 17 * 4 < size <= 1500


def test_bytes_of_a_coupling_count_its_types() -> None:
    first, second = (c for c in MIXED.offered if c.kind == "ffn")
    weights = {n: p.element_size() for n, p in MIXED.model.named_parameters()}
    cost_model = Bytes(MIXED.shapes, weights)
    assert cost_model.total([first]) == 24 * 17 * 4
    assert cost_model.total([first, second]) == 24 * 17 * 4 + 32 * 17 * 2
    assert cost_model.freed(first, [23, 20, 1]).tolist() == [17 * 4, 4 * 17 * 4, 23 * 17 * 4]


@pytest.mark.parametrize("share", [0.9, 0.7])
def test_flops_are_those_of_the_whole_call(share: float) -> None:
    """As torch counts them in the dense and in the smaller model, products that nothing narrows included."""
    model = nn.Sequential(Mixed(), nn.Linear(8, 3, dtype=torch.bfloat16))
    dense, couplings = flops_of(model, (X,)), eco.detect(model, (X,)).select(kinds="ffn")
    assert ceiling.size_of(couplings, "flops") == dense
    plan = eco.plan(couplings, scores="magnitude", within={"flops": share * dense})
    left = flops_of(eco.shrink(model, plan, (X,)), (X,))
    assert share * dense - 2 * 4 * 16 < left <= share * dense


def test_seconds_are_those_of_the_call_less_those_of_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that counts FLOPs, and half as much for everything else."""
    dense = ceiling.size_of(MIXED, "flops")
    monkeypatch.setattr(Latency, "of", lambda couplings, round_to: Flops.of(couplings))
    monkeypatch.setattr(ceiling, "_seconds", lambda model, couplings: 1.5 * dense)
    by_time = eco.plan(MIXED, scores="magnitude", within={"seconds": 1.1 * dense})
    assert by_time == eco.plan(MIXED, scores="magnitude", within={"flops": 0.6 * dense})


def test_the_call_is_timed_and_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8)).train()
    couplings, before = eco.detect(model, (X,)), {n: b.clone() for n, b in model.named_buffers()}
    seconds = iter([0.0, 5.0, 5.0, 7.0, 7.0, 10.0, 10.0, 14.0, 20.0, 26.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(seconds))
    assert ceiling.size_of(couplings, "seconds") == 2.0
    assert next(seconds, None) is None
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    assert model.training


@pytest.mark.slow
def test_compress_stays_within() -> None:
    batches, model = data(), Tokens()
    dense = sum(p.numel() for p in model.parameters())
    for options in ({"distillation": 0}, {"distillation": 0, "allocation": "sensitivity"}, {"method": "taylor"}):
        small = eco.compress(
            model,
            IDS,
            batches=batches,
            loss=loss_of,
            within={"parameters": 0.8 * dense},
            **options,
        )
        assert 0.77 * dense < sum(p.numel() for p in small.parameters()) <= 0.8 * dense


def test_the_lowest_height_that_frees_enough() -> None:
    cost_model = Bytes(MIXED.shapes, dict.fromkeys(MIXED.shapes, 1))
    (c, *_) = MIXED.offered
    order = RemovalOrder.of(c, torch.arange(float(c.size))[None], range(c.size - 1, 0, -1), cost_model)
    schedule = GreedySchedule.of(cost_model, [order], each_alone([order]))
    each = 17.0
    assert [schedule.least(x) for x in (0.0, each, each + 1e-9, 2 * each, each * (c.size - 1), each * c.size)] == [
        0,
        1,
        2,
        2,
        c.size - 1,
        c.size,  # more than all steps
    ]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"within": "6 Gi"}, "within='6 Gi' is no number of bytes: give one like '6GiB' or '500MB'"),
    ({"within": "GiB"}, "within='GiB' is no number of bytes"),
    ({"within": "-1 GB"}, "within='-1 GB' is no number of bytes"),
    ({"within": 3}, "within=3 is unknown: give bytes like '6GiB', or an amount by its unit"),
    ({"within": {}}, "within={} is unknown"),
    ({"within": {"bytes": 1, "flops": 2}}, "is unknown: give bytes"),
    ({"within": {"tokens": 3}}, "within={'tokens': 3} has an unknown unit: use one of parameters, bytes, flops, sec"),
    ({"within": {"bytes": 0}}, "within={'bytes': 0} is no amount of bytes: give a number above 0"),
    ({"within": {"bytes": True}}, "is no amount of bytes"),
    ({"within": {"flops": float("inf")}}, "is no amount of flops"),
    ({"within": "0 MB"}, "is no amount of bytes"),
    ({"within": "1 GiB"}, "within=1.07374e+09 bytes is met without a plan: the model has 2,740; ask for less"),
    ({"within": {"parameters": 960}}, "is met without a plan: the model has 960; ask for less"),
    ({"within": {"parameters": 9}}, "within=9 parameters is out of reach because it takes 0.9989 of the couplings'"),
    ({"within": "1kB", "ratio": 0.3}, "ratio= and within= both say how much goes: give one of them"),
    ({"within": "1kB", "widths": {"*": 3}}, "widths= says how many units stay, and within="),
    ({"within": "1kB", "budget": "flops"}, "within= is counted in bytes, and budget= says otherwise"),
    ({"within": {"flops": 9}, "allocation": "ragged"}, "allocation='ragged' counts parameters, and within= flops"),
    ({"within": {"seconds": 9}, "expressible_in": "module"}, "expressible_in='module' cannot spend seconds yet"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[str(options) for options, _ in REFUSED])
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError) as error:
        eco.plan(MIXED, scores="magnitude", **options)
    assert message in str(error.value)


def test_units_of_bytes() -> None:
    sizes = {"3B": 3, "2 kB": 2e3, "2KB": 2e3, "1.5MB": 1.5e6, "2GB": 2e9, "1TB": 1e12, "1KiB": 1024}
    sizes |= {"2MiB": 2 * 2**20, "0.5GiB": 2**29, "1TiB": 2**40}
    assert {text: ceiling.Ceiling.of(text).amount for text in sizes} == sizes


def test_seconds_need_an_example_and_a_device() -> None:
    with pytest.raises(PlanError, match="seconds needs example inputs"):
        ceiling.size_of(Couplings([*MIXED], MIXED.model, MIXED.analysis), "seconds")
    with torch.device("meta"):
        couplings = eco.detect(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), (torch.empty(2, 8),))
    with pytest.raises(PlanError, match="on meta, where nothing takes time"):
        ceiling.size_of(couplings, "seconds")
    with pytest.raises(OptionError, match=r"compress\(\) needs ratio=.*, or within= or widths="):
        eco.compress(MIXED.model, (X,), method="magnitude")
