"""Plans for many ratios by one order of removal are what `plan` makes at each of them."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ecospa_fx.budget.allocate import NestedPlans
from ecospa_fx.budget.cost import Parameters
from ecospa_fx.planning import plan
from tests.support.tiny import tiny, tiny_couplings

COUPLINGS = tiny_couplings(tiny(1), heads=True)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**30), st.lists(st.floats(0.02, 0.7), min_size=1, max_size=3, unique=True).map(sorted))
def test_each_is_what_plan_makes(seed: int, ratios: list[float]) -> None:
    torch.manual_seed(seed)
    scores = {c.name: torch.rand(c.carriers, c.size).double() for c in COUPLINGS.offered}
    nested = NestedPlans.of(COUPLINGS, scores, ratios)
    assert nested.ratios == tuple(ratios)
    removed = nested.removed(Parameters(COUPLINGS.shapes))
    for i, ratio in enumerate(ratios):
        want = plan(COUPLINGS, ratio, scores)
        assert nested.plan(i) == want
        assert [nested.kept(j)[i] for j in range(len(nested.orders))] == [s.kept for s in want]
        assert removed[i] == want.removed_parameters
    for i, _ in pairwise(range(len(ratios))):
        for before, after in zip(nested.plan(i), nested.plan(i + 1), strict=True):
            assert bool((before.mask | ~after.mask).all())


def test_it_stops_at_the_first_ratio_out_of_reach() -> None:
    nested = NestedPlans.of(COUPLINGS, "magnitude", (0.1, 0.5, 0.97, 0.98))
    assert nested.ratios == (0.1, 0.5)
    assert len(nested.steps) == 2
