"""Allocation: from scores and a budget to a plan.

Every coupling has a *ladder*: its units are ranked within each carrier, and rung r takes the r-th least unit out of
every carrier at once, so all carriers keep the same number. Allocation merges the rungs of all ladders into one order
and cuts it where the budget is met. Removed elements are counted exactly, each once, though couplings may overlap.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Literal, get_args

import torch
from torch import Tensor

from ecospa_fx.budget.elements import Removal, removed_elements
from ecospa_fx.coupling.couplings import Coupling, Couplings
from ecospa_fx.errors import PlanError
from ecospa_fx.importance.score import magnitudes
from ecospa_fx.importance.scores import Scores
from ecospa_fx.plan import Plan, Selection

Allocation = Literal["global", "uniform"]


def plan(
    couplings: Couplings,
    ratio: float = 0.5,
    scores: Scores | Literal["magnitude", "random"] = "magnitude",
    seed: int = 0,
    round_to: int = 1,
    *,
    allocation: Allocation = "global",
    floor: float = 0.05,
    kinds: Sequence[str] | None = None,
) -> Plan:
    """Decide what to remove.

    ratio: the share, between 0 and 1, of the elements that the chosen couplings hold together (each counted once)
    to remove; met to within half a rung. scores: what `score` returned; "magnitude", from the weights; or "random",
    drawn from `seed` alone, a test of any combination and no way to compress. round_to: kept units per carrier are a
    multiple of it; a coupling with fewer units than that stays whole. allocation: "global" removes the least score
    per parameter first, wherever it is; "uniform" removes the same share of every coupling, and couplings of equal
    kind and size keep equally many units. floor: the share of its units that a coupling keeps in any case, at least
    one unit. kinds: only couplings of these kinds; by default all that are offered, except those whose content is
    offered as finer couplings (heads) unless scores are random.

    Deterministic. Raises PlanError for arguments out of range, scores that do not fit, and a ratio that `floor` and
    `round_to` put out of reach. Where no coupling is offered, the plan is empty.
    """
    _check_arguments(ratio, round_to, floor, allocation)
    chosen = _choose(couplings, kinds, containers=scores == "random")
    values = _values(couplings, chosen, scores, seed)
    ladders = [_ladder(c, values[c.name], round_to, floor) for c in chosen]
    tracks = _tracks(ladders, allocation)
    counts = _cut(couplings, ladders, tracks, ratio, f"floor={floor} and round_to={round_to}")
    selections = tuple(ladder.selection(n) for ladder, n in zip(ladders, counts, strict=True))
    return Plan(selections, tuple(couplings.shapes.items()))


@dataclass(frozen=True, slots=True, eq=False)
class Ladder:
    """The order in which one coupling's units go.

    order: LongTensor [carriers, units], least first; removed: units gone per carrier after each rung; cost: float64
    [rungs], score per parameter of what each rung takes.
    """

    coupling: Coupling
    order: Tensor
    removed: tuple[int, ...]
    cost: Tensor

    def removal(self, rungs: int) -> Removal:
        """What the first `rungs` rungs take."""
        gone = torch.zeros(self.order.shape, dtype=torch.bool)
        if rungs:
            gone.scatter_(1, self.order[:, : self.removed[rungs - 1]], True)
        return self.coupling.members, gone

    def selection(self, rungs: int) -> Selection:
        """What stays after the first `rungs` rungs."""
        c, gone = self.coupling, self.removal(rungs)[1]
        keep = tuple(tuple(row.logical_not().nonzero().flatten().tolist()) for row in gone)
        return Selection(c.name, c.kind, c.layer, c.size, c.carriers, c.members, keep)


def _ladder(coupling: Coupling, values: Tensor, round_to: int, floor: float) -> Ladder:
    size = coupling.size
    least, values = max(1, ceil(floor * size)), values.to(torch.float64)
    ranked, order = values.sort(dim=1, stable=True)
    kept = range((size - 1) // round_to * round_to, least - 1, -round_to)
    removed = tuple(size - k for k in kept if k > 0)
    at = torch.tensor((0, *removed))
    total = torch.cat([torch.zeros(1, dtype=torch.float64), ranked.sum(0).cumsum(0)])[at]
    return Ladder(coupling, order, removed, total.diff() / (at.diff() * (coupling.parameters / size)))


@dataclass(frozen=True, slots=True, eq=False)
class Track:
    """Ladders climbed together, and the key of each rung; the rung with the least key goes first."""

    ladders: tuple[int, ...]
    keys: Tensor


def _tracks(ladders: Sequence[Ladder], allocation: Allocation) -> list[Track]:
    if allocation == "global":
        return [Track((i,), ladder.cost) for i, ladder in enumerate(ladders)]
    groups: dict[tuple[str, int, int], list[int]] = {}
    for i, ladder in enumerate(ladders):
        groups.setdefault((ladder.coupling.kind, ladder.coupling.size, ladder.coupling.carriers), []).append(i)
    return [Track(tuple(group), _shares(ladders[group[0]])) for group in groups.values()]


def _shares(ladder: Ladder) -> Tensor:
    """The share of units gone in the middle of each rung: what keeps couplings of different sizes in step."""
    at = torch.tensor((0, *ladder.removed), dtype=torch.float64)
    return (at[1:] + at[:-1]) / (2 * ladder.coupling.size)


def _cut(
    couplings: Couplings, ladders: Sequence[Ladder], tracks: Sequence[Track], ratio: float, limits: str
) -> list[int]:
    """Rungs climbed on each ladder so that the removed share is nearest to `ratio`."""
    if not ladders:
        return []
    order = torch.cat([t.keys for t in tracks]).argsort(stable=True)
    owner = torch.cat([torch.full_like(t.keys, i, dtype=torch.long) for i, t in enumerate(tracks)])[order]

    def rungs(climbed: int) -> list[int]:
        per_track = owner[:climbed].bincount(minlength=len(tracks)).tolist()
        of_ladder = {i: n for track, n in zip(tracks, per_track, strict=True) for i in track.ladders}
        return [of_ladder[i] for i in range(len(ladders))]

    def removed(climbed: int) -> int:
        return removed_elements(couplings.shapes, map(Ladder.removal, ladders, rungs(climbed)))

    whole = [(x.coupling.members, torch.ones(x.order.shape, dtype=torch.bool)) for x in ladders]
    held = removed_elements(couplings.shapes, whole)
    target, last = ratio * held, len(order)
    above = bisect_left(range(last + 1), target, key=removed)
    below = max(above - 1, 0)
    if above > last:
        most = removed(last)
        if last == 0 or target - most > (most - removed(last - 1)) / 2:
            raise PlanError(
                f"ratio={ratio} is out of reach because {limits} leave at most {most / held:.4f} of the couplings' "
                "parameters to remove: ask for less, or lower them"
            )
        return rungs(last)
    return rungs(above if removed(above) - target <= target - removed(below) else below)


def _check_arguments(ratio: float, round_to: int, floor: float, allocation: str) -> None:
    if not isinstance(ratio, int | float) or not 0 < ratio < 1:
        raise PlanError(
            f"ratio={ratio!r} is not a share of parameters to remove: give a number between 0 and 1, like 0.5"
        )
    if not isinstance(round_to, int) or round_to < 1:
        raise PlanError(f"round_to={round_to!r} is not a number of units: give a whole number of at least 1")
    if not isinstance(floor, int | float) or not 0 <= floor < 1:
        raise PlanError(
            f"floor={floor!r} is not a share of units to keep: give a number from 0 up to, not including, 1"
        )
    if allocation not in get_args(Allocation):
        raise PlanError(f"allocation={allocation!r} is unknown: use one of {', '.join(get_args(Allocation))}")


def _choose(couplings: Couplings, kinds: Sequence[str] | None, *, containers: bool) -> list[Coupling]:
    """The couplings to allocate; containers whose content is offered are left to their content by default."""
    offered = couplings.offered
    if kinds is not None:
        wanted, known = [kinds] if isinstance(kinds, str) else list(kinds), sorted({c.kind for c in offered})
        for kind in wanted:
            if kind not in known:
                raise PlanError(f"no offered coupling is of kind {kind!r}: use some of {', '.join(known) or 'none'}")
        return [c for c in offered if c.kind in wanted]
    names = {c.name for c in offered}
    return [c for c in offered if containers or not c.contains or not names.issuperset(c.contains)]


def _values(couplings: Couplings, chosen: Sequence[Coupling], scores: Scores | str, seed: int) -> Mapping[str, Tensor]:
    """Scores [carriers, units] of every chosen coupling, checked."""
    if scores == "random":
        return _random(chosen, seed)
    if isinstance(scores, str):
        if scores != "magnitude":
            raise PlanError(f"scores={scores!r} is unknown: use 'magnitude', 'random' or what score() returned")
        scores = magnitudes(couplings)
    for c in chosen:
        value = scores.values.get(c.name)
        if value is None or tuple(value.shape) != (c.carriers, c.size):
            found = "none" if value is None else f"shape {tuple(value.shape)}"
            raise PlanError(
                f"coupling {c.name!r} needs scores of shape {(c.carriers, c.size)} and has {found}: "
                "score these couplings"
            )
        if not value.isfinite().all():
            raise PlanError(f"the scores of coupling {c.name!r} are not all finite: score it anew")
    return scores.values


def _random(chosen: Sequence[Coupling], seed: int) -> dict[str, Tensor]:
    """Scores per parameter uniform in [0, 1), times a factor per coupling so that widths differ too."""
    source = torch.Generator().manual_seed(seed)
    drawn = {}
    for c in chosen:
        factor = 2 ** (2 * torch.rand((), generator=source, dtype=torch.float64) - 1)
        units = torch.rand(c.carriers, c.size, generator=source, dtype=torch.float64)
        drawn[c.name] = units * factor * (c.parameters / (c.size * c.carriers))
    return drawn
