"""Allocation: from scores and a budget to a plan.

Every coupling has a *ladder*: its units are ranked within each carrier, and rung r takes the r-th least unit out of
every carrier at once, so all carriers keep the same number. Allocation merges the rungs of all ladders into one order
and cuts it where the budget is met. Removed elements are counted exactly, each once, though couplings may overlap.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import ceil
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ecospa_fx.budget.elements import Removal, Shapes, removed_elements
from ecospa_fx.coupling.couplings import Coupling, Couplings
from ecospa_fx.errors import PlanError
from ecospa_fx.importance.score import magnitudes
from ecospa_fx.importance.scores import Scores
from ecospa_fx.plan import Plan, Selection

if TYPE_CHECKING:
    from ecospa_fx.inplace.express import Carried


def plan(  # noqa: PLR0913  # options of one decision, all but four by name
    couplings: Couplings,
    ratio: float = 0.5,
    scores: Scores | Literal["magnitude", "random"] = "magnitude",
    seed: int = 0,
    round_to: int = 1,
    *,
    uniform: bool = False,
    floor: float = 0.05,
    kinds: Sequence[str] | None = None,
    expressible_in: Literal["module"] | None = None,
) -> Plan:
    """Decide what to remove.

    ratio: the share, between 0 and 1, of the elements that the chosen couplings hold together (each counted once)
    to remove; met to within half a rung. scores: what `score` returned; "magnitude", from the weights; or "random",
    drawn from `seed` alone, a test of any combination and no way to compress. round_to: kept units per carrier are a
    multiple of it; a coupling with fewer units than that stays whole. uniform: by default the least score per
    parameter goes first, wherever it is; True removes the same share of every coupling, and couplings of equal kind,
    size and carriers keep equally many units. floor: the share of its units that a coupling keeps in any case, at
    least one unit. kinds: only couplings of these kinds; by default all that are offered, except those whose content
    is offered as finer couplings (heads) unless scores are random. Couplings of a single unit are left out.
    expressible_in: "module" leaves whole what `shrink_` could not write back, as trying on a copy of the model shows,
    and takes heads where their content cannot be; with uniform=True the model's configuration can describe it too.

    Deterministic; where no coupling can shrink, the plan is empty. Raises PlanError for arguments out of range, scores
    that do not fit, a ratio that `floor` and `round_to` put out of reach; ScoreError where magnitudes cannot be taken.

    >>> small = plan(couplings, ratio=0.5, round_to=8)  # doctest: +SKIP
    >>> print(small)  # doctest: +SKIP
    """
    _check_arguments(ratio, seed, round_to, floor, expressible_in)
    limits = (round_to, floor)
    if expressible_in is None:
        chosen = choose(couplings, kinds, containers=isinstance(scores, str) and scores == "random")
        ladders, tracks = _apart(chosen, _values(couplings, chosen, scores, seed), limits, uniform)
    else:
        carried = _carried(couplings, kinds, uniform)
        ladders, tracks = _in_step(carried, _values(couplings, carried.couplings, scores, seed), limits, uniform)
    return _allocated(couplings, ratio, ladders, tracks, limits)


Limits = tuple[int, float]
"""round_to and floor."""


def _apart(
    chosen: Sequence[Coupling], values: Mapping[str, Tensor], limits: Limits, uniform: bool
) -> tuple[list[Ladder], list[Track]]:
    """A ladder per coupling, each climbed alone, or with uniform widths those of equal sizes in step."""
    ladders = [_ladder(c, values[c.name], _kept(c.size, *limits)) for c in chosen]
    return ladders, _uniform(ladders) if uniform else _global(ladders)


def _carried(couplings: Couplings, kinds: Sequence[str] | None, uniform: bool) -> Carried:
    """What the model's own module can carry."""
    from ecospa_fx.inplace.express import carried_by  # which imports plans

    return carried_by(couplings, choose(couplings, kinds, containers=True), uniform)


