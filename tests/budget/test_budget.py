"""Counting without masks, and allocation: what is removed, how evenly, and every refusal."""

from __future__ import annotations

import time
from collections.abc import Sequence
from math import ceil
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ecospa_fx.coupling import unit_elements
from ecospa_fx.coupling.couplings import Couplings
from ecospa_fx.coupling.types import Member
from ecospa_fx.errors import PlanError, ScoreError
from ecospa_fx.importance.scores import Scores
from ecospa_fx.plan import Plan
from ecospa_fx.planning import plan
from tests.support.tiny import box, coupling, member, tiny, tiny_couplings

MODEL = tiny()
COUPLINGS = tiny_couplings(MODEL)
DIMS = tiny_couplings(MODEL, heads=False)


def by_position(choices: Sequence[unit_elements.UnitChoice]) -> dict[str, Tensor]:
    """Masks written one position at a time."""
    masks = {n: torch.ones(p.shape, dtype=torch.bool) for n, p in MODEL.named_parameters()}
    for members, keep in choices:
        for m in members:
            for c, u in (~keep).nonzero().tolist():
                mask = masks[m.parameter]
                if m.carrier_axis is not None:
                    mask, axis = mask.select(m.carrier_axis, c), m.axis - (m.carrier_axis < m.axis)
                else:
                    axis = m.axis
                for position in m.indices[c, u].tolist():
                    mask.select(axis, position).fill_(False)
    return masks


