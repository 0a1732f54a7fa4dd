"""Turn linear couplings so that few of their units carry most of what they do.

Between two matrices with nothing in between, V then O or Q with K, any invertible matrix B may be put in: B on one
side, its inverse on the other. The function stays the same, to rounding, and removal of the last units then costs
least. The bases are those of the singular value decomposition of the product, weighted by the data: see `value_basis`
and `query_basis`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ecospa_fx.coupling.couplings import Coupling, Member
from ecospa_fx.graph.program import Program
from ecospa_fx.graph.sites import Site
from ecospa_fx.importance.curvature import Curvature, Moments
from ecospa_fx.importance.matrices import power
from ecospa_fx.importance.views import Gate, Inputs, Views

FLOOR = 1e-6
"""Directions with less than this share of the largest second moment are not blown up any further."""


@dataclass(frozen=True, slots=True, eq=False)
class Side:
    """Positions [carriers, units, width] along one axis of one parameter."""

    member: Member
    positions: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class ChangeBasis:
    """Multiply one side of a linear coupling by B [carriers, units, units] and the other by its inverse transposed."""

    first: tuple[Side, ...]
    second: tuple[Side, ...]
    basis: Tensor
    name: str = "change-basis"

    def run(self, program: Program) -> None:
        """Replace the parameters of a program; the function that it computes stays the same."""
        inverse = torch.linalg.inv(self.basis).mT
        for sides, matrix in ((self.first, self.basis), (self.second, inverse)):
            for side in sides:
                name, axis = side.member.parameter, side.member.axis
                turned = rotated(program.tensor(name).detach(), axis, side.positions, matrix)
                program.replace_parameter(name, turned)


def rotated(tensor: Tensor, axis: int, positions: Tensor, matrix: Tensor) -> Tensor:
    """`tensor` with what lies at `positions` [carriers, units, width] of an axis multiplied by a matrix per carrier."""
    moved = tensor.movedim(axis, 0)
    at = positions.to(tensor.device)
    old = moved[at.flatten()].view(*at.shape, -1).to(matrix)
    new = torch.einsum("cuv,cvwn->cuwn", matrix, old)
    result = moved.clone()
    result[at.flatten()] = new.reshape(at.numel(), *moved.shape[1:]).to(tensor)
    return result.movedim(0, axis).contiguous()


def sides_of(coupling: Coupling) -> tuple[tuple[Side, ...], tuple[Side, ...]] | None:
    """The two factors of a product: by role, or by halves of a fused matrix; None where neither tells them apart."""
    if any(m.carrier_axis is not None for m in coupling.members):
        return None
    whole = [Side(m, m.indices) for m in coupling.members]
    if len({m.role for m in coupling.members}) == 2:
        return tuple(s for s in whole if s.member.role == "producer"), tuple(
            s for s in whole if s.member.role == "consumer"
        )
    if any(len(m.boxes) != 2 for m in coupling.members):
        return None
    halves = [tuple(Side(m, m.boxes[i].indices(m.carriers, m.units)) for m in coupling.members) for i in (0, 1)]
    return halves[0], halves[1]


def value_basis(view: Inputs, site: Site, curvature: Curvature, weight: Tensor) -> Tensor:
    """B = Xᵀ S^-½ [carriers, units, units] with S^½ M S^½ = X Λ Xᵀ.

    S is the second moment of the units (about the mean where a bias can take it), averaged over the repeats of a
    carrier, M = Σ Wᵀ G W over them, G the second moment of the loss's gradient at the output.
    """
    moments, gradients = curvature.inputs[site], curvature.outputs[site]
    second = moments.covariance() if site.bias is not None else moments.second
    metric = gradients.second / max(gradients.rows, 1)
    at = view.positions[site].to(second.device)
    columns = site.matrix(weight).to(metric)[:, at]  # [out, carriers, units, width]
    pulled = torch.einsum("ocuw,op,pcvw->cuv", columns, metric, columns)
    return _joint(_averaged(second, at) / max(moments.rows, 1), pulled)


def query_basis(first: tuple[Site, Tensor], second: tuple[Site, Tensor], outputs: Mapping[Site, Moments]) -> Tensor:
    """B = Xᵀ S^-½ [carriers, units, units] with S^½ K S^½ = X Λ Xᵀ.

    S is the second moment of the queries, averaged over the heads that share a key, K the covariance of the keys: what
    is added to every key alike is invisible to the softmax.
    """
    (query, rows), (key, columns) = first, second
    moments = outputs[query]
    queries = _averaged(moments.second, rows.to(moments.second.device)) / max(moments.rows, 1)
    covariance = outputs[key].covariance()
    keys = _averaged(covariance, columns.to(covariance.device)) / max(outputs[key].rows, 1)
    return _joint(queries, keys)


def _averaged(second: Tensor, at: Tensor) -> Tensor:
    """[carriers, units, units] from [n, n], the mean over the width of positions."""
    blocks = second[at[:, :, None, :], at[:, None, :, :]]
    return blocks.mean(-1)


def _joint(first: Tensor, second: Tensor) -> Tensor:
    half = power(first, 0.5, FLOOR)
    vectors = torch.linalg.eigh(half @ second @ half)[1].flip(-1)
    basis: Tensor = vectors.mT @ power(first, -0.5, FLOOR)
    return basis


# -- for whole models --------------------------------------------------------------------------------------------


def turn_queries(views: Views, outputs: Callable[[Sequence[Site]], Mapping[Site, Moments]], program: Program) -> int:
    """Turn every product of two sides; returns how many were."""
    todo = [(gate, *sides) for gate in views.gates if (sides := _factors(gate)) is not None]
    moments = outputs(list(dict.fromkeys(site for gate, _, _ in todo for site in gate.positions))) if todo else {}
    for gate, first, second in todo:
        sites = {site.parameter: site for site in gate.positions}
        (a,), (b,) = ([s for s in sides if s.member.parameter in sites] for sides in (first, second))
        basis = query_basis((sites[a.member.parameter], a.positions), (sites[b.member.parameter], b.positions), moments)
        ChangeBasis(first, second, basis).run(program)
    return len(todo)


def _factors(gate: Gate) -> tuple[tuple[Side, ...], tuple[Side, ...]] | None:
    """The sides of a linear product with one matrix on each."""
    sides = sides_of(gate.coupling) if gate.coupling.symmetry == "linear" else None
    if sides is None:
        return None
    matrices = {site.parameter for site in gate.positions}
    return sides if all(sum(s.member.parameter in matrices for s in side) == 1 for side in sides) else None


def turn_values(views: Views, curvature: Curvature, program: Program) -> int:
    """Turn every linear coupling with one consumer, and what was measured of it; returns how many were."""
    count = 0
    for view in views.inputs:
        sides = sides_of(view.coupling) if view.coupling.symmetry == "linear" else None
        if sides is None or len(view.positions) != 1 or len(sides[1]) != 1:
            continue
        ((site, at),) = view.positions.items()
        basis = value_basis(view, site, curvature, program.tensor(site.parameter).detach())
        ChangeBasis(sides[0], sides[1], basis).run(program)
        moments = curvature.inputs[site]
        moments.second = rotated(rotated(moments.second, 0, at, basis), 1, at, basis)
        moments.total = rotated(moments.total, 0, at, basis)
        count += 1
    return count
