"""Sparse training by masks: what a shrink would remove is set to zero, in weights and in the optimizer's state.

Losses are those of `SparseTraining`, which removes it for good: zero rows and columns get zero gradients. Layers keep
their shapes and are compiled once, whatever the widths, so that many recipes can be tried in little time. What recipes
add to a shrink is here too: changed bases, second-order scores, least squares, fading, a teacher.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from books import head_loss
from torch import Tensor, nn
from torch.optim import Optimizer

import ecospa_fx as eco
from ecospa_fx.capture.export import captures
from ecospa_fx.coupling.types import Coupling
from ecospa_fx.coupling.unit_elements import coupled_elements, removed_elements
from ecospa_fx.importance.compensation import Compensated
from ecospa_fx.importance.curvature import Collector, Curvature
from ecospa_fx.importance.linalg import regular_inverse
from ecospa_fx.importance.linear_views import CouplingViews, views_of
from ecospa_fx.ir.linears import LinearUse, linear_uses
from ecospa_fx.passes.lossy.change_basis import ChangeBasis, balanced
from ecospa_fx.passes.lossy.measurement import Collect, Measurement, measure
from ecospa_fx.plan import Plan, Selection
from ecospa_fx.runtime.interpreter import PartialInterpreter
from ecospa_fx.training.allocation import allocate, bounds
from ecospa_fx.training.moving_scores import MovingScores
from ecospa_fx.training.optimizer_basis import change_basis_of_states
from ecospa_fx.training.remaining_couplings import narrowed
from ecospa_fx.training.settings import Settings, choose_couplings
from ecospa_fx.training.tensor_cuts import cuts_between

Compensation = Literal["none", "solve", "full"]


@dataclass(frozen=True, slots=True)
class Options:
    """target: share of the block parameters to remove; scores: of training; allocation, band, round_to, window: as in
    `SparseTraining`; compensate: nothing, least squares, or bases and second-order scores too; damping: of the least
    squares; fade: over how many steps what goes fades out before it goes."""

    target: float
    scores: str = "gate-fisher"
    allocation: Literal["global", "uniform"] = "global"
    band: tuple[float, float] = (0.6, 1.6)
    round_to: int = 4
    window: int = 50
    compensate: Compensation = "none"
    damping: float = 0.1
    fade: int = 0


class MaskedTraining:
    """Shrinks of one model by masks. `gather` after backward, `shrink` and `fade` after the optimizer's step."""

    def __init__(self, model: nn.Module, ids: Tensor, optimizer: Optimizer, options: Options) -> None:
        self.model, self.optimizer, self.options = model, optimizer, options
        self.parameters = dict(model.named_parameters())
        settings = Settings(allocation=options.allocation, band=options.band, round_to=options.round_to)
        self.limits = settings.shares
        couplings = eco.detect(model, (ids[:2],))
        self.shapes = couplings.shapes
        self.couplings = choose_couplings(couplings, settings, options.scores, model)
        self.keep = {c.name: torch.ones(c.carriers, c.size, dtype=torch.bool) for c in self.couplings}
        self.running = MovingScores(options.scores, options.window)
        self.running.follow(self.couplings, self.parameters, {})
        self.fading: dict[str, Tensor] = {}
        self.faded = 0
        if options.compensate != "none":
            self.program = next(iter(captures(model, (ids[:2],), {}, dynamic=True)))
            self.evaluator = PartialInterpreter(self.program, model, (ids[:2],), {})
            self.views = views_of(self.couplings, linear_uses(self.program))

    def state_dict(self) -> dict[str, Any]:
        """What has gone, and what is known of the rest."""
        return {"keep": self.keep, "scores": self.running.values(), "fading": self.fading, "faded": self.faded}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.keep, self.fading = ({n: m.cpu() for n, m in state[k].items()} for k in ("keep", "fading"))
        self.running.follow(self.couplings, self.parameters, state["scores"])
        self.faded = state["faded"]

    @property
    def removed(self) -> float:
        """Share of the couplings' elements that is gone."""
        removed = removed_elements(self.shapes, [(c.members, self.keep[c.name]) for c in self.couplings])
        return removed / self.held(self.couplings, self.shapes)

    @staticmethod
    def held(couplings: Sequence[Coupling], shapes: Mapping[str, tuple[int, ...]]) -> int:
        return coupled_elements(shapes, (c.members for c in couplings))

    def plan(self, keep: Mapping[str, Tensor]) -> Plan:
        """What stays, as a plan of the dense model."""
        return Plan(tuple(Selection.of(c, keep[c.name]) for c in self.couplings), tuple(self.shapes.items()))

    def gather(self) -> None:
        """Take in the gradients of a step."""
        self.running.gather()

    # -- a shrink ----------------------------------------------------------------------------------------------

    def shrink(self, share: float, batches: Sequence[Tensor] = ()) -> None:
        """Down to a share of the target. batches: ids [batch, length + 1], to compensate by."""
        if self.options.compensate == "none":
            self._mask(self.units(self.running.scores(), share))
            return
        scores, keep, views = self.running.scores(), dict(self.keep), self.views
        self.program.values = {n: nn.Parameter(p.detach().clone()) for n, p in self.parameters.items()}
        collect = partial(self._measured, batches)
        if self.options.compensate == "full":
            turned, measurement = self._turned(collect)
            keep.update(turned)
            views, curvature, scores = measurement.views, measurement.curvature, measurement.scores(0.01)
        else:
            views = CouplingViews(self.views.inputs, (), ())
            curvature = collect(views, ())
        self.keep = keep
        kept = self.units(scores, share)
        self._solve(views, curvature, kept)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.program.tensor(name))
        self._mask(kept)

    def units(self, scores: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
        """What stays at a share of the target, as `SparseTraining` chooses it."""
        options, left = self.options, 1 - self.options.target * share
        factors = self.plan(self.keep).factors()
        shapes = {**self.shapes, **{n: c.after for n, c in cuts_between(self.shapes, {}, factors).items()}}
        now = narrowed(self.couplings, self.keep, factors, shapes)
        dense = {c.name: c.size for c in self.couplings}
        limits = {c.name: bounds(dense[c.name], c.size, left, self.limits, options.round_to) for c in now}
        goal = self.held(now, shapes) - round(self.held(self.couplings, self.shapes) * left)
        current = {c.name: scores[c.name][self.keep[c.name]].view(c.carriers, c.size) for c in now}
        uniform = dense if options.allocation == "uniform" else None
        steps = dict.fromkeys(dense, options.round_to)
        kept = allocate(now, shapes, current, limits, goal, round_to=steps, dense=uniform)
        found = {}
        for name, before in self.keep.items():
            found[name] = before.clone()
            found[name][before] = kept[name].flatten()
        return found

    @torch.no_grad()
    def _mask(self, keep: Mapping[str, Tensor]) -> None:
        self.keep = dict(keep)
        for name, mask in self.plan(keep).masks(self.model).items():
            parameter = self.parameters[name]
            state = [v for v in self.optimizer.state[parameter].values() if v.shape == parameter.shape]
            for tensor in (parameter, *state):
                tensor.mul_(mask.to(tensor.device))

    # -- compensation ------------------------------------------------------------------------------------------

    def _measured(self, batches: Sequence[Tensor], views: CouplingViews, results: Sequence[LinearUse]) -> Curvature:
        """Second moments of what the consumers read, and of the loss's gradients, at the weights as they are."""
        weight = self.parameters["embed.weight"].detach()

        def loss(output: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
            return head_loss(output[:, :-1], weight, args[0][:, 1:])

        given: list[tuple[tuple[Tensor], dict[str, Any]]] = [((b[:, :-1],), {}) for b in batches]
        return Collector(self.evaluator, views, results).run(given, loss)

    def _turned(self, collect: Collect) -> tuple[dict[str, Tensor], Measurement]:
        """Turn linear couplings, their optimizer states too; what is alive comes first then."""
        keep = {}

        def made(change: ChangeBasis) -> ChangeBasis:
            change = balanced(change, self.program)
            change.run(self.program)
            inverse = regular_inverse(change.basis).mT
            for group, matrix in ((change.first, inverse), (change.second, change.basis)):
                for side in group:
                    weight = self.parameters[side.member.parameter]
                    change_basis_of_states([self.optimizer], weight, side.member.axis, side.positions, matrix)
            name = next(c.name for c in self.couplings if change.first[0].member in c.members)
            before = self.keep[name]
            keep[name] = (torch.arange(before.shape[1]) < before[0].sum()).expand_as(before).clone()
            return change

        return keep, measure(self.program, self.couplings, collect, apply=made)

    def _solve(self, views: CouplingViews, curvature: Curvature, keep: Mapping[str, Tensor]) -> None:
        """Let the units that stay do what those that go did."""
        values = {name: tensor.detach() for name, tensor in self.program.values.items()}
        made = Compensated(self.couplings, values, views, curvature, self.options.damping)
        for name, value in made.compensated(keep):
            self.program.replace_parameter(name, value)

    # -- fading ------------------------------------------------------------------------------------------------

    def begin_fading(self, share: float) -> None:
        """Choose what goes at the next shrink now."""
        self.fading, self.faded = self.units(self.running.scores(), share), 0

    @torch.no_grad()
    def fade(self) -> None:
        """One step of fading: the consumers of what goes lose an equal part each time."""
        steps = self.options.fade
        factor = max(0.0, 1 - 1 / max(1, steps - self.faded))
        self.faded += 1
        for coupling in self.couplings:
            gone = self.keep[coupling.name] & ~self.fading[coupling.name]
            for member in coupling.members:
                if member.role == "consumer":
                    at = member.indices[gone].flatten().to(self.parameters[member.parameter].device)
                    weight = self.parameters[member.parameter]
                    weight.index_copy_(member.axis, at, weight.index_select(member.axis, at) * factor)

    def end_fading(self) -> None:
        """Remove what has faded."""
        self._mask(self.fading)
        self.fading = {}
