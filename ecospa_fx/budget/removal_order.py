"""How couplings are climbed down: rung by rung, alone or together, until a budget is met."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, gcd, lcm

import torch
from torch import Tensor

from ecospa_fx.budget.alignment import preferred_multiple
from ecospa_fx.budget.cost import CostModel
from ecospa_fx.budget.ties import Carried, Tie
from ecospa_fx.coupling.types import Coupling
from ecospa_fx.errors import PlanError
from ecospa_fx.plan import Selection


@dataclass(frozen=True, slots=True)
class Bounds:
    """How many units a coupling may keep; see `plan`.

    limits: by name of coupling, the largest share that it may lose; parameters: by name, those whose device and type
    say what is liked where round_to is None.
    """

    round_to: int | None
    floor: float
    limits: Mapping[str, float]
    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    told: Mapping[str, float] | None = None
    """The limits as the user wrote them, for messages."""

    def widths(self, coupling: Coupling, tied: Sequence[Coupling] = ()) -> list[int]:
        """Numbers of units that may be kept, short of all, from most to fewest.

        tied: couplings that keep as many times more as they have, each of which must be allowed to.
        """
        size, every = coupling.size, (coupling, *tied)
        step = lcm(*(self.step(c, c.size // size) for c in every))
        least = max(ceil(self.least(c) / (c.size // size)) for c in every)
        return list(range((size - 1) // step * step, least - 1, -step))

    def least(self, coupling: Coupling) -> int:
        """How many units stay at least."""
        return least_units(coupling.size, self.floor, self.limits.get(coupling.name, 1.0))

    def step(self, coupling: Coupling, times: int = 1) -> int:
        """What kept units are a multiple of where a coupling keeps so many times more of them."""
        if self.round_to is not None:
            return self.round_to
        step = preferred_multiple(coupling, self.parameters)
        return step // gcd(step, times)

    def __str__(self) -> str:
        told = f"floor={self.floor} and round_to={self.round_to}"
        return f"{told} and limits={dict(self.told)}" if self.told else told


def least_units(size: int, floor: float, limit: float) -> int:
    """Units that stay at least: one, a share of them, and what a limit on the share that goes leaves."""
    return max(1, ceil(floor * size), size - int(limit * size + 1e-9))


@dataclass(frozen=True, slots=True, eq=False)
class RemovalOrder:
    """The order in which one coupling's units go.

    order: LongTensor, carrier · size + unit of those that may go, first ones first; removed: how many of them are gone
    after each rung; freed, cost: float64 [rungs], what each rung frees of the budget, and its score for each unit of
    that.
    """

    coupling: Coupling
    order: Tensor
    removed: tuple[int, ...]
    freed: Tensor
    cost: Tensor

    @classmethod
    def of(cls, coupling: Coupling, values: Tensor, widths: Sequence[int], spending: CostModel) -> RemovalOrder:
        """values: scores [carriers, units]; widths: numbers of units that may be kept, from most to fewest."""
        ranked, order = values.to("cpu", torch.float64).sort(dim=1, stable=True)
        at = torch.tensor([0, *(coupling.size - k for k in widths)])
        lost = torch.cat([torch.zeros(1, dtype=torch.float64), ranked.sum(0).cumsum(0)])[at]
        freed = torch.cat([torch.zeros(1, dtype=torch.float64), spending.freed(coupling, widths)]).diff()
        removed = tuple((at[1:] * coupling.carriers).tolist())
        return cls(coupling, numbered(order).T.flatten(), removed, freed, lost.diff() / freed)

    @classmethod
    def ragged(cls, coupling: Coupling, values: Tensor, bounds: Bounds) -> RemovalOrder:
        """Each carrier loses units by itself, a step at a time, and keeps as many at least; counted in elements."""
        ranked, order = values.to("cpu", torch.float64).sort(dim=1, stable=True)
        size, carriers, step = coupling.size, coupling.carriers, bounds.step(coupling)
        each = coupling.parameters / (size * carriers)
        ends = size - torch.arange((size - 1) // step * step, 0, -step)
        at = torch.cat([ends.new_zeros(1), ends])
        lost = torch.cat([ranked.new_zeros(carriers, 1), ranked.cumsum(1)], 1)[:, at].diff()
        keys, chosen = (lost / (at.diff() * each)).cummax(1).values.flatten().sort(stable=True)
        taken = at.diff().repeat(carriers)[chosen]
        rungs = int((taken.cumsum(0) <= carriers * (size - bounds.least(coupling))).sum())
        turn = torch.empty_like(chosen).scatter(0, chosen, torch.arange(len(chosen))).view(carriers, len(ends))
        last = int(at[-1])
        turns = turn[:, torch.searchsorted(ends, torch.arange(last), right=True)].flatten()
        units = numbered(order)[:, :last].flatten()[turns.argsort(stable=True)]
        removed = tuple(taken[:rungs].cumsum(0).tolist())
        return cls(coupling, units, removed, taken[:rungs] * each, keys[:rungs])

    def rungs(self, kept: int) -> int:
        """How many rungs lead down to a width."""
        gone = (self.coupling.size - kept) * self.coupling.carriers
        return self.removed.index(gone) + 1 if gone else 0

    def keep(self, rungs: int) -> Tensor:
        """BoolTensor [carriers, units], True where a unit is kept after the first `rungs` rungs."""
        keep = torch.ones(self.coupling.carriers, self.coupling.size, dtype=torch.bool)
        if rungs:
            keep.view(-1)[self.order[: self.removed[rungs - 1]]] = False
        return keep

    def selection(self, rungs: int) -> Selection:
        """What stays after the first `rungs` rungs."""
        return Selection.of(self.coupling, self.keep(rungs))


def numbered(order: Tensor) -> Tensor:
    """[carriers, units] of units as carrier · size + unit."""
    return order + torch.arange(len(order))[:, None] * order.shape[1]


@dataclass(frozen=True, slots=True, eq=False)
class Lockstep:
    """Ladders climbed together, and the key of each rung; the rung with the least key goes first."""

    ladders: tuple[int, ...]
    keys: Tensor


def each_alone(ladders: Sequence[RemovalOrder]) -> list[Lockstep]:
    return [Lockstep((i,), ladder.cost) for i, ladder in enumerate(ladders)]


def in_uniform_step(ladders: Sequence[RemovalOrder]) -> list[Lockstep]:
    groups: dict[tuple[str, int, int, tuple[int, ...]], list[int]] = {}
    for i, ladder in enumerate(ladders):
        c = ladder.coupling
        groups.setdefault((c.kind, c.size, c.carriers, ladder.removed), []).append(i)
    return [Lockstep(tuple(group), _shares(ladders[group[0]])) for group in groups.values()]


def _shares(ladder: RemovalOrder) -> Tensor:
    """The share of units gone in the middle of each rung: what keeps couplings of different sizes in step."""
    at = torch.tensor((0, *ladder.removed), dtype=torch.float64)
    return (at[1:] + at[:-1]) / (2 * ladder.coupling.size * ladder.coupling.carriers)


@dataclass(frozen=True, slots=True, eq=False)
class GreedySchedule:
    """The rungs of all tracks in one order, least key first; a *height* is how many of them are taken.

    owner: LongTensor [heights], the track of each rung; estimate: float64 [heights + 1], what is freed at each height
    where couplings do not overlap.
    """

    spending: CostModel
    ladders: Sequence[RemovalOrder]
    tracks: Sequence[Lockstep]
    owner: Tensor
    estimate: Tensor

    @classmethod
    def of(cls, spending: CostModel, ladders: Sequence[RemovalOrder], tracks: Sequence[Lockstep]) -> GreedySchedule:
        """Merge the tracks; equal keys stay in the order of the couplings."""
        order = torch.cat([t.keys for t in tracks]).argsort(stable=True)
        owner = torch.cat([torch.full_like(t.keys, i, dtype=torch.long) for i, t in enumerate(tracks)])[order]
        taken = torch.cat([torch.stack([ladders[i].freed for i in t.ladders]).sum(0) for t in tracks])[order]
        return cls(spending, ladders, tracks, owner, torch.cat([taken.new_zeros(1), taken.cumsum(0)]))

    def rungs(self, height: int) -> list[int]:
        """Rungs taken on each ladder."""
        per_track = self.owner[:height].bincount(minlength=len(self.tracks)).tolist()
        of_ladder = {i: n for track, n in zip(self.tracks, per_track, strict=True) for i in track.ladders}
        return [of_ladder[i] for i in range(len(self.ladders))]

    def removed(self, height: int) -> float:
        """What is freed at a height, together."""
        return removed_at(self.spending, self.ladders, self.rungs(height))

    def held(self) -> float:
        """What all the couplings hold, together."""
        return self.spending.held([x.coupling for x in self.ladders])


def removed_at(spending: CostModel, ladders: Sequence[RemovalOrder], rungs: Sequence[int]) -> float:
    """What is freed by some rungs of each ladder, together."""
    taken = {x.coupling.name: (x, n) for x, n in zip(ladders, rungs, strict=True) if n}
    kept = {name: x.coupling.size - x.removed[n - 1] // x.coupling.carriers for name, (x, n) in taken.items()}
    return spending.removed({name: (x.coupling.members, x.keep(n)) for name, (x, n) in taken.items()}, kept)


def in_carried_step(
    carried: Carried, values: Mapping[str, Tensor], bounds: Bounds, spending: CostModel, *, uniform: bool
) -> tuple[list[RemovalOrder], list[Lockstep]]:
    """Ladders of what is tied together are climbed in step, and with uniform widths those of all layers.

    What keeps the same number of units may keep what every one of its couplings may.
    """
    if not spending.smooth:
        raise PlanError("expressible_in='module' cannot spend a budget in latency yet: use 'parameters' or 'flops'")
    ladders: list[RemovalOrder] = []
    tracks: dict[tuple[int, ...], list[int]] = {}
    keys = [(tie.number, tie.base.size) if uniform else (i,) for i, tie in enumerate(carried.ties)]
    together: dict[tuple[int, ...], list[Coupling]] = {}
    for key, tie in zip(keys, carried.ties, strict=True):
        together.setdefault(key, []).extend(tie.couplings)
    for key, tie in zip(keys, carried.ties, strict=True):
        size = tie.base.size
        kept = [k for k in bounds.widths(tie.base, together[key]) if carried.fine(tie, k)]
        track = tracks.setdefault(key, [])
        for c in tie.couplings:
            track.append(len(ladders))
            ladders.append(RemovalOrder.of(c, _shared(tie, c, values), [k * (c.size // size) for k in kept], spending))
    found = [Lockstep(tuple(t), _shares(ladders[t[0]]) if uniform else _together(ladders, t)) for t in tracks.values()]
    return ladders, found


def _shared(tie: Tie, coupling: Coupling, values: Mapping[str, Tensor]) -> Tensor:
    """Scores [carriers, units] of a coupling; the mean over all that rotates where that must keep the same pairs."""
    if not tie.same or coupling.symmetry != "rotary":
        return values[coupling.name]
    alike = [values[c.name] for c in tie.couplings if c.symmetry == "rotary" and c.size == coupling.size]
    return torch.cat(alike).mean(0).expand(coupling.carriers, -1)


def _together(ladders: Sequence[RemovalOrder], members: Sequence[int]) -> Tensor:
    """Score for each unit of the budget of the rungs of ladders that are climbed in step."""
    freed = torch.stack([ladders[i].freed for i in members])
    return (torch.stack([ladders[i].cost for i in members]) * freed).sum(0) / freed.sum(0)
