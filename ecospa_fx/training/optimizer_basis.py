"""Change of basis of optimizer states, when a linear coupling's weights change theirs.

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
from ecospa_fx.training.sharded import assign, full_tensor

FIRST_MOMENTS = frozenset({"exp_avg", "momentum_buffer"})
"""States that are means of gradients."""

SECOND_MOMENTS = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"})
"""States that are means or sums of their squares."""


def unsupported_state(optimizers: Sequence[Optimizer], tensor: Tensor) -> str | None:
    """A state beside a parameter whose change of basis is not known, for a message; None where there is none."""
    for optimizer in optimizers:
        for key, value in optimizer.state.get(tensor, {}).items():
            plain = value is None or isinstance(value, int | float) or (isinstance(value, Tensor) and value.dim() == 0)
            same = isinstance(value, Tensor) and value.shape == tensor.shape and value.is_floating_point()
            if not plain and not (same and key in FIRST_MOMENTS | SECOND_MOMENTS):
                return f"{type(optimizer).__name__} keeps {key!r}"
    return None


@torch.no_grad()
def change_basis_of_states(
    optimizers: Sequence[Optimizer], tensor: Tensor, axis: int, positions: Tensor, matrix: Tensor
) -> None:
    """Change the basis of a parameter's gradient and states in place.

    matrix: [carriers, units, units], B⁻ᵀ for weights B W.
    """

    if tensor.grad is not None:
        assign(tensor.grad, rotated(full_tensor(tensor.grad), axis, positions, matrix))
    for optimizer in optimizers:
        for key, value in optimizer.state.get(tensor, {}).items():
            if key in FIRST_MOMENTS and isinstance(value, Tensor):
                assign(value, rotated(full_tensor(value), axis, positions, matrix))
            if key in SECOND_MOMENTS and isinstance(value, Tensor):
                assign(value, rotated(full_tensor(value), axis, positions, matrix.square()))
