"""The knapsack: equal to trying everything, within bounds, and a larger share never loses less."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from math import inf
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ecospa_fx.budget import knapsack
from ecospa_fx.budget.cost import Parameters
from ecospa_fx.budget.removal_order import Bounds
from ecospa_fx.coupling.types import Box, Coupling
from tests.support.tiny import tiny, tiny_couplings

DIMS = tiny_couplings(tiny(), heads=False)
CHOSEN = list(DIMS.offered)

option = st.tuples(st.integers(0, 9), st.floats(0, 10))
groups = st.lists(st.lists(option, min_size=1, max_size=4), max_size=5)


def best(choices: Sequence[Sequence[tuple[int, float]]], target: int) -> float:
    """The least cost of all combinations that suffice."""
    sums = ((sum(w for w, _ in one), sum(c for _, c in one)) for one in product(*choices))
    return min((cost for weight, cost in sums if weight >= target), default=inf)


@settings(max_examples=300, deadline=None)
@given(groups, st.integers(-2, 50))
def test_the_solution_is_that_of_trying_everything(choices: list[list[tuple[int, float]]], target: int) -> None:
    chosen, want = knapsack.solve(choices, target), best(choices, target)
    if chosen is None:
        assert want == inf
        return
    taken = [group[i] for group, i in zip(choices, chosen, strict=True)]
    assert sum(weight for weight, _ in taken) >= target
    assert abs(sum(cost for _, cost in taken) - want) <= 1e-9 * max(want, 1)
    assert chosen == knapsack.solve(choices, target)


def curve(values: dict[str, list[float]]) -> knapsack.PredictedLoss:
    def lost(coupling: Coupling, kept: Sequence[int]) -> Tensor:
        total = torch.tensor([0.0, *values[coupling.name]], dtype=torch.float64).cumsum(0)
        return total[torch.tensor([coupling.size - k for k in kept])]

    return lost


curves = st.fixed_dictionaries({c.name: st.lists(st.floats(0, 5), min_size=c.size, max_size=c.size) for c in CHOSEN})
bounds = st.builds(
    Bounds, st.integers(1, 3), st.sampled_from([0.0, 0.3]), st.fixed_dictionaries({"ffn": st.sampled_from([0.4, 1])})
)


@settings(max_examples=60, deadline=None)
@given(curves, bounds, st.floats(0.01, 0.9), st.floats(0.01, 0.9))
def test_widths_meet_the_budget_and_the_bounds(values: Any, limits: Bounds, less: float, more: float) -> None:
    spending, lost = Parameters(DIMS.shapes), curve(values)
    allowed = {c.name: limits.widths(c) for c in CHOSEN}
    costs = []
    for ratio in sorted((less, more)):
        most, kept = 1.0, dict[str, int]()
        try:
            kept = knapsack.widths(spending, CHOSEN, lost, allowed, ratio)
        except knapsack.TooMuch as error:
            most = error.most
        if not kept:
            assert most < ratio
            costs.append(inf)
            continue
        assert all(kept[c.name] in (c.size, *allowed[c.name]) for c in CHOSEN)
        freed = sum(float(spending.freed(c, [kept[c.name]])) for c in CHOSEN)
        assert freed >= ratio * spending.total(CHOSEN) * (1 - 1e-9)
        costs.append(sum(float(lost(c, [kept[c.name]])) for c in CHOSEN))
    assert costs[0] <= costs[1]


@settings(max_examples=25, deadline=None)
@given(curves, st.floats(0.05, 0.6))
def test_widths_are_nearly_those_of_trying_everything(values: Any, ratio: float) -> None:
    """What is freed is counted in whole steps, so that the best choice frees a few steps more at most."""
    three, spending, lost = CHOSEN[:3], Parameters(DIMS.shapes), curve(values)
    allowed = {c.name: list(range(c.size - 1, 0, -1)) for c in three}
    try:
        kept = knapsack.widths(spending, three, lost, allowed, ratio)
    except knapsack.TooMuch:
        return
    freed = [spending.freed(c, [c.size, *allowed[c.name]]).tolist() for c in three]
    costs = [lost(c, [c.size, *allowed[c.name]]).tolist() for c in three]
    pairs = [list(zip(f, c, strict=True)) for f, c in zip(freed, costs, strict=True)]
    held = spending.total(three)

    def least(share: float) -> float:
        sums = ((sum(f for f, _ in one), sum(c for _, c in one)) for one in product(*pairs))
        return min((cost for weight, cost in sums if weight >= share * held - 1e-6), default=inf)

    found = sum(float(lost(c, [kept[c.name]])) for c in three)
    assert least(ratio) - 1e-9 <= found <= least(ratio + 4 / knapsack.STEPS) + 1e-9


@pytest.mark.parametrize("ratio", [0.1, 1 / 3, 0.5, 0.7071])
def test_at_least_the_ratio_goes_also_between_two_steps(ratio: float) -> None:
    """Widths that differ by less than a step in which what is freed is counted: one that misses is not taken."""
    size = 2 * knapsack.STEPS + 3
    member = replace(CHOSEN[0].members[0], units=size, carriers=1, boxes=(Box(0, (), 1, ()),), carrier_axis=None)
    coupling = replace(CHOSEN[0], size=size, carriers=1, members=(member,), parameters=size)
    spending = Parameters({member.parameter: tuple(size if i == member.axis else 1 for i in range(2))})
    kept = knapsack.widths(
        spending,
        [coupling],
        lambda c, widths: torch.tensor([float(c.size - k) for k in widths], dtype=torch.float64),
        {coupling.name: [size - int(ratio * size) - more for more in (0, 1, 2, 4)]},
        ratio,
    )
    gone = size - kept[coupling.name]
    assert ratio * size <= gone


@pytest.mark.slow
def test_a_hundred_layers_take_seconds() -> None:
    source = torch.Generator().manual_seed(0)
    drawn = [torch.rand(64, generator=source).cumsum(0).tolist() for _ in range(240)]
    choices = [[(80 * i, cost) for i, cost in enumerate([0.0, *costs])] for costs in drawn]
    chosen = knapsack.solve(choices, 48_000)
    assert chosen is not None
    assert 48_000 <= sum(80 * i for i in chosen) < 48_080
