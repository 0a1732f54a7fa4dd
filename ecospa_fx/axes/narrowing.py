"""Which positions of each axis stay, once it is decided which units of each dim do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ecospa_fx.axes.dims import Axis, Dims, Piece


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """The units of one dim that stay: BoolTensor [carrier₀, …, units] over its carriers' sizes."""

    carriers: tuple[int, ...]
    keep: Tensor

    @property
    def count(self) -> int:
        """Units kept, the same in every carrier."""
        return int(self.keep.flatten(0, -2)[0].sum()) if self.keep.dim() > 1 else int(self.keep.sum())


class Kept:
    """Choices for some dims of one graph; every other dim stays whole."""

    def __init__(self, dims: Dims, choices: Mapping[int, Choice]) -> None:
        self.dims = dims
        self.choices = {d: c for d, c in choices.items() if c.count < dims.sizes[d]}
        self._counts = {d: c.count for d, c in self.choices.items()}

    def changed(self, axis: Axis) -> bool:
        """Whether some positions of an axis go."""
        return any(d in self.choices for d in self.dims.dims_of(axis))

    def count(self, axis: Axis) -> int:
        """Positions of an axis that stay."""
        return sum(self._size(piece) for piece in self.dims.resolve(axis).pieces) if axis.size else 0

    def _size(self, piece: Piece) -> int:
        size = 1
        for dim, _ in piece.dims:
            size *= self._counts.get(dim, self.dims.sizes[dim])
        return size

    def carrier_axis(self, axes: Sequence[Axis], index: int) -> int | None:
        """The other axis along which the choice on axes[index] differs, or None."""
        own = set(self.dims.dims_of(axes[index]))
        needed = {c for d in own if d in self.choices for c in self.choices[d].carriers} - own
        for other, axis in enumerate(axes):
            if other != index and needed & set(self.dims.dims_of(axis)):
                return other
        return None

    def mask(self, axes: Sequence[Axis], index: int) -> Tensor:
        """BoolTensor [places, positions] of axes[index], True where a position stays.

        places: positions of `carrier_axis(axes, index)`, or 1 where the choice is the same throughout.
        """
        axis, other = axes[index], self.carrier_axis(axes, index)
        places = axes[other] if other is not None else Axis(1, (Piece(0, ()),))
        result = torch.ones(places.size, axis.size, dtype=torch.bool)
        for dim in self.dims.dims_of(axis):
            if dim in self.choices:
                result &= self._mask_of(dim, places, axis)
        return result

    def _mask_of(self, dim: int, places: Axis, axis: Axis) -> Tensor:
        choice, unit = self.choices[dim], self._coordinates(axis, dim)
        where: list[Tensor] = []
        for carrier in choice.carriers:
            here = self._coordinates(axis, carrier)[None]
            there = self._coordinates(places, carrier)[:, None]
            where.append(torch.where(here >= 0, here, there).clamp(min=0))
        kept = choice.keep[(*where, unit.clamp(min=0)[None])]
        return kept | (unit < 0)[None]

    def _coordinates(self, axis: Axis, dim: int) -> Tensor:
        """Index of `dim` at every position of an axis; -1 where its piece lacks the dim."""
        result = torch.full((axis.size,), -1)
        for piece in self.dims.resolve(axis).pieces:
            if all(d != dim for d, _ in piece.dims):
                continue
            positions, index = torch.tensor([piece.offset]), torch.tensor([0])
            for d, stride in piece.dims:
                steps = torch.arange(self.dims.sizes[d])
                positions = (positions[:, None] + steps * stride).flatten()
                index = (index[:, None] + (steps if d == dim else torch.zeros_like(steps))).flatten()
            result[positions] = index
        return result

    def rank(self, axes: Sequence[Axis], index: int, position: int) -> int:
        """How many positions before `position` stay, the same along every carrier."""
        return int(self.mask(axes, index)[0, :position].sum())

    def ranks(self, axes: Sequence[Axis], index: int, positions: Iterable[int]) -> Tensor:
        """LongTensor [places, count]: where those of some positions that stay end up, at each place that is left.

        places: of `carrier_axis(axes, index)`, or 1 where the choice is the same throughout.
        """
        mask, other = self.mask(axes, index), self.carrier_axis(axes, index)
        if other is not None:
            mask = mask[self.mask(axes, other)[0]]
        chosen = list(positions)
        after = mask.cumsum(1)[:, chosen] - 1
        found = after[mask[:, chosen]].view(len(mask), -1)
        return found[:1] if bool((found == found[:1]).all()) else found


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One axis reduced to some positions.

    size: positions that it had; other: None, or an axis along which the choice differs; positions: LongTensor of those
    that stay, [positions] or a view that broadcasts over the other axes.
    """

    axis: int
    size: int
    other: int | None
    positions: Tensor

    def of(self, tensor: Tensor) -> Tensor:
        """The tensor with this axis reduced."""
        positions = self.positions.to(tensor.device)
        if self.other is None:
            return tensor.index_select(self.axis, positions)
        return torch.take_along_dim(tensor, positions, self.axis)


Cut = tuple[Step, ...]
"""A tensor reduced to the kept positions of all its axes."""


def cut_of(kept: Kept, axes: Sequence[Axis]) -> Cut:
    """How a tensor with these axes is reduced; axes whose choice differs along another come last."""
    order = sorted(range(len(axes)), key=lambda i: kept.carrier_axis(axes, i) is not None)
    return tuple(_step(kept, axes, index) for index in order if kept.changed(axes[index]))


def _step(kept: Kept, axes: Sequence[Axis], index: int) -> Step:
    mask, other, size = kept.mask(axes, index), kept.carrier_axis(axes, index), axes[index].size
    if other is None:
        return Step(index, size, None, mask[0].nonzero().flatten())
    rows = mask[kept.mask(axes, other)[0]]
    positions = rows.nonzero()[:, 1].reshape(len(rows), -1)
    view = [1] * len(axes)
    view[other], view[index] = positions.shape
    return Step(index, size, other, (positions if other < index else positions.T).reshape(view))


def take_more(tensor: Tensor, before: Cut, after: Cut, shape: Sequence[int]) -> Tensor:
    """`tensor`, of this shape before it was reduced by a cut, reduced to what another one keeps, which is a part."""
    whole = torch.arange(math.prod(shape), device=tensor.device).view(*shape)
    had, wanted = take(whole, before), take(whole, after)
    order, sorted_ = had.flatten().argsort(), had.flatten().sort().values
    return tensor.flatten()[order[torch.searchsorted(sorted_, wanted)]]


def take(tensor: Tensor, cut: Cut) -> Tensor:
    """`tensor` reduced to what stays."""
    for step in cut:
        tensor = step.of(tensor)
    return tensor
