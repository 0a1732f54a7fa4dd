"""The recipe of `compress`: bases, scores, allocation, gates, least squares and fit, in the order that works."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ecospa_fx.budget.allocate import choose
from ecospa_fx.budget.allocate import plan as make_plan
from ecospa_fx.coupling.couplings import Coupling, Couplings
from ecospa_fx.errors import PlanError, ScoreError
from ecospa_fx.graph.evaluate import Evaluator
from ecospa_fx.graph.program import ExportedForm
from ecospa_fx.graph.sites import Site, find_sites
from ecospa_fx.importance.curvature import Collector, Curvature, Gate, output_moments
from ecospa_fx.importance.matrices import damped
from ecospa_fx.importance.progress import watched
from ecospa_fx.importance.score import Batch, Loss, arguments
from ecospa_fx.importance.scores import Scores
from ecospa_fx.importance.second_order import Views, unit_scores, views_of, without_traffic
from ecospa_fx.importance.surgeon import kept_gates
from ecospa_fx.plan import Plan


@dataclass(frozen=True, slots=True)
class Recipe:
    """What goes into second-order compression; each ingredient can be left out.

    basis: turn linear couplings (V with O, Q with K where nothing rotates them) before units are chosen.
    damping: of the surgeon's matrices, in means of their diagonals. gates: rescale the queries and keys that are kept
    for those that go. least_squares: solve the matrices that lost inputs anew. epochs: of the local fit after that, 0
    for none; rate, step: its learning rate in root mean squares of each parameter, and batches per step.
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


def compress_program(
    program: ExportedForm,
    model: nn.Module,
    example: tuple[Sequence[Any], Mapping[str, Any]],
    couplings: Couplings,
    batches: Sequence[Batch],
    loss: Loss,
    recipe: Recipe,
    ratio: float,
    planning: Mapping[str, Any],
) -> Plan:
    """Make a program smaller in place and let what stays make up for what goes. Returns what was kept."""
    from ecospa_fx.passes.lossy.change_basis import turn_queries, turn_values
    from ecospa_fx.passes.lossy.reconstruct import Reconstruct
    from ecospa_fx.passes.shrink_couplings import shrink_program

    chosen = choose(couplings, planning.get("kinds"), containers=False)
    sites = find_sites(program)
    views = views_of(chosen, sites)

    def shown(label: str, items: Any) -> Any:
        return watched(items, label) if recipe.progress else items

    evaluator = Evaluator(program, model, *example)
    if recipe.basis:
        turn_queries(views, lambda wanted: output_moments(evaluator, wanted, shown("queries", batches)), program)
    collector = Collector(evaluator, views.sites, views.gates, views.others)
    curvature = collector.run(shown("curvature", batches), loss)
    if recipe.basis:
        turn_values(views, curvature, program)
    values = {name: tensor.detach() for name, tensor in program.values.items()}
    scores = Scores("second-order", unit_scores(views, curvature, values, recipe.damping))
    plan = make_plan(couplings, ratio, scores, **planning)
    dense = Evaluator(program.frozen(), model, *example)
    sites = find_sites(dense.program)
    if recipe.gates:
        _rescale(program, views.gates, curvature, plan, recipe.gate_damping)
    shrink_program(program, plan)
    if recipe.least_squares:
        small = Evaluator(program, model, *example)
        Reconstruct(recipe.least_squares_damping, recipe.epochs, recipe.rate, recipe.step).run(
            dense, small, sites, batches, lambda stages: shown("reconstruct", stages)
        )
    return plan


def _rescale(program: ExportedForm, gates: Sequence[Gate], curvature: Curvature, plan: Plan, damping: float) -> None:
    """Multiply both sides of what is kept by the square roots of the best gates."""
    from ecospa_fx.passes.lossy.change_basis import rotated

    removed = {s.name: s.removed for s in plan}
    for gate in gates:
        gone = removed.get(gate.coupling.name)
        if gone is None or not gone.any():
            continue
        scale = kept_gates(damped(curvature.gates[gate.coupling.name], damping), ~gone.to(curvature.gates[gate.coupling.name].device))
        root = scale.clamp(min=0.25, max=4.0).sqrt()
        for member in gate.coupling.members:
            held = program.tensor(member.parameter).detach()
            program.replace_parameter(member.parameter, rotated(held, member.axis, member.indices, torch.diag_embed(root)))
