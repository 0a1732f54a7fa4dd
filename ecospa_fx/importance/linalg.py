"""Symmetric matrices as they come from sums of outer products: damped, and raised to a power; and inverses.

Nothing here, or elsewhere in the library, calls for an LU decomposition: that of a batch of matrices never ends in some
CPU builds of torch once the number of threads was set. Cholesky, QR and eigenvalues do, and are as good here.
"""

from __future__ import annotations

import torch
from torch import Tensor

NOISE = 1e-7
"""Variance below this share of the mean square is rounding."""


def damped(matrix: Tensor, damping: float, square: Tensor | float = 0.0) -> Tensor:
    """`matrix` [..., n, n] plus `damping` times the mean of its diagonal; the identity where it is zero.

    square: that mean before anything was centred, where what is left may be rounding; `NOISE` times it is added too.
    """
    mean = matrix.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=0)
    added = damping * mean + NOISE * square
    added = torch.where(added > 0, added, torch.ones_like(added))
    return matrix + added[..., None, None] * torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)


def power(matrix: Tensor, exponent: float, floor: float = 1e-10) -> Tensor:
    """`matrix` [..., n, n], positive semidefinite, to a power; eigenvalues below `floor` of the largest are that."""
    values, vectors = torch.linalg.eigh(matrix)
    least = (values[..., -1:] * floor).clamp(min=torch.finfo(matrix.dtype).tiny)
    result: Tensor = (vectors * values.maximum(least).pow(exponent)[..., None, :]) @ vectors.mT
    return result


def inverse(matrix: Tensor) -> Tensor:
    """Of `matrix` [..., n, n], positive definite but for rounding: what that left below zero is lifted."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed.any():
        values = torch.linalg.eigvalsh(matrix)
        least = matrix.shape[-1] * torch.finfo(matrix.dtype).eps * values[..., -1].abs()
        added = torch.where(failed > 0, 2 * values[..., 0].clamp(max=0).abs() + least, 0)
        eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        factor = torch.linalg.cholesky(matrix + added[..., None, None] * eye)
    result: Tensor = torch.cholesky_inverse(factor)
    return result


def regular_inverse(matrix: Tensor) -> Tensor:
    """Of `matrix` [..., n, n], any that has one: R⁻¹ Qᵀ."""
    orthogonal, triangular = torch.linalg.qr(matrix)
    result: Tensor = torch.linalg.solve_triangular(triangular, orthogonal.mT, upper=True)
    return result


def least_squares(second: Tensor, cross: Tensor, damping: float, square: float) -> Tensor:
    """C (A + λ)⁻¹ [m, n] with A = `second` [n, n] and C = `cross` [m, n]; zeros where there is nothing to solve for.

    λ is `damping` times the mean of A's diagonal, and some more, for of what does not vary nothing is to be learnt:
    `NOISE` times `square`, that mean before anything was centred.
    """
    added = damping * float(second.diagonal().mean().clamp(min=0)) + square * NOISE
    eye = torch.eye(len(second), dtype=second.dtype, device=second.device)
    factor, failed = torch.linalg.cholesky_ex(second + added * eye)
    if added == 0 or failed:
        return torch.zeros_like(cross)
    return torch.cholesky_solve(cross.T, factor).T


def rotated(tensor: Tensor, axis: int, positions: Tensor, matrix: Tensor) -> Tensor:
    """`tensor` with what lies at `positions` [carriers, units, width] of an axis multiplied by a matrix per carrier."""
    moved = tensor.movedim(axis, 0)
    places = positions.to(tensor.device)
    old = moved[places.flatten()].view(*places.shape, -1).to(matrix)
    new = torch.einsum("cuv,cvwn->cuwn", matrix, old)
    result = moved.clone()
    result[places.flatten()] = new.reshape(places.numel(), *moved.shape[1:]).to(tensor)
    return result.movedim(0, axis).contiguous()
