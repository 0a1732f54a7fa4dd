"""Measured curves: what they measure, how they are read, and what becomes of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ecospa_fx as eco
from ecospa_fx.budget.allocate import choose
from ecospa_fx.capture.export import capture
from ecospa_fx.coupling.couplings import Couplings
from ecospa_fx.errors import PlanError, ScoreError
from ecospa_fx.importance.compensation import Compensated
from ecospa_fx.importance.curvature import Collector
from ecospa_fx.importance.linear_views import views_of
from ecospa_fx.importance.scores import Scores
from ecospa_fx.importance.sensitivity import Curves, Trial, TrialLosses, keep_best, measured_curves
from ecospa_fx.ir.linears import linear_uses
from ecospa_fx.origin import origin_of
from ecospa_fx.plan import Selection
from ecospa_fx.runtime.interpreter import PartialInterpreter
from ecospa_fx.sensitivity_search import Sensitivity, around
from ecospa_fx.verify import masked
from tests.support.tiny import batches, loss, samples, tiny, tiny_couplings

MODEL = tiny().eval()
DATA = batches(6)
DIMS = tiny_couplings(MODEL, heads=False)


class Prepared:
    """A captured model with its couplings and scores."""

    def __init__(self) -> None:
        self.program = capture(MODEL, *DATA[0], dynamic=False)
        self.evaluator = PartialInterpreter(self.program, MODEL, *DATA[0])
        self.couplings = eco.detect(MODEL, *DATA[0])
        self.chosen = choose(self.couplings, None, containers=False)
        source = torch.Generator().manual_seed(0)
        self.scores = {c.name: torch.rand(c.carriers, c.size, generator=source).double() for c in self.chosen}
        self.values = {name: tensor.detach() for name, tensor in self.program.values.items()}

    def masks(self) -> Compensated:
        return Compensated(self.chosen, self.values)

    def compensated(self) -> Compensated:
        views = views_of(self.chosen, linear_uses(self.program))
        return Compensated(self.chosen, self.values, views, Collector(self.evaluator, views).run(DATA, loss), 1e-9)


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    return Prepared()


def mean_loss(model: nn.Module) -> float:
    with torch.no_grad():
        return sum(float(loss(model(*args), args, {})) for args, _ in DATA) / len(DATA)


@pytest.mark.slow
def test_a_measured_rise_is_that_of_the_masked_model(prepared: Prepared) -> None:
    """Around a base: the others at its widths, the one at its own."""
    scores = Scores("mine", prepared.scores)
    base = eco.plan(prepared.couplings, 0.3, scores)
    keep, weights = {s.name: s.mask for s in base}, prepared.masks()
    names = {name for c in prepared.chosen for name in weights.touched(c)}
    bench = TrialLosses(prepared.evaluator, DATA, loss, weights.weights(keep, names))
    curves = measured_curves(bench, weights, prepared.scores, {c.name: [c.size // 2] for c in prepared.chosen}, keep)
    for c in prepared.chosen:
        ((kept, rise),) = curves.rises[c.name]
        found = []
        for width in (c.size, kept):
            choice = {**keep, c.name: keep_best(prepared.scores[c.name], width)}
            selections = tuple(Selection.of(x, choice[x.name]) for x in prepared.chosen)
            with masked(MODEL, eco.Plan(selections, tuple(prepared.couplings.shapes.items()))):
                found.append(mean_loss(MODEL))
        assert rise == pytest.approx(max(found[1] - found[0], 0), abs=1e-9)


def test_what_stays_makes_up_for_what_goes(prepared: Prepared) -> None:
    """Solved for the dense output, consumers come closer to it than masked ones; producers and others are masked."""
    solved, plain = prepared.compensated(), prepared.masks()
    assert solved.views is not None
    assert len(solved.views.inputs) > 1
    for c in (view.coupling for view in solved.views.inputs):
        keep = {c.name: keep_best(prepared.scores[c.name], c.size // 2)}
        names = solved.touched(c)
        assert names >= {m.parameter for m in c.members}
        better, worse = (
            distance(prepared, Trial(c.name, names, [partial(w.weights, keep, names), dict])) for w in (solved, plain)
        )
        assert better < worse
        held = solved.weights(keep, names)
        masks = eco.Plan((Selection.of(c, keep[c.name]),), tuple(prepared.couplings.shapes.items())).masks(MODEL)
        assert all(bool((held[name][~mask] == 0).all()) for name, mask in masks.items())


def distance(prepared: Prepared, trial: Trial) -> float:
    """Mean square of how far the model's output moves."""
    outputs: list[Tensor] = []

    def keep(output: Tensor, args: object, kwargs: object) -> Tensor:
        outputs.append(output)
        return output.sum()

    TrialLosses(prepared.evaluator, DATA, keep, {}).losses([trial])
    changed, dense = outputs[: len(DATA)], outputs[len(DATA) :]
    return float(sum((a - b).square().mean() for a, b in zip(changed, dense, strict=True)))


# -- reading curves ------------------------------------------------------------------------------------------------

FFN = DIMS["layers.1.ffn:ffn"]


def straight(kept: Sequence[int]) -> Tensor:
    return torch.tensor([float(FFN.size - k) for k in kept], dtype=torch.float64)


