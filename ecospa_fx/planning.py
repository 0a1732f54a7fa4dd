"""The verb `plan`: what to remove, by scores and a budget."""

from __future__ import annotations

from typing import Unpack

from ecospa_fx.budget.alignment import Engine
from ecospa_fx.budget.allocate import allocated, chosen_by, narrowed_to
from ecospa_fx.budget.settings import RATIO, PlanOptions, PlanSettings
from ecospa_fx.budget.ties import Carried
from ecospa_fx.checks import check_options
from ecospa_fx.coupling.choice import choosable
from ecospa_fx.coupling.couplings import Couplings, check_couplings
from ecospa_fx.coupling.types import BLOCK
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
    round_to: int | Engine | None = 1,
    **options: Unpack[PlanOptions],
) -> Plan:
    """Decide which units are removed: by scores, down to a budget or to widths.

    Args:
        couplings: `Couplings` that `detect` returned, or a selection of them.
        ratio: share to remove of what the chosen couplings hold together, above 0 and below 1; 0.5 by default. It is
            met as closely as whole units allow.
        scores: importance of units. `Scores` that `score` returned, or a mapping of coupling names to tensors
            [carriers, units]; "magnitude", from the weights, which costs most quality (None, the default, is the same
            with a warning); "random", drawn from `seed`, for tests.
        seed: whole number that "random" scores are drawn from, 0 by default.
        round_to: kept units per carrier are a multiple of this, 1 by default; a coupling with fewer units stays whole.
            "gguf", "marlin", "tensor-cores": by coupling, a multiple at which all axes fit K-quants of llama.cpp, the
            4-bit kernels of vLLM, or tensor cores in half precision, see
            `ecospa_fx.budget.alignment.engine_multiple`. None: a multiple at which the kernels of the model's device
            are fast, see `ecospa_fx.budget.alignment.preferred_multiple`.
        **options: see `ecospa_fx.budget.settings.PlanOptions`: which couplings may lose units (kinds, exclude, limits,
            floor), what the ratio counts (budget), how it is spread (allocation, uniform, expressible_in), or in place
            of a ratio what the whole model stays within (within), or widths.

    Returns:
        A `Plan`: for every chosen coupling the units that are kept. It prints as a table and is saved as JSON.

    Raises:
        PlanError: a value is out of range, the ratio is out of reach, or nothing is offered.
        ScoreError: the weights have no magnitudes, being on ``meta`` or not finite.
        OptionError: an option is unknown.

    Examples:
        >>> import torch, ecospa_fx as eco
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 8))
        >>> couplings = eco.detect(mlp, (torch.randn(2, 8),))
        >>> eco.plan(couplings, ratio=0.5, scores="magnitude")["ffn"].kept
        16

        Scores of one's own, here by position, and widths that are multiples of 8:

        >>> mine = {"ffn": torch.arange(32.0)[None]}
        >>> eco.plan(couplings, ratio=0.3, scores=mine, round_to=8)["ffn"].keep[0][:4]
        (8, 9, 10, 11)

        The largest model of at most 300 parameters, biases and all:

        >>> eco.plan(couplings, scores="magnitude", within={"parameters": 300})
        Plan(1 couplings, removes 255 of 552 parameters (46.2%), 46.9% of what its couplings hold)

        A budget in FLOPs, in which no MLP loses more than 60 % of its units and one layer none:

        >>> eco.plan(
        ...     couplings, 0.5, scores, budget="flops", limits={"ffn": 0.6}, exclude=["layers.0.*"]
        ... )  # doctest: +SKIP
    """
    check_options("plan", options, PlanOptions, plan)
    check_couplings(couplings, PlanError)
    settings = PlanSettings(ratio, _meant(scores), seed, round_to, **options)
    couplings = couplings.asked(settings.kinds)
    check_blocks(couplings, settings)
    if settings.widths is not None:
        return narrowed_to(couplings, settings.widths, settings)
    return allocated(couplings, settings, _carried(couplings, settings))


def check_blocks(couplings: Couplings, settings: PlanSettings) -> None:
    """Raise PlanError for what cannot be said of whole blocks."""
    if not any(c.kind == BLOCK for c in choosable(couplings, settings.kinds, settings.exclude)):
        return
    for option, value, usual in (
        ("allocation", settings.how, "global"),
        ("budget", settings.budget, "parameters"),
        ("expressible_in", settings.expressible_in, None),
        ("widths", settings.widths, None),
    ):
        if value != usual:
            raise PlanError(
                f"{option}={value!r:.60} cannot be said of whole blocks, which go one by one, in graph form, counted "
                f"in parameters: leave it out, or {BLOCK!r} out of kinds="
            )


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
    chosen, uniform = chosen_by(couplings, settings), settings.how == "uniform"
    return expressible_couplings(couplings, chosen, uniform, progress=settings.progress)
