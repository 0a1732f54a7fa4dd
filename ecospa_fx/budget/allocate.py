"""Allocation: from scores and a budget to a plan.

Every coupling has a *ladder*: its units are ranked within each carrier, and rung r takes the r-th least unit out of
every carrier at once, so all carriers keep the same number; on a ragged ladder each carrier goes at its own pace.
Allocation merges the rungs of all ladders into one order and cuts it where the budget, in a unit of one's choice
(`spending`), is met. Removed elements are counted exactly, each once, though couplings may overlap.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from functools import cache

import torch
from torch import Tensor

from ecospa_fx.budget import knapsack
from ecospa_fx.budget.cost import CostModel, Flops, Parameters
from ecospa_fx.budget.knapsack import Lost
from ecospa_fx.budget.latency import Latency
from ecospa_fx.budget.removal_order import (
    Bounds,
    GreedySchedule,
    Lockstep,
    RemovalOrder,
    each_alone,
    in_carried_step,
    in_uniform_step,
    removed_at,
)
from ecospa_fx.budget.settings import PlanSettings
from ecospa_fx.budget.ties import Carried
from ecospa_fx.checks import check_whole
from ecospa_fx.coupling.choice import choosable, named, shares
from ecospa_fx.coupling.couplings import Couplings
from ecospa_fx.coupling.types import Coupling
from ecospa_fx.errors import PlanError
from ecospa_fx.importance.score import magnitudes
from ecospa_fx.importance.scores import given_scores
from ecospa_fx.importance.sensitivity import Curves
from ecospa_fx.plan import Plan, Selection

TRIES = 8
"""Of a knapsack whose couplings hold the same elements, each for what the one before was short of."""


def allocated(couplings: Couplings, settings: PlanSettings, carried: Carried | None = None) -> Plan:
    """The plan for a ratio. carried: what a module can carry, or None for couplings each by itself."""
    how = settings.how
    chosen = carried.couplings if carried is not None else chosen_by(couplings, settings)
    limits = shares(couplings, chosen, settings.limits)
    parameters = dict(couplings.model.named_parameters())
    bounds = Bounds(settings.round_to, settings.floor, limits, parameters, settings.limits)
    values = _values(couplings, chosen, settings)
    spending = _spending(couplings, settings.budget, chosen, bounds.round_to or 1)
    if carried is not None:
        ladders, tracks = in_carried_step(carried, values, bounds, spending, uniform=how == "uniform")
        return _planned(couplings, ladders, _cut(spending, ladders, tracks, settings.ratio, bounds))
    ladders = [
        RemovalOrder.ragged(c, values[c.name], bounds)
        if how == "ragged" and may_be_ragged(c)
        else RemovalOrder.of(c, values[c.name], bounds.widths(c), spending)
        for c in chosen
    ]
    return _planned(couplings, ladders, _rungs(spending, ladders, _lost(values, spending, how), settings.ratio, bounds))


def narrowed_to(couplings: Couplings, widths: Mapping[str, int], settings: PlanSettings) -> Plan:
    """The plan that keeps a number of units, those of most score, of the couplings that are named.

    widths: by name of a coupling, or by shell pattern on names, units per carrier; a name counts before a pattern.
    """
    chosen = choosable(couplings, settings.kinds, settings.exclude)
    wanted = _widths(couplings, chosen, widths)
    chosen = [c for c in chosen if c.name in wanted]
    values = _values(couplings, chosen, settings)
    selections = []
    for c in chosen:
        order = values[c.name].sort(dim=1, stable=True).indices
        keep = torch.ones(c.carriers, c.size, dtype=torch.bool)
        selections.append(Selection.of(c, keep.scatter(1, order[:, : c.size - wanted[c.name]], False)))
    return Plan(tuple(selections), tuple(couplings.shapes.items()))


def _widths(couplings: Couplings, chosen: Sequence[Coupling], widths: Mapping[str, int]) -> dict[str, int]:
    """Units that each named coupling keeps. Raises PlanError for names and numbers that make no sense."""
    found: dict[str, tuple[str, int]] = {}
    for key in sorted(widths, key=lambda key: key in {c.name for c in chosen}):
        width = widths[key]
        check_whole(f"widths[{key!r}]", width, 1, PlanError, "a number of units to keep")
        names = named(couplings, "widths", key)
        matched = [c for c in chosen if c.name in names]
        if not matched:
            raise PlanError(f"widths names {key!r}, which cannot lose a unit: {_why_whole(couplings[min(names)])}")
        for c in matched:
            if width > c.size:
                raise PlanError(
                    f"widths[{key!r}]={width} is more than the {c.size} units of coupling {c.name!r}: keep fewer"
                )
            before, other = found.get(c.name, (key, width))
            if other != width and c.name != key:
                raise PlanError(
                    f"widths says {other} ({before!r}) and {width} ({key!r}) for coupling {c.name!r}: give one"
                )
            found[c.name] = key, width
    return {name: width for name, (_, width) in found.items()}


def _why_whole(coupling: Coupling) -> str:
    if coupling.blocked is not None:
        return coupling.blocked.message
    return "it has one unit, or kinds= and exclude= leave it out"


def may_be_ragged(coupling: Coupling) -> bool:
    """Whether parameters can hold a number of units per carrier: not where the carrier is an axis of its own."""
    return coupling.inexact is None and all(m.carrier_axis is None for m in coupling.members)


def _is_random(scores: object) -> bool:
    return isinstance(scores, str) and scores == "random"


def _planned(couplings: Couplings, ladders: Sequence[RemovalOrder], rungs: Sequence[int]) -> Plan:
    selections = tuple(ladder.selection(n) for ladder, n in zip(ladders, rungs, strict=True))
    return Plan(selections, tuple(couplings.shapes.items()))


def _spending(couplings: Couplings, budget: str | CostModel, chosen: Sequence[Coupling], round_to: int) -> CostModel:
    """The unit of a budget, ready for the chosen couplings. Raises PlanError for one that is unknown."""
    if isinstance(budget, str) and budget == "parameters":
        return Parameters(couplings.shapes)
    if isinstance(budget, str) and budget == "flops":
        budget = Flops.of(couplings)
    elif isinstance(budget, str) and budget == "latency":
        budget = Latency.of(couplings, round_to)
    assert isinstance(budget, CostModel)  # as the settings have checked
    budget.ready(chosen)
    return budget


def _rungs(
    spending: CostModel, ladders: Sequence[RemovalOrder], lost: Lost | str, ratio: float, bounds: Bounds
) -> list[int]:
    """Rungs taken on each ladder, by what is lost at any widths, or the name of a way to climb."""
    if isinstance(lost, str) or not ladders:
        return _cut(
            spending, ladders, in_uniform_step(ladders) if lost == "uniform" else each_alone(ladders), ratio, bounds
        )
    return _packed(spending, ladders, lost, ratio, bounds)


def _lost(values: Mapping[str, Tensor], spending: CostModel, how: str | Curves) -> Lost | str:
    """Predicted loss at any widths where climbing is not good enough: by curves, or by scores on a staircase."""
    if how in ("uniform", "ragged") or (how == "global" and spending.smooth):
        return str(how)

    def lost(coupling: Coupling, kept: Sequence[int]) -> Tensor:
        ranked = values[coupling.name].to("cpu", torch.float64).sort(dim=1).values.sum(0)
        total = torch.cat([torch.zeros(1, dtype=torch.float64), ranked.cumsum(0).cummax(0).values])

        def predicted(kept: Sequence[int]) -> Tensor:
            return total[torch.tensor([coupling.size - k for k in kept])]

        return how.lost(coupling, kept, predicted) if isinstance(how, Curves) else predicted(kept)

    return lost


def _packed(
    spending: CostModel, ladders: Sequence[RemovalOrder], lost: Lost, ratio: float, bounds: Bounds
) -> list[int]:
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
    spending: CostModel, ladders: Sequence[RemovalOrder], tracks: Sequence[Lockstep], ratio: float, bounds: Bounds
) -> list[int]:
    """Rungs taken on each ladder so that the removed share is nearest to `ratio`."""
    if not ladders:
        return []
    climb = GreedySchedule.of(spending, ladders, tracks)
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


def _out_of_reach(ratio: float, most: float, bounds: Bounds, spending: CostModel) -> PlanError:
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


def chosen_by(couplings: Couplings, settings: PlanSettings) -> list[Coupling]:
    """The couplings that a plan allocates; what is drawn, or tried on a module, includes containers."""
    containers = _is_random(settings.scores) or settings.expressible_in is not None
    return choose(couplings, settings.kinds, settings.exclude, containers=containers)


def choose(
    couplings: Couplings, kinds: str | Sequence[str] | None = None, exclude: str | Sequence[str] = (), *,
    containers: bool,
) -> list[Coupling]:  # fmt: skip
    """The couplings to allocate; containers whose content is offered are left to their content by default."""
    found = choosable(couplings, kinds, exclude)
    if kinds is not None or containers:
        return found
    names = {c.name for c in couplings.offered if c.size > 1}
    return [c for c in found if not c.contains or not names.issuperset(c.contains)]


def _values(couplings: Couplings, chosen: Sequence[Coupling], settings: PlanSettings) -> Mapping[str, Tensor]:
    """Scores [carriers, units] of every chosen coupling, checked."""
    scores: object = settings.scores
    if _is_random(scores):
        return _random(chosen, settings.seed)
    if isinstance(scores, str) and scores == "magnitude":
        scores = magnitudes(couplings)
    values = given_scores(couplings, chosen, scores)
    for c in chosen if isinstance(settings.allocation, Curves) else ():
        if isinstance(settings.how, Curves) and c.name not in settings.how.rises:
            raise PlanError(f"coupling {c.name!r} has no measured curve: measure these couplings, or choose kinds=")
    return values


def _random(chosen: Sequence[Coupling], seed: int) -> dict[str, Tensor]:
    """Scores per parameter uniform in [0, 1), times a factor per coupling so that widths differ too."""
    source = torch.Generator().manual_seed(seed)
    drawn = {}
    for c in chosen:
        factor = 2 ** (2 * torch.rand((), generator=source, dtype=torch.float64) - 1)
        units = torch.rand(c.carriers, c.size, generator=source, dtype=torch.float64)
        drawn[c.name] = units * factor * (c.parameters / (c.size * c.carriers))
    return drawn
