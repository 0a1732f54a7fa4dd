"""Allocation: from scores and a budget to a plan.

Every coupling has a *ladder*: its units are ranked within each carrier, and rung r takes the r-th least unit out of
every carrier at once, so all carriers keep the same number. Allocation merges the rungs of all ladders into one order
and cuts it where the budget, in a unit of one's choice (`spending`), is met. Removed elements are counted exactly, each
once, though couplings may overlap.
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

from ecospa_fx.budget import knapsack
from ecospa_fx.budget.elements import Removal
from ecospa_fx.budget.knapsack import Lost
from ecospa_fx.budget.latency import Latency
from ecospa_fx.budget.spending import Flops, Parameters, Spending
from ecospa_fx.coupling.couplings import Coupling, Couplings
from ecospa_fx.errors import PlanError
from ecospa_fx.importance.score import magnitudes
from ecospa_fx.importance.scores import Scores
from ecospa_fx.importance.sensitivity import Curves
from ecospa_fx.plan import Plan, Selection

if TYPE_CHECKING:
    from ecospa_fx.inplace.express import Carried

TRIES = 8
"""Of a knapsack whose couplings hold the same elements, each for what the one before was short of."""


def plan(  # noqa: PLR0913  # whatever a user decides about an allocation meets here
    couplings: Couplings,
    ratio: float = 0.5,
    scores: Scores | Literal["magnitude", "random"] = "magnitude",
    seed: int = 0,
    round_to: int = 1,
    *,
    allocation: Literal["global", "uniform"] | Curves = "global",
    uniform: bool = False,
    floor: float = 0.05,
    kinds: Sequence[str] | None = None,
    limits: Mapping[str, float] | None = None,
    budget: Literal["parameters", "flops", "latency"] | Spending = "parameters",
    expressible_in: Literal["module"] | None = None,
) -> Plan:
    """Decide what to remove.

    ratio: the share, between 0 and 1, of what the chosen couplings hold together to remove, met to within half a rung.
    budget: what that is counted in: "parameters", each once; "flops" of the example call that `detect` saw; "latency",
    seconds of that call's products on this machine, measured once and kept on disk (`ecospa_fx.budget.latency`).
    scores: what `score` returned; "magnitude", from the weights; or "random", drawn from `seed` alone, a test of any
    combination and no way to compress. round_to: kept units per carrier are a multiple of it; a coupling with fewer
    units than that stays whole. allocation: "global", what scores least for what it frees goes first, wherever it is;
    "uniform" or uniform=True, the same share of every coupling, and equally many units in those of equal kind, size and
    carriers; or measured curves (`ecospa_fx.importance.sensitivity`), which say how many units go where scores say
    which. floor: the share of its units that a coupling keeps in any case, at least one unit. limits: by kind, the
    largest share of its units that a coupling may lose. kinds: only couplings of these kinds; by default all offered,
    except those whose content is offered as finer couplings (heads) unless scores are random. Couplings of a single
    unit are left out, and where no coupling can shrink, the plan is empty. expressible_in: "module" leaves whole what
    `shrink_` could not write back, as trying on a copy of the model shows, and takes heads where their content cannot
    be; with uniform widths the model's configuration can describe it too.

    Raises PlanError for what is out of range, out of reach or does not fit; ScoreError for weights without magnitudes.

    >>> small = plan(couplings, ratio=0.5, round_to=8, limits={"ffn": 0.6}, budget="flops")  # doctest: +SKIP
    """
    bounds, how = Bounds(round_to, floor, {} if limits is None else limits), "uniform" if uniform else allocation
    _check_arguments(ratio, seed, how)
    carried = _carried(couplings, kinds, how, expressible_in) if expressible_in is not None else None
    chosen = (
        carried.couplings
        if carried is not None
        else choose(couplings, kinds, containers=isinstance(scores, str) and scores == "random")
    )
    values = _values(couplings, bounds.fit(chosen), scores, seed, how)
    spending = _spending(couplings, budget, chosen, round_to)
    if carried is not None:
        ladders, tracks = _in_step(carried, values, bounds, spending, uniform=how == "uniform")
        return _planned(couplings, ladders, _cut(spending, ladders, tracks, ratio, bounds))
    ladders = [Ladder.of(c, values[c.name], bounds.widths(c), spending) for c in chosen]
    return _planned(couplings, ladders, _rungs(spending, ladders, _lost(values, spending, how), ratio, bounds))


def _carried(couplings: Couplings, kinds: Sequence[str] | None, how: str | Curves, expressible_in: str) -> Carried:
    """What the model's own module can carry."""
    from ecospa_fx.inplace.express import carried_by  # which imports plans

    if expressible_in != "module":
        raise PlanError(f"expressible_in={expressible_in!r} is unknown: give 'module', or leave it out")
    if isinstance(how, Curves):
        raise PlanError("expressible_in='module' keeps couplings in step, which curves do not: use allocation='global'")
    return carried_by(couplings, choose(couplings, kinds, containers=True), how == "uniform")


