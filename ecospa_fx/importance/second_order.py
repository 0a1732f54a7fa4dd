"""Couplings as linear layers see them, and what removing their units costs to second order.

Three ways to look at a coupling, by its evidence alone:

- *inputs*: its consumers are matrices whose inputs are the units (FFN-out, W_O). With A the second moment of the input
  and G that of the loss's gradient at the output, changing the matrix by Δ costs ½ tr(Δ A Δᵀ G) (the Kronecker-
  factored Fisher of Martens and Grosse, 2015); units go in the order of the optimal brain surgeon.
- *gates*: nobody consumes them because both sides are multiplied with each other (Q with K). A gate per unit has
  Fisher matrix F = Σ e eᵀ, with e the derivatives of the loss by the gates at one row; the surgeon works on the gates.
- *others*: anything else, such as packed experts: ½ Σ e² with e the derivative by a gate in one batch.

All three estimate the increase of the summed loss over the calibration data, up to one common factor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ecospa_fx.coupling.couplings import Coupling, Member
from ecospa_fx.graph.sites import Site
from ecospa_fx.importance.curvature import Curvature, Gate
from ecospa_fx.importance.matrices import damped, power
from ecospa_fx.importance.surgeon import order_scores, remove_all


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """The units of a coupling as inputs of linear layers.

    positions: per site LongTensor [carriers, units, width], positions of its input.
    """

    coupling: Coupling
    positions: Mapping[Site, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Views:
    """How each coupling is looked at."""

    inputs: tuple[Inputs, ...]
    gates: tuple[Gate, ...]
    others: tuple[Coupling, ...]

    @property
    def sites(self) -> list[Site]:
        """The sites whose inputs are units, each once."""
        return list(dict.fromkeys(site for view in self.inputs for site in view.positions))


def views_of(couplings: Sequence[Coupling], sites: Sequence[Site]) -> Views:
    """Look at each coupling in the most informed way that its members allow."""
    by_name = {site.parameter: site for site in sites}
    inputs, gates, others = [], [], []
    for coupling in couplings:
        consumed = {s: m.indices for m in coupling.members if (s := _met(by_name, m, inside=True)) is not None}
        produced = _rows(by_name, coupling)
        outside = [m for m in coupling.members if m.role == "consumer" and _met(by_name, m, inside=True) is None]
        if consumed and not outside:
            inputs.append(Inputs(coupling, consumed))
        elif not consumed and produced and coupling.symmetry != "permutation":
            gates.append(Gate(coupling, produced))
        else:
            others.append(coupling)
    return Views(tuple(inputs), tuple(gates), tuple(others))


def _met(sites: Mapping[str, Site], member: Member, *, inside: bool) -> Site | None:
    """The site whose input (inside) or output a member's axis is."""
    site = sites.get(member.parameter)
    if site is None or member.carrier_axis is not None or (member.axis == site.in_axis) != inside:
        return None
    return site


def _rows(sites: Mapping[str, Site], coupling: Coupling) -> dict[Site, Tensor]:
    """Positions in the outputs of the sites that make the units; empty where something else makes them too."""
    found: dict[Site, Tensor] = {}
    biases = {site.bias for site in sites.values()}
    for member in coupling.members:
        site = _met(sites, member, inside=False)
        if site is not None:
            found[site] = member.indices
        elif member.parameter not in biases:
            return {}
    return found


# -- costs -------------------------------------------------------------------------------------------------------


def unit_scores(views: Views, curvature: Curvature, weights: Mapping[str, Tensor], damping: float) -> dict[str, Tensor]:
    """Per coupling [carriers, units] in float64 on the CPU, ascending in the order in which units should go.

    The score of a unit is what its removal adds once all before it are gone and the rest has made up for them.
    """
    found: dict[str, Tensor] = {}
    for view in views.inputs:
        found[view.coupling.name] = sum(
            (_input_scores(site, at, curvature, weights, damping) for site, at in view.positions.items()),
            torch.zeros(view.coupling.carriers, view.coupling.size, dtype=torch.float64),
        )
    for gate in views.gates:
        matrix = damped(curvature.gates[gate.coupling.name], damping)
        removal = remove_all(matrix, torch.ones_like(matrix[:, :1]))
        found[gate.coupling.name] = order_scores(removal).cpu() / 2
    for coupling in views.others:
        found[coupling.name] = curvature.others[coupling.name] / 2
    return found


def _input_scores(
    site: Site, positions: Tensor, curvature: Curvature, weights: Mapping[str, Tensor], damping: float
) -> Tensor:
    """Carrier by carrier: what is left of a carrier makes up for what goes from it."""
    moments, gradients = curvature.inputs[site], curvature.outputs[site]
    at = positions.flatten(1).to(moments.second.device)
    hessian = damped(_second(site, curvature)[at[:, :, None], at[:, None, :]], damping)
    metric = power(gradients.second / max(gradients.rows, 1), 0.5)
    matrix = metric @ site.matrix(weights[site.parameter]).to(metric)
    weight = matrix[:, at].movedim(1, 0)
    removal = remove_all(hessian, weight, positions.shape[2])
    return order_scores(removal).cpu() / 2


def _second(site: Site, curvature: Curvature) -> Tensor:
    """Second moment of a site's input, about the mean where a bias can make up for it."""
    moments = curvature.inputs[site]
    return moments.covariance() if site.bias is not None else moments.second


def without_traffic(views: Views, curvature: Curvature) -> list[str]:
    """Couplings that the data never reached: an expert without tokens, a branch that was not taken."""
    idle = [v.coupling.name for v in views.inputs if not any(curvature.inputs[s].second.any() for s in v.positions)]
    idle += [gate.coupling.name for gate in views.gates if not curvature.gates[gate.coupling.name].any()]
    return idle + [coupling.name for coupling in views.others if not curvature.others[coupling.name].any()]
