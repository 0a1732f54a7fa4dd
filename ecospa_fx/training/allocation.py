"""Which units go at one shrink: the least score per parameter, within bounds per coupling, down to a budget."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from functools import cache
from math import ceil, floor

import torch
from torch import Tensor

from ecospa_fx.budget.cost import Parameters
from ecospa_fx.budget.removal_order import GreedySchedule, Lockstep, RemovalOrder, least_units, numbered
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


def uniform_share(couplings: Sequence[Coupling], limits: Mapping[str, float], gone: float) -> float:
    """The share that stays where every coupling loses the same, up to its limit, and all together lose `gone`.

    limits: by name, the largest share that may go, where there is one.
    """
    whole, low, high = sum(c.parameters for c in couplings), gone, 1.0
    if not limits:
        return 1 - gone
    for _ in range(50):  # halvings, to the last bit of a float
        middle = (low + high) / 2
        lost = sum(c.parameters * min(middle, limits.get(c.name, 1.0)) for c in couplings)
        low, high = (low, middle) if lost >= gone * whole else (middle, high)
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
    steps = round_to or {}
    ladders = [_ladder(c, scores[c.name], limits[c.name], steps.get(c.name, 1)) for c in couplings]
    tracks = _uniform(ladders, dense) if dense is not None else _global(ladders, limits)
    if not ladders or not any(len(t.keys) for t in tracks):
        return {c.name: torch.ones(c.carriers, c.size, dtype=torch.bool) for c in couplings}
    climb = GreedySchedule.of(Parameters(shapes), ladders, tracks)
    forced = sum(int((t.keys == -torch.inf).sum()) for t in tracks)
    rungs = climb.rungs(_height(climb, goal, forced))
    return {x.coupling.name: x.keep(n) for x, n in zip(ladders, rungs, strict=True)}


def _ladder(coupling: Coupling, values: Tensor, limits: WidthBounds, round_to: int) -> RemovalOrder:
    least, most = limits
    ranked, order = values.to("cpu", torch.float64).sort(dim=1, stable=True)
    size = coupling.size
    kept = [k for k in range((size - 1) // round_to * round_to, least - 1, -round_to) if k <= most]
    at = torch.tensor([0, *(size - k for k in kept)])
    total = torch.cat([torch.zeros(1, dtype=torch.float64), ranked.sum(0).cumsum(0)])[at]
    elements = at.diff() * (coupling.parameters / size)
    removed = tuple((at[1:] * coupling.carriers).tolist())
    return RemovalOrder(coupling, numbered(order).T.flatten(), removed, elements, total.diff() / elements)


def _global(ladders: Sequence[RemovalOrder], limits: Mapping[str, WidthBounds]) -> list[Lockstep]:
    """One track per ladder, by cost, ascending even where rounding made the first rung the dearest."""
    tracks = []
    for i, ladder in enumerate(ladders):
        keys = ladder.cost.cummax(0).values if len(ladder.cost) else ladder.cost
        if len(keys) and limits[ladder.coupling.name][1] < ladder.coupling.size:
            keys = torch.cat([torch.full((1,), -torch.inf, dtype=keys.dtype), keys[1:]])
        tracks.append(Lockstep((i,), keys))
    return tracks


def _uniform(ladders: Sequence[RemovalOrder], dense: Mapping[str, int]) -> list[Lockstep]:
    """Couplings of equal kind and sizes in step, by the share of their units that is gone."""
    groups: dict[tuple[str, int, int, int, tuple[int, ...]], list[int]] = {}
    for i, ladder in enumerate(ladders):
        c = ladder.coupling
        groups.setdefault((c.kind, dense[c.name], c.size, c.carriers, ladder.removed), []).append(i)
    tracks = []
    for (_, whole, size, _, _), group in groups.items():
        first = ladders[group[0]]
        gone = whole - size + torch.tensor((0, *first.removed), dtype=torch.float64) / first.coupling.carriers
        tracks.append(Lockstep(tuple(group), (gone[1:] + gone[:-1]) / (2 * whole)))
    return tracks


def _height(climb: GreedySchedule, goal: int, forced: int) -> int:
    """How many rungs remove what is nearest to the goal, at least the forced ones."""
    last, removed = len(climb.owner), cache(climb.removed)
    above = bisect_left(range(last + 1), float(goal), lo=forced, key=removed)
    if above > last:
        return last
    below = max(above - 1, forced)
    return above if removed(above) - goal <= goal - removed(below) else below
