"""Which positions of each axis stay, once it is decided which units of each dim do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ecospa_fx.axes.axis import Axis, Piece, distances
from ecospa_fx.ir.slices import AxisSlice, TensorSlice


@dataclass(frozen=True, slots=True, eq=False)
class DimSelection:
    """The units of one dim that stay."""

    carriers: tuple[int, ...]
    """The dims along which the choice differs."""
    keep: Tensor
    """BoolTensor [carrier₀, …, units], True where a unit stays."""

    @property
    def count(self) -> int:
        """Units kept, the same in every carrier."""
        return int(self.keep.flatten(0, -2)[0].sum()) if self.keep.dim() > 1 else int(self.keep.sum())


class Narrowing:
    """Choices for some dims of one graph, whose axes are resolved; every other dim stays whole."""

    def __init__(self, sizes: Sequence[int], choices: Mapping[int, DimSelection]) -> None:
        self.sizes = sizes
        """The size of each dim."""
        self.choices = {d: c for d, c in choices.items() if c.count < sizes[d]}
        """What stays of the dims that lose units."""
        self._counts = {d: c.count for d, c in self.choices.items()}

    def changed(self, axis: Axis) -> bool:
        """Whether some positions of an axis go."""
        return any(d in self.choices for d in axis.dims)

    def count(self, axis: Axis) -> int:
        """Positions of an axis that stay."""
        return sum(self._size(piece) for piece in axis.pieces) if axis.size else 0

    def _size(self, piece: Piece) -> int:
        size = 1
        for dim, _ in piece.dims:
            size *= self._counts.get(dim, self.sizes[dim])
        return size

    def carrier_axis(self, axes: Sequence[Axis], index: int) -> int | None:
        """The other axis along which the choice on axes[index] differs, or None."""
        dims = set(axes[index].dims)
        needed = {c for d in dims if d in self.choices for c in self.choices[d].carriers} - dims
        for other, axis in enumerate(axes):
            if other != index and needed & set(axis.dims):
                return other
        return None

    def mask(self, axes: Sequence[Axis], index: int) -> Tensor:
        """BoolTensor [places, positions] of axes[index], True where a position stays.

        places: positions of `carrier_axis(axes, index)`, or 1 where the choice is the same throughout.
        """
        axis, other = axes[index], self.carrier_axis(axes, index)
        places = axes[other] if other is not None else Axis(1, (Piece(0, ()),))
        result = torch.ones(places.size, axis.size, dtype=torch.bool)
        for dim in axis.dims:
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
        for piece in axis.pieces:
            if all(d != dim for d, _ in piece.dims):
                continue
            positions, index = torch.tensor([piece.offset]), torch.tensor([0])
            for d, steps in piece.dims:
                numbers, away = torch.arange(self.sizes[d]), torch.tensor(list(distances(steps, self.sizes[d])))
                positions = (positions[:, None] + away).flatten()
                index = (index[:, None] + (numbers if d == dim else torch.zeros_like(numbers))).flatten()
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
        ranks = after[mask[:, chosen]].view(len(mask), -1)
        return ranks[:1] if bool((ranks == ranks[:1]).all()) else ranks


def slice_of(kept: Narrowing, axes: Sequence[Axis]) -> TensorSlice:
    """How a tensor with these axes is reduced; axes whose choice differs along another come last."""
    order = sorted(range(len(axes)), key=lambda i: kept.carrier_axis(axes, i) is not None)
    return tuple(_step(kept, axes, index) for index in order if kept.changed(axes[index]))


def _step(kept: Narrowing, axes: Sequence[Axis], index: int) -> AxisSlice:
    mask, other, size = kept.mask(axes, index), kept.carrier_axis(axes, index), axes[index].size
    if other is None:
        return AxisSlice(index, size, None, mask[0].nonzero().flatten())
    rows = mask[kept.mask(axes, other)[0]]
    return AxisSlice.along(index, size, other, rows.nonzero()[:, 1].reshape(len(rows), -1), len(axes))
