"""In which order units are removed: each coupling's by itself, several in lockstep, and all merged into one schedule.

A step of a `RemovalOrder` takes units out of one coupling: the next ones of every carrier at once, so that all carriers
keep the same number, or of one carrier where the order is ragged. `Lockstep` takes steps of several orders together.
`GreedySchedule` merges the steps of all, least score per cost first.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from math import ceil, gcd, lcm

import torch
from torch import Tensor

from ecospa_fx.budget.alignment import Engine, multiple_of
from ecospa_fx.budget.cost import CostModel
from ecospa_fx.budget.ties import Carried, Tie
from ecospa_fx.coupling.types import BLOCK, Coupling
from ecospa_fx.errors import PlanError
from ecospa_fx.plan import Selection


@dataclass(frozen=True, slots=True)
class Bounds:
    """How many units a coupling may keep; see `plan`."""

    round_to: int | Engine | None
    """What kept units are a multiple of; by name, of what an engine likes; None: of what the device prefers."""
    floor: float
    """Least share of its units that a coupling keeps."""
    limits: Mapping[str, float]
    """By name of coupling, the largest share that it may lose."""
    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    """By name, those whose device and type count where `round_to` is None."""
    written: Mapping[str, float] | None = None
    """The limits as the user wrote them, for messages."""

    def widths(self, coupling: Coupling, tied: Sequence[Coupling] = ()) -> list[int]:
        """Numbers of units that may be kept, short of all, from most to fewest.

        tied: couplings that keep as many times more as they have, each of which must be allowed to.
        """
        size, every = coupling.size, (coupling, *tied)
        multiple = lcm(*(self.multiple(c, c.size // size) for c in every))
        least = max(ceil(self.least(c) / (c.size // size)) for c in every)
        return multiples_below(size, least, multiple)

    def least(self, coupling: Coupling) -> int:
        """How many units stay at least."""
        limit = self.limits.get(coupling.name, 1.0)
        if coupling.kind == BLOCK:
            return 0 if limit == 1.0 else 1
        return least_units(coupling.size, self.floor, limit)

    def multiple(self, coupling: Coupling, times: int = 1) -> int:
        """What kept units are a multiple of where a coupling keeps so many times more of them."""
        if isinstance(self.round_to, int):
            return self.round_to
        multiple = multiple_of(self.round_to, coupling, self.parameters)
        return multiple // gcd(multiple, times)

    def __str__(self) -> str:
        message = f"floor={self.floor} and round_to={self.round_to}"
        return f"{message} and limits={dict(self.written)}" if self.written else message


def least_units(size: int, floor: float, limit: float) -> int:
    """Units that stay at least: one, a share of them, and what a limit on the share that goes leaves."""
    return max(1, ceil(floor * size), size - int(limit * size + 1e-9))


def multiples_below(size: int, least: int, multiple: int) -> list[int]:
    """Widths short of `size` and not below `least` that are multiples of a number, from most to fewest.

    >>> multiples_below(10, 4, 2)
    [8, 6, 4]
    """
    return list(range((size - 1) // multiple * multiple, least - 1, -multiple))


@dataclass(frozen=True, slots=True, eq=False)
class RemovalOrder:
    """The order in which one coupling's units are removed, step by step."""

    coupling: Coupling
    """Whose units these are."""
    order: Tensor
    """LongTensor of carrier · size + unit for the units that may be removed, first ones first."""
    removed: tuple[int, ...]
    """Per step, how many units of `order` are removed after it."""
    freed: Tensor
    """float64 [steps]: what each step frees of the budget."""
    cost: Tensor
    """float64 [steps]: the score of each step's units, divided by what it frees."""

    @classmethod
    def of(cls, coupling: Coupling, scores: Tensor, widths: Sequence[int], cost_model: CostModel) -> RemovalOrder:
        """scores: [carriers, units]; widths: numbers of units that may be kept, from most to fewest."""
        ranked, order = scores.to("cpu", torch.float64).sort(dim=1, stable=True)
        ends = torch.tensor([0, *(coupling.size - k for k in widths)])  # units removed per carrier after each step
        total = torch.cat([torch.zeros(1, dtype=torch.float64), ranked.sum(0).cumsum(0)])[ends]
        freed = torch.cat([torch.zeros(1, dtype=torch.float64), cost_model.freed(coupling, widths)]).diff()
        removed = tuple((ends[1:] * coupling.carriers).tolist())
        return cls(coupling, numbered(order).T.flatten(), removed, freed, total.diff() / freed)

    @classmethod
    def ragged(cls, coupling: Coupling, scores: Tensor, bounds: Bounds, cost_model: CostModel) -> RemovalOrder:
        """Each carrier loses units by itself, a step at a time, and keeps as many at least.

        cost_model: parameters or bytes, of which all units free the same.
        """
        ranked, order = scores.to("cpu", torch.float64).sort(dim=1, stable=True)
        size, carriers, multiple = coupling.size, coupling.carriers, bounds.multiple(coupling)
        each = float(cost_model.freed(coupling, [size - 1])) / carriers  # of one unit of one carrier
        ends = size - torch.arange((size - 1) // multiple * multiple, 0, -multiple)
        begins_and_ends = torch.cat([ends.new_zeros(1), ends])
        steps = begins_and_ends.diff()  # units of each step, the same in every carrier
        total = torch.cat([ranked.new_zeros(carriers, 1), ranked.cumsum(1)], 1)[:, begins_and_ends].diff()
        cost, chosen = (total / (steps * each)).cummax(1).values.flatten().sort(stable=True)
        taken = steps.repeat(carriers)[chosen]
        count = int((taken.cumsum(0) <= carriers * (size - bounds.least(coupling))).sum())
        turn = torch.empty_like(chosen).scatter(0, chosen, torch.arange(len(chosen))).view(carriers, len(ends))
        last = int(begins_and_ends[-1])
        turns = turn[:, torch.searchsorted(ends, torch.arange(last), right=True)].flatten()
        units = numbered(order)[:, :last].flatten()[turns.argsort(stable=True)]
        removed = tuple(taken[:count].cumsum(0).tolist())
        return cls(coupling, units, removed, taken[:count] * each, cost[:count])

    def steps_to(self, kept: int) -> int:
        """How many steps lead down to a width."""
        removed = (self.coupling.size - kept) * self.coupling.carriers
        return self.removed.index(removed) + 1 if removed else 0

    def keep(self, steps: int) -> Tensor:
        """BoolTensor [carriers, units], True where a unit is kept after so many steps."""
        keep = torch.ones(self.coupling.carriers, self.coupling.size, dtype=torch.bool)
        if steps:
            keep.view(-1)[self.order[: self.removed[steps - 1]]] = False
        return keep

    def selection(self, steps: int) -> Selection:
        """What is kept after so many steps."""
        return Selection.of(self.coupling, self.keep(steps))


def numbered(order: Tensor) -> Tensor:
    """[carriers, units] of units as carrier · size + unit."""
    return order + torch.arange(len(order))[:, None] * order.shape[1]


@dataclass(frozen=True, slots=True, eq=False)
class Lockstep:
    """Orders that take their steps together."""

    orders: tuple[int, ...]
    """Their places in a list."""
    keys: Tensor
    """float64 [steps]: of all locksteps, the step with the least key comes first."""


def each_alone(orders: Sequence[RemovalOrder]) -> list[Lockstep]:
    """Each order by itself, by its cost."""
    return [Lockstep((i,), order.cost) for i, order in enumerate(orders)]


def in_uniform_step(orders: Sequence[RemovalOrder], dense: Mapping[str, int] | None = None) -> list[Lockstep]:
    """Couplings of equal kind and sizes in step, all by the share of their units that is removed.

    dense: by name of coupling, its units before any removal, where that is not now.
    """
    groups: dict[tuple[str, int, int, int, tuple[int, ...]], list[int]] = {}
    for i, order in enumerate(orders):
        c = order.coupling
        whole = c.size if dense is None else dense[c.name]
        groups.setdefault((c.kind, whole, c.size, c.carriers, order.removed), []).append(i)
    return [Lockstep(tuple(group), _shares(orders[group[0]], whole)) for (_, whole, *_), group in groups.items()]


def _shares(order: RemovalOrder, dense: int) -> Tensor:
    """The share of units removed in the middle of each step: what keeps couplings of different sizes in step.

    dense: how many units the coupling had before any removal.
    """
    before = (dense - order.coupling.size) * order.coupling.carriers
    removed = before + torch.tensor((0, *order.removed), dtype=torch.float64)
    return (removed[1:] + removed[:-1]) / (2 * dense * order.coupling.carriers)


@dataclass(frozen=True, slots=True, eq=False)
class GreedySchedule:
    """The steps of all locksteps in one order, least key first; a *height* is how many of them are taken."""

    cost_model: CostModel
    """Counts what is freed."""
    orders: Sequence[RemovalOrder]
    """One per coupling."""
    locksteps: Sequence[Lockstep]
    """Which of the orders take their steps together; each order is in one of them."""
    owner: Tensor
    """LongTensor [heights]: the lockstep of each step."""
    estimate: Tensor
    """float64 [heights + 1]: what is freed at each height where couplings do not overlap."""

    @classmethod
    def of(cls, cost_model: CostModel, orders: Sequence[RemovalOrder], locksteps: Sequence[Lockstep]) -> GreedySchedule:
        """Merge the locksteps; equal keys stay in the order of the couplings."""
        order = torch.cat([s.keys for s in locksteps]).argsort(stable=True)
        owner = torch.cat([torch.full_like(s.keys, i, dtype=torch.long) for i, s in enumerate(locksteps)])[order]
        freed = torch.cat([torch.stack([orders[i].freed for i in s.orders]).sum(0) for s in locksteps])[order]
        return cls(cost_model, orders, locksteps, owner, torch.cat([freed.new_zeros(1), freed.cumsum(0)]))

    @property
    def top(self) -> int:
        """The height at which every step is taken."""
        return len(self.owner)

    def steps(self, height: int) -> list[int]:
        """Steps taken in each order."""
        per_lockstep = self.owner[:height].bincount(minlength=len(self.locksteps)).tolist()
        taken = {i: n for lockstep, n in zip(self.locksteps, per_lockstep, strict=True) for i in lockstep.orders}
        return [taken[i] for i in range(len(self.orders))]

    def removed(self, height: int) -> float:
        """What is freed at a height, together."""
        return removed_at(self.cost_model, self.orders, self.steps(height))

    def nearest(self, target: float, least: int = 0) -> int:
        """The height that frees what is nearest to a target, the higher of two that are as near; at least `least`."""
        removed = cache(self.removed)
        above = max(least, self._first_reaching(removed, target))
        if above > self.top:
            return self.top
        below = max(above - 1, least)
        return above if removed(above) - target <= target - removed(below) else below

    def least(self, target: float) -> int:
        """The lowest height that frees a target; `top` + 1 where none does."""
        return self._first_reaching(cache(self.removed), target)

    def _first_reaching(self, removed: Callable[[int], float], target: float) -> int:
        """The least height that frees a target, `top` + 1 where none does; the estimate saves counting."""
        guess = int(torch.searchsorted(self.estimate, target))
        low, high, step = guess - 1, guess, 1
        while high <= self.top and removed(high) < target:
            low, high, step = high, high + step, 2 * step
        while low >= 0 and removed(low) >= target:
            low, high, step = low - step, low, 2 * step
        heights = range(self.top + 1)
        return bisect_left(heights, target, lo=max(low + 1, 0), hi=min(high, self.top + 1), key=removed)


def removed_at(cost_model: CostModel, orders: Sequence[RemovalOrder], steps: Sequence[int]) -> float:
    """What is freed by some steps of each order, together."""
    taken = {x.coupling.name: (x, n) for x, n in zip(orders, steps, strict=True) if n}
    kept = {name: x.coupling.size - x.removed[n - 1] // x.coupling.carriers for name, (x, n) in taken.items()}
    return cost_model.removed({name: (x.coupling.members, x.keep(n)) for name, (x, n) in taken.items()}, kept)


def in_carried_step(
    carried: Carried, scores: Mapping[str, Tensor], bounds: Bounds, cost_model: CostModel, *, uniform: bool
) -> tuple[list[RemovalOrder], list[Lockstep]]:
    """What is tied together takes its steps together, and with uniform widths so do all layers.

    What keeps the same number of units may keep what every one of its couplings may.
    """
    if not cost_model.smooth:
        raise PlanError("expressible_in='module' cannot spend a budget in latency yet: use 'parameters' or 'flops'")
    orders: list[RemovalOrder] = []
    locksteps: dict[tuple[int, ...], list[int]] = {}
    keys = [(tie.number, tie.base.size) if uniform else (i,) for i, tie in enumerate(carried.ties)]
    together: dict[tuple[int, ...], list[Coupling]] = {}
    for key, tie in zip(keys, carried.ties, strict=True):
        together.setdefault(key, []).extend(tie.couplings)
    for key, tie in zip(keys, carried.ties, strict=True):
        size = tie.base.size
        kept = [k for k in bounds.widths(tie.base, together[key]) if carried.fine(tie, k)]
        for c in tie.couplings:
            locksteps.setdefault(key, []).append(len(orders))
            widths = [k * (c.size // size) for k in kept]
            orders.append(RemovalOrder.of(c, _shared(tie, c, scores), widths, cost_model))

    def keyed(members: Sequence[int]) -> Tensor:
        first = orders[members[0]]
        return _shares(first, first.coupling.size) if uniform else _together([orders[i] for i in members])

    return orders, [Lockstep(tuple(members), keyed(members)) for members in locksteps.values()]


def _shared(tie: Tie, coupling: Coupling, scores: Mapping[str, Tensor]) -> Tensor:
    """Scores [carriers, units] of a coupling; the mean over all that rotates where that must keep the same pairs."""
    if not tie.same or coupling.symmetry != "rotary":
        return scores[coupling.name]
    alike = [scores[c.name] for c in tie.couplings if c.symmetry == "rotary" and c.size == coupling.size]
    return torch.cat(alike).mean(0).expand(coupling.carriers, -1)


def _together(orders: Sequence[RemovalOrder]) -> Tensor:
    """Cost of the steps of several orders that are taken together."""
    freed = torch.stack([order.freed for order in orders])
    return (torch.stack([order.cost for order in orders]) * freed).sum(0) / freed.sum(0)
