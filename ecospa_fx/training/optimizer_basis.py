"""Turning what an optimizer keeps beside a parameter, when a linear coupling changes its basis.

Where weights become B W, gradients become B⁻ᵀ g. First moments are means of gradients and turn like them. Second
moments are means of squares, of each element for itself: of the turned gradients' squares only Σ_j (B⁻ᵀ)²_ij v_j is
known, exact where the elements of a gradient are uncorrelated, and for permutations and changes of sign and scale.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from ecospa_fx.importance.linalg import rotated
from ecospa_fx.training.sharded import put, whole

FIRST = frozenset({"exp_avg", "momentum_buffer"})
"""States that are means of gradients."""

SQUARED = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"})
"""States that are means or sums of their squares."""


def unknown(optimizers: Sequence[Optimizer], tensor: Tensor) -> str | None:
    """What an optimizer keeps beside a parameter, and nobody knows how it turns; None where there is no such thing."""
    for optimizer in optimizers:
        for key, value in optimizer.state.get(tensor, {}).items():
            plain = value is None or isinstance(value, int | float) or (isinstance(value, Tensor) and value.dim() == 0)
            same = isinstance(value, Tensor) and value.shape == tensor.shape and value.is_floating_point()
            if not plain and not (same and key in FIRST | SQUARED):
                return f"{type(optimizer).__name__} keeps {key!r}"
    return None


@torch.no_grad()
def turn_gradient(
    optimizers: Sequence[Optimizer], tensor: Tensor, axis: int, positions: Tensor, matrix: Tensor
) -> None:
    """Turn a parameter's gradient and states in place. matrix: [carriers, units, units], B⁻ᵀ for weights B W."""

    if tensor.grad is not None:
        put(tensor.grad, rotated(whole(tensor.grad), axis, positions, matrix))
    for optimizer in optimizers:
        for key, value in optimizer.state.get(tensor, {}).items():
            if key in FIRST and isinstance(value, Tensor):
                put(value, rotated(whole(value), axis, positions, matrix))
            if key in SQUARED and isinstance(value, Tensor):
                put(value, rotated(whole(value), axis, positions, matrix.square()))
