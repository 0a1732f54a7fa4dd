"""Couplings of a model that was shrunk: fewer units, at other positions.

Every carrier keeps the same number of units, so what is left of a coupling is again a regular grid of positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from ecospa_fx.axes.axis import Steps, normalised
from ecospa_fx.coupling.types import Box, Coupling, Member
from ecospa_fx.coupling.unit_elements import Factors, coupled_elements
from ecospa_fx.errors import TrainingError

Keep = Mapping[str, Tensor]
"""Per coupling BoolTensor [carriers, units] of the dense model, True where a unit is still there."""


def disjoint(couplings: Iterable[Coupling]) -> list[Coupling]:
    """Those that can be chosen from independently: of couplings that share positions, the finest, in their order."""
    listed = [c for c in couplings if c.size > 1]
    taken: dict[tuple[str, int], set[int]] = {}
    accepted = set()
    for coupling in sorted(listed, key=lambda c: c.parameters / (c.size * c.carriers)):
        places = [place for member in coupling.members for place in _positions_by_axis(member)]
        if any(taken.get(key, set()) & positions for key, positions in places):
            continue
        accepted.add(coupling.name)
        for key, positions in places:
            taken.setdefault(key, set()).update(positions)
    return [c for c in listed if c.name in accepted]


def _positions_by_axis(member: Member) -> list[tuple[tuple[str, int], set[int]]]:
    """Positions per axis that a member's units take, or that its choice depends on."""
    result = [((member.parameter, member.axis), set(member.indices.flatten().tolist()))]
    if member.carrier_axis is not None:
        result.append(((member.parameter, member.carrier_axis), set(range(member.carriers))))
    return result


def narrowed(
    couplings: Sequence[Coupling], keep: Keep, factors: Mapping[str, Factors], shapes: Mapping[str, tuple[int, ...]]
) -> list[Coupling]:
    """The couplings as they are now. factors: of the plan that has been applied; shapes: of the parameters now."""
    result = []
    for coupling in couplings:
        kept = keep[coupling.name]
        members = tuple(_member(m, kept, factors.get(m.parameter, {})) for m in coupling.members)
        parameters = coupled_elements(shapes, [members])
        result.append(replace(coupling, size=members[0].units, members=members, parameters=parameters))
    return result


def _member(member: Member, keep: Tensor, factors: Factors) -> Member:
    ranks = _ranks(member, factors)
    boxes = tuple(_box(member, box, keep, ranks) for box in member.boxes)
    return replace(member, boxes=boxes, units=int(keep[0].sum()))


def _ranks(member: Member, factors: Factors) -> Tensor | None:
    """LongTensor [1 or slices, positions]: where each kept position of the member's axis is now; None: unmoved."""
    masks = []
    for axes, kept in factors.items():
        if axes[-1] != member.axis:
            continue
        if len(axes) == 2 and axes[0] != member.carrier_axis:
            raise TrainingError(
                f"axis {member.axis} of parameter {member.parameter!r} belongs to several couplings whose choices "
                "differ along different axes: leave one kind out with kinds="
            )
        masks.append(kept if len(axes) == 2 else kept[None])
    if not masks:
        return None
    mask = masks[0]
    for other in masks[1:]:
        mask = mask & other
    return mask.cumsum(1) - 1


def _box(member: Member, box: Box, keep: Tensor, ranks: Tensor | None) -> Box:
    """The grid that is left of a box."""
    dense = box.indices(member.carriers, member.units)
    if ranks is None:
        now = dense
    else:
        rows = torch.arange(member.carriers)[:, None, None] if len(ranks) > 1 else torch.zeros_like(dense[:1, :1, :1])
        now = ranks[rows, dense]
    width = now.shape[2]
    now = now[keep[:, :, None].expand_as(now)].view(member.carriers, -1, width)
    first = int(now[0, 0, 0])
    offset, unit = normalised(now[0, :, 0].tolist()) if now.shape[1] > 1 else (first, 1)
    carriers = tuple((n, int(now[index, 0, 0]) - first) for n, index in _unit_positions(box.carriers))
    widths = tuple((n, int(now[0, 0, index]) - first) for n, index in _unit_positions(box.width))
    grid = Box(offset, carriers, unit, widths)
    if not torch.equal(grid.indices(member.carriers, now.shape[1]), now):
        raise TrainingError(
            f"what is left of axis {member.axis} of parameter {member.parameter!r} is no regular grid: "
            "leave this kind of coupling out with kinds="
        )
    return grid


def _unit_positions(pairs: Sequence[tuple[int, Steps]]) -> list[tuple[int, int]]:
    """Per (size, stride) pair its size, and the flat index at which it alone is 1; 0 where it never is."""
    sizes = [size for size, _ in pairs]
    return [(size, prod(sizes[i + 1 :]) if size > 1 else 0) for i, size in enumerate(sizes)]
