"""One pass over the data for everything that second-order scores and compensation need.

All are sums over rows (tokens, patches) of outer products, in float64: of the inputs of linear layers, of the loss's
gradients at their outputs, and of its gradients by gates. Activations live no longer than their batch's backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ecospa_fx.errors import ScoreError
from ecospa_fx.importance.linear_views import CouplingViews
from ecospa_fx.importance.losses import NormalisedLoss, no_slope
from ecospa_fx.importance.methods import GATE_FISHER, GradientStatistic
from ecospa_fx.importance.output_distance import probes_of
from ecospa_fx.importance.score import Batch, Loss, one_batch
from ecospa_fx.importance.unit_reduction import accumulator_dtype
from ecospa_fx.ir.linears import LinearUse
from ecospa_fx.runtime.interpreter import NodeValues, PartialInterpreter

Total = Callable[[Tensor], None]
"""Replaces a tensor by its sum over all processes, in place."""


class Moments:
    """Of rows x of one width, none yet: how many (`rows`), Σ x [n] (`total`), Σ x xᵀ [n, n] (`second`)."""

    def __init__(self, width: int, device: torch.device) -> None:
        dtype = accumulator_dtype(device)
        self.rows = 0
        self.total = torch.zeros(width, dtype=dtype, device=device)
        self.second = torch.zeros(width, width, dtype=dtype, device=device)

    def add(self, rows: Tensor) -> None:
        """Fold in rows [..., n], in at least float32.

        Products are of the deviations from these rows' mean: a mean that is large would leave nothing of what varies
        in float32. Σ x xᵀ = Σ d dᵀ + m (Σ x)ᵀ + (Σ d) mᵀ with d = x - m, its last two terms in float64.
        """
        flat = rows.reshape(-1, rows.shape[-1])
        flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
        mean = flat.sum(0) / max(len(flat), 1)
        deviations = flat - mean
        mean, rest = mean.to(self.total), deviations.sum(0).to(self.total)
        total = rest + len(flat) * mean
        self.rows += len(flat)
        self.total += total
        self.second += deviations.T @ deviations
        self.second.addmm_(torch.stack([mean, rest], 1), torch.stack([total, mean]))

    def add_up(self, total: Total) -> None:
        """Fold in the rows of all other processes."""
        rows = torch.tensor(self.rows, device=self.total.device)
        for tensor in (rows, self.total, self.second):
            total(tensor)
        self.rows = int(rows)

    def covariance(self) -> Tensor:
        """Σ (x - mean)(x - mean)ᵀ."""
        return self.second - torch.outer(self.total, self.total) / max(self.rows, 1)


class Curvature:
    """What the pass collects; a site or gate that is not a key is not watched.

    inputs: moments of the input; results: of the output; outputs: of the loss's gradient at the output; gates: by
    coupling, Σ e eᵀ [carriers, units, units] over rows of the derivatives e by gates on the units, of the factor at
    which they are smaller; others: by coupling, [carriers, units], sums over samples of squared derivatives by gates.
    probes: how often each sample was read.
    has_slope: whether the loss has any slope at the model's outputs.
    """

    def __init__(self) -> None:
        self.inputs: dict[LinearUse, Moments] = {}
        self.results: dict[LinearUse, Moments] = {}
        self.outputs: dict[LinearUse, Moments] = {}
        self.gates: dict[str, Tensor] = {}
        self.others: dict[str, Tensor] = {}
        self.probes = 1
        self.has_slope = False

    def second(self, site: LinearUse) -> Tensor:
        """Second moment of a site's input, about the mean where a bias can make up for it."""
        moments = self.inputs[site]
        return moments.covariance() if site.bias is not None else moments.second

    def check(self) -> None:
        """Raise ScoreError where something is not finite, or the loss has no slope."""
        if not self.has_slope:
            raise no_slope("second-order scores")
        for kind, by_site in (("input", self.inputs), ("gradient", self.outputs)):
            for site, moments in by_site.items():
                if not moments.second.isfinite().all():
                    raise ScoreError(
                        f"the {kind} of {site.parameter!r} is not finite in the calibration data: "
                        "run the model in bfloat16 or float32, or leave out the batches that overflow"
                    )


