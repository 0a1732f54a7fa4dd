"""What stays of a tensor: per axis the positions that are kept, and how a tensor is cut to them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class AxisSlice:
    """One axis reduced to some positions."""

    axis: int
    """Which axis."""
    size: int
    """How many positions it had."""
    other: int | None
    """An axis along which the choice differs, or None."""
    positions: Tensor
    """LongTensor of the positions that stay, [positions] or a view that broadcasts over the other axes."""

    @classmethod
    def along(cls, axis: int, size: int, other: int, rows: Tensor, rank: int) -> AxisSlice:
        """A choice that differs along another axis. rows: LongTensor [positions of `other`, kept]; rank: of tensors."""
        view = [1] * rank
        view[other], view[axis] = rows.shape
        return cls(axis, size, other, (rows if other < axis else rows.T).reshape(view))

    @property
    def count(self) -> int:
        """How many positions stay."""
        return self.positions.shape[0 if self.other is None else self.axis]

    def of(self, tensor: Tensor) -> Tensor:
        """The tensor with this axis reduced."""
        positions = self.positions.to(tensor.device)
        if self.other is None:
            return tensor.index_select(self.axis, positions)
        return torch.take_along_dim(tensor, positions, self.axis)


TensorSlice = tuple[AxisSlice, ...]
"""A tensor reduced to the kept positions of all its axes."""


def take_more(tensor: Tensor, before: TensorSlice, after: TensorSlice, shape: Sequence[int]) -> Tensor:
    """`tensor`, of this shape before it was reduced by a cut, reduced to what another one keeps, which is a part."""
    whole = torch.arange(math.prod(shape), device=tensor.device).view(*shape)
    had, wanted = take(whole, before), take(whole, after)
    order, sorted_ = had.flatten().argsort(), had.flatten().sort().values
    return tensor.flatten()[order[torch.searchsorted(sorted_, wanted)]]


def take(tensor: Tensor, cut: TensorSlice) -> Tensor:
    """`tensor` reduced to what stays."""
    for step in cut:
        tensor = step.of(tensor)
    return tensor
