"""The verb `plan`: what to remove, by scores and a budget."""

from __future__ import annotations

from typing import Unpack

from ecospa_fx.budget.allocate import allocated, chosen_by, narrowed_to
from ecospa_fx.budget.settings import RATIO, PlanOptions, PlanSettings
from ecospa_fx.budget.ties import Carried
from ecospa_fx.checks import check_options
from ecospa_fx.coupling.couplings import Couplings, check_couplings
from ecospa_fx.errors import PlanError, warn_caller
from ecospa_fx.importance.scores import Given
from ecospa_fx.importance.sensitivity import Curves
from ecospa_fx.inplace.expressible import expressible_couplings
from ecospa_fx.plan import Plan


def plan(
    couplings: Couplings,
    ratio: float = RATIO,
    scores: Given | None = None,
    seed: int = 0,
    round_to: int | None = 1,
    **options: Unpack[PlanOptions],
) -> Plan:
    """Decide what to remove.

    ratio: the share, between 0 and 1 and by default 0.5, of what the chosen couplings hold together to remove, met to
    within half a rung. scores: what `score` returned, or a mapping of coupling names to tensors [carriers, units];
    "magnitude", from the weights, which costs most quality (None: the same, with a warning); or "random", drawn from
    `seed` alone, for tests. round_to: kept units per carrier are a multiple of it; a coupling with fewer stays whole;
    None: of what their device likes (`ecospa_fx.budget.alignment.preferred_multiple`). Which couplings may lose units,
    and how many at most: kinds, exclude, limits, floor, as in `ecospa_fx.coupling.choice.ChoiceOptions`. Further
    options, as in `ecospa_fx.budget.settings.PlanOptions`:

    budget: what the ratio counts: "parameters", each once; "flops" of the example call that `detect` saw; "latency",
    seconds of its products on this machine, measured once and kept on disk (`ecospa_fx.budget.latency`). allocation:
    "global", what scores least for what it frees goes first; "ragged", the same where heads may keep different numbers
    of units, and zeros fill activations up; "uniform" or uniform=True, the same share everywhere; or measured
    `ecospa_fx.importance.sensitivity` curves. expressible_in: "module" leaves whole what `shrink_` could not write
    back, as trying on a copy shows, and takes heads where their content cannot be; with uniform widths the
    configuration can describe it too. widths: in place of a ratio, units to keep by name of coupling.

    Raises PlanError for what is out of range or reach or does not fit, and where nothing is offered; ScoreError for
    weights without magnitudes; OptionError for an option that is not there.
    >>> plan(couplings, 0.5, s, exclude=["layers.0.*"], limits={"ffn": 0.6}, budget="flops")  # doctest: +SKIP
    """
    check_options("plan", options, PlanOptions, plan)
    check_couplings(couplings, PlanError)
    settings = PlanSettings(ratio, _meant(scores), seed, round_to, **options)
    if settings.widths is not None:
        return narrowed_to(couplings, settings.widths, settings)
    return allocated(couplings, settings, _carried(couplings, settings))


def _meant(scores: Given | None) -> Given:
    """The scores, with a warning at the user's line where there are none."""
    if scores is not None:
        return scores
    warn_caller(
        "plan() has no scores=, so that units go by their magnitude, which costs most quality by far: pass what "
        "ecospa_fx.score returned, or scores='magnitude' where that is meant"
    )
    return "magnitude"


def _carried(couplings: Couplings, settings: PlanSettings) -> Carried | None:
    """What the model's own module can carry, where that is asked for."""
    if settings.expressible_in is None:
        return None
    if isinstance(settings.how, Curves):
        raise PlanError("expressible_in='module' keeps couplings in step, which curves do not: use allocation='global'")
    return expressible_couplings(couplings, chosen_by(couplings, settings), settings.how == "uniform")