def _in_step(
    carried: Carried, values: Mapping[str, Tensor], limits: Limits, uniform: bool
) -> tuple[list[Ladder], list[Track]]:
    """Ladders of what is tied together are climbed in step, and with uniform widths those of all layers."""
    ladders: list[Ladder] = []
    tracks: dict[tuple[int, ...], list[int]] = {}
    for i, tie in enumerate(carried.ties):
        size = tie.base.size
        kept = [k for k in _kept(size, *limits) if carried.fine(tie, k)]
        track = tracks.setdefault((tie.number, size, len(kept)) if uniform else (i,), [])
        for c in tie.couplings:
            track.append(len(ladders))
            ladders.append(_ladder(c, values[c.name], [k * (c.size // size) for k in kept]))
    found = [Track(tuple(t), _shares(ladders[t[0]]) if uniform else _together(ladders, t)) for t in tracks.values()]
    return ladders, found


def _together(ladders: Sequence[Ladder], members: Sequence[int]) -> Tensor:
    """Score per parameter of the rungs of ladders that are climbed in step."""
    elements = torch.stack([ladders[i].elements for i in members])
    return (torch.stack([ladders[i].cost for i in members]) * elements).sum(0) / elements.sum(0)


def _allocated(
    couplings: Couplings, ratio: float, ladders: Sequence[Ladder], tracks: Sequence[Track], limits: Limits
) -> Plan:
    """The plan at the height where the budget is met."""
    counts: list[int] = []
    if ladders:
        climb = Climb.of(couplings.shapes, ladders, tracks)
        counts = _cut(climb, ratio, f"floor={limits[1]} and round_to={limits[0]}")
    selections = tuple(ladder.selection(n) for ladder, n in zip(ladders, counts, strict=True))
    return Plan(selections, tuple(couplings.shapes.items()))


@dataclass(frozen=True, slots=True, eq=False)
class Ladder:
    """The order in which one coupling's units go.

    order: LongTensor [carriers, units], least first; removed: units gone per carrier after each rung; elements,
    cost: float64 [rungs], parameters that each rung takes and their score per parameter.
    """

    coupling: Coupling
    order: Tensor
    removed: tuple[int, ...]
    elements: Tensor
    cost: Tensor

    def removal(self, rungs: int) -> Removal:
        """What the first `rungs` rungs take."""
        gone = torch.zeros(self.order.shape, dtype=torch.bool)
        if rungs:
            gone.scatter_(1, self.order[:, : self.removed[rungs - 1]], True)
        return self.coupling.members, gone

    def selection(self, rungs: int) -> Selection:
        """What stays after the first `rungs` rungs."""
        return Selection.of(self.coupling, self.removal(rungs)[1].logical_not())


def _kept(size: int, round_to: int, floor: float) -> range:
    """The numbers of units that a coupling may be left with, besides all of them."""
    return range((size - 1) // round_to * round_to, max(1, ceil(floor * size)) - 1, -round_to)


def _ladder(coupling: Coupling, values: Tensor, kept: Sequence[int]) -> Ladder:
    size, values = coupling.size, values.to("cpu", torch.float64)
    ranked, order = values.sort(dim=1, stable=True)
    removed = tuple(size - k for k in kept)
    at = torch.tensor((0, *removed))
    total = torch.cat([torch.zeros(1, dtype=torch.float64), ranked.sum(0).cumsum(0)])[at]
    elements = at.diff() * (coupling.parameters / size)
    return Ladder(coupling, order, removed, elements, total.diff() / elements)


@dataclass(frozen=True, slots=True, eq=False)
class Track:
    """Ladders climbed together, and the key of each rung; the rung with the least key goes first."""

    ladders: tuple[int, ...]
    keys: Tensor


def _global(ladders: Sequence[Ladder]) -> list[Track]:
    return [Track((i,), ladder.cost) for i, ladder in enumerate(ladders)]


def _uniform(ladders: Sequence[Ladder]) -> list[Track]:
    groups: dict[tuple[str, int, int], list[int]] = {}
    for i, ladder in enumerate(ladders):
        groups.setdefault((ladder.coupling.kind, ladder.coupling.size, ladder.coupling.carriers), []).append(i)
    return [Track(tuple(group), _shares(ladders[group[0]])) for group in groups.values()]


def _shares(ladder: Ladder) -> Tensor:
    """The share of units gone in the middle of each rung: what keeps couplings of different sizes in step."""
    at = torch.tensor((0, *ladder.removed), dtype=torch.float64)
    return (at[1:] + at[:-1]) / (2 * ladder.coupling.size)


@dataclass(frozen=True, slots=True, eq=False)
class Climb:
    """The rungs of all tracks in one order, least key first; a *height* is how many of them are taken.

    owner: LongTensor [heights], the track of each rung; estimate: float64 [heights + 1], elements removed at each
    height where couplings do not overlap.
    """

    shapes: Shapes
    ladders: Sequence[Ladder]
    tracks: Sequence[Track]
    owner: Tensor
    estimate: Tensor

    @classmethod
    def of(cls, shapes: Shapes, ladders: Sequence[Ladder], tracks: Sequence[Track]) -> Climb:
        """Merge the tracks; equal keys stay in the order of the couplings."""
        order = torch.cat([t.keys for t in tracks]).argsort(stable=True)
        owner = torch.cat([torch.full_like(t.keys, i, dtype=torch.long) for i, t in enumerate(tracks)])[order]
        taken = torch.cat([torch.stack([ladders[i].elements for i in t.ladders]).sum(0) for t in tracks])[order]
        return cls(shapes, ladders, tracks, owner, torch.cat([taken.new_zeros(1), taken.cumsum(0)]))

    def rungs(self, height: int) -> list[int]:
        """Rungs taken on each ladder."""
        per_track = self.owner[:height].bincount(minlength=len(self.tracks)).tolist()
        of_ladder = {i: n for track, n in zip(self.tracks, per_track, strict=True) for i in track.ladders}
        return [of_ladder[i] for i in range(len(self.ladders))]

    def removed(self, height: int) -> int:
        """Elements removed, exactly."""
        return removed_elements(self.shapes, map(Ladder.removal, self.ladders, self.rungs(height)))

    def held(self) -> int:
        """Elements of all the couplings, each counted once."""
        whole = [(x.coupling.members, torch.ones(x.order.shape, dtype=torch.bool)) for x in self.ladders]
        return removed_elements(self.shapes, whole)


def _cut(climb: Climb, ratio: float, limits: str) -> list[int]:
    """Rungs taken on each ladder so that the removed share is nearest to `ratio`."""
    held, last = climb.held(), len(climb.owner)
    target, removed = ratio * held, cache(climb.removed)
    above = _first_reaching(removed, target, int(torch.searchsorted(climb.estimate, target)), last)
    below = max(above - 1, 0)
    if above > last:
        most = removed(last)
        if last == 0 or target - most > (most - removed(last - 1)) / 2:
            raise PlanError(
                f"ratio={ratio} is out of reach because {limits} leave at most {int(most / held * 1e4) / 1e4:.4f} "
                "of the couplings' parameters to remove: ask for less, or lower them"
            )
        return climb.rungs(last)
    return climb.rungs(above if removed(above) - target <= target - removed(below) else below)


def _first_reaching(removed: Callable[[int], int], target: float, guess: int, last: int) -> int:
    """The least height up to `last` that removes `target`, last + 1 where none does; a good guess saves counting."""
    low, high, step = guess - 1, guess, 1
    while high <= last and removed(high) < target:
        low, high, step = high, high + step, 2 * step
    while low >= 0 and removed(low) >= target:
        low, high, step = low - step, low, 2 * step
    return bisect_left(range(last + 1), target, lo=max(low + 1, 0), hi=min(high, last + 1), key=removed)


def _check_arguments(ratio: float, seed: int, round_to: int, floor: float, expressible_in: str | None) -> None:
    if expressible_in not in (None, "module"):
        raise PlanError(f"expressible_in={expressible_in!r} is unknown: give 'module', or leave it out")
    if not isinstance(ratio, int | float) or not 0 < ratio < 1:
        raise PlanError(
            f"ratio={ratio!r} is not a share of parameters to remove: give a number between 0 and 1, like 0.5"
        )
    if not isinstance(seed, int):
        raise PlanError(f"seed={seed!r} is not a seed: give a whole number")
    if not isinstance(round_to, int) or round_to < 1:
        raise PlanError(f"round_to={round_to!r} is not a number of units: give a whole number of at least 1")
    if not isinstance(floor, int | float) or not 0 <= floor < 1:
        raise PlanError(
            f"floor={floor!r} is not a share of units to keep: give a number from 0 up to, not including, 1"
        )


def choose(couplings: Couplings, kinds: Sequence[str] | None, *, containers: bool) -> list[Coupling]:
    """The couplings to allocate; containers whose content is offered are left to their content by default."""
    offered = [c for c in couplings.offered if c.size > 1]
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
    if isinstance(scores, str) and scores == "random":
        return _random(chosen, seed)
    if isinstance(scores, str) and scores == "magnitude":
        scores = magnitudes(couplings)
    if not isinstance(scores, Scores):
        raise PlanError(f"scores={scores!r:.60} is unknown: use 'magnitude', 'random' or what score() returned")
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
