"""What the page shows, as plain data: rows of layers, cards of couplings, plans for every ratio."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite, prod

from ecospa_fx.budget.allocate import NestedPlans
from ecospa_fx.budget.cost import Flops, Parameters
from ecospa_fx.coupling.couplings import Couplings
from ecospa_fx.coupling.report import covered_parameters, positions
from ecospa_fx.coupling.types import Coupling, Refusal
from ecospa_fx.coupling.unit_elements import kept_sizes
from ecospa_fx.errors import PlanError
from ecospa_fx.plan import Plan
from ecospa_fx.report.layer_rows import row_of

Json = dict[str, object]

Keep = Mapping[str, tuple[tuple[int, ...], ...]]
"""By coupling, per carrier the units that stay."""

POINTS = 32
"""Of a curve, at most."""

PERCENTS = tuple(percent / 100 for percent in range(1, 100))
"""The ratios that a plan is made for."""


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """The next unit of one coupling that would go."""

    coupling: str
    """The coupling's name."""
    kind: str
    """Its kind."""
    share: float
    """Of its units that are gone after this one."""
    score: float
    """Score of the units of this step, per parameter."""


@dataclass(frozen=True, slots=True)
class Replanning:
    """What the slider chooses from."""

    ratios: tuple[float, ...]
    """Of the couplings' parameters."""
    widths: Mapping[str, tuple[int, ...]]
    """By coupling the units kept per carrier, per ratio."""
    marginal: Mapping[str, tuple[float, ...]]
    """By coupling the score per parameter of the last step taken, per ratio; NaN where none was taken."""
    removed: tuple[int, ...]
    """Parameters that go, per ratio."""
    flops: tuple[float, ...]
    """Share of FLOPs left, per ratio; () where they are unknown."""
    curves: tuple[CurvePoint, ...]
    """The score curves of all couplings, thinned out."""


@dataclass(frozen=True, slots=True)
class Content:
    """Everything on the page but the drawings and the charts."""

    title: str
    """Class of the model."""
    couplings: Couplings
    """All of them."""
    plan: Plan | None
    """What is kept."""
    rows: tuple[str, ...]
    """Paths of layers, in the order of the couplings."""
    kinds: tuple[str, ...]
    """Kinds of couplings, in their order."""
    parameters: int
    """Of the whole model."""
    covered: int
    """Parameters that couplings hold, each once."""
    flops: float | None
    """Share of FLOPs that the plan leaves; None where it is unknown."""
    replanning: Replanning | None
    """None without scores."""
    small: Mapping[str, tuple[int, ...]]
    """Shapes of the parameters that get smaller, by name."""
    cards: tuple[Json, ...] = field(default=())
    """One per coupling."""
    steps: tuple[tuple[str, str, str, str], ...] = field(default=())
    """Operator, action, module and source of evidence steps, each once."""

    def script_data(self) -> Json:
        """What the page's script reads."""
        data: Json = {"kinds": self.kinds, "rows": self.rows, "cards": self.cards, "steps": self.steps}
        if self.replanning is not None:
            r = self.replanning
            numbers = {str(card["name"]): number for number, card in enumerate(self.cards)}
            data["replanning"] = {
                "ratios": r.ratios,
                "removed": r.removed,
                "flops": r.flops,
                "widths": {numbers[name]: widths for name, widths in r.widths.items()},
                "marginal": {numbers[n]: [_finite(x) for x in values] for n, values in r.marginal.items()},
                "parameters": self.parameters,
            }
        return data


def _finite(number: float) -> float | None:
    """A number as JSON has it: three digits, None for what is none."""
    return float(f"{number:.4g}") if isfinite(number) else None


def content(couplings: Couplings, plan: Plan | None, replanned: NestedPlans | None) -> Content:
    """What is shown of couplings, a plan and plans for every ratio. Raises PlanError for a plan of another model."""
    check_same_model(couplings, plan)
    rows = tuple(dict.fromkeys(row_of(c.layer) for c in couplings))
    kinds = tuple(dict.fromkeys(c.kind for c in couplings))
    flops = _flops(couplings)
    steps: dict[tuple[str, str, str, str], int] = {}
    factors = {} if plan is None else plan.factors()
    small = {name: tuple(kept_sizes(couplings.shapes[name], of)) for name, of in factors.items()}
    keep = {s.name: s.keep for s in plan or ()}
    cards = tuple(_card(c, keep, couplings.shapes, small, (rows, kinds), steps) for c in couplings)
    return Content(
        title=type(couplings.model).__name__,
        couplings=couplings,
        plan=plan,
        rows=rows,
        kinds=kinds,
        parameters=sum(prod(shape) for shape in couplings.shapes.values()),
        covered=covered_parameters(couplings),
        flops=None if plan is None or flops is None or plan.ragged else _left(flops, couplings, plan),
        replanning=None if replanned is None else _replanning(couplings, replanned, flops),
        small=small,
        cards=cards,
        steps=tuple(steps),
    )