class Collector:
    """Runs batches through a program and folds what it sees of some couplings into a `Curvature`.

    results: sites whose outputs are to be known as well, with the gradients there.
    """

    def __init__(self, evaluator: PartialInterpreter, views: CouplingViews, results: Sequence[LinearUse] = ()) -> None:
        self.evaluator, self.curvature = evaluator, Curvature()
        weights = evaluator.program.values
        for site in views.sites:
            out, width = site.matrix(weights[site.parameter]).shape
            self.curvature.inputs[site] = Moments(width, weights[site.parameter].device)
            self.curvature.outputs[site] = Moments(out, weights[site.parameter].device)
        for site in (site for view in views.beside for site in view.positions if site not in self.curvature.inputs):
            width = site.matrix(weights[site.parameter]).shape[1]
            self.curvature.inputs[site] = Moments(width, weights[site.parameter].device)
        for site in results:
            out = site.matrix(weights[site.parameter]).shape[0]
            self.curvature.results[site] = Moments(out, weights[site.parameter].device)
            self.curvature.outputs[site] = Moments(out, weights[site.parameter].device)
        self._gates: dict[LinearUse, list[tuple[Tensor, Tensor]]] = {}
        self._sides: dict[str, list[Tensor]] = {}
        for gate in views.gates:
            self._sides[gate.coupling.name] = [self._side(side) for side in gate.sides]
        names = dict.fromkeys(m.parameter for c in views.others for m in c.members)
        self._leaves = {name: nn.Parameter(weights[name].detach()) for name in names}
        self._statistic = GradientStatistic(GATE_FISHER, self._leaves, views.others) if views.others else None
        self._watched = {site.node: site for site in {**self.curvature.inputs, **self.curvature.outputs, **self._gates}}
        self._begun: list[Tensor] = []
        self._samples, self._unit = 0, 1.0

    def _side(self, side: Mapping[LinearUse, Tensor]) -> Tensor:
        """Zeros [carriers, units, units], to which the hooks of a factor's sites will add."""
        weights = self.evaluator.program.values
        (shape,) = {tuple(positions.shape[:2]) for positions in side.values()}
        device = weights[next(iter(side)).parameter].device
        total = torch.zeros(*shape, shape[1], dtype=accumulator_dtype(device), device=device)
        for site, positions in side.items():
            self._gates.setdefault(site, []).append((total, positions.to(weights[site.parameter].device)))
        return total

    def run(self, batches: Iterable[Batch], loss: Loss) -> Curvature:
        """One forward and backward pass per batch, of which there is at least one; each holds one sample.

        Raises ScoreError where they tell nothing.
        """
        self.watch(batches, loss)
        return self.result()

    def watch(self, batches: Iterable[Batch], loss: Loss) -> None:
        """The passes alone, once."""
        watching = self._statistic.watching() if self._statistic is not None else nullcontext()
        with torch.inference_mode(False), torch.enable_grad(), watching:
            unit = NormalisedLoss(loss)
            for number, batch in enumerate(batches):
                probes = probes_of(loss, number)
                # Each counts as a sample: all that is summed is summed as often, and only ratios matter.
                for probe in probes:
                    one_batch(self._forward, self._inputs, batch, unit.of(probe), number)
                    if self._statistic is not None:
                        self._statistic.fold(number)
                self._samples += len(probes)
                self.curvature.probes = len(probes)
        self.curvature.has_slope, self._unit = not unit.is_flat, unit.unit
        self._rescale(1 / unit.unit)

    def _rescale(self, factor: float) -> None:
        """To the unit of the loss itself, which this factor makes of the one that was measured in."""
        for moments in self.curvature.outputs.values():
            moments.total *= factor
            moments.second *= factor**2
        for side in (side for sides in self._sides.values() for side in sides):
            side *= factor**2

    def result(self, total: Total | None = None) -> Curvature:
        """What was collected, by all processes together where there is a `total`."""
        if self._statistic is not None:
            sums = self._samples / self._unit**2
            self.curvature.others = {name: means * sums for name, means in self._statistic.result().items()}
        if total is not None:
            self._add_up(total)
        self.curvature.gates = {name: _quieter(sides) for name, sides in self._sides.items()}
        self.curvature.check()
        return self.curvature

    def _add_up(self, total: Total) -> None:
        curvature = self.curvature
        for moments in (*curvature.inputs.values(), *curvature.results.values(), *curvature.outputs.values()):
            moments.add_up(total)
        for side in (side for sides in self._sides.values() for side in sides):
            total(side)
        with_slope = next(iter(self.evaluator.program.values.values())).new_full((), int(curvature.has_slope))
        total(with_slope)
        curvature.has_slope = bool(with_slope)
        for name, sums in curvature.others.items():
            summed = sums.to(next(iter(self._leaves.values())).device)
            total(summed)
            curvature.others[name] = summed.cpu()

    def _inputs(self) -> list[Tensor]:
        return [*self._begun, *self._leaves.values()]

    def _forward(self, *args: object, **kwargs: object) -> object:
        evaluator, self._begun = self.evaluator, []
        values: NodeValues = evaluator.start(args, kwargs)
        for node, name in evaluator.program.parameters.items():
            values[node] = self._leaves.get(name, evaluator.program.tensor(name).detach())
        for node in evaluator.order:
            site = self._watched.get(node)
            source = values[site.input] if site is not None else None
            evaluator.run([node], values)
            if site is not None:
                values[node] = self._watched_result(site, source, values[node])
        return evaluator.returned(values, args, kwargs)

    def _watched_result(self, site: LinearUse, source: Any, result: Tensor) -> Tensor:
        """The result with a hook; what comes after it may overwrite it."""
        if not result.requires_grad:
            self._begun.append(result.requires_grad_())
            result = result.clone()
        # A hook must not hold its own tensor, nor what that was made from: such rings keep a whole batch alive.
        seen = result.detach().clone() if site in self._gates else None
        if site in self.curvature.inputs:
            self.curvature.inputs[site].add(source.detach())
        if site in self.curvature.results:
            self.curvature.results[site].add(result.detach())

        def fold(gradient: Tensor) -> None:
            if site in self.curvature.outputs:
                self.curvature.outputs[site].add(gradient)
            for total, positions in self._gates.get(site, ()):
                assert seen is not None
                each = (seen.float() * gradient.float()).flatten(0, -2)[:, positions].sum(-1)
                total.add_(torch.einsum("ncu,ncv->cuv", each, each))

        result.register_hook(fold)  # type: ignore[no-untyped-call]  # torch has no types here
        return result


def _quieter(sides: Sequence[Tensor]) -> Tensor:
    """Per carrier [units, units] of the factor with the smaller trace.

    A gate on a product acts on both factors alike, but the rows of one may hold much that cancels over rows: what is
    added to all keys, of which softmax sees nothing.
    """
    stacked = torch.stack(list(sides))
    least = stacked.diagonal(dim1=-2, dim2=-1).sum(-1).argmin(0)
    return stacked[least, torch.arange(stacked.shape[1], device=stacked.device)]