def test_a_curve_goes_through_what_was_measured_and_no_further() -> None:
    curves = Curves({FFN.name: ((9, 3.0), (6, 2.0), (3, 9.0))})
    lost = curves.rise(FFN, range(12, 0, -1), straight)
    want = [0, 1, 2, 3, 3, 3, 3, 5, 7, 9, torch.inf, torch.inf]  # it never falls
    assert lost.tolist() == pytest.approx(want)
    assert Curves({FFN.name: ()}).rise(FFN, [12, 11], straight).tolist() == [0.0, torch.inf]


rises = st.lists(st.floats(0, 9), min_size=3, max_size=3)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.lists(rises, min_size=len(DIMS.offered), max_size=len(DIMS.offered)), st.floats(0.02, 0.4), st.integers(1, 3))
def test_plans_by_curves_meet_the_budget_within_the_tried_widths(
    drawn: list[list[float]], ratio: float, round_to: int
) -> None:
    tried = {c.name: around(c.size, c.size // 3, 0.5) for c in DIMS.offered}
    pairs = zip(DIMS.offered, drawn, strict=True)
    curves = Curves({c.name: tuple(zip(tried[c.name], rise, strict=False)) for c, rise in pairs})
    try:
        made = eco.plan(DIMS, ratio, "magnitude", 0, round_to, allocation=curves, limits={"ffn": 0.4})
    except PlanError:  # nothing but the bounds can be in the way
        assert ratio > 0.2 or round_to > 1
        return
    assert made.removed_parameters >= ratio * made.coupled_parameters - 1e-6
    assert made == eco.plan(DIMS, ratio, "magnitude", 0, round_to, allocation=curves, limits={"ffn": 0.4})
    for s in made:
        assert s.kept == s.size or (s.kept % round_to == 0 and s.kept >= min(tried[s.name]))
        assert s.kind != "ffn" or s.size - s.kept <= 0.4 * s.size


def test_refuses_curves_and_names_that_do_not_fit() -> None:
    with pytest.raises(PlanError, match=r"^coupling '\S+' has no measured curve: measure these couplings, or choose"):
        eco.plan(DIMS, allocation=Curves({}), scores="magnitude")
    with pytest.raises(PlanError, match=r"^allocation='best' is unknown: use 'global', 'ragged', 'uniform' or "):
        eco.plan(DIMS, allocation="best", scores="magnitude")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=r"^allocation='sensitivity' needs measured curves: pass these, or"):
        eco.plan(DIMS, allocation="sensitivity", scores="magnitude")  # type: ignore[arg-type]
    assert eco.plan(DIMS, allocation="uniform", scores="magnitude") == eco.plan(DIMS, uniform=True, scores="magnitude")


@given(st.integers(2, 300), st.floats(0, 1), st.floats(0.01, 0.99))
def test_widths_to_try_lie_within_the_coupling(size: int, share: float, ratio: float) -> None:
    tried = around(size, int(share * size), ratio)
    assert tried == sorted(set(tried), reverse=True)
    assert all(1 <= kept < size for kept in tried)


# -- the whole -----------------------------------------------------------------------------------------------------


def test_the_plan_is_never_worse_on_the_held_out_data_than_the_one_by_scores(prepared: Prepared) -> None:
    scores = Scores("mine", prepared.scores)
    by = Sensitivity(prepared.evaluator, prepared.masks(), DATA, loss, rounds=2)
    first, found = eco.plan(prepared.couplings, 0.3, scores), by.plan(prepared.couplings, 0.3, scores)
    with masked(MODEL, first):
        before = mean_loss(MODEL)
    with masked(MODEL, found):
        after = mean_loss(MODEL)
    assert by.loss_of(first) == pytest.approx(before, abs=1e-9)
    assert by.loss_of(found) == pytest.approx(after, abs=1e-9)
    assert after <= before
    assert found == by.plan(prepared.couplings, 0.3, scores)


@pytest.mark.slow
def test_compress_measures_when_asked() -> None:
    options: dict[str, Any] = {"ratio": 0.3, "batches": batches(4), "loss": loss, "distillation": 0}
    small = eco.compress(MODEL, *DATA[0], allocation="sensitivity", rounds=1, limits={"ffn": 0.5}, **options)
    plan = origin_of(small).plan
    assert abs(plan.removed_parameters / plan.coupled_parameters - 0.3) < 0.05
    assert all(s.kept >= s.size / 2 for s in plan if s.kind == "ffn")
    even = origin_of(eco.compress(MODEL, *DATA[0], allocation="uniform", **options)).plan
    assert len({s.kept for s in even if s.kind == "ffn" and s.size == 12}) == 1
    with pytest.raises(ScoreError, match=r"^allocation='sensitivity' holds every 4th sample back: pass at least 4$"):
        eco.compress(MODEL, *DATA[0], allocation="sensitivity", **{**options, "batches": samples(2)[:3]})
    known = "use 'ragged', 'global', 'uniform', 'sensitivity'"
    with pytest.raises(ScoreError, match=f"^allocation='best' is unknown: {known}$"):
        eco.compress(MODEL, *DATA[0], allocation="best", **options)  # type: ignore[call-overload]


def test_a_loss_that_is_not_finite_is_refused(prepared: Prepared) -> None:
    bench = TrialLosses(prepared.evaluator, DATA, lambda output, args, kwargs: output.sum() * torch.nan, {})
    name = prepared.chosen[0].name
    with pytest.raises(ScoreError, match=r"^the loss is not finite while sensitivities are measured at '\S+': check"):
        measured_curves(bench, prepared.masks(), prepared.scores, {name: [1]}, {})
    assert isinstance(prepared.couplings, Couplings)
