"""Turn linear couplings so that few of their units carry most of what they do.

Between two matrices with nothing in between, V then O or Q with K, any invertible matrix B may be put in: B on one
side, its inverse on the other. The function stays the same, to rounding, and removal of the last units then costs
least. The bases are those of the singular value decomposition of the product, weighted by the data: see `value_basis`
and `factor_basis`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ecospa_fx.importance.curvature import Curvature
from ecospa_fx.importance.linalg import NOISE, power, regular_inverse, rotated
from ecospa_fx.importance.linear_views import CouplingViews, Gate, Inputs, Side, sides_of
from ecospa_fx.ir.linears import LinearUse
from ecospa_fx.ir.program import Program

FLOOR = 1e-6
"""Directions with less than this share of the largest second moment are not blown up any further."""


@dataclass(frozen=True, slots=True, eq=False)
class ChangeBasis:
    """Multiply one side of a linear coupling by a matrix B per carrier and the other by its inverse transposed."""

    first: tuple[Side, ...]
    """What is multiplied by B."""
    second: tuple[Side, ...]
    """What is multiplied by B⁻ᵀ."""
    basis: Tensor
    """B [carriers, units, units]."""
    name: str = "change-basis"

    def run(self, program: Program) -> None:
        """Replace the parameters of a program; the function that it computes stays the same."""
        inverse = regular_inverse(self.basis).mT
        for sides, matrix in ((self.first, self.basis), (self.second, inverse)):
            for side in sides:
                name, axis = side.member.parameter, side.member.axis
                turned = rotated(program.tensor(name).detach(), axis, side.positions, matrix)
                program.replace_parameter(name, turned)


def value_basis(view: Inputs, site: LinearUse, curvature: Curvature, weight: Tensor) -> Tensor:
    """B = Xᵀ S^-½ [carriers, units, units] with S^½ M S^½ = X Λ Xᵀ.

    S is the second moment of the units (about the mean where a bias can take it), averaged over the repeats of a
    carrier, M = Σ Wᵀ G W over them, G the second moment of the loss's gradient at the output.
    """
    moments, gradients = curvature.inputs[site], curvature.outputs[site]
    second = curvature.second(site)
    metric = gradients.second / max(gradients.rows, 1)
    positions = view.positions[site].to(second.device)
    columns = site.matrix(weight).to(metric)[:, positions]  # [out, carriers, units, width]
    pulled = torch.einsum("ocuw,op,pcvw->cuv", columns, metric, columns)
    first, whole = (_averaged(s, positions) / max(moments.rows, 1) for s in (second, moments.second))
    return _joint(_or_identity(first, whole), pulled)[0]


def factor_basis(site: LinearUse, positions: Tensor, curvature: Curvature) -> tuple[Tensor, Tensor]:
    """For one factor of a product of activations, B [carriers, units, units] as above and Λ [carriers, units].

    S is the second moment of the factor, averaged over the heads that share the other one; in place of M stands that of
    the loss's gradient at it, which holds what the factor is multiplied with, as far as it matters.
    """
    values, gradients = curvature.results[site], curvature.outputs[site]
    places = positions.to(values.second.device)
    first, second = (_averaged(m.second, places) / max(m.rows, 1) for m in (values, gradients))
    return _joint(_or_identity(first, first), second)


def _averaged(second: Tensor, positions: Tensor) -> Tensor:
    """[carriers, units, units] from [n, n], the mean over the width of positions."""
    blocks = second[positions[:, :, None, :], positions[:, None, :, :]]
    return blocks.mean(-1)


def _or_identity(first: Tensor, whole: Tensor) -> Tensor:
    """The identity in place of a moment of what does not vary. whole: the moment before anything was centred."""
    size, square = (m.diagonal(dim1=-2, dim2=-1).mean(-1) for m in (first, whole))
    still = (size <= NOISE * square)[..., None, None]
    return torch.where(still, torch.eye(first.shape[-1], dtype=first.dtype, device=first.device), first)


def _joint(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    half = power(first, 0.5, FLOOR)
    values, vectors = torch.linalg.eigh(half @ second @ half)
    basis: Tensor = vectors.flip(-1).mT @ power(first, -0.5, FLOOR)
    return basis, values.flip(-1)


def balanced(change: ChangeBasis, program: Program) -> ChangeBasis:
    """The same directions at such lengths that both sides of a unit have equal norms afterwards, as training has them.

    An optimizer that scales its steps per element, like Adam, would otherwise move one side far more than the other.
    """
    inverse = regular_inverse(change.basis).mT
    norms = []
    for sides, matrix in ((change.first, change.basis), (change.second, inverse)):
        total = torch.zeros(matrix.shape[:2], dtype=matrix.dtype, device=matrix.device)
        for side in sides:
            before = program.tensor(side.member.parameter).detach().to(matrix)
            rows = rotated(before, side.member.axis, side.positions, matrix).movedim(side.member.axis, 0)
            total += rows[side.positions.to(rows.device)].flatten(2).square().sum(2)
        norms.append(total)
    alive = (norms[0] > 0) & (norms[1] > 0)
    ratio = torch.where(alive, norms[1] / norms[0].clamp(min=torch.finfo(norms[0].dtype).tiny), 1.0)
    return replace(change, basis=ratio.pow(0.25).clamp(1e-3, 1e3)[..., None] * change.basis)


# -- for whole models --------------------------------------------------------------------------------------------

Apply = Callable[[ChangeBasis], ChangeBasis]
"""Makes a change, and says which one it made."""


def turn_factors(
    views: CouplingViews,
    measure: Callable[[Sequence[LinearUse]], Curvature],
    program: Program,
    apply: Apply | None = None,
) -> int:
    """Turn every product of two activations, such as queries and keys; returns how many were.

    The factor that decides is the one at which the gradients tell less: what is added to all keys alike is invisible to
    the softmax, yet not to the gradient at a single key.
    """
    todo = [(gate, *sides) for gate in views.gates if (sides := _factors(gate)) is not None]
    curvature = measure(list(dict.fromkeys(site for gate, _, _ in todo for site in gate.sites))) if todo else None
    for gate, first, second in todo:
        assert curvature is not None
        sites = {site.parameter: site for site in gate.sites}
        choices = []
        for near, far in ((first, second), (second, first)):
            (side,) = (s for s in near if s.member.parameter in sites)
            basis, weights = factor_basis(sites[side.member.parameter], side.positions, curvature)
            choices.append((float(weights.sum()), ChangeBasis(near, far, basis)))
        _applied(min(choices, key=lambda pair: pair[0])[1], program, apply)
    return len(todo)


def _applied(change: ChangeBasis, program: Program, apply: Apply | None) -> ChangeBasis:
    if apply is not None:
        return apply(change)
    change.run(program)
    return change


def _factors(gate: Gate) -> tuple[tuple[Side, ...], tuple[Side, ...]] | None:
    """The sides of a linear product with one matrix on each."""
    sides = sides_of(gate.coupling) if gate.coupling.symmetry == "linear" else None
    if sides is None:
        return None
    matrices = {site.parameter for site in gate.sites}
    return sides if all(sum(s.member.parameter in matrices for s in side) == 1 for side in sides) else None


def turn_values(views: CouplingViews, curvature: Curvature, program: Program, apply: Apply | None = None) -> int:
    """Turn every linear coupling with one consumer, and what was measured of it; returns how many were."""
    count = 0
    for view in views.inputs:
        sides = sides_of(view.coupling) if view.coupling.symmetry == "linear" else None
        if sides is None or len(view.positions) != 1 or len(sides[1]) != 1:
            continue
        ((site, positions),) = view.positions.items()
        wanted = ChangeBasis(*sides, value_basis(view, site, curvature, program.tensor(site.parameter).detach()))
        basis = _applied(wanted, program, apply).basis
        moments = curvature.inputs[site]
        moments.second = rotated(rotated(moments.second, 0, positions, basis), 1, positions, basis)
        moments.total = rotated(moments.total, 0, positions, basis)
        count += 1
    return count
