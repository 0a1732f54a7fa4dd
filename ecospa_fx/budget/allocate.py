"""Allocation: from scores and a budget to a plan.

Every coupling has an order in which its units are removed (`removal_order`), step by step. Allocation merges the steps
of all orders into one schedule and cuts it where the budget, in a unit of one's choice (`cost`), is met; or it chooses
all widths at once (`knapsack`). Removed elements are counted exactly, each once, though couplings may overlap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ecospa_fx.budget import knapsack
from ecospa_fx.budget.ceiling import Ceiling, size_of
from ecospa_fx.budget.cost import Bytes, CostModel, Flops, Parameters
from ecospa_fx.budget.knapsack import PredictedLoss
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
from ecospa_fx.coupling.types import BLOCK, Coupling
from ecospa_fx.errors import PlanError
from ecospa_fx.importance.score import magnitudes
from ecospa_fx.importance.scores import Given, given_scores
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
    scores = _scores(couplings, chosen, settings)
    step = settings.round_to if isinstance(settings.round_to, int) else 1
    ceiling = None if settings.within is None else Ceiling.of(settings.within)
    cost_model = _cost_model(couplings, settings.budget if ceiling is None else ceiling.unit, chosen, step)
    goal = Goal.of(couplings, chosen, cost_model, settings.ratio if ceiling is None else ceiling)
    if carried is not None:
        orders, locksteps = in_carried_step(carried, scores, bounds, cost_model, uniform=how == "uniform")
        return _planned(couplings, orders, _cut(cost_model, orders, locksteps, goal, bounds))
    orders = [
        RemovalOrder.ragged(c, scores[c.name], bounds, cost_model)
        if how == "ragged" and may_be_ragged(c)
        else RemovalOrder.of(c, scores[c.name], bounds.widths(c), cost_model)
        for c in chosen
    ]
    return _planned(couplings, orders, _steps(cost_model, orders, scores, how, goal, bounds))


@dataclass(frozen=True, slots=True)
class Goal:
    """How much is to be freed."""

    amount: float
    """In the cost model's unit."""
    total: float
    """What the couplings hold."""
    asked: float | Ceiling
    """The ratio, which is met as closely as can be, or the ceiling, within which the model stays."""

    @classmethod
    def of(
        cls, couplings: Couplings, chosen: Sequence[Coupling], cost_model: CostModel, asked: float | Ceiling
    ) -> Goal:
        """Raises PlanError for a ceiling within which the model is already."""
        total = cost_model.total(chosen)
        if not isinstance(asked, Ceiling):
            return cls(asked * total, total, asked)
        size = size_of(couplings, asked.unit)
        if size <= asked.amount:
            raise PlanError(f"within={asked} is met without a plan: the model has {size:,.6g}; ask for less")
        return cls(size - asked.amount, total, asked)

    def out_of_reach(self, most: float, bounds: Bounds, cost_model: CostModel) -> PlanError:
        """The error where bounds leave at most a share to remove."""
        share = int(most * 1e4) / 1e4
        if isinstance(self.asked, Ceiling):
            return PlanError(
                f"within={self.asked} is out of reach because it takes {self.amount / max(self.total, 1e-300):.4f} of "
                f"{cost_model.unit}, and {bounds} leave at most {share:.4f} to remove: ask for more, or lower them"
            )
        return PlanError(
            f"ratio={self.asked} is out of reach because {bounds} leave at most {share:.4f} "
            f"of {cost_model.unit} to remove: ask for less, or lower them"
        )


