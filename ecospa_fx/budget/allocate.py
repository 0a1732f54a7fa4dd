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
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ecospa_fx.budget import knapsack
from ecospa_fx.budget.knapsack import Lost
from ecospa_fx.budget.ladders import (
    Bounds,
    Climb,
    Ladder,
    Track,
    each_alone,
    in_carried_step,
    in_uniform_step,
    listed,
    removed_at,
)
from ecospa_fx.budget.latency import Latency
from ecospa_fx.budget.spending import Flops, Parameters, Spending
from ecospa_fx.coupling.couplings import Coupling, Couplings
from ecospa_fx.errors import PlanError
from ecospa_fx.importance.score import magnitudes
from ecospa_fx.importance.scores import Scores
from ecospa_fx.importance.sensitivity import Curves
from ecospa_fx.plan import Plan

if TYPE_CHECKING:
    from ecospa_fx.inplace.express import Carried

TRIES = 8
"""Of a knapsack whose couplings hold the same elements, each for what the one before was short of."""


def plan(  # noqa: PLR0913  # whatever a user decides about an allocation meets here
    couplings: Couplings,
    ratio: float = 0.5,
    scores: Scores | Literal["magnitude", "random"] = "magnitude",
    seed: int = 0,
    round_to: int | None = 1,
    *,
    allocation: Literal["global", "ragged", "uniform"] | Curves = "global",
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
    seconds of its products on this machine, measured once and kept on disk (`ecospa_fx.budget.latency`). scores: what
    `score` returned; "magnitude", from the weights; or "random", drawn from `seed` alone, for tests. round_to: kept
    units per carrier are a multiple of it; a coupling with fewer stays whole; None: of what their device likes
    (`ecospa_fx.budget.alignment.liked`). allocation: "global", what scores least for what it frees goes first;
    "ragged", the same where heads may keep different numbers of units, and zeros fill activations up; "uniform" or
    uniform=True, the same share everywhere; or measured `ecospa_fx.importance.sensitivity` curves. floor: the least
    share that a coupling keeps, at least one unit. limits: by kind, the largest share that it may lose. kinds: only
    these; by default all offered, but not what is offered in finer couplings (heads) unless scores are random.
    expressible_in: "module" leaves whole what `shrink_` could not write back, as trying on a copy shows, and takes
    heads where their content cannot be; with uniform widths the configuration can describe it too.

    Raises PlanError for what is out of range or reach or does not fit, ScoreError for weights without magnitudes.
    >>> small = plan(couplings, ratio=0.5, round_to=8, limits={"ffn": 0.6}, budget="flops")  # doctest: +SKIP
    """
    bounds = Bounds(round_to, floor, {} if limits is None else limits, dict(couplings.model.named_parameters()))
    how = "uniform" if uniform else allocation
    _check_arguments(ratio, seed, how)
    _check_ragged(how, even=budget != "parameters" or expressible_in is not None)
    carried = _carried(couplings, kinds, how, expressible_in) if expressible_in is not None else None
    chosen = carried.couplings if carried is not None else choose(couplings, kinds, containers=_is_random(scores))
    return _allocated(couplings, carried or chosen, ratio, (scores, seed, how), bounds, budget)


def _allocated(
    couplings: Couplings,
    among: Carried | Sequence[Coupling],
    ratio: float,
    by: tuple[Scores | str, int, str | Curves],
    bounds: Bounds,
    budget: str | Spending,
) -> Plan:
    """The plan for what a module can carry, or for couplings each by itself. by: scores, seed and allocation."""
    scores, seed, how = by
    chosen = among if isinstance(among, Sequence) else among.couplings
    values = _values(couplings, bounds.fit(chosen), scores, seed, how)
    spending = _spending(couplings, budget, chosen, bounds.round_to or 1)
    if not isinstance(among, Sequence):
        ladders, tracks = in_carried_step(among, values, bounds, spending, uniform=how == "uniform")
        return _planned(couplings, ladders, _cut(spending, ladders, tracks, ratio, bounds))
    ladders = [
        Ladder.ragged(c, values[c.name], bounds)
        if how == "ragged" and may_be_ragged(c)
        else Ladder.of(c, values[c.name], bounds.widths(c), spending)
        for c in chosen
    ]
    return _planned(couplings, ladders, _rungs(spending, ladders, _lost(values, spending, how), ratio, bounds))


def may_be_ragged(coupling: Coupling) -> bool:
    """Whether parameters can hold a number of units per carrier: not where the carrier is an axis of its own."""
    return coupling.inexact is None and all(m.carrier_axis is None for m in coupling.members)


def _is_random(scores: Scores | str) -> bool:
    return isinstance(scores, str) and scores == "random"


def _carried(
    couplings: Couplings, kinds: Sequence[str] | None, how: str | Curves, expressible_in: str | None
) -> Carried:
    """What the model's own module can carry."""
    from ecospa_fx.inplace.express import carried_by  # which imports plans

    if expressible_in != "module":
        raise PlanError(f"expressible_in={expressible_in!r} is unknown: give 'module', or leave it out")
    if isinstance(how, Curves):
        raise PlanError("expressible_in='module' keeps couplings in step, which curves do not: use allocation='global'")
    return carried_by(couplings, choose(couplings, kinds, containers=True), how == "uniform")


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


def _rungs(spending: Spending, ladders: Sequence[Ladder], lost: Lost | str, ratio: float, bounds: Bounds) -> list[int]:
    """Rungs taken on each ladder, by what is lost at any widths, or the name of a way to climb."""
    if isinstance(lost, str) or not ladders:
        return _cut(
            spending, ladders, in_uniform_step(ladders) if lost == "uniform" else each_alone(ladders), ratio, bounds
        )
    return _packed(spending, ladders, lost, ratio, bounds)


def _lost(values: Mapping[str, Tensor], spending: Spending, how: str | Curves) -> Lost | str:
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


def _check_ragged(allocation: object, *, even: bool) -> None:
    if even and isinstance(allocation, str) and allocation == "ragged":
        raise PlanError("allocation='ragged' counts parameters, in graph form: leave budget= and expressible_in= out")


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
    if not isinstance(allocation, Curves) and allocation not in ("global", "ragged", "uniform"):
        raise PlanError(
            f"allocation={allocation!r:.60} is unknown: use 'global', 'ragged', 'uniform' or measured curves"
        )


def choose(couplings: Couplings, kinds: Sequence[str] | None, *, containers: bool) -> list[Coupling]:
    """The couplings to allocate; containers whose content is offered are left to their content by default."""
    offered = [c for c in couplings.offered if c.size > 1]
    if kinds is not None:
        wanted, known = [kinds] if isinstance(kinds, str) else list(kinds), sorted({c.kind for c in offered})
        for kind in wanted:
            if kind not in known:
                raise PlanError(f"no offered coupling is of kind {kind!r}: use some of {listed(known)}")
        return [c for c in offered if c.kind in wanted]
    names = {c.name for c in offered}
    return [c for c in offered if containers or not c.contains or not names.issuperset(c.contains)]


def _values(
    couplings: Couplings, chosen: Sequence[Coupling], scores: Scores | str, seed: int, how: str | Curves
) -> Mapping[str, Tensor]:
    """Scores [carriers, units] of every chosen coupling, checked."""
    if _is_random(scores):
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