choices = st.lists(
    st.integers(0, len(COUPLINGS.offered) - 1).flatmap(
        lambda i: (
            st.tuples(
                st.just(COUPLINGS.offered[i].members),
                st.lists(st.booleans(), min_size=n, max_size=n).map(
                    lambda bits: torch.tensor(bits).view(COUPLINGS.offered[i].carriers, -1)
                ),
            )
            if (n := COUPLINGS.offered[i].carriers * COUPLINGS.offered[i].size)
            else st.nothing()
        )
    ),
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(choices)
def test_masks_and_counts_agree_with_single_positions(chosen: list[unit_elements.UnitChoice]) -> None:
    want, factors = by_position(chosen), unit_elements.keep_factors(COUPLINGS.shapes, chosen)
    for name, shape in COUPLINGS.shapes.items():
        mask = unit_elements.mask(shape, factors.get(name, {}))
        assert torch.equal(mask, want[name])
        assert unit_elements.kept_elements(shape, factors.get(name, {})) == int(mask.sum())
    assert unit_elements.removed_elements(COUPLINGS.shapes, chosen) == sum(int((~m).sum()) for m in want.values())


def test_the_hand_written_parameter_counts_are_right() -> None:
    for c in COUPLINGS.offered:
        assert unit_elements.coupled_elements(COUPLINGS.shapes, [c.members]) == c.parameters


def test_a_carrier_axis_after_the_units_axis() -> None:
    """Two experts along the last axis; the second loses its first unit."""
    shapes, keep = {"w": (3, 5, 2)}, torch.tensor([[True] * 3, [False, True, True]])
    factors = unit_elements.keep_factors(shapes, [([Member("w", 0, "producer", 2, (box(),), 2, 3)], keep)])
    mask = unit_elements.mask(shapes["w"], factors["w"])
    assert (~mask).nonzero()[:, [0, 2]].unique(dim=0).tolist() == [[0, 1]]  # type: ignore[no-untyped-call]
    assert unit_elements.kept_elements(shapes["w"], factors["w"]) == 30 - 5


# -- what a plan removes -------------------------------------------------------------------------------------------

options = st.fixed_dictionaries(
    {
        "ratio": st.floats(0.01, 0.99),
        "seed": st.integers(0, 99),
        "round_to": st.integers(1, 5),
        "uniform": st.booleans(),
        "floor": st.sampled_from([0.0, 0.05, 0.3, 0.6]),
        "scores": st.sampled_from(["random", "magnitude"]),
    }
)


def reached(couplings: Couplings, wanted: dict[str, Any]) -> Plan | None:
    """The plan, or None where the ratio is refused; then the ratio that the refusal offers is within reach."""
    try:
        return plan(couplings, **wanted)
    except PlanError as error:
        told = str(error).split("leave at most ")[1].split(" of the couplings")[0]
        assert float(told) < wanted["ratio"]
        if float(told) > 0:
            assert len(plan(couplings, **{**wanted, "ratio": float(told)}))
        return None


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(options)
def test_widths_ratio_and_determinism(wanted: dict[str, Any]) -> None:
    made = reached(COUPLINGS, wanted)
    if made is None:
        return
    for s in made:
        assert {len(units) for units in s.keep} == {s.kept}
        assert s.kept == s.size or s.kept % wanted["round_to"] == 0
        assert s.kept >= max(1, ceil(wanted["floor"] * s.size))
    assert made == plan(COUPLINGS, **wanted)
    masks = made.masks(MODEL)
    assert sum(int((~m).sum()) for m in masks.values()) == made.removed_parameters
    assert abs(made.removed_parameters - wanted["ratio"] * made.coupled_parameters) <= widest_rung(made, wanted) / 2


def widest_rung(made: Plan, wanted: dict[str, Any]) -> float:
    """Most elements that one step of the allocation takes; a first step also takes what rounding leaves over."""
    steps: dict[object, float] = {}
    for s in made:
        units = max(wanted["round_to"], s.size - (s.size - 1) // wanted["round_to"] * wanted["round_to"])
        group = (s.kind, s.size, s.carriers) if wanted["uniform"] else s.name
        steps[group] = steps.get(group, 0) + units * COUPLINGS[s.name].parameters / s.size
    return max(steps.values()) + 1e-6


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(options, st.floats(0.01, 0.99))
def test_a_larger_ratio_removes_more_of_the_same(wanted: dict[str, Any], other: float) -> None:
    less, more = sorted((wanted["ratio"], other))
    small, large = (reached(COUPLINGS, {**wanted, "ratio": r}) for r in (more, less))
    if small is not None and large is not None:
        for a, b in zip(small, large, strict=True):
            assert all(set(x) <= set(y) for x, y in zip(a.keep, b.keep, strict=True))


@settings(max_examples=40, deadline=None)
@given(options)
def test_uniform_keeps_equal_widths_in_equal_couplings(wanted: dict[str, Any]) -> None:
    made = reached(DIMS, {**wanted, "uniform": True})
    widths: dict[str, set[int]] = {}
    for s in made or ():
        widths.setdefault(s.kind, set()).add(s.kept)
    assert all(len(w) == 1 for w in widths.values())


@pytest.mark.slow
@settings(max_examples=80, deadline=None)
@given(options)
def test_ragged_carriers_go_at_their_own_pace(wanted: dict[str, Any]) -> None:
    del wanted["uniform"]
    made = reached(COUPLINGS, {**wanted, "allocation": "ragged"})
    for s in made or ():
        assert all(len(units) == s.size or len(units) % wanted["round_to"] == 0 for units in s.keep)
        assert min(len(units) for units in s.keep) >= 1
        assert s.carriers * s.size - int(s.removed.sum()) >= s.carriers * max(1, ceil(wanted["floor"] * s.size))
        assert not s.ragged or all(m.carrier_axis is None for m in s.members)
    if made is not None:
        assert sum(int((~m).sum()) for m in made.masks(MODEL).values()) == made.removed_parameters
        assert abs(made.removed_parameters / made.coupled_parameters - wanted["ratio"]) < 0.5
        assert Plan.from_json(made.to_json()) == made


def test_the_least_unit_of_any_carrier_goes_first() -> None:
    values = {c.name: torch.full((c.carriers, c.size), 100.0, dtype=torch.float64) for c in DIMS.offered}
    values["layers.0.attention:vo"] = torch.tensor([[0.0, 1, 2, 3], [9, 8, 7, 6]], dtype=torch.float64)
    vo = DIMS["layers.0.attention:vo"]
    ratio = vo.parameters / 2 / sum(c.parameters for c in DIMS.offered)
    made = plan(DIMS, ratio, Scores("mine", values), allocation="ragged")
    assert made[vo.name].keep == ((3,), (0, 1, 2))  # three of the first, of which one stays, then the second's least
    assert made.even()[vo.name].keep == ((0, 1, 3), (0, 1, 2))


def test_the_least_score_per_parameter_goes_first() -> None:
    values = {c.name: torch.full((c.carriers, c.size), 100.0, dtype=torch.float64) for c in DIMS.offered}
    values["layers.1.ffn:ffn"] = torch.arange(12.0, dtype=torch.float64)[None]
    share = 5 * DIMS["layers.1.ffn:ffn"].parameters / 12 / sum(c.parameters for c in DIMS.offered)
    made = plan(DIMS, share, Scores("mine", values))
    assert made["layers.1.ffn:ffn"].keep == (tuple(range(5, 12)),)
    assert all(s.kept == s.size for s in made if s.name != "layers.1.ffn:ffn")


def test_scores_are_weighed_by_what_they_free() -> None:
    """A unit of V–O scores more than an FFN neuron and frees twice as much: it goes first."""
    values = {c.name: torch.full((c.carriers, c.size), 1000.0, dtype=torch.float64) for c in DIMS.offered}
    values["layers.0.ffn:ffn"].fill_(30)
    values["layers.0.attention:vo"].fill_(20)
    made = plan(DIMS, 50 / sum(c.parameters for c in DIMS.offered), Scores("mine", values))
    assert {s.name for s in made if s.kept < s.size} == {"layers.0.attention:vo"}


def test_the_reachable_ratio_is_told_rounded_down() -> None:
    with torch.device("meta"):
        model = nn.Linear(1, 30_000, bias=False)
    wide = coupling(":ffn", [member("weight", 0, "producer", [box()], 1, 30_000)], 30_000)
    couplings = Couplings([wide], model)
    with pytest.raises(PlanError, match=r" leave at most 0\.6666 of the couplings' parameters to remove"):
        plan(couplings, 0.6667, "random", floor=1 / 3)
    assert plan(couplings, 0.6666, "random", floor=1 / 3)[":ffn"].kept == 10_002


def test_carriers_choose_their_own_units() -> None:
    values = {c.name: torch.full((c.carriers, c.size), 100.0, dtype=torch.float64) for c in DIMS.offered}
    values["layers.0.attention:vo"] = torch.tensor([[0.0, 9, 9, 1], [9, 0, 1, 9]], dtype=torch.float64)
    vo = DIMS["layers.0.attention:vo"]
    made = plan(DIMS, vo.parameters / 2 / sum(c.parameters for c in DIMS.offered), Scores("mine", values))
    assert made[vo.name].keep == ((1, 2), (0, 3))


def test_random_differs_by_seed_and_in_widths_and_carriers() -> None:
    first, second = (plan(COUPLINGS, 0.5, "random", seed=s) for s in (0, 1))
    assert first != second
    assert len({s.kept / s.size for s in first}) > 1
    assert any(len(set(s.keep)) > 1 for s in first)


def test_heads_are_left_to_their_content_unless_random_or_asked_for() -> None:
    assert {s.kind for s in plan(COUPLINGS, scores="magnitude")} == {"qk", "vo", "ffn", "experts"}
    assert {s.kind for s in plan(COUPLINGS, scores="random")} == {"qk", "vo", "heads", "ffn", "experts"}
    assert {s.kind for s in plan(COUPLINGS, kinds=["heads", "ffn"], scores="magnitude")} == {"heads", "ffn"}
    assert {s.kind for s in plan(COUPLINGS, 0.3, kinds="ffn", scores="magnitude")} == {"ffn"}


def test_random_plans_need_no_weights() -> None:
    with torch.device("meta"):
        shadow = tiny()
    assert plan(tiny_couplings(shadow), scores="random", seed=3) == plan(COUPLINGS, scores="random", seed=3)
    with pytest.raises(ScoreError, match=r"is on meta and has no values to score: load the weights first$"):
        plan(tiny_couplings(shadow), scores="magnitude")


def test_nothing_offered_makes_no_plan() -> None:
    single = coupling("a:ffn", [member("embed.weight", 1, "producer", [box()], 1, 1)], 11)
    for offered in ([], [c for c in COUPLINGS if c.blocked], [single]):
        with pytest.raises(PlanError, match=r"^there is nothing to remove because "):
            plan(Couplings(offered, MODEL), 0.5, "magnitude")


@pytest.mark.slow
def test_a_hundred_wide_layers_take_seconds() -> None:
    with torch.device("meta"):
        layers = [nn.Sequential(nn.Linear(64, 28_672), nn.Linear(28_672, 64)) for _ in range(100)]
    model = nn.Sequential(*layers)
    found = []
    for i in range(100):
        up, bias = (member(f"{i}.0.{n}", 0, "producer", [box()], 1, 28_672) for n in ("weight", "bias"))
        down = member(f"{i}.1.weight", 1, "consumer", [box()], 1, 28_672)
        found.append(coupling(f"{i}:ffn", [up, bias, down], 28_672 * 129))
    threads, begin = torch.get_num_threads(), time.perf_counter()
    torch.set_num_threads(1)  # threads that wait for each other on a busy machine are not what is measured
    made = plan(Couplings(found, model), 0.4, "random", round_to=64)
    torch.set_num_threads(threads)
    assert time.perf_counter() - begin < 20
    assert abs(made.removed_parameters / made.coupled_parameters - 0.4) < 64 / 28_672 / 100


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        *(
            (
                {"ratio": r},
                f"ratio={r!r} is not a share of parameters to remove: give a number between 0 and 1, like 0.5",
            )
            for r in (0, 1, -0.5, 1.5, float("nan"), "0.5", None)
        ),
        *(
            (
                {"round_to": n},
                f"round_to={n!r} is not a number of units: give a whole number of at least 1",
            )
            for n in (0, -8, 2.0)
        ),
        *(
            (
                {"floor": f},
                f"floor={f!r} is not a share of units to keep: give a number from 0 up to, not including, 1",
            )
            for f in (-0.1, 1, float("nan"))
        ),
        (
            {"allocation": "ragged", "budget": "flops"},
            "allocation='ragged' counts parameters, in graph form: leave budget= and expressible_in= out",
        ),
        ({"seed": 0.5}, "seed=0.5 is not a seed: give a whole number"),
        (
            {"kinds": ["moe"]},
            "no offered coupling is of kind 'moe': use some of experts, ffn, heads, qk, vo",
        ),
        (
            {"scores": "size"},
            "scores='size' is unknown: use 'magnitude', 'random', what score() returned, or a mapping of coupling "
            "names to tensors",
        ),
        (
            {"scores": {}},
            "coupling 'layers.0.attention:qk' needs scores of shape (2, 2) and has none: score these couplings",
        ),
        (
            {"ratio": 0.9, "floor": 0.25, "kinds": "ffn"},
            "ratio=0.9 is out of reach because floor=0.25 and round_to=1 leave at most 0.7500 of the couplings' "
            "parameters to remove: ask for less, or lower them",
        ),
        (
            {"ratio": 0.6, "round_to": 8, "kinds": "ffn"},
            "ratio=0.6 is out of reach because floor=0.05 and round_to=8 leave at most 0.3333 of the couplings' "
            "parameters to remove: ask for less, or lower them",
        ),
        (
            {"ratio": 0.4, "round_to": 64},
            "ratio=0.4 is out of reach because floor=0.05 and round_to=64 leave at most 0.0000 of the couplings' "
            "parameters to remove: ask for less, or lower them",
        ),
    ],
)
def test_refuses(wanted: dict[str, Any], text: str) -> None:
    with pytest.raises(PlanError) as error:
        plan(COUPLINGS, **{"scores": "magnitude", **wanted})
    assert str(error.value) == text


def test_refuses_weights_and_scores_that_are_not_finite_or_not_there() -> None:
    model = tiny()
    couplings = tiny_couplings(model)
    with torch.no_grad():
        model.get_parameter("layers.0.ffn.fused.bias")[0] = torch.inf
    with pytest.raises(ScoreError, match=r"^parameter 'layers.0.ffn.fused.bias' holds values that are not finite: "):
        plan(couplings, scores="magnitude")
    values = {c.name: torch.ones(c.carriers, c.size) for c in couplings.offered}
    name = "layers.1.ffn:ffn"
    with pytest.raises(PlanError) as error:
        plan(couplings, scores=Scores("mine", {**values, name: values[name] * torch.nan}))
    assert str(error.value) == f"the scores of coupling {name!r} are not all finite: score it anew"
    with pytest.raises(PlanError) as error:
        plan(couplings, scores=Scores("mine", {**values, name: torch.ones(12)}))
    text = f"coupling {name!r} needs scores of shape (1, 12) and has shape (12,): score these couplings"
    assert str(error.value) == text
    with pytest.raises(PlanError, match=r"^coupling '\S+' needs scores of shape \(1, 12\) and has none: "):
        plan(couplings, scores=Scores("mine", {n: v for n, v in values.items() if n != name}))
