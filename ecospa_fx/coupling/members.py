"""Whether members point where their parameters are: checked of every plan, which may come from a file."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from ecospa_fx.coupling.types import Box, Member
from ecospa_fx.errors import PlanError


def shape_told(shape: tuple[int, ...] | None) -> str:
    """A parameter's shape for people, None for one that is not there."""
    return "absent" if shape is None else f"of shape {shape}"


def check_member(member: Member, shapes: Mapping[str, tuple[int, ...]], coupling: str) -> None:
    """Raise PlanError where a member points outside its parameter."""
    shape = shapes.get(member.parameter)
    axes = [member.axis, *(() if member.carrier_axis is None else (member.carrier_axis,))]
    if shape is None or len(set(axes)) < len(axes) or not all(0 <= a < len(shape) for a in axes):
        raise PlanError(
            f"coupling {coupling!r} names axes {axes} of parameter {member.parameter!r}, "
            f"which is {shape_told(shape)}: make the plan anew"
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
    if box.carriers and prod(n for n, _ in box.carriers) != member.carriers:
        return False
    reach = [(n - 1) * stride for n, stride in pairs]
    return box.offset + sum(min(r, 0) for r in reach) >= 0 and box.offset + sum(max(r, 0) for r in reach) < size