def _in_step(
    carried: Carried, values: Mapping[str, Tensor], bounds: Bounds, spending: Spending, *, uniform: bool
) -> tuple[list[Ladder], list[Track]]:
    """Ladders of what is tied together are climbed in step, and with uniform widths those of all layers."""
    if not spending.smooth:
        raise PlanError("expressible_in='module' cannot spend a budget in latency yet: use 'parameters' or 'flops'")
    ladders: list[Ladder] = []
    tracks: dict[tuple[int, ...], list[int]] = {}
    for i, tie in enumerate(carried.ties):
        size = tie.base.size
        kept = [k for k in bounds.widths(tie.base) if carried.fine(tie, k)]
        track = tracks.setdefault((tie.number, size, len(kept)) if uniform else (i,), [])
        for c in tie.couplings:
            track.append(len(ladders))
            ladders.append(Ladder.of(c, values[c.name], [k * (c.size // size) for k in kept], spending))
    found = [Track(tuple(t), _shares(ladders[t[0]]) if uniform else _together(ladders, t)) for t in tracks.values()]
    return ladders, found


def _together(ladders: Sequence[Ladder], members: Sequence[int]) -> Tensor:
    """Score for each unit of the budget of the rungs of ladders that are climbed in step."""
    freed = torch.stack([ladders[i].freed for i in members])
    return (torch.stack([ladders[i].cost for i in members]) * freed).sum(0) / freed.sum(0)


def _planned(couplings: Couplings, ladders: Sequence[Ladder], rungs: Sequence[int]) -> Plan:
    selections = tuple(ladder.selection(n) for ladder, n in zip(ladders, rungs, strict=True))
    return Plan(selections, tuple(couplings.shapes.items()))


def _spending(couplings: Couplings, budget: str | Spending, chosen: Sequence[Coupling], round_to: int) -> Spending:
    """The unit of a budget, ready for the chosen couplings. Raises PlanError for one that is unknown."""
    if isinstance(budget, str) and budget == "parameters":
        return Parameters(couplings.shapes)
    if isinstance(budget, str) and budget == "flops":
        budget = Flops.of(couplings)
    elif isinstance(budget, str) and budget == "latency":
        budget = Latency.of(couplings, round_to)
    if not isinstance(budget, Spending):
        raise PlanError(f"budget={budget!r:.60} is unknown: use 'parameters', 'flops' or 'latency'")
    budget.ready(chosen)
    return budget


@dataclass(frozen=True, slots=True)
class Bounds:
    """How many units a coupling may keep; see `plan`. Raises PlanError for what is out of range."""

    round_to: int
    floor: float
    limits: Mapping[str, float]

    def __post_init__(self) -> None:
        if not isinstance(self.round_to, int) or self.round_to < 1:
            raise PlanError(f"round_to={self.round_to!r} is not a number of units: give a whole number of at least 1")
        if not isinstance(self.floor, int | float) or not 0 <= self.floor < 1:
            raise PlanError(
                f"floor={self.floor!r} is not a share of units to keep: give a number from 0 up to, not including, 1"
            )
        if not isinstance(self.limits, Mapping):
            raise PlanError(f"limits={self.limits!r:.60} is no mapping: give a share per kind, like {{'ffn': 0.5}}")
        for kind, limit in self.limits.items():
            if not isinstance(limit, int | float) or not 0 <= limit <= 1:
                raise PlanError(
                    f"limits[{kind!r}]={limit!r} is not a share of units to remove at most: give a number from 0 to 1"
                )

    def fit(self, chosen: Sequence[Coupling]) -> Sequence[Coupling]:
        """The same couplings. Raises PlanError for a limit of a kind that is not there: it would limit nothing."""
        known = sorted({c.kind for c in chosen})
        for kind in self.limits:
            if kind not in known:
                raise PlanError(f"limits names kind {kind!r}, of which nothing is chosen: use some of {_listed(known)}")
        return chosen

    def widths(self, coupling: Coupling) -> list[int]:
        """Numbers of units that may be kept, short of all, from most to fewest."""
        size, step, limit = coupling.size, self.round_to, self.limits.get(coupling.kind, 1)
        least = max(1, ceil(self.floor * size), size - int(limit * size + 1e-9))
        return list(range((size - 1) // step * step, least - 1, -step))

    def __str__(self) -> str:
        told = f"floor={self.floor} and round_to={self.round_to}"
        return f"{told} and limits={dict(self.limits)}" if self.limits else told


@dataclass(frozen=True, slots=True, eq=False)
class Ladder:
    """The order in which one coupling's units go.

    order: LongTensor [carriers, units], least first; removed: units gone per carrier after each rung; freed, cost:
    float64 [rungs], what each rung frees of the budget, and its score for each unit of that.
    """

    coupling: Coupling
    order: Tensor
    removed: tuple[int, ...]
    freed: Tensor
    cost: Tensor

    @classmethod
    def of(cls, coupling: Coupling, values: Tensor, widths: Sequence[int], spending: Spending) -> Ladder:
        """values: scores [carriers, units]; widths: numbers of units that may be kept, from most to fewest."""
        ranked, order = values.to("cpu", torch.float64).sort(dim=1, stable=True)
        at = torch.tensor([0, *(coupling.size - k for k in widths)])
        lost = torch.cat([torch.zeros(1, dtype=torch.float64), ranked.sum(0).cumsum(0)])[at]
        freed = torch.cat([torch.zeros(1, dtype=torch.float64), spending.freed(coupling, widths)]).diff()
        return cls(coupling, order, tuple(at[1:].tolist()), freed, lost.diff() / freed)

    def rungs(self, kept: int) -> int:
        """How many rungs lead down to a width."""
        return 0 if kept == self.coupling.size else self.removed.index(self.coupling.size - kept) + 1

    def removal(self, rungs: int) -> Removal:
        """What the first `rungs` rungs take."""
        gone = torch.zeros(self.order.shape, dtype=torch.bool)
        if rungs:
            gone.scatter_(1, self.order[:, : self.removed[rungs - 1]], True)
        return self.coupling.members, gone

    def selection(self, rungs: int) -> Selection:
        """What stays after the first `rungs` rungs."""
        return Selection.of(self.coupling, self.removal(rungs)[1].logical_not())


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

    owner: LongTensor [heights], the track of each rung; estimate: float64 [heights + 1], what is freed at each height
    where couplings do not overlap.
    """

    spending: Spending
    ladders: Sequence[Ladder]
    tracks: Sequence[Track]
    owner: Tensor
    estimate: Tensor

    @classmethod
    def of(cls, spending: Spending, ladders: Sequence[Ladder], tracks: Sequence[Track]) -> Climb:
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


def removed_at(spending: Spending, ladders: Sequence[Ladder], rungs: Sequence[int]) -> float:
    """What is freed by some rungs of each ladder, together."""
    taken = {x.coupling.name: (x, n) for x, n in zip(ladders, rungs, strict=True) if n}
    kept = {name: x.coupling.size - x.removed[n - 1] for name, (x, n) in taken.items()}
    return spending.removed({name: x.removal(n) for name, (x, n) in taken.items()}, kept)


def _rungs(spending: Spending, ladders: Sequence[Ladder], lost: Lost | str, ratio: float, bounds: Bounds) -> list[int]:
    """Rungs taken on each ladder, by what is lost at any widths, or the name of a way to climb."""
    if isinstance(lost, str) or not ladders:
        return _cut(spending, ladders, _uniform(ladders) if lost == "uniform" else _global(ladders), ratio, bounds)
    return _packed(spending, ladders, lost, ratio, bounds)


def _lost(values: Mapping[str, Tensor], spending: Spending, how: str | Curves) -> Lost | str:
    """Predicted loss at any widths where climbing is not good enough: by curves, or by scores on a staircase."""
    if how == "uniform" or (how == "global" and spending.smooth):
        return how

    def lost(coupling: Coupling, kept: Sequence[int]) -> Tensor:
        ranked = values[coupling.name].to("cpu", torch.float64).sort(dim=1).values.sum(0)
        total = torch.cat([torch.zeros(1, dtype=torch.float64), ranked.cumsum(0).cummax(0).values])

        def predicted(kept: Sequence[int]) -> Tensor:
            return total[torch.tensor([coupling.size - k for k in kept])]

        return how.lost(coupling, kept, predicted) if isinstance(how, Curves) else predicted(kept)

    return lost


def _packed(spending: Spending, ladders: Sequence[Ladder], lost: Lost, ratio: float, bounds: Bounds) -> list[int]:
    """Rungs taken on each ladder so that at least `ratio` goes at the least predicted loss, all choices at once."""
    couplings, held = [x.coupling for x in ladders], spending.held([x.coupling for x in ladders])
    allowed, wanted = {x.coupling.name: bounds.widths(x.coupling) for x in ladders}, ratio
    rungs: list[int] = []
    for _ in range(TRIES):
        kept = knapsack.widths(spending, couplings, lost, allowed, wanted)
        if isinstance(kept, float) and not rungs:
            raise _out_of_reach(ratio, kept, bounds, spending)
        if isinstance(kept, float):
            break
        rungs = [ladder.rungs(kept[ladder.coupling.name]) for ladder in ladders]
        missing = ratio - removed_at(spending, ladders, rungs) / held
        if missing <= 1e-9:
            break
        wanted += missing  # couplings that hold the same elements free less together than each
    return rungs


def _cut(
    spending: Spending, ladders: Sequence[Ladder], tracks: Sequence[Track], ratio: float, bounds: Bounds
) -> list[int]:
    """Rungs taken on each ladder so that the removed share is nearest to `ratio`."""
    if not ladders:
        return []
    climb = Climb.of(spending, ladders, tracks)
    held, last = climb.held(), len(climb.owner)
    target, removed = ratio * held, cache(climb.removed)
    above = _first_reaching(removed, target, int(torch.searchsorted(climb.estimate, target)), last)
    below = max(above - 1, 0)
    if above > last:
        most = removed(last)
        if last == 0 or target - most > (most - removed(last - 1)) / 2:
            raise _out_of_reach(ratio, most / max(held, 1e-300), bounds, climb.spending)
        return climb.rungs(last)
    return climb.rungs(above if removed(above) - target <= target - removed(below) else below)


def _out_of_reach(ratio: float, most: float, bounds: Bounds, spending: Spending) -> PlanError:
    return PlanError(
        f"ratio={ratio} is out of reach because {bounds} leave at most {int(most * 1e4) / 1e4:.4f} "
        f"of {spending.unit} to remove: ask for less, or lower them"
    )


def _first_reaching(removed: Callable[[int], float], target: float, guess: int, last: int) -> int:
    """The least height up to `last` that removes `target`, last + 1 where none does; a good guess saves counting."""
    low, high, step = guess - 1, guess, 1
    while high <= last and removed(high) < target:
        low, high, step = high, high + step, 2 * step
    while low >= 0 and removed(low) >= target:
        low, high, step = low - step, low, 2 * step
    return bisect_left(range(last + 1), target, lo=max(low + 1, 0), hi=min(high, last + 1), key=removed)


def _check_arguments(ratio: float, seed: int, allocation: object) -> None:
    if not isinstance(ratio, int | float) or not 0 < ratio < 1:
        raise PlanError(
            f"ratio={ratio!r} is not a share of parameters to remove: give a number between 0 and 1, like 0.5"
        )
    if not isinstance(seed, int):
        raise PlanError(f"seed={seed!r} is not a seed: give a whole number")
    if allocation == "sensitivity":
        raise PlanError(
            "allocation='sensitivity' needs measured curves: pass these, or use compress() with method='second-order'"
        )
    if not isinstance(allocation, Curves) and allocation not in ("global", "uniform"):
        raise PlanError(f"allocation={allocation!r:.60} is unknown: use 'global', 'uniform' or measured curves")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


def choose(couplings: Couplings, kinds: Sequence[str] | None, *, containers: bool) -> list[Coupling]:
    """The couplings to allocate; containers whose content is offered are left to their content by default."""
    offered = [c for c in couplings.offered if c.size > 1]
    if kinds is not None:
        wanted, known = [kinds] if isinstance(kinds, str) else list(kinds), sorted({c.kind for c in offered})
        for kind in wanted:
            if kind not in known:
                raise PlanError(f"no offered coupling is of kind {kind!r}: use some of {_listed(known)}")
        return [c for c in offered if c.kind in wanted]
    names = {c.name for c in offered}
    return [c for c in offered if containers or not c.contains or not names.issuperset(c.contains)]


def _values(
    couplings: Couplings, chosen: Sequence[Coupling], scores: Scores | str, seed: int, how: str | Curves
) -> Mapping[str, Tensor]:
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
        if isinstance(how, Curves) and c.name not in how.rises:
            raise PlanError(f"coupling {c.name!r} has no measured curve: measure these couplings, or choose kinds=")
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
