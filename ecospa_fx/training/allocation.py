"""Which units go at one shrink: the least score per parameter, within bounds per coupling, down to a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, floor

import torch
from torch import Tensor

from ecospa_fx.budget.cost import Parameters
from ecospa_fx.budget.removal_order import (
    GreedySchedule,
    Lockstep,
    RemovalOrder,
    in_uniform_step,
    least_units,
    multiples_below,
)
from ecospa_fx.coupling.types import Coupling
from ecospa_fx.coupling.unit_elements import Shapes

WidthBounds = tuple[int, int]
"""Least and most units that one coupling may have afterwards."""


def bounds(
    size: int, now: int, uniform: float, shares: tuple[float, float, float], round_to: int, limit: float = 1.0
) -> WidthBounds:
    """Bounds of a coupling. size, now: its units dense and now; uniform: the share that uniform allocation keeps;
    shares: what is kept in any case, and least and most as multiples of `uniform`; limit: the share that may go."""
    lowest, low, high = shares
    least = max(least_units(size, lowest, limit), ceil(low * uniform * size - 1e-9))
    least = min(now, ceil(least / round_to) * round_to)
    return least, max(least, floor(min(now, high * uniform * size + 1e-9)))


def uniform_share(couplings: Sequence[Coupling], limits: Mapping[str, float], removed: float) -> float:
    """The share that stays where every coupling loses the same, up to its limit, and a share `removed` goes in all.

    limits: by name, the largest share that may go, where there is one.
    """
    whole, low, high = sum(c.parameters for c in couplings), removed, 1.0
    if not limits:
        return 1 - removed
    for _ in range(50):  # halvings, to the last bit of a float
        middle = (low + high) / 2
        lost = sum(c.parameters * min(middle, limits.get(c.name, 1.0)) for c in couplings)
        low, high = (low, middle) if lost >= removed * whole else (middle, high)
    return 1 - high


def allocate(
    couplings: Sequence[Coupling],
    shapes: Shapes,
    scores: Mapping[str, Tensor],
    limits: Mapping[str, WidthBounds],
    goal: int,
    *,
    round_to: Mapping[str, int] | None = None,
    dense: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """Per coupling BoolTensor [carriers, units], True where a unit stays, so that about `goal` elements go.

    couplings, shapes: as they are now; round_to: what kept units are multiples of, where it is not 1. Of several
    couplings the least score per parameter goes first; with `dense`, their units before any shrink, the same share of
    each. Units above a coupling's bounds go whatever the goal.
    """
    multiples, cost_model = round_to or {}, Parameters(shapes)
    orders = [
        RemovalOrder.of(c, scores[c.name], _widths(c, limits[c.name], multiples.get(c.name, 1)), cost_model)
        for c in couplings
    ]
    locksteps = in_uniform_step(orders, dense) if dense is not None else _global(orders, limits)
    if not any(len(lockstep.keys) for lockstep in locksteps):
        return {c.name: torch.ones(c.carriers, c.size, dtype=torch.bool) for c in couplings}
    schedule = GreedySchedule.of(cost_model, orders, locksteps)
    forced = sum(int((lockstep.keys == -torch.inf).sum()) for lockstep in locksteps)
    steps = schedule.steps(schedule.nearest(float(goal), forced))
    return {order.coupling.name: order.keep(n) for order, n in zip(orders, steps, strict=True)}


def _widths(coupling: Coupling, limits: WidthBounds, multiple: int) -> list[int]:
    """Numbers of units that may be kept, short of all, from most to fewest."""
    least, most = limits
    return [k for k in multiples_below(coupling.size, least, multiple) if k <= most]


def _global(orders: Sequence[RemovalOrder], limits: Mapping[str, WidthBounds]) -> list[Lockstep]:
    """Each order by itself, by cost, ascending even where rounding made the first step the dearest.

    What has more units than its bounds allow takes its first step before all others.
    """
    locksteps = []
    for i, order in enumerate(orders):
        keys = order.cost.cummax(0).values if len(order.cost) else order.cost
        if len(keys) and limits[order.coupling.name][1] < order.coupling.size:
            keys = torch.cat([torch.full((1,), -torch.inf, dtype=keys.dtype), keys[1:]])
        locksteps.append(Lockstep((i,), keys))
    return locksteps
