"""The recipe of `compress`: bases, scores, allocation, gates, least squares, distillation, in the order that works."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from typing import Any, Literal, NamedTuple, TypeVar, Unpack

import torch
from torch import Tensor, nn

from ecospa_fx.budget.allocate import choose
from ecospa_fx.budget.ceiling import Ceiling
from ecospa_fx.budget.settings import AllPlanOptions
from ecospa_fx.calibration.distances import Distances, mean_divergence
from ecospa_fx.calibration.second_text import SecondText
from ecospa_fx.checks import check_data, check_flag, check_share, check_whole, is_number
from ecospa_fx.coupling.couplings import Couplings
from ecospa_fx.coupling.types import Coupling
from ecospa_fx.distillation.distill import Distill
from ecospa_fx.distillation.divergence import answer_of, check_convex
from ecospa_fx.distillation.token_mixing import augmented
from ecospa_fx.errors import PlanError, ScoreError, warn_caller
from ecospa_fx.importance.compensation import Compensated
from ecospa_fx.importance.curvature import Collector, Curvature
from ecospa_fx.importance.linear_views import CouplingViews
from ecospa_fx.importance.losses import Batch, Loss, check_slope
from ecospa_fx.importance.output_distance import is_distance, or_distance, probes_of, scaled_loss
from ecospa_fx.importance.samples import grouped, samples_of
from ecospa_fx.importance.score import arguments
from ecospa_fx.importance.scores import Scores, given_scores
from ecospa_fx.importance.second_order import SECOND_ORDER
from ecospa_fx.importance.sensitivity import Trial
from ecospa_fx.ir.linears import LinearUse
from ecospa_fx.ir.program import ExportedForm
from ecospa_fx.passes.lossy.measurement import Measurement, measure
from ecospa_fx.passes.lossy.reconstruct import Reconstruct
from ecospa_fx.passes.shrink.shrink_couplings import shrink_program
from ecospa_fx.plan import Plan
from ecospa_fx.planning import plan as make_plan
from ecospa_fx.progress import progress_bar, stage
from ecospa_fx.runtime.bfloat16 import in_bfloat16
from ecospa_fx.runtime.interpreter import PartialInterpreter
from ecospa_fx.runtime.part import Part
from ecospa_fx.sensitivity_search import Sensitivity

Item = TypeVar("Item")

HOLDOUT_EVERY, HOLDOUT_MOST = 4, 16
"""Every how many-th sample measures sensitivities and is not scored on, and how many at most."""
VALIDATION_EVERY = 16
"""Every how many-th sample validates distillation, and nothing is measured, solved or learnt on it."""

FEW, MANY = 32, 128
"""Samples, or groups of small ones, that are few and many for distillation."""
DRAWS = 224, 640
"""How many of them it reads where there are many, and where there are few."""

ROWS = 64
"""Rows that distillation reads at once where samples hold fewer."""

IN_TURN = "in turn"
"""Least squares layer by layer, on what the smaller model itself makes."""

ALLOCATIONS = "ragged", "global", "uniform", "sensitivity"


@dataclass(frozen=True, slots=True)
class Recipe:
    """What goes into second-order compression; each ingredient can be left out or tuned.

    So that few samples do for many, they vary: see `mixed` and `predicted`. Samples of fewer than 64 rows, such as
    tokens, are distilled in groups that hold so many, and a group counts as one sample there.
    """

    basis: bool = True
    """Turn linear couplings (V with O, Q with K where nothing rotates them) before units are chosen."""
    damping: float = 0.01
    """Of the matrices of the optimal brain surgeon, in means of their diagonals."""
    gates: bool = True
    """Rescale the queries and keys that are kept for those that are removed."""
    gate_damping: float = 0.1
    """Of the gates' Fisher matrix, in means of its diagonal."""
    least_squares: bool | str = True
    """Solve the matrices that lost inputs, by what was measured of the dense model. "in turn": layer by layer, on the
    inputs that the smaller model makes, in a pass of its own over the data."""
    least_squares_damping: float = 0.1
    """Of least squares, in means of the diagonal."""
    allocation: Literal["ragged", "global", "uniform", "sensitivity"] | None = None
    """"ragged": by score, and each head keeps its own number of units. "global": by score, with as many in all heads of
    a layer. "uniform": the same share everywhere. "sensitivity": by what couplings are measured to cost, on every
    fourth sample, which the scores do not see. None: "ragged" where parameters are counted and the graph form may do as
    it likes, else "global"."""
    rounds: int = 2
    """How often sensitivities are measured, each time around the plan before."""
    distillation: int | None = None
    """Samples, without their labels, on which the smaller model learns the dense one's output, each as often as it
    takes; 0 for none. None: 224, and up to 640 where fewer than 128 are given."""
    rate: float = 0.125
    """Learning rate r of distillation: the first steps change a parameter by at most r √s of its operator norm, s being
    the share of the dense model's output that is lost (the divergence, divided by that of an output of zeros)."""
    step: int = 1
    """Samples per step of distillation."""
    mixed: float = 0.2
    """Share, from 0 to below 1, of a sample's positions, such as tokens, that come from other samples where none are
    predicted. Such mixed samples also count for all that is measured and solved where the data holds fewer than 60,000
    positions, up to four for one."""
    predicted: float = 0.25
    """Share, from 0 to below 1, of a sample's positions that are what the dense model predicted for them when it last
    read the sample in distillation, where it predicts its own inputs."""
    progress: bool = False
    """Bars on stderr."""

    def __post_init__(self) -> None:
        for name in ("basis", "gates", "progress"):
            check_flag(name, getattr(self, name), ScoreError)
        for name in ("damping", "gate_damping", "least_squares_damping", "rate"):
            value = getattr(self, name)
            if not is_number(value) or not 0 < value < float("inf"):
                raise ScoreError(f"{name}={value!r:.60} is not a factor: give a positive number")
        for name in ("mixed", "predicted"):
            check_share(name, getattr(self, name), ScoreError)
        if not isinstance(self.least_squares, bool) and self.least_squares != IN_TURN:
            raise ScoreError(f"least_squares={self.least_squares!r:.60} is unknown: use True, False or {IN_TURN!r}")
        if self.allocation not in (None, *ALLOCATIONS):
            raise ScoreError(f"allocation={self.allocation!r:.60} is unknown: use {', '.join(map(repr, ALLOCATIONS))}")
        for name, least in (("distillation", 0), ("step", 1), ("rounds", 1)):
            value = getattr(self, name)
            if (name, value) != ("distillation", None):
                check_whole(name, value, least, ScoreError)

    def draws(self, batches: int) -> int:
        """How many samples, or groups of them, to distil on where so many are given.

        By default from `DRAWS` for `MANY` to `DRAWS` for `FEW`; below that each counts as often as when they are few.
        """
        if self.distillation is not None:
            return self.distillation
        lacking = min(1.0, max(0.0, (MANY - batches) / (MANY - FEW)))
        return max(DRAWS[0], min(round(DRAWS[0] + lacking * (DRAWS[1] - DRAWS[0])), DRAWS[1] // FEW * batches))

    def planning(self, options: AllPlanOptions) -> AllPlanOptions:
        """The same options of `plan`, with the allocation that goes with them."""
        if options.get("widths") is not None and self.allocation is not None:
            raise PlanError("widths= says how many units stay, and allocation= how a ratio is spread: give one of them")
        even = options.get("budget", "parameters") != "parameters" or options.get("expressible_in") is not None
        even = even or options.get("widths") is not None
        within = options.get("within")
        even = even or (within is not None and Ceiling.of(within).unit in ("flops", "seconds"))
        chosen = "uniform" if options.get("uniform") else self.allocation or ("global" if even else "ragged")
        return {**options, "allocation": "global" if chosen == "sensitivity" else chosen}

    def with_progress(self, items: Iterable[Item], label: str, total: int | None = None) -> Iterable[Item]:
        """The same items, with a bar if wanted. total: how many, where they do not say."""
        return progress_bar(items, label, total) if self.progress else items


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """What is to be compressed: a model, how it is called, and the data that says what matters."""

    model: nn.Module | Part
    """The dense one, or the part of it that is to be smaller; it is not changed."""
    args: Sequence[Any]
    """Positional example inputs."""
    kwargs: Mapping[str, Any]
    """Example inputs by name."""
    couplings: Couplings
    """Those that may lose units."""
    batches: Sequence[Batch]
    """Calibration data."""
    loss: Loss
    """(output, args, kwargs) to a scalar; `ecospa_fx.OutputDistance` where the user has none."""
    scores: Scores | Mapping[str, Tensor] | None = None
    """The user's own, by which units are removed; None: those of the recipe."""
    text: SecondText | None = None
    """What the model itself wrote, beside the batches or in their place."""


class CompressedProgram(NamedTuple):
    """What becomes of a program."""

    program: ExportedForm
    """The smaller one."""
    plan: Plan
    """What was removed."""
    distances: Distances | None
    """From the dense model, where that wrote text to judge by."""


def checked(batches: Iterable[object], loss: Loss | None, *, optional: bool = False) -> tuple[list[Batch], Loss]:
    """Calibration data as a list, and the loss, or the default. Raises ScoreError for no data and what is no batch.

    optional: whether there may be no batches.
    """
    check_data(batches, loss, ScoreError)
    samples = [arguments(batch, number) for number, batch in enumerate(batches)]
    if not (samples or optional):
        raise ScoreError("there are no batches to calibrate with: pass at least one (args, kwargs)")
    return samples, or_distance(loss)


def compress_program(
    program: ExportedForm, task: Task, ratios: Sequence[float], recipe: Recipe, **planning: Unpack[AllPlanOptions]
) -> list[CompressedProgram]:
    """Make a program smaller and let kept units make up for removed ones. Returns a smaller program per ratio.

    All is measured once. The program itself becomes the one of the last ratio. planning: further options of `plan`. The
    model itself is not changed. Raises PlanError where a plan does not fit the program, ScoreError and InputError for
    data that tells nothing or does not fit.
    """
    evaluator = PartialInterpreter(program, task.model, task.args, task.kwargs)
    text, given_samples = task.text, samples_of(task.batches, evaluator, task.loss)
    task = replace(task, batches=_alternating(given_samples, text.windows if text else ()))
    draws = recipe.draws(len(task.batches))
    task = _with_scales(task, evaluator)
    _check_loss(evaluator, task, distilled=draws > 0)
    learning, validation = _split(given_samples, VALIDATION_EVERY) if draws or text else (given_samples, [])
    measured = _alternating(learning, text.windows if text else ())
    scoring, held_out = _hold_out(measured) if recipe.allocation == "sensitivity" else (measured, [])
    more = augmented(scoring, recipe.mixed)
    plans, weights = _planned(program, replace(task, batches=more), held_out, ratios, recipe, planning)
    dense = PartialInterpreter(program.frozen(), task.model, task.args, task.kwargs)
    programs = [*(program.frozen() for _ in plans[1:]), program]
    results = list(zip(programs, plans, strict=True))
    for smaller, plan in results:
        _shrink(smaller, plan, replace(weights, damping=None) if _in_turn(recipe, plan) else weights)
    judges = (validation or learning, text.judges) if text else ((), ())
    size = _group_size(weights.curvature, len(more))
    del weights  # what was measured takes more memory than the model
    lessons = _lessons(dense, task, (learning, validation), recipe, size)
    finished = []
    for smaller, plan in results:
        small = PartialInterpreter(smaller, task.model, task.args, task.kwargs)
        if _in_turn(recipe, plan):
            _rebuild(dense, small, more + held_out, recipe)
        if draws:
            _distil(dense, small, lessons, task.loss, recipe)
        on_batches, on_generated = (mean_divergence(dense, small, judge, task.loss) for judge in judges)
        distances = None if on_generated is None else Distances(on_generated, on_batches)
        finished.append(CompressedProgram(smaller, plan, distances))
    return finished


def _with_scales(task: Task, dense: PartialInterpreter) -> Task:
    """With a loss that knows how large the dense model's outputs are, where it is their distance."""
    narrower = next((coupling.name for coupling in task.couplings.offered if coupling.resized), None)
    if narrower is not None and is_distance(task.loss):
        raise ScoreError(
            f"without {narrower} an output is narrower than the dense model's, so that their distance says nothing: "
            "give loss=, a function (output, args, kwargs) -> scalar, or detect without allow='cache'"
        )
    with torch.no_grad():
        return replace(task, loss=scaled_loss(task.loss, (dense.answer(*batch) for batch in task.batches)))


def _in_turn(recipe: Recipe, plan: Plan) -> bool:
    """Whether layers are solved one after the other.

    Where a norm runs over what is kept, the dense model's inputs are not those of the smaller one.
    """
    if recipe.least_squares is False:
        return False
    return recipe.least_squares == IN_TURN or any(selection.inexact for selection in plan)


def _shrink(program: ExportedForm, plan: Plan, weights: Compensated) -> None:
    """Make up for what the plan removes, and remove it."""
    keep = {selection.name: selection.mask for selection in plan}
    with stage("solving"):
        for name, value in weights.compensated(keep):
            program.replace_parameter(name, value)
    shrink_program(program, plan)


def _rebuild(dense: PartialInterpreter, small: PartialInterpreter, batches: Sequence[Batch], recipe: Recipe) -> None:
    """Least squares layer by layer."""
    with stage("solving in turn"):
        rebuild = Reconstruct(recipe.least_squares_damping)
        rebuild.run(dense, small, batches, lambda stages: recipe.with_progress(stages, "reconstruct"))


@dataclass(frozen=True, slots=True, eq=False)
class _Lessons:
    """What distillation reads, in groups of samples where these are small."""

    learning: Sequence[Batch]
    """The user's, again and again."""
    validation: Sequence[Batch]
    """The user's, held out."""
    fresh: Sequence[Batch] = ()
    """What the model wrote, once each."""
    judges: Sequence[Batch] = ()
    """What it wrote, held out."""
    length: int = 0
    """How many are read in all."""


def _lessons(
    dense: PartialInterpreter, task: Task, samples: tuple[Sequence[Batch], Sequence[Batch]], recipe: Recipe, size: int
) -> _Lessons:
    """What to distil on. samples: the user's to learn from, and those that are held out."""
    text, drawn = task.text, recipe.draws(len(task.batches))
    if not drawn:
        return _Lessons((), ())
    learning, validation = (grouped(some, size, dense, task.loss) for some in samples)
    if text is None:
        return _Lessons(learning, validation, length=recipe.draws(len(learning)))
    judges = grouped(text.judges, size, dense, task.loss)
    size = len(text.judges) // len(judges)  # 1 where they are not taken side by side
    length = recipe.draws(len(learning) + math.ceil(len(text.windows) / size))
    with stage("text for distillation"):
        fresh = text.unread(size * round(length * text.share))
    return _Lessons(learning, validation, grouped(fresh, size, dense, task.loss), judges, length)


def _distil(
    dense: PartialInterpreter, small: PartialInterpreter, lessons: _Lessons, loss: Loss, recipe: Recipe
) -> None:
    with stage("distillation"):
        distill = Distill(
            lessons.length, recipe.rate, recipe.step, recipe.mixed, recipe.predicted, lessons.fresh, lessons.judges
        )
        learning, validation = lessons.learning, lessons.validation
        distill.run(dense, small, learning, loss, validation, lambda order: recipe.with_progress(order, "distill"))


def _group_size(curvature: Curvature | None, samples: int) -> int:
    """How many samples distillation reads at once: as many as hold `ROWS` rows, where that is known."""
    rows = max((moments.rows for moments in curvature.inputs.values()), default=0) if curvature is not None else 0
    return math.ceil(ROWS * samples * curvature.probes / rows) if curvature is not None and rows else 1


def _check_loss(dense: PartialInterpreter, task: Task, *, distilled: bool) -> None:
    """Raise ScoreError, before anything slow, for a loss that tells nothing at the dense model."""

    weights = dense.weights()
    with torch.no_grad():
        answers = ((batch, answer_of(dense, weights, batch)) for batch in task.batches)
        batch, answer = check_slope(probes_of(task.loss, 0)[0], answers)
        if distilled:
            check_convex(task.loss, answer, batch)


def _planned(
    program: ExportedForm,
    task: Task,
    held_out: Sequence[Batch],
    ratios: Sequence[float],
    recipe: Recipe,
    options: AllPlanOptions,
) -> tuple[list[Plan], Compensated]:
    """A plan per ratio, and the weights that compensate what it removes; bases have changed in the program."""
    evaluator = PartialInterpreter(program, task.model, task.args, task.kwargs)
    # What a module can carry may be whole heads where it cannot carry what is in them.
    containers = options.get("expressible_in") is not None or options.get("widths") is not None
    chosen = choose(task.couplings, options.get("kinds"), options.get("exclude", ()), containers=containers)
    measurement = _measured(program, evaluator, task, recipe, chosen)
    couplings = _reached(task.couplings, measurement.unreached)
    if task.scores is None:
        with stage("surgeon"):
            shown = partial(recipe.with_progress, label="surgeon")
            scores = Scores(SECOND_ORDER, measurement.scores(recipe.damping, shown))
    else:
        scores = Scores("given", given_scores(task.couplings, chosen, task.scores))
    planning = recipe.planning(options)
    plans = [make_plan(couplings, ratio, scores, **planning) for ratio in ratios]
    damping = recipe.least_squares_damping if recipe.least_squares else None
    weights = measurement.compensated(couplings.offered, damping, recipe.gate_damping if recipe.gates else None)
    if held_out:

        def watch(trials: Sequence[Trial]) -> Iterable[Trial]:
            return recipe.with_progress(trials, "sensitivity")

        search = Sensitivity(evaluator, weights, held_out, task.loss, recipe.rounds, watch)
        with stage("search"):
            plans = [search.plan(couplings, ratio, scores, **planning) for ratio in ratios]
    return plans, weights


def _alternating(samples: Sequence[Batch], others: Sequence[Batch]) -> list[Batch]:
    """Both in turn, so that whoever takes every so many-th gets some of both."""
    return [batch for pair in zip_longest(samples, others) for batch in pair if batch is not None]


def _split(batches: Sequence[Batch], every: int, most: int | None = None) -> tuple[list[Batch], list[Batch]]:
    """The batches without every so many-th, and those, of which there are so many at most."""
    chosen = range(every - 1, len(batches), every)[:most]
    return [batch for i, batch in enumerate(batches) if i not in chosen], [batches[i] for i in chosen]


def _hold_out(batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Samples to score on, and a few to measure sensitivities on."""
    if len(batches) < HOLDOUT_EVERY:
        raise ScoreError(
            f"allocation='sensitivity' holds every {HOLDOUT_EVERY}th sample back: pass at least {HOLDOUT_EVERY}"
        )
    return _split(batches, HOLDOUT_EVERY, HOLDOUT_MOST)


def _measured(
    program: ExportedForm, evaluator: PartialInterpreter, task: Task, recipe: Recipe, chosen: Sequence[Coupling]
) -> Measurement:
    """What the data says of the chosen couplings, in the bases that suit removal."""
    rounded = in_bfloat16(evaluator, {member.parameter for coupling in chosen for member in coupling.members})

    def collect(views: CouplingViews, results: Sequence[LinearUse]) -> Curvature:
        label = "bases" if results else "curvature"
        with stage(label):
            return Collector(rounded, views, results).run(recipe.with_progress(task.batches, label), task.loss)

    # Least squares layer by layer, as where a norm runs over what is kept, measures by itself.
    solves = recipe.least_squares not in (False, IN_TURN) and not any(coupling.inexact for coupling in chosen)
    return measure(program, chosen, collect, basis=recipe.basis, solves=solves)


def _reached(couplings: Couplings, idle: Sequence[str]) -> Couplings:
    """The couplings without those of which the data says nothing."""
    if not idle:
        return couplings
    names = ", ".join(idle[:4]) + (f" and {len(idle) - 4} more" if len(idle) > 4 else "")
    warn_caller(
        f"the calibration data never reaches {names}, which therefore stay whole; the ratio counts the other "
        "couplings: calibrate with more or other data"
    )
    left = couplings.select(predicate=lambda c: c.name not in idle)
    if not left.offered:
        raise PlanError("the calibration data reaches no coupling at all: pass batches that the model reads")
    return left
