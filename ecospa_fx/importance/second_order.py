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

from collections.abc import Mapping

import torch
from torch import Tensor

from ecospa_fx.importance.brain_surgeon import order_scores, remove_all
from ecospa_fx.importance.curvature import Curvature
from ecospa_fx.importance.linalg import damped, power
from ecospa_fx.importance.linear_views import CouplingViews
from ecospa_fx.ir.linears import LinearUse

SECOND_ORDER = "second-order"
"""The name of these scores, as a method of `compress` and as scores of training."""


def unit_scores(
    views: CouplingViews,
    curvature: Curvature,
    weights: Mapping[str, Tensor],
    damping: float,
    updates: int | None = None,
) -> dict[str, Tensor]:
    """Per coupling [carriers, units] in float64 on the CPU, ascending in the order in which units should go.

    The score of a unit is what its removal adds once all before it are removed and compensated. updates: how often the
    costs of a coupling's units are updated on the way, by default after every unit.
    """
    scores: dict[str, Tensor] = {}
    for view in views.inputs:
        scores[view.coupling.name] = sum(
            (
                _input_scores(site, positions, curvature, weights, damping, updates)
                for site, positions in view.positions.items()
            ),
            torch.zeros(view.coupling.carriers, view.coupling.size, dtype=torch.float64),
        )
    for gate in views.gates:
        matrix = damped(curvature.gates[gate.coupling.name], damping)
        removal = remove_all(matrix, torch.ones_like(matrix[:, :1]), 1, _block_size(matrix.shape[1], updates))
        scores[gate.coupling.name] = order_scores(removal).cpu() / 2
    for coupling in views.others:
        scores[coupling.name] = curvature.others[coupling.name] / 2
    return scores


def _block_size(units: int, updates: int | None) -> int:
    return 1 if updates is None else max(1, units // updates)


def _input_scores(
    site: LinearUse, positions: Tensor, curvature: Curvature, weights: Mapping[str, Tensor], damping: float,
    updates: int | None,
) -> Tensor:  # fmt: skip
    """Carrier by carrier: what is left of a carrier makes up for what goes from it."""
    moments, gradients = curvature.inputs[site], curvature.outputs[site]
    flat = positions.flatten(1).to(moments.second.device)
    square = moments.second.diagonal()[flat].mean(-1)
    hessian = damped(curvature.second(site)[flat[:, :, None], flat[:, None, :]], damping, square)
    metric = power(gradients.second / max(gradients.rows, 1), 0.5)
    matrix = metric @ site.matrix(weights[site.parameter]).to(metric)
    weight = matrix[:, flat].movedim(1, 0)
    removal = remove_all(hessian, weight, positions.shape[2], _block_size(positions.shape[1], updates))
    return order_scores(removal).cpu() / 2


def without_traffic(views: CouplingViews, curvature: Curvature) -> list[str]:
    """Couplings that the data never reached: an expert without tokens, a branch that was not taken."""
    idle = [v.coupling.name for v in views.inputs if not any(curvature.inputs[s].second.any() for s in v.positions)]
    idle += [gate.coupling.name for gate in views.gates if not curvature.gates[gate.coupling.name].any()]
    return idle + [coupling.name for coupling in views.others if not curvature.others[coupling.name].any()]
