"""Whole heads and groups of heads: what they cost after all others made up for them, in the currency of FFN units."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ecospa_fx as eco
from ecospa_fx.budget.allocate import choose
from ecospa_fx.capture.export import capture
from ecospa_fx.coupling.types import Coupling
from ecospa_fx.importance.brain_surgeon import remove_all
from ecospa_fx.importance.curvature import Collector
from ecospa_fx.importance.linear_views import views_of
from ecospa_fx.importance.second_order import unit_scores
from ecospa_fx.ir.linears import linear_uses
from ecospa_fx.runtime.interpreter import PartialInterpreter
from tests.importance.test_second_order import cost_of
from tests.support.counting import Tokens, data, loss_of


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 2), st.integers(0, 10**6))
def test_parts_take_turns(carriers: int, parts: int, units: int, width: int, seed: int) -> None:
    """Against brute force: of the parts that lost no unit in this round, the unit that costs least every time."""
    source, n = torch.Generator().manual_seed(seed), parts * units * width
    rows = torch.randn(carriers, 3 * n, n, generator=source, dtype=torch.float64)
    hessian, weight = rows.mT @ rows, torch.randn(carriers, 4, n, generator=source, dtype=torch.float64)
    removal = remove_all(hessian, weight.mT @ weight, width, parts)
    for c in range(carriers):
        gone: list[int] = []
        before, waiting = 0.0, set[int]()
        for unit, cost in zip(removal.order[c].tolist(), removal.cost[c].tolist(), strict=True):
            left = [u for u in range(parts * units) if u * width not in gone and u // units not in waiting]
            costs = {u: cost_of(hessian[c], weight[c], [*gone, *range(u * width, (u + 1) * width)]) for u in left}
            assert costs[unit] <= min(costs.values()) * (1 + 1e-9) + 1e-9
            assert cost == pytest.approx(costs[unit] - before, rel=1e-6, abs=1e-8)
            gone += range(unit * width, (unit + 1) * width)
            before = costs[unit]
            waiting = {*waiting, unit // units} if len(waiting) + 1 < parts else set()


# -- of a model --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """A model of two layers with two groups of two heads each, and what data says of it."""

    model: Tokens
    couplings: list[Coupling]
    scores: dict[str, Tensor]
    inputs: Tensor
    gradients: Tensor


@pytest.fixture(scope="module")
def measured() -> Measured:
    model = Tokens(bias=True).double().eval()
    batches, seen = data(8), (list[Tensor](), list[Tensor]())
    example = (batches[0][0][0].repeat(2, 1),)
    program, couplings = capture(model, example, {}, dynamic=True), eco.detect(model, example)
    chosen = choose(couplings, None, containers=True)
    evaluator, views = PartialInterpreter(program, model, example, {}), views_of(chosen, linear_uses(program))
    curvature = Collector(evaluator, views).run(batches, loss_of)
    values = {name: tensor.detach() for name, tensor in program.values.items()}
    scores = unit_scores(views, curvature, values, 1e-12)

    def watch(_: object, given: tuple[Tensor], out: Tensor) -> None:
        seen[0].append(given[0].detach().flatten(0, 1))
        out.register_hook(lambda g: seen[1].append(g.flatten(0, 1)))  # type: ignore[no-untyped-call]

    handle = model.get_submodule("layers.1.o").register_forward_hook(watch)
    for args, _ in batches:
        torch.autograd.backward(loss_of(model(*args), args, {}))
    handle.remove()
    inputs, gradients = map(torch.cat, seen)
    return Measured(model, chosen, scores, inputs, gradients)


def residual(case: Measured, gone: Tensor) -> float:
    """½ Σ eᵀ G e of what the best matrix and bias leave without some inputs: by least squares."""
    weight = case.model.get_parameter("layers.1.o.weight").detach()
    keep = torch.ones(weight.shape[1], dtype=torch.bool)
    keep[gone.flatten()] = False
    rows = torch.cat([case.inputs[:, keep], torch.ones(len(case.inputs), 1, dtype=torch.float64)], 1)
    want = case.inputs @ weight.T
    left = want - rows @ torch.linalg.lstsq(rows, want).solution
    metric = case.gradients.T @ case.gradients / len(case.gradients)
    return float(((left @ metric) * left).sum() / 2)


@pytest.mark.parametrize("name", ["layers.1.heads", "layers.1.heads.2"])
def test_a_head_costs_what_least_squares_leaves(measured: Measured, name: str) -> None:
    """Of groups the better one; of the heads in them the best, and then the best of the other group.

    But for 1e-7 of the mean square, which is added to matrices of what may not vary.
    """
    coupling = next(c for c in measured.couplings if c.name == name)
    positions = next(m.indices for m in coupling.members if m.parameter == "layers.1.o.weight")
    scores = measured.scores[name]
    assert coupling.contains
    assert scores.shape == (coupling.carriers, coupling.size) == positions.shape[:2]
    every = {
        (c, u): residual(measured, positions[c, u]) for c, u in product(range(coupling.carriers), range(coupling.size))
    }
    first = min(every, key=lambda place: every[place])
    assert float(scores[first]) == pytest.approx(every[first], rel=1e-4)
    others = [c for c in range(coupling.carriers) if c != first[0]] or [first[0]]
    places = [(c, u) for c in others for u in range(coupling.size) if (c, u) != first]
    both = {place: residual(measured, torch.cat([positions[first], positions[place]])) for place in places}
    second = min(both, key=lambda place: both[place])
    assert float(scores[second]) == pytest.approx(both[second] - every[first], rel=1e-4)
