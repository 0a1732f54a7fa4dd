"""Let what stays do what everything did: layer by layer, on the inputs that the smaller model itself makes.

The dense and the smaller program run side by side, batch by batch. At every matrix that lost inputs, the dense one's
output on the smaller one's activations is the target, for which the matrix is solved anew by damped least squares.
From there both go on with the smaller one's output, so that each layer answers for its own losses only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from ecospa_fx.errors import ScoreError
from ecospa_fx.importance.curvature import Moments, Total
from ecospa_fx.importance.linalg import least_squares
from ecospa_fx.importance.score import Batch
from ecospa_fx.ir.linears import LinearUse, linear_uses
from ecospa_fx.runtime.interpreter import NodeValues, PartialInterpreter, detached


@dataclass(frozen=True, slots=True)
class Reconstruct:
    """``Reconstruct(damping).run(dense, small, batches)``."""

    damping: float = 0.1
    """Of least squares, in means of the diagonal."""
    name: str = "reconstruct"

    def run(
        self,
        dense: PartialInterpreter,
        small: PartialInterpreter,
        batches: Sequence[Batch],
        watch: Callable[[Sequence[Stage]], Iterable[Stage]] = lambda stages: stages,
        total: Total | None = None,
    ) -> int:
        """Change the smaller program's parameters in place. watch: wraps the stages, to show progress; total: where
        several processes with batches of their own solve together.

        Returns how many matrices were solved. Raises ScoreError where the smaller model's values are not finite.
        """
        stages = stages_of(dense, small)
        states = [(dense.start(*batch), small.start(*batch)) for batch in batches]
        done = (0, 0)
        for stage in watch(stages):
            segment = _Segment(stage, dense, small, done, total)
            segment.rebuild(states, self.damping)
            done = segment.end
        return len(stages)


@dataclass(frozen=True, slots=True, eq=False)
class Stage:
    """A matrix that lost inputs, in both programs."""

    site: LinearUse
    """In the dense program."""
    twin: fx.Node
    """Its node in the smaller program."""


def stages_of(dense: PartialInterpreter, small: PartialInterpreter) -> list[Stage]:
    """The sites that lost inputs and still have all their outputs, in the order of the graph."""
    by_name = {node.name: node for node in small.order}
    stages = []
    for site in linear_uses(dense.program):
        before, after = (e.program.tensor(site.parameter).shape for e in (dense, small))
        lost, kept = before[site.in_axis] != after[site.in_axis], before[1 - site.in_axis] == after[1 - site.in_axis]
        if lost and kept and site.node.name in by_name:
            stages.append(Stage(site, by_name[site.node.name]))
    return stages


class _Segment:
    """The nodes from one site, exclusive, to the next one, inclusive, in both programs."""

    def __init__(
        self,
        stage: Stage,
        dense: PartialInterpreter,
        small: PartialInterpreter,
        begin: tuple[int, int],
        total: Total | None,
    ) -> None:
        self._total = total
        self.site, self.twin, self.dense, self.small = stage.site, stage.twin, dense, small
        self.end = (dense.order.index(stage.site.node) + 1, small.order.index(stage.twin) + 1)
        self.dense_nodes = dense.order[begin[0] : self.end[0]]
        self.small_nodes = small.order[begin[1] : self.end[1]]
        self.weights = small.weights()

    def rebuild(self, states: list[tuple[NodeValues, NodeValues]], damping: float) -> None:
        """Solve, and let both programs go on with the new output."""
        fixed = self.dense.weights()
        for values, _ in states:
            values.update(fixed)
            with torch.no_grad():
                self.dense.run(self.dense_nodes, values)
            _forget(values, fixed)
        targets = [values[self.site.node] for values, _ in states]
        self._solve(states, targets, damping)
        for values, small_values in states:
            with torch.no_grad():
                small_values.update(self.weights)
                self.small.run(self.small_nodes[-1:], small_values)
            _forget(small_values, self.weights)
            output = small_values[self.twin]
            values[self.site.node] = output.clone() if self.dense.overwrites else output

    def _input(self, values: NodeValues) -> Tensor:
        """Go on to right before the site; its inputs [rows, n]."""
        values.update(self.weights)
        self.small.run(self.small_nodes[:-1], values)
        _forget(values, self.weights)
        rows: Tensor = values[self._twin_input()]
        return rows.flatten(0, -2).float()

    def _solve(self, states: list[tuple[NodeValues, NodeValues]], targets: list[Tensor], damping: float) -> None:
        """W ← W + R (A + λ)⁻¹, A = Σ x xᵀ, R = Σ (y - W x - b) xᵀ, both centred if there is a bias."""
        weight = self.site.matrix(self._tensor(self.site.parameter))
        bias = self._tensor(self.site.bias) if self.site.bias is not None else None
        moments = Moments(weight.shape[1], weight.device)
        sums, cross = moments.total.new_zeros(len(weight)), moments.total.new_zeros(weight.shape)
        with torch.no_grad():
            for (_, small_values), target in zip(states, targets, strict=True):
                rows = self._input(small_values)
                residual = target.flatten(0, -2).float() - nn.functional.linear(rows, weight.float(), _float(bias))
                moments.add(rows)
                sums += residual.sum(0)
                cross += residual.T @ rows
        if self._total is not None:
            moments.add_up(self._total)
            self._total(sums)
            self._total(cross)
        if not (moments.second.isfinite().all() and cross.isfinite().all()):
            raise ScoreError(
                f"the smaller model's values at {self.site.parameter!r} are not finite: run it in bfloat16 or float32"
            )
        square = float(moments.second.diagonal().mean())
        if bias is None:
            change = least_squares(moments.second, cross, damping, square)
        else:
            count = max(moments.rows, 1)
            mean = moments.total / count
            change = least_squares(moments.covariance(), cross - torch.outer(sums, mean), damping, square)
            self._set(str(self.site.bias), bias.double() + sums / count - change @ mean)
        self._set(self.site.parameter, self.site.matrix(weight.double() + change))

    def _twin_input(self) -> fx.Node:
        """The activation of the smaller program's site: its argument where the dense one has the input."""
        flat = list(self.site.node.all_input_nodes)
        node: fx.Node = list(self.twin.all_input_nodes)[flat.index(self.site.input)]
        return node

    def _tensor(self, name: str | None) -> Tensor:
        return self.small.program.tensor(str(name)).detach()

    def _set(self, name: str, values: Tensor) -> None:
        before = self._tensor(name)
        self.small.program.replace_parameter(name, values.to(before.dtype).contiguous())
        self.weights = self.small.weights()


def _forget(values: NodeValues, weights: NodeValues) -> None:
    """Keep a batch's own values only."""
    for node in weights:
        values.pop(node, None)
    for node, value in values.items():
        values[node] = detached(value)


def _float(value: Tensor | None) -> Tensor | None:
    return value.float() if value is not None else None
