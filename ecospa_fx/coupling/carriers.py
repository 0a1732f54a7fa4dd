"""Carriers: the other dims along which the choice of a dim's units may differ.

A dim c carries d if every tensor on the way that has d also has c, so that the pair (c, d) names one element set
everywhere, and if nothing mixes positions along c while d is present. Rows that are routed to the positions of c, as
tokens to experts, count as having c.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from ecospa_fx.axes.axis import Axis, DimKind
from ecospa_fx.axes.flow import AxisFlow


def carriers_of(flow: AxisFlow, wanted: Iterable[int]) -> dict[int, tuple[int, ...]]:
    """Carriers of each wanted dim, in no particular order."""
    result: dict[int, set[int] | None] = dict.fromkeys(wanted)
    routed: dict[int, set[int]] = {}
    for route in flow.record.routed:
        routed.setdefault(route.dim, set()).update(route.axis.dims)
    for axes in {**dict.fromkeys(v.axes for v in flow.parameters.values()), **flow.record.tensors}:
        _narrow(flow.origins, axes, routed, result)
    for gather in flow.record.gathers:
        _narrow(flow.origins, gather.target, {}, result)
    for dim, other in flow.record.mixed:
        candidates = result.get(dim)
        if candidates:
            candidates.discard(other)
    outer = _outer(flow)
    return {
        d: tuple(sorted(c for c in candidates if d not in (result.get(c) or ()) or outer.get(c, 0) < outer.get(d, 0)))
        for d, candidates in result.items()
        if candidates
    }


def _outer(flow: AxisFlow) -> dict[int, int]:
    """A rank by which, of two dims that always go together, the outer one carries the inner one."""
    order: dict[int, int] = {}
    for value in flow.parameters.values():
        for axis in value.axes:
            for dim in (dim for piece in axis.pieces for dim, _ in piece.dims):
                order.setdefault(dim, len(order))
    return order


def _narrow(
    origins: Sequence[DimKind],
    axes: tuple[Axis, ...],
    routed: dict[int, set[int]],
    result: dict[int, set[int] | None],
) -> None:
    """Intersect the candidates of every dim of one tensor with the dims that go with it there."""
    everywhere = [_in_all_pieces(axis, routed) for axis in axes]
    times = sum((_times(axis) for axis in axes), Counter[int]())
    for i, axis in enumerate(axes):
        others: set[int] = set().union(*(e for j, e in enumerate(everywhere) if j != i))
        for piece in axis.pieces:
            order = [d for d, _ in piece.dims]
            for place, dim in enumerate(order):
                if dim in result:
                    # Only outer dims: units that differ along an inner one would not stay in row-major order.
                    # Along a dim that lies on two other axes, or twice in one, one choice would meet another.
                    outer = {d for d in order[:place] if order.count(d) == 1}
                    around = {d for d in others if times[d] < 2}
                    here = {d for d in {*outer, *around} - {dim} if origins[d] is DimKind.PARAMETER}
                    before = result[dim]
                    result[dim] = here if before is None else before & here


def _times(axis: Axis) -> Counter[int]:
    """How often each dim lies on one axis: more than once where one piece repeats it."""
    result = Counter[int]()
    for piece in axis.pieces:
        result |= Counter(d for d, _ in piece.dims)
    return result


def _in_all_pieces(axis: Axis, routed: dict[int, set[int]]) -> set[int]:
    sets = []
    for piece in axis.pieces:
        dims = {d for d, _ in piece.dims}
        for dim in tuple(dims):
            dims |= routed.get(dim, set())
        sets.append(dims)
    return set.intersection(*sets) if sets else set()
