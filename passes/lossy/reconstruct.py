"""Let what stays do what everything did: layer by layer, on the inputs that the smaller model itself makes.

The dense and the smaller program run side by side, batch by batch. At every matrix that lost inputs, the dense one's
output on the smaller one's activations is the target: first the matrix is solved anew by damped least squares, then,
on request, it and everything before it since the last such matrix is fitted to the target by a few epochs of Adam.
From there both go on with the smaller one's output, so that each layer answers for its own losses only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from ecospa_fx.errors import ScoreError
from ecospa_fx.graph.evaluate import Evaluator, Values, detached
from ecospa_fx.graph.sites import Site, find_sites
from ecospa_fx.importance.curvature import Moments
from ecospa_fx.importance.score import Batch

NOISE = 1e-7
"""Variance below this share of the mean square is rounding."""


@dataclass(frozen=True, slots=True)
class Reconstruct:
    """``Reconstruct(…).run(dense, small, batches)``.

    damping: of the least squares, in means of the diagonal; epochs: of the fit, 0 for none; rate: Adam's, in root mean
    squares of each parameter; step: batches per step; held: every how many-th batch only judges whether the fit helped.
    """

    damping: float = 0.1
    epochs: int = 4
    rate: float = 0.02
    step: int = 8
    held: int = 8
    name: str = "reconstruct"

    def run(
        self,
        dense: Evaluator,
        small: Evaluator,
        batches: Sequence[Batch],
        watch: Callable[[Sequence[Stage]], Iterable[Stage]] = lambda stages: stages,
    ) -> list[str]:
        """Change the smaller program's parameters in place.

        Returns for each matrix that lost inputs what became of it. watch: wraps the stages, to show progress.
        """
        stages = stages_of(dense, small)
        states = [(dense.start(*batch), small.start(*batch)) for batch in batches]
        done, told = (0, 0), []
        for stage in watch(stages):
            segment = _Segment(stage, dense, small, done)
            told.append(segment.rebuild(states, self))
            done = segment.end
        return told


@dataclass(frozen=True, slots=True, eq=False)
class Stage:
    """A matrix that lost inputs, in both programs."""

    site: Site
    twin: fx.Node


def stages_of(dense: Evaluator, small: Evaluator) -> list[Stage]:
    """The sites that lost inputs and still have all their outputs, in the order of the graph."""
    by_name = {node.name: node for node in small.order}
    found = []
    for site in find_sites(dense.program):
        before, after = (e.program.tensor(site.parameter).shape for e in (dense, small))
        lost, kept = before[site.in_axis] != after[site.in_axis], before[1 - site.in_axis] == after[1 - site.in_axis]
        if lost and kept and site.node.name in by_name:
            found.append(Stage(site, by_name[site.node.name]))
    return found


class _Segment:
    """The nodes from one site, exclusive, to the next one, inclusive, in both programs."""

    def __init__(self, stage: Stage, dense: Evaluator, small: Evaluator, begin: tuple[int, int]) -> None:
        self.site, self.twin, self.dense, self.small = stage.site, stage.twin, dense, small
        self.end = (dense.order.index(stage.site.node) + 1, small.order.index(stage.twin) + 1)
        self.dense_nodes = dense.order[begin[0] : self.end[0]]
        self.small_nodes = small.order[begin[1] : self.end[1]]
        self.weights = small.weights()

    def rebuild(self, states: list[tuple[Values, Values]], options: Reconstruct) -> str:
        """Solve, fit, and let both programs go on with the new output."""
        fixed = self.dense.weights()
        for values, _ in states:
            values.update(fixed)
            with torch.no_grad():
                self.dense.run(self.dense_nodes, values)
            _forget(values, fixed)
        targets = [values[self.site.node] for values, _ in states]
        self._solve(states, targets, options.damping)
        told = self._fit(states, targets, options) if options.epochs else "solved"
        for values, own in states:
            with torch.no_grad():
                own.update(self.weights)
                self.small.run(self.small_nodes, own)
            _forget(own, self.weights)
            values[self.site.node] = own[self.twin].clone() if self.dense.overwrites else own[self.twin]
        return f"{self.site.parameter}: {told}"

    def _run(self, own: Values, *, whole: bool) -> Values:
        """A copy of a batch's values after the segment, or right before its last node."""
        # Together, so that views of one tensor stay views of one.
        fresh = deepcopy(list(own.values())) if self.small.overwrites else own.values()
        values = {**dict(zip(own, fresh, strict=True)), **self.weights}
        self.small.run(self.small_nodes if whole else self.small_nodes[:-1], values)
        return values

    # -- least squares -------------------------------------------------------------------------------------------

    def _solve(self, states: list[tuple[Values, Values]], targets: list[Tensor], damping: float) -> None:
        """W ← W + R (A + λ)⁻¹, A = Σ x xᵀ, R = Σ (y - W x - b) xᵀ, both centred if there is a bias."""
        weight = self.site.matrix(self._held(self.site.parameter))
        bias = self._held(self.site.bias) if self.site.bias is not None else None
        joint = Moments(sum(weight.shape), weight.device)  # of inputs and residuals together
        activation = self._twin_input()
        with torch.no_grad():
            for (_, own), target in zip(states, targets, strict=True):
                rows = self._run(own, whole=False)[activation].flatten(0, -2).float()
                residual = target.flatten(0, -2).float() - nn.functional.linear(rows, weight.float(), _float(bias))
                joint.add(torch.cat([rows, residual], 1))
        n = weight.shape[1]
        second = joint.covariance() if bias is not None else joint.second
        noise = float(joint.second.diagonal()[:n].mean()) * NOISE  # of what does not vary, nothing is to be learnt
        change = _least_squares(second[:n, :n], second[n:, :n], damping, noise)
        self._set(self.site.parameter, self.site.matrix(weight.double() + change))
        if bias is not None:
            mean = joint.total / max(joint.rows, 1)
            self._set(str(self.site.bias), bias.double() + mean[n:] - change @ mean[:n])

    def _twin_input(self) -> fx.Node:
        """The activation of the smaller program's site: its argument where the dense one has the input."""
        flat = list(self.site.node.all_input_nodes)
        found: fx.Node = list(self.twin.all_input_nodes)[flat.index(self.site.input)]
        return found

    def _held(self, name: str | None) -> Tensor:
        return self.small.program.tensor(str(name)).detach()

    def _set(self, name: str, values: Tensor) -> None:
        held = self._held(name)
        self.small.program.replace_parameter(name, values.to(held.dtype).contiguous())
        self.weights = self.small.weights()

    # -- fit -----------------------------------------------------------------------------------------------------

    def _fit(self, states: list[tuple[Values, Values]], targets: list[Tensor], options: Reconstruct) -> str:
        """Adam on the squared error; undone where it does not help on batches that it did not see."""
        leaves = self._trained()
        judges = [i for i in range(len(states)) if i % options.held == options.held - 1]
        learned = [i for i in range(len(states)) if i not in set(judges)]
        before = self._error(states, targets, judges or learned)
        saved = {node: leaf.detach().clone() for node, leaf in leaves.items()}
        self.weights.update(leaves)
        self._epochs(states, targets, learned, options, leaves)
        after = self._error(states, targets, judges or learned)
        helped = after < before
        for node, leaf in leaves.items():
            self._set(self.small.program.parameters[node], leaf.detach() if helped else saved[node])
        return f"solved, then fitted from {before:.4g} to {after:.4g}" + ("" if helped else ", which was undone")

    def _epochs(
        self,
        states: list[tuple[Values, Values]],
        targets: list[Tensor],
        learned: list[int],
        options: Reconstruct,
        leaves: dict[fx.Node, Tensor],
    ) -> None:
        groups = [{"params": [leaf], "lr": options.rate * _size(leaf)} for leaf in leaves.values()]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
        steps = options.epochs * math.ceil(len(learned) / options.step)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: (1 + math.cos(math.pi * i / steps)) / 2)
        source = torch.Generator().manual_seed(0)
        with torch.inference_mode(False), torch.enable_grad():
            for _ in range(options.epochs):
                order = torch.randperm(len(learned), generator=source).tolist()
                for begin in range(0, len(order), options.step):
                    for i in order[begin : begin + options.step]:
                        chosen = learned[i]
                        result = self._run(states[chosen][1], whole=True)[self.twin]
                        (result.float() - targets[chosen].float()).square().mean().backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    schedule.step()

    def _trained(self) -> dict[fx.Node, Tensor]:
        """Fresh leaves for what the site's output depends on: parameters that lost elements, and its own."""
        before: set[fx.Node] = {self.twin}
        for node in reversed(self.small_nodes):
            if node in before:
                before.update(node.all_input_nodes)
        program, original = self.small.program, self.dense.program
        own = {self.site.parameter, self.site.bias}
        return {
            node: nn.Parameter(program.tensor(name).detach().clone())
            for node, name in program.parameters.items()
            if node in before
            and (name in own or program.tensor(name).shape != original.tensor(name).shape)
            and program.tensor(name).is_floating_point()
        }

    def _error(self, states: list[tuple[Values, Values]], targets: list[Tensor], chosen: list[int]) -> float:
        total = 0.0
        with torch.no_grad():
            for i in chosen:
                result = self._run(states[i][1], whole=True)[self.twin]
                total += float((result.float() - targets[i].float()).square().mean())
        if not math.isfinite(total):
            raise ScoreError(
                f"the smaller model's output at {self.site.parameter!r} is not finite: run it in bfloat16 or float32"
            )
        return total / max(len(chosen), 1)


def _least_squares(second: Tensor, cross: Tensor, damping: float, noise: float) -> Tensor:
    """C (A + λ)⁻¹ with λ = damping · mean of the diagonal + noise; zeros where there is nothing to solve for."""
    added = damping * float(second.diagonal().mean().clamp(min=0)) + noise
    eye = torch.eye(len(second), dtype=second.dtype, device=second.device)
    factor, failed = torch.linalg.cholesky_ex(second + added * eye)
    if added == 0 or failed:
        return torch.zeros_like(cross)
    return torch.cholesky_solve(cross.T, factor).T


def _forget(values: Values, weights: Values) -> None:
    """Keep a batch's own values only."""
    for node in weights:
        values.pop(node, None)
    for node, value in values.items():
        values[node] = detached(value)


def _float(value: Tensor | None) -> Tensor | None:
    return value.float() if value is not None else None


def _size(parameter: Tensor) -> float:
    """Root mean square; of zeros, what it is for common initialisations."""
    return float(parameter.detach().float().square().mean().sqrt()) or 0.02
