"""What removing units costs to second order, by the way that their coupling is looked at (`linear_views`):

- *inputs*: with A the second moment of the consumer's input and G that of the loss's gradient at its output, changing
  the matrix by Δ costs ½ tr(Δ A Δᵀ G), the Kronecker-factored Fisher of Martens and Grosse (2015); units go in the
  order of the optimal brain surgeon.
- *gates*: a gate per unit has the Fisher matrix F = Σ e eᵀ, with e the derivatives of the loss by the gates at one
  row; the surgeon works on the gates.
- *others*: ½ Σ e² with e the derivative by a gate in one sample.

All three estimate the increase of the summed loss over the calibration data, up to one common factor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from ecospa_fx.importance.brain_surgeon import Layer, order_scores, removals
from ecospa_fx.importance.curvature import Curvature
from ecospa_fx.importance.linalg import damped
from ecospa_fx.importance.linear_views import CouplingViews
from ecospa_fx.ir.linears import LinearUse

Item = TypeVar("Item")

SECOND_ORDER = "second-order"
"""The name of these scores, as a method of `compress` and as scores of training."""


class Watch(Protocol):
    """Passes on what it is given, and shows it as progress."""

    def __call__(self, items: Iterable[Item], *, total: int) -> Iterable[Item]:
        """The same items. total: how many they are."""


def unit_scores(
    views: CouplingViews,
    curvature: Curvature,
    weights: Mapping[str, Tensor],
    damping: float,
    watch: Watch | None = None,
) -> dict[str, Tensor]:
    """Per coupling [carriers, units] in float64 on the CPU, ascending in the order in which units should go.

    The score of a unit is what its removal adds once all before it are removed and compensated. watch: wraps what comes
    of each layer, to show progress.
    """
    couplings = [*(view.coupling for view in views.inputs), *(gate.coupling for gate in views.gates)]
    whose = [view.coupling.name for view in views.inputs for _ in view.positions]
    layers = [
        _consumer(site, positions, curvature, weights, damping, together=bool(view.coupling.contains))
        for view in views.inputs
        for site, positions in view.positions.items()
    ]
    whose += [gate.coupling.name for gate in views.gates]
    layers += [_gates(curvature.gates[gate.coupling.name], damping) for gate in views.gates]
    scores = {c.name: torch.zeros(c.carriers, c.size, dtype=torch.float64) for c in couplings}
    done = removals(layers)
    done = done if watch is None else iter(watch(done, total=len(layers)))
    costs = {number: order_scores(removal).cpu() / 2 for number, removal in done}
    for number, name in enumerate(whose):
        scores[name] += costs[number].view_as(scores[name])
    return scores | {coupling.name: curvature.others[coupling.name] / 2 for coupling in views.others}


def _gates(matrix: Tensor, damping: float) -> Layer:
    """Units that are closed by gates of 1, with this Fisher matrix."""
    carriers, units = matrix.shape[:2]
    return Layer(
        carriers, units, 1, matrix.dtype, matrix.device, lambda: (damped(matrix, damping), torch.ones_like(matrix))
    )


def _consumer(
    site: LinearUse,
    positions: Tensor,
    curvature: Curvature,
    weights: Mapping[str, Tensor],
    damping: float,
    *,
    together: bool,
) -> Layer:
    """Carrier by carrier: what is left of a carrier makes up for what goes from it.

    together: what is left of all carriers does, which lose as many units each, as heads do in groups of heads.
    """
    parts = 1
    if together:
        parts, units, width = positions.shape
        positions = positions.reshape(1, parts * units, width)
    moments, gradients = curvature.inputs[site], curvature.outputs[site]
    flat = positions.flatten(1).to(moments.second.device)

    def matrices() -> tuple[Tensor, Tensor]:
        square = moments.second.diagonal()[flat].mean(-1)
        hessian = damped(curvature.second(site)[flat[:, :, None], flat[:, None, :]], damping, square)
        metric = gradients.second / max(gradients.rows, 1)
        weight = site.matrix(weights[site.parameter]).detach().to(metric)
        gram = weight[:, flat].movedim(1, 0).mT @ (metric @ weight)[:, flat].movedim(1, 0)
        return hessian, gram

    carriers, units, width = positions.shape
    return Layer(carriers, units, width, moments.second.dtype, moments.second.device, matrices, parts)


def without_traffic(views: CouplingViews, curvature: Curvature) -> list[str]:
    """Couplings that the data never reached: an expert without tokens, a branch that was not taken."""
    idle = [v.coupling.name for v in views.inputs if not any(curvature.inputs[s].second.any() for s in v.positions)]
    idle += [gate.coupling.name for gate in views.gates if not curvature.gates[gate.coupling.name].any()]
    return idle + [coupling.name for coupling in views.others if not curvature.others[coupling.name].any()]
