"""One pass over the data for everything that second-order scores and compensation need.

All are sums over rows (tokens, patches) of outer products, in float64: of the inputs of linear layers, of the loss's
gradients at their outputs, and of its gradients by gates. Activations live no longer than their batch's backward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ecospa_fx.errors import ScoreError
from ecospa_fx.graph.evaluate import Evaluator, Values
from ecospa_fx.graph.sites import Site
from ecospa_fx.importance.methods import GATE_FISHER, GradientStatistic
from ecospa_fx.importance.reduce import accumulator_dtype
from ecospa_fx.importance.score import Batch, Loss, one_batch
from ecospa_fx.importance.views import Views


class Moments:
    """Of rows x of one width, none yet: how many (`rows`), Σ x [n] (`total`), Σ x xᵀ [n, n] (`second`)."""

    def __init__(self, width: int, device: torch.device) -> None:
        dtype = accumulator_dtype(device)
        self.rows = 0
        self.total = torch.zeros(width, dtype=dtype, device=device)
        self.second = torch.zeros(width, width, dtype=dtype, device=device)

    def add(self, rows: Tensor) -> None:
        """Fold in rows [..., n], in at least float32."""
        flat = rows.reshape(-1, rows.shape[-1])
        flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
        self.rows += len(flat)
        self.total += flat.sum(0)
        self.second += flat.T @ flat

    def covariance(self) -> Tensor:
        """Σ (x - mean)(x - mean)ᵀ."""
        return self.second - torch.outer(self.total, self.total) / max(self.rows, 1)


class Curvature:
    """What the pass collects; a site or gate that is not a key is not watched.

    inputs: moments of the input; outputs: of the loss's gradient at the output; gates: by coupling, Σ e eᵀ [carriers,
    units, units] over rows of the derivatives e by gates on the units, half of it where both factors of a product
    have them; others: by coupling, [carriers, units], the sum over batches of squared derivatives by gates.
    """

    def __init__(self) -> None:
        self.inputs: dict[Site, Moments] = {}
        self.outputs: dict[Site, Moments] = {}
        self.gates: dict[str, Tensor] = {}
        self.others: dict[str, Tensor] = {}

    def check(self) -> None:
        """Raise ScoreError where something is not finite."""
        for kind, found in (("input", self.inputs), ("gradient", self.outputs)):
            for site, moments in found.items():
                if not moments.second.isfinite().all():
                    raise ScoreError(
                        f"the {kind} of {site.parameter!r} is not finite in the calibration data: "
                        "run the model in bfloat16 or float32, or leave out the batches that overflow"
                    )


class Collector:
    """Runs batches through a program and folds what it sees of some couplings into a `Curvature`."""

    def __init__(self, evaluator: Evaluator, views: Views) -> None:
        self.evaluator, self.curvature = evaluator, Curvature()
        weights = evaluator.program.values
        for site in views.sites:
            out, width = site.matrix(weights[site.parameter]).shape
            self.curvature.inputs[site] = Moments(width, weights[site.parameter].device)
            self.curvature.outputs[site] = Moments(out, weights[site.parameter].device)
        self._gates: dict[Site, list[tuple[str, Tensor]]] = {}
        for gate in views.gates:
            for site, positions in gate.positions.items():
                device = weights[site.parameter].device
                self._gates.setdefault(site, []).append((gate.coupling.name, positions.to(device)))
                shape, dtype = (*positions.shape[:2], positions.shape[1]), accumulator_dtype(device)
                self.curvature.gates[gate.coupling.name] = torch.zeros(shape, dtype=dtype, device=device)
        names = dict.fromkeys(m.parameter for c in views.others for m in c.members)
        self._leaves = {name: nn.Parameter(weights[name].detach()) for name in names}
        self._statistic = GradientStatistic(GATE_FISHER, self._leaves, views.others) if views.others else None
        self._watched = {site.node: site for site in {**self.curvature.inputs, **self._gates}}
        self._begun: list[Tensor] = []
        self._batches = 0

    def run(self, batches: Iterable[Batch], loss: Loss) -> Curvature:
        """One forward and backward pass per batch, of which there is one. Raises ScoreError where they tell nothing."""
        watching = self._statistic.watching() if self._statistic is not None else nullcontext()
        with torch.inference_mode(False), torch.enable_grad(), watching:
            for batch in batches:
                one_batch(self._forward, self._inputs, batch, loss, self._batches)
                if self._statistic is not None:
                    self._statistic.end_batch(self._batches)
                self._batches += 1
        if self._statistic is not None:
            self.curvature.others = {n: v * self._batches for n, v in self._statistic.result().items()}
        self.curvature.check()
        return self.curvature

    def _inputs(self) -> list[Tensor]:
        return [*self._begun, *self._leaves.values()]

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        evaluator, self._begun = self.evaluator, []
        values: Values = evaluator.start(args, kwargs)
        for node, name in evaluator.program.parameters.items():
            values[node] = self._leaves.get(name, evaluator.program.tensor(name).detach())
        for node in evaluator.order:
            site = self._watched.get(node)
            source = values[site.input] if site is not None else None
            evaluator.run([node], values)
            if site is not None:
                values[node] = self._watched_result(site, source, values[node])
        return evaluator.returned(values, args, kwargs)

    def _watched_result(self, site: Site, source: Any, result: Tensor) -> Tensor:
        """The result with a hook; what comes after it may overwrite it."""
        if not result.requires_grad:
            self._begun.append(result.requires_grad_())
            result = result.clone()
        seen = result.detach().clone() if site in self._gates else result
        if site in self.curvature.inputs:
            self.curvature.inputs[site].add(source.detach())

        def fold(gradient: Tensor) -> None:
            if site in self.curvature.outputs:
                self.curvature.outputs[site].add(gradient)
            for name, positions in self._gates.get(site, ()):
                self._gate(name, positions, (seen.float() * gradient.float()).flatten(0, -2))

        result.register_hook(fold)  # type: ignore[no-untyped-call]  # torch has no types here
        return result

    def _gate(self, name: str, positions: Tensor, products: Tensor) -> None:
        each = products[:, positions].sum(-1)
        self.curvature.gates[name] += torch.einsum("ncu,ncv->cuv", each, each) / 2


def output_moments(evaluator: Evaluator, sites: Sequence[Site], batches: Iterable[Batch]) -> dict[Site, Moments]:
    """Moments of the outputs of some sites, from forward passes alone."""
    weights, watched = evaluator.weights(), {site.node: site for site in sites}
    found: dict[Site, Moments] = {}
    last = max((place for place, node in enumerate(evaluator.order) if node in watched), default=-1)
    with torch.no_grad():
        for args, kwargs in batches:
            values = {**evaluator.start(args, kwargs), **weights}
            for node in evaluator.order[: last + 1]:
                evaluator.run([node], values)
                if node in watched:
                    rows = values[node]
                    found.setdefault(watched[node], Moments(rows.shape[-1], rows.device)).add(rows)
    return found
