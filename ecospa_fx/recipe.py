"""The recipe of `compress`: bases, scores, allocation, gates, least squares and fit, in the order that works."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from ecospa_fx.budget.allocate import choose
from ecospa_fx.budget.allocate import plan as make_plan
from ecospa_fx.coupling.couplings import Couplings
from ecospa_fx.errors import PlanError, ScoreError
from ecospa_fx.graph.evaluate import Evaluator
from ecospa_fx.graph.program import ExportedForm
from ecospa_fx.graph.sites import find_sites
from ecospa_fx.importance.curvature import Collector, Curvature, output_moments
from ecospa_fx.importance.matrices import damped
from ecospa_fx.importance.progress import watched
from ecospa_fx.importance.score import Batch, Loss, arguments
from ecospa_fx.importance.scores import Scores
from ecospa_fx.importance.second_order import unit_scores, without_traffic
from ecospa_fx.importance.surgeon import kept_gates
from ecospa_fx.importance.views import Views, views_of
from ecospa_fx.plan import Plan

Item = TypeVar("Item")

SECOND_ORDER = "second-order"
"""The name of the recipe as a method of `compress`."""

SCALES = 0.25, 4.0
"""Gates of kept units stay within these."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What goes into second-order compression; each ingredient can be left out or tuned.

    basis: turn linear couplings (V with O, Q with K where nothing rotates them) before units are chosen.
    damping: of the surgeon's matrices, in means of their diagonals. gates: rescale the queries and keys that are kept
    for those that go, with gate_damping. least_squares: solve the matrices that lost inputs anew, with
    least_squares_damping. epochs: of the local fit after that, 0 for none; rate, step: its learning rate in root mean
    squares of each parameter, and batches per step. progress: bars on stderr.
    """

    basis: bool = True
    damping: float = 0.01
    gates: bool = True
    gate_damping: float = 0.1
    least_squares: bool = True
    least_squares_damping: float = 0.1
    epochs: int = 4
    rate: float = 0.02
    step: int = 8
    progress: bool = False

    def __post_init__(self) -> None:
        for name in ("damping", "gate_damping", "least_squares_damping", "rate"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise ScoreError(f"{name}={value!r} is not a factor: give a positive number")
        for name, least in (("epochs", 0), ("step", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ScoreError(f"{name}={value!r} is not a count: give a whole number of at least {least}")
        if self.epochs and not self.least_squares:
            raise ScoreError("epochs without least_squares=True fit nothing: pass epochs=0 too")

    def shown(self, items: Sequence[Item], label: str) -> Iterator[Item] | Sequence[Item]:
        """The same items, with a bar if wanted."""
        return watched(items, label) if self.progress else items


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """What is to be compressed: a model, how it is called, and the data that says what matters."""

    model: nn.Module
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    couplings: Couplings
    batches: Sequence[Batch]
    loss: Loss


def checked(batches: Iterable[object], loss: Loss | None) -> tuple[list[Batch], Loss]:
    """Calibration data as a list, and the loss. Raises ScoreError for what is missing or no batch."""
    if loss is None:
        raise ScoreError(
            f"method {SECOND_ORDER!r} needs a loss: pass loss=, a function (output, args, kwargs) -> scalar, "
            "or method='magnitude'"
        )
    found = [arguments(batch, number) for number, batch in enumerate(batches)]
    if not found:
        raise ScoreError("there are no batches to calibrate with: pass at least one (args, kwargs)")
    return found, loss


def compress_program(program: ExportedForm, task: Task, ratio: float, recipe: Recipe, **planning: Any) -> Plan:
    """Make a program smaller in place and let what stays make up for what goes. Returns what was kept.

    planning: further options of `plan`. The model itself is not changed. Raises PlanError where the plan does not fit
    the program, ScoreError and InputError for data that tells nothing or does not fit.
    """
    from ecospa_fx.passes.lossy.reconstruct import Reconstruct
    from ecospa_fx.passes.shrink_couplings import shrink_program

    evaluator = Evaluator(program, task.model, task.args, task.kwargs)
    views, curvature = _measured(program, evaluator, task, recipe, planning.get("kinds"))
    couplings = _reached(task.couplings, without_traffic(views, curvature))
    values = {name: tensor.detach() for name, tensor in program.values.items()}
    scores = Scores(SECOND_ORDER, unit_scores(views, curvature, values, recipe.damping))
    plan = make_plan(couplings, ratio, scores, **planning)
    dense = Evaluator(program.frozen(), task.model, task.args, task.kwargs)
    if recipe.gates:
        _rescale(program, views, curvature, plan, recipe.gate_damping)
    shrink_program(program, plan)
    if recipe.least_squares:
        small = Evaluator(program, task.model, task.args, task.kwargs)
        rebuild = Reconstruct(recipe.least_squares_damping, recipe.epochs, recipe.rate, recipe.step)
        rebuild.run(dense, small, task.batches, lambda stages: recipe.shown(stages, "reconstruct"))
    return plan


def _measured(
    program: ExportedForm, evaluator: Evaluator, task: Task, recipe: Recipe, kinds: Sequence[str] | None
) -> tuple[Views, Curvature]:
    """Views of the couplings and what the data says of them, in the bases that suit removal."""
    from ecospa_fx.passes.lossy.change_basis import turn_queries, turn_values

    views = views_of(choose(task.couplings, kinds, containers=False), find_sites(program))
    if recipe.basis:
        turn_queries(views, lambda s: output_moments(evaluator, s, recipe.shown(task.batches, "queries")), program)
    collector = Collector(evaluator, views)
    curvature = collector.run(recipe.shown(task.batches, "curvature"), task.loss)
    if recipe.basis:
        turn_values(views, curvature, program)
    return views, curvature


def _reached(couplings: Couplings, idle: Sequence[str]) -> Couplings:
    """The couplings without those of which the data says nothing."""
    if not idle:
        return couplings
    told = ", ".join(idle[:4]) + (f" and {len(idle) - 4} more" if len(idle) > 4 else "")
    warnings.warn(
        f"the calibration data never reaches {told}, which therefore stay whole; the ratio counts the other couplings: "
        "calibrate with more or other data",
        stacklevel=2,
    )
    left = Couplings((c for c in couplings if c.name not in set(idle)), couplings.model, couplings.example)
    if not left.offered:
        raise PlanError("the calibration data reaches no coupling at all: pass batches that the model reads")
    return left


def _rescale(program: ExportedForm, views: Views, curvature: Curvature, plan: Plan, damping: float) -> None:
    """Multiply both sides of what is kept by the square roots of the best gates."""
    from ecospa_fx.passes.lossy.change_basis import rotated

    removed = {selection.name: selection.removed for selection in plan}
    for gate in views.gates:
        matrix, gone = curvature.gates[gate.coupling.name], removed.get(gate.coupling.name)
        if gone is None or not gone.any():
            continue
        scale = kept_gates(damped(matrix, damping), ~gone.to(matrix.device))
        roots = torch.diag_embed(scale.clamp(*SCALES).sqrt())
        for member in gate.coupling.members:
            held = program.tensor(member.parameter).detach()
            program.replace_parameter(member.parameter, rotated(held, member.axis, member.indices, roots))