@dataclass(frozen=True, slots=True, eq=False)
class NestedPlans:
    """Plans for ascending ratios by one order of removal: each removes what those before it remove, and more."""

    orders: tuple[RemovalOrder, ...]
    """One per coupling."""
    ratios: tuple[float, ...]
    """Those that are in reach."""
    steps: tuple[tuple[int, ...], ...]
    """Per ratio, the steps taken in each order."""
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    """(name, dense shape) of every parameter of the model."""

    @classmethod
    def of(cls, couplings: Couplings, scores: Given, ratios: Sequence[float]) -> NestedPlans:
        """What ``plan(couplings, ratio, scores)`` decides at each ratio, up to the first that is out of reach."""
        settings = PlanSettings(scores=scores)
        chosen = chosen_by(couplings, settings)
        bounds = Bounds(1, settings.floor, {}, dict(couplings.model.named_parameters()))
        checked, cost_model = _scores(couplings, chosen, settings), Parameters(couplings.shapes)
        orders = [RemovalOrder.of(c, checked[c.name], bounds.widths(c), cost_model) for c in chosen]
        schedule, steps = GreedySchedule.of(cost_model, orders, each_alone(orders)), []
        total = cost_model.total(chosen)
        for ratio in ratios:
            try:
                steps.append(tuple(schedule.steps(_height(schedule, Goal(ratio * total, total, ratio), bounds))))
            except PlanError:
                break
        return cls(tuple(orders), tuple(ratios[: len(steps)]), tuple(steps), tuple(couplings.shapes.items()))

    def plan(self, number: int) -> Plan:
        """The plan for the ratio of that number."""
        selections = (order.selection(n) for order, n in zip(self.orders, self.steps[number], strict=True))
        return Plan(tuple(selections), self.shapes)

    def kept(self, coupling: int) -> tuple[int, ...]:
        """Units per carrier that the coupling of that number keeps, per ratio."""
        order = self.orders[coupling]
        taken = [(0, *order.removed)[steps[coupling]] for steps in self.steps]
        return tuple(order.coupling.size - n // order.coupling.carriers for n in taken)

    def removed(self, cost_model: CostModel) -> list[float]:
        """What goes at each ratio, together, as a cost model counts it."""
        return [removed_at(cost_model, self.orders, steps) for steps in self.steps]


def narrowed_to(couplings: Couplings, widths: Mapping[str, int], settings: PlanSettings) -> Plan:
    """The plan that keeps a number of units, those of most score, of the couplings that are named.

    widths: by name of a coupling, or by shell pattern on names, units per carrier; a name counts before a pattern.
    """
    every = sorted({c.kind for c in couplings.offered if c.size > 1}) or None  # what is named is asked for
    chosen = choosable(couplings, settings.kinds or every, settings.exclude)
    wanted = _widths(couplings, chosen, widths)
    chosen = [c for c in chosen if c.name in wanted]
    scores = _scores(couplings, chosen, settings)
    selections = []
    for c in chosen:
        order = scores[c.name].sort(dim=1, stable=True).indices
        keep = torch.ones(c.carriers, c.size, dtype=torch.bool)
        selections.append(Selection.of(c, keep.scatter(1, order[:, : c.size - wanted[c.name]], False)))
    return Plan(tuple(selections), tuple(couplings.shapes.items()))


def _widths(couplings: Couplings, chosen: Sequence[Coupling], widths: Mapping[str, int]) -> dict[str, int]:
    """Units that each named coupling keeps. Raises PlanError for names and numbers that make no sense."""
    result: dict[str, tuple[str, int]] = {}
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
            before, other = result.get(c.name, (key, width))
            if other != width and c.name != key:
                raise PlanError(
                    f"widths says {other} ({before!r}) and {width} ({key!r}) for coupling {c.name!r}: give one"
                )
            result[c.name] = key, width
    return {name: width for name, (_, width) in result.items()}


def _why_whole(coupling: Coupling) -> str:
    if coupling.blocked is not None:
        return coupling.blocked.message
    return "it has one unit, or kinds= and exclude= leave it out"


def may_be_ragged(coupling: Coupling) -> bool:
    """Whether parameters can hold a number of units per carrier: not where the carrier is an axis of its own."""
    return coupling.inexact is None and all(m.carrier_axis is None for m in coupling.members)


def _is_random(scores: object) -> bool:
    return isinstance(scores, str) and scores == "random"


def _planned(couplings: Couplings, orders: Sequence[RemovalOrder], steps: Sequence[int]) -> Plan:
    taken = list(zip(orders, steps, strict=True))
    dropped = {m.parameter for x, n in taken if n and x.coupling.kind == BLOCK for m in x.coupling.members}
    selections = tuple(x.selection(0 if _goes_with(x.coupling, dropped) else n) for x, n in taken)
    return Plan(selections, tuple(couplings.shapes.items()))


def _goes_with(coupling: Coupling, dropped: set[str]) -> bool:
    """Whether all of a coupling is in parameters that go with whole blocks, so that it need not lose units as well."""
    return coupling.kind != BLOCK and dropped.issuperset(m.parameter for m in coupling.members)


def _cost_model(couplings: Couplings, budget: str | CostModel, chosen: Sequence[Coupling], round_to: int) -> CostModel:
    """The unit of a budget, ready for the chosen couplings. Raises PlanError for one that is unknown."""
    if isinstance(budget, str) and budget == "parameters":
        return Parameters(couplings.shapes)
    if isinstance(budget, str) and budget == "bytes":
        return Bytes(couplings.shapes, {n: p.element_size() for n, p in couplings.model.named_parameters()})
    if isinstance(budget, str) and budget == "flops":
        budget = Flops.of(couplings)
    elif isinstance(budget, str) and budget in ("latency", "seconds"):
        budget = Latency.of(couplings, round_to)
    assert isinstance(budget, CostModel)  # as the settings have checked
    budget.ready(chosen)
    return budget


def _predicted_loss(scores: Mapping[str, Tensor], how: str | Curves) -> PredictedLoss:
    """Predicted loss at any widths: by measured curves, else by what the scores of the removed units sum up to."""

    def loss(coupling: Coupling, kept: Sequence[int]) -> Tensor:
        ranked = scores[coupling.name].to("cpu", torch.float64).sort(dim=1).values.sum(0)
        total = torch.cat([torch.zeros(1, dtype=torch.float64), ranked.cumsum(0).cummax(0).values])

        def predicted(kept: Sequence[int]) -> Tensor:
            return total[torch.tensor([coupling.size - k for k in kept])]

        return how.rise(coupling, kept, predicted) if isinstance(how, Curves) else predicted(kept)

    return loss


def _steps(
    cost_model: CostModel,
    orders: Sequence[RemovalOrder],
    scores: Mapping[str, Tensor],
    how: str | Curves,
    goal: Goal,
    bounds: Bounds,
) -> list[int]:
    """Steps taken in each order: by a greedy schedule where that is good enough, else by the predicted loss.

    It is where costs fall in proportion to widths, or all couplings keep the same share; a staircase of costs, or
    measured curves, take the knapsack.
    """
    if not orders or how in ("uniform", "ragged") or (how == "global" and cost_model.smooth):
        locksteps = in_uniform_step(orders) if how == "uniform" else each_alone(orders)
        return _cut(cost_model, orders, locksteps, goal, bounds)
    return _packed(cost_model, orders, _predicted_loss(scores, how), goal, bounds)


def _packed(
    cost_model: CostModel, orders: Sequence[RemovalOrder], loss: PredictedLoss, goal: Goal, bounds: Bounds
) -> list[int]:
    """Steps taken in each order so that at least the goal goes at the least predicted loss, all choices at once."""
    couplings = [order.coupling for order in orders]
    share = wanted = goal.amount / goal.total if goal.total else 1.0
    allowed = {c.name: bounds.widths(c) for c in couplings}
    steps: list[int] = []
    for _ in range(TRIES):
        try:
            kept = knapsack.widths(cost_model, couplings, loss, allowed, wanted)
        except knapsack.TooMuch as error:
            if not steps:
                raise goal.out_of_reach(error.most, bounds, cost_model) from None
            break
        steps = [order.steps_to(kept[order.coupling.name]) for order in orders]
        missing = share - removed_at(cost_model, orders, steps) / goal.total
        if missing <= 1e-9:
            break
        wanted += missing  # couplings that hold the same elements free less together than each
    return steps


def _cut(
    cost_model: CostModel,
    orders: Sequence[RemovalOrder],
    locksteps: Sequence[Lockstep],
    goal: Goal,
    bounds: Bounds,
) -> list[int]:
    """Steps taken in each order so that what is removed is nearest to a ratio, or least of what meets a ceiling."""
    if not orders:
        return []
    schedule = GreedySchedule.of(cost_model, orders, locksteps)
    return schedule.steps(_height(schedule, goal, bounds))


def _height(schedule: GreedySchedule, goal: Goal, bounds: Bounds) -> int:
    """The height that frees what is nearest to a ratio, or least of what meets a ceiling.

    Raises PlanError where no height does.
    """
    top, wanted = schedule.top, goal.amount
    if isinstance(goal.asked, Ceiling):
        height, tolerance = schedule.least(wanted), 0.0
    else:
        height = schedule.nearest(wanted)
        tolerance = (schedule.removed(top) - schedule.removed(top - 1)) / 2 if top else 0.0
    if height >= top and schedule.removed(top) < wanted - tolerance:
        raise goal.out_of_reach(schedule.removed(top) / max(goal.total, 1e-300), bounds, schedule.cost_model)
    return height


def chosen_by(couplings: Couplings, settings: PlanSettings) -> list[Coupling]:
    """The couplings that a plan allocates; what is drawn, or tried on a module, includes containers."""
    containers = _is_random(settings.scores) or settings.expressible_in is not None
    return choose(couplings, settings.kinds, settings.exclude, containers=containers)


def choose(
    couplings: Couplings, kinds: str | Sequence[str] | None = None, exclude: str | Sequence[str] = (), *,
    containers: bool,
) -> list[Coupling]:  # fmt: skip
    """The couplings to allocate; containers whose content is offered are left to their content by default."""
    chosen = choosable(couplings, kinds, exclude)
    if kinds is not None or containers:
        return chosen
    names = {c.name for c in couplings.offered if c.size > 1}
    return [c for c in chosen if not c.contains or not names.issuperset(c.contains)]


def _scores(couplings: Couplings, chosen: Sequence[Coupling], settings: PlanSettings) -> Mapping[str, Tensor]:
    """Scores [carriers, units] of every chosen coupling, checked."""
    scores: object = settings.scores
    if _is_random(scores):
        return _random(chosen, settings.seed)
    if isinstance(scores, str) and scores == "magnitude":
        scores = magnitudes(couplings)
    checked = given_scores(couplings, chosen, scores)
    for c in chosen if isinstance(settings.allocation, Curves) else ():
        if isinstance(settings.how, Curves) and c.name not in settings.how.rises:
            raise PlanError(f"coupling {c.name!r} has no measured curve: measure these couplings, or choose kinds=")
    return checked


def _random(chosen: Sequence[Coupling], seed: int) -> dict[str, Tensor]:
    """Scores per parameter uniform in [0, 1), times a factor per coupling so that widths differ too."""
    source = torch.Generator().manual_seed(seed)
    drawn = {}
    for c in chosen:
        factor = 2 ** (2 * torch.rand((), generator=source, dtype=torch.float64) - 1)
        units = torch.rand(c.carriers, c.size, generator=source, dtype=torch.float64)
        drawn[c.name] = units * factor * (c.parameters / (c.size * c.carriers))
    return drawn