def check_same_model(couplings: Couplings, plan: Plan | None) -> None:
    """Raise PlanError where a plan is not of these couplings."""
    if plan is None:
        return
    offered = {c.name: (c.size, c.carriers) for c in couplings}
    for s in plan:
        if offered.get(s.name) != (s.size, s.carriers):
            raise PlanError(
                f"the plan keeps units of coupling {s.name!r}, which is not among the couplings that were given: pass "
                "the couplings that the plan was made for"
            )
    if dict(plan.shapes) != couplings.shapes:
        raise PlanError("the plan was made for a model of other sizes: pass the couplings that the plan was made for")


# -- FLOPs and plans for every ratio -----------------------------------------------------------------------------


def _flops(couplings: Couplings) -> Flops | None:
    """Counts what couplings narrow; None where no graph is known, or an operator cannot be counted."""
    try:
        counted = Flops.of(couplings)
        counted.ready([c for c in couplings.offered if c.size > 1])
    except PlanError:
        return None
    return counted if counted.total(couplings.offered) > 0 else None


def _left(flops: Flops, couplings: Couplings, plan: Plan) -> float:
    """The share of FLOPs that a plan leaves."""
    thinned = {s.name: s for s in plan if s.kept < s.size}
    removed = flops.removed({}, {name: s.kept for name, s in thinned.items()})
    return 1 - removed / flops.total(couplings.offered)


def _replanning(couplings: Couplings, replanned: NestedPlans, flops: Flops | None) -> Replanning:
    orders, total = replanned.orders, None if flops is None else flops.total(couplings.offered)
    left = () if flops is None or not total else tuple(1 - r / total for r in replanned.removed(flops))
    marginal = {}
    for i, order in enumerate(orders):
        costs = [float("nan"), *order.cost.tolist()]
        marginal[order.coupling.name] = tuple(costs[steps[i]] for steps in replanned.steps)
    return Replanning(
        ratios=replanned.ratios,
        widths={order.coupling.name: replanned.kept(i) for i, order in enumerate(orders)},
        marginal=marginal,
        removed=tuple(round(r) for r in replanned.removed(Parameters(couplings.shapes))),
        flops=left,
        curves=tuple(point for i in range(len(orders)) for point in _curve(replanned, i)),
    )


def _curve(replanned: NestedPlans, number: int) -> list[CurvePoint]:
    """The score curve of one coupling, thinned out to evenly spread steps, the first and the last among them."""
    order = replanned.orders[number]
    c, count = order.coupling, len(order.removed)
    chosen = sorted({round(i * (count - 1) / (POINTS - 1)) for i in range(POINTS)}) if count > 1 else range(count)
    units, costs = c.size * c.carriers, order.cost.tolist()
    return [CurvePoint(c.name, c.kind, order.removed[i] / units, costs[i]) for i in chosen]


# -- cards -------------------------------------------------------------------------------------------------------


def _card(
    coupling: Coupling,
    keep: Keep,
    shapes: Mapping[str, tuple[int, ...]],
    small: Mapping[str, tuple[int, ...]],
    places: tuple[tuple[str, ...], tuple[str, ...]],
    steps: dict[tuple[str, str, str, str], int],
) -> Json:
    c, (rows, kinds) = coupling, places
    path = []
    for step in c.path:
        key = (step.operator, step.action, step.module, step.source)
        path.append((step.node, steps.setdefault(key, len(steps))))
    members = [
        (m.parameter, m.axis, m.role, shapes[m.parameter], small.get(m.parameter, shapes[m.parameter]), positions(m))
        for m in c.members
    ]
    return {
        "name": c.name, "kind": kinds.index(c.kind), "row": rows.index(row_of(c.layer)), "layer": c.layer,
        "size": c.size, "carriers": c.carriers, "symmetry": c.symmetry, "parameters": c.parameters,
        "kept": kept_share(c, keep), "units": kept_units(c, keep), "blocked": _note(c.blocked),
        "inexact": _note(c.inexact), "resized": _note(c.resized), "members": members, "path": path,
        "contains": c.contains,
    }  # fmt: skip


def kept_share(coupling: Coupling, keep: Keep) -> float | None:
    """The share of its units that a coupling keeps: 1 where the plan leaves it, None where it cannot lose any."""
    if coupling.blocked is not None:
        return None
    rows = keep.get(coupling.name)
    return 1.0 if rows is None else sum(map(len, rows)) / (coupling.size * coupling.carriers)


def kept_units(coupling: Coupling, keep: Keep) -> tuple[int, int]:
    """The least and the most units that any carrier keeps."""
    lengths = [len(row) for row in keep.get(coupling.name, ())] or [coupling.size]
    return min(lengths), max(lengths)


def _note(refusal: Refusal | None) -> Json | None:
    if refusal is None:
        return None
    return {
        "message": refusal.message, "operator": refusal.operator, "node": refusal.node, "source": refusal.source,
        "remedy": refusal.remedy,
    }  # fmt: skip
