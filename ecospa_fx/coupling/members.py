"""Where the dims of couplings lie in parameters: members from the axes of a graph, and checks of those in a plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from ecospa_fx.axes.axis import Axis, Piece, distances
from ecospa_fx.axes.flow import AxisFlow
from ecospa_fx.coupling.types import Box, Member, Role
from ecospa_fx.errors import PlanError


@dataclass(frozen=True, slots=True)
class Occurrence:
    """One axis of one parameter that a dim lies on."""

    parameter: str
    """The parameter's first name."""
    axis: int
    """The axis."""
    axes: tuple[Axis, ...]
    """All axes of the parameter."""

    def pieces(self, dim: int) -> list[Piece]:
        """The pieces of the axis that a dim runs along."""
        return [piece for piece in self.axes[self.axis].pieces if any(d == dim for d, _ in piece.dims)]

    def holds(self, dim: int, carriers: Iterable[int]) -> bool:
        """Whether all carriers of a dim lie on its own axis."""
        around = {d for d, _ in self.pieces(dim)[0].dims}
        return all(carrier in around for carrier in carriers)

    def carrier_axis(self, carriers: Sequence[int]) -> int | None:
        """The other axis that is the product of the carriers, or None."""
        others = (i for i, axis in enumerate(self.axes) if i != self.axis and _is_product(axis, carriers))
        return next(others, None)


def occurrences(flow: AxisFlow) -> dict[int, list[Occurrence]]:
    """Where each dim lies among the parameters, in the order of the parameters."""
    result: dict[int, list[Occurrence]] = {}
    for name, value in flow.parameters.items():
        for index, axis in enumerate(value.axes):
            for dim in axis.dims:
                result.setdefault(dim, []).append(Occurrence(name, index, value.axes))
    return result


@dataclass(frozen=True, slots=True)
class Membership:
    """The carriers of a dim and its members."""

    carriers: tuple[int, ...]
    """Dims along which the choice may differ, outer ones first."""
    members: tuple[Member, ...]
    """Where the dim lies in parameters."""


class MemberSearch:
    """Finds the members of dims, with as many carriers as they can express."""

    def __init__(self, sizes: Sequence[int], consumed: set[tuple[str, int]]) -> None:
        self.sizes = sizes
        """The size of each dim."""
        self.consumed = consumed
        """(parameter, dim) that an activation is contracted with."""

    def all(
        self, places: Mapping[int, Sequence[Occurrence]], carriers: Mapping[int, tuple[int, ...]]
    ) -> dict[int, Membership]:
        """Members of every dim. A carrier whose choice differs along a third dim carries only what that carries too."""
        result = {dim: self.members(dim, carriers.get(dim, ()), where) for dim, where in places.items()}
        changed = True
        while changed:
            changed = False
            for dim, membership in result.items():
                chosen = membership.carriers
                kept = tuple(c for c in chosen if c not in result or set(result[c].carriers) <= set(chosen))
                if kept != chosen:
                    result[dim] = self.members(dim, kept, places[dim])
                    changed = True
        return result

    def members(self, dim: int, carriers: tuple[int, ...], where: Sequence[Occurrence]) -> Membership:
        """Members of a dim, with as many of the carriers as every member can express."""
        while True:
            drop = {carrier for place in where for carrier in _inexpressible(dim, place, carriers)}
            if not drop:
                break
            carriers = tuple(c for c in carriers if c not in drop)
        carriers = _ordered(dim, where[0], carriers)
        if any(not place.holds(dim, carriers) and place.carrier_axis(carriers) is None for place in where):
            carriers = ()
        return Membership(carriers, tuple(self._member(dim, carriers, place) for place in where))

    def _member(self, dim: int, carriers: tuple[int, ...], place: Occurrence) -> Member:
        carrier_axis = None if place.holds(dim, carriers) else place.carrier_axis(carriers)
        boxes = []
        for piece in place.pieces(dim):
            strides = dict(piece.dims)
            inside = () if carrier_axis is not None else tuple((self.sizes[c], strides[c]) for c in carriers)
            width = tuple((self.sizes[d], stride) for d, stride in piece.dims if d != dim and d not in carriers)
            boxes.append(Box(piece.offset, inside, strides[dim], width))
        count = prod(self.sizes[c] for c in carriers)
        role: Role = "consumer" if (place.parameter, dim) in self.consumed else "producer"
        return Member(place.parameter, place.axis, role, carrier_axis, tuple(boxes), count, self.sizes[dim])


def _inexpressible(dim: int, place: Occurrence, carriers: Sequence[int]) -> set[int]:
    """Carriers that a member cannot express together: neither all on its own axis nor all of one other axis."""
    around = [{d for d, _ in piece.dims} for piece in place.pieces(dim)]
    inside = {c for c in carriers if all(c in dims for dims in around)}
    if inside:
        return set(carriers) - inside
    for index, axis in enumerate(place.axes):
        outside = [d for d in axis.dims if d in carriers]
        if index != place.axis and outside and _is_product(axis, outside):
            return set(carriers) - set(outside)
    return set(carriers)


def _is_product(axis: Axis, dims: Sequence[int]) -> bool:
    """Whether an axis is one piece of exactly these dims."""
    pieces = axis.pieces
    return len(pieces) == 1 and pieces[0].offset == 0 and [d for d, _ in pieces[0].dims] == list(dims)


def _ordered(dim: int, place: Occurrence, carriers: tuple[int, ...]) -> tuple[int, ...]:
    """Carriers from outer to inner, as in one parameter."""
    order = [d for d, _ in place.pieces(dim)[0].dims if d in carriers]
    order += [d for axis in place.axes for piece in axis.pieces for d, _ in piece.dims if d in carriers]
    return tuple(dict.fromkeys(order))


# -- members of a plan -------------------------------------------------------------------------------------------


def shape_text(shape: tuple[int, ...] | None) -> str:
    """A parameter's shape for people, None for one that is not there."""
    return "absent" if shape is None else f"of shape {shape}"


def check_member(member: Member, shapes: Mapping[str, tuple[int, ...]], coupling: str) -> None:
    """Raise PlanError where a member points outside its parameter."""
    shape = shapes.get(member.parameter)
    axes = [member.axis, *(() if member.carrier_axis is None else (member.carrier_axis,))]
    if shape is None or len(set(axes)) < len(axes) or not all(0 <= a < len(shape) for a in axes):
        raise PlanError(
            f"coupling {coupling!r} names axes {axes} of parameter {member.parameter!r}, "
            f"which is {shape_text(shape)}: make the plan anew"
        )
    slices = None if member.carrier_axis is None else shape[member.carrier_axis]
    if not all(_fits(box, member, shape[member.axis]) for box in member.boxes) or slices not in (None, member.carriers):
        raise PlanError(
            f"coupling {coupling!r} has positions outside parameter {member.parameter!r} "
            f"of shape {shape}: make the plan anew"
        )


def _fits(box: Box, member: Member, size: int) -> bool:
    """Whether all positions of a box lie within `size` and are few enough to be distinct."""
    pairs = [*box.carriers, (member.units, box.unit), *box.width]
    if any(n < 1 for n, _ in pairs) or prod(n for n, _ in pairs) > size:
        return False
    if not all(isinstance(steps, int) or len(steps) == n for n, steps in pairs):
        return False
    if box.carriers and prod(n for n, _ in box.carriers) != member.carriers:
        return False
    ends = [(min(here), max(here)) for here in (distances(steps, n) for n, steps in pairs)]
    return box.offset + sum(low for low, _ in ends) >= 0 and box.offset + sum(high for _, high in ends) < size
