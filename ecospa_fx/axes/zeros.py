"""Where removed elements are exactly 0, dim by dim.

A flag per axis says it of all dims of the axis. Of an axis such as ``(q_bias + stored + v_bias)`` or ``(heads units)``
it may hold for some of its dims alone: `Zeros` also knows for which dims it does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ecospa_fx.axes.dims import Axis, DimKind, Dims

if TYPE_CHECKING:
    from ecospa_fx.axes.findings import Value


class Zeros(tuple[bool, ...]):
    """Flags per axis of a tensor, and the dims whose removed units leave something that is not 0.

    Rules may handle it like any tuple of flags: what they make of it knows the flags alone.
    """

    alive: frozenset[int]

    def __new__(cls, flags: Iterable[bool], alive: Iterable[int]) -> Zeros:
        """Flags, and dims."""
        self = super().__new__(cls, flags)
        self.alive = frozenset(alive)
        return self


def cut_dims(dims: Dims, axis: Axis) -> set[int]:
    """The dims of an axis that may lose units."""
    return {d for d in dims.dims_of(axis) if dims.origins[d] is not DimKind.STORED}


def alive_on(dims: Dims, value: Value, index: int) -> set[int]:
    """The dims of one axis of a value whose removed units leave something that is not 0 there."""
    if value.zero[index]:
        return set()
    here = cut_dims(dims, value.axes[index])
    if not isinstance(value.zero, Zeros):
        return here
    return here & {root for dim in value.zero.alive for root in dims.root_dims(dim)}


def alive_anywhere(dims: Dims, value: Value) -> set[int]:
    """The same for all axes of a value."""
    return set[int]().union(*(alive_on(dims, value, i) for i in range(len(value.axes))))


def flagged(dims: Dims, axes: Sequence[Axis], flags: Iterable[bool], alive: Iterable[int]) -> Zeros:
    """Flags of axes, with those raised that have dims, none of them among some that leave something."""
    roots, here = {root for dim in alive for root in dims.root_dims(dim)}, [cut_dims(dims, axis) for axis in axes]
    return Zeros((flag or (bool(cut) and not cut & roots) for flag, cut in zip(flags, here, strict=True)), roots)
