"""Which couplings a module's own code can carry, and which of them must keep equal shares: found by probing.

A probe is a plan of random units whose integers are searched for and proven as `shrink_` does. Couplings that one
attribute counts together, such as the head dimension of keys and of values, are carried in step only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from ecospa_fx.budget.ties import Carried, Tie
from ecospa_fx.coupling.couplings import Couplings
from ecospa_fx.coupling.types import Coupling
from ecospa_fx.errors import PlanError
from ecospa_fx.inplace.configuration import builders, configured
from ecospa_fx.inplace.equivalence import EquivalenceCheck
from ecospa_fx.inplace.groups import components, grouped
from ecospa_fx.inplace.shrink import sharers, solved
from ecospa_fx.plan import Plan, Selection

STEPS = (1, 8)
"""Units that are taken at a time: one, or as many as fill the 16 bytes that some kernels want."""

FEW = 64
"""Numbers of units that are all tried; of couplings with more, every one is taken to be as good as the probed one."""


def carried_by(couplings: Couplings, chosen: Sequence[Coupling], uniform: bool) -> Carried:
    """What the model's own code can carry of some couplings.

    uniform: the same number of units in all layers; then, where the model has a configuration that describes any of
    it, what that can describe. Of couplings within others, the outer ones are taken where not all inner ones can be.
    Raises PlanError where nothing can be carried, or where the couplings do not say how they were detected.
    """
    if couplings.example is None:
        raise PlanError("these couplings do not know their example inputs: use those that detect(model, args) returned")
    probing = Probing(EquivalenceCheck(couplings.model, *couplings.example), couplings, uniform)
    names = builders(probing.bench.model) if uniform else []
    for name in [*names, None]:
        probing.configuration = name
        ties = _outer_or_inner(probing, chosen)
        if ties:
            rows = tuple(Tie(tuple(row), number, t.step, t.same) for number, t in enumerate(ties) for row in t.rows)
            return Carried(rows, partial(probing.fine, rows))
    raise PlanError(
        f"the code of {type(couplings.model).__name__} can carry none of its couplings in narrower weights alone: "
        "leave expressible_in out and use ecospa_fx.shrink"
    )


@dataclass(frozen=True, slots=True, eq=False)
class Tied:
    """Couplings that the same code computes, one row per choice; those of a row are in step, `step` units at a time.

    same: what rotates keeps the same pairs everywhere, as a table of frequencies that all share asks for.
    """

    rows: tuple[tuple[Coupling, ...], ...]
    step: int = 1
    same: bool = False

    @property
    def names(self) -> set[str]:
        """Of all couplings."""
        return {c.name for row in self.rows for c in row}

    @property
    def elements(self) -> int:
        """What they hold."""
        return sum(c.parameters for row in self.rows for c in row)

    def share(self, row: int, size: int, *, even: bool) -> int:
        """Units that a probe keeps: about half, others in every second row, an odd number of steps where it can."""
        steps, odd = size // self.step, row % 2 and not even
        if steps < 8:
            return size if odd or size <= self.step else max(steps // 2, 1) * self.step
        return (steps // 2 - 1 + steps // 2 % 2 - 2 * odd) * self.step


class Probing:
    """Tries plans on one bench. configuration: None, or the attribute that must be able to describe them too."""

    def __init__(self, bench: EquivalenceCheck, couplings: Couplings, uniform: bool) -> None:
        self.bench, self.shapes, self.uniform = bench, tuple(couplings.shapes.items()), uniform
        self.configuration: str | None = None
        self.known: dict[object, bool] = {}

    def carried(self, tied: Tied) -> Tied | None:
        """Rows that can be carried: as they are, or all in step, or several units at a time; None where they cannot."""
        evens = (True,) if self.uniform or len(tied.rows) < 2 else (False, True)
        ways = [(False, step, even) for step in STEPS for even in evens]
        if any(rotates(c) for row in tied.rows for c in row):
            ways += [(True, step, True) for step in STEPS]
        for same, step, even in ways:
            steps = replace(tied, step=step, same=same)
            if self.takes(self.plan(steps, lambda i, size: steps.share(i, size, even=even))):  # noqa: B023
                together = even and len(tied.rows) > 1 and (same or not self.uniform)
                return replace(steps, rows=(tuple(c for row in tied.rows for c in row),)) if together else steps
        return None

    def takes(self, plan: Plan) -> bool:
        """Whether a plan can be carried."""
        groups = grouped([s for s in plan if s.kept < s.size], self.bench.model)
        if not groups:
            return False
        try:
            solved(self.bench, plan, groups)
        except PlanError:
            return False
        return self.configuration is None or configured(self.bench, plan, groups, self.configuration) is not None

    def plan(self, tied: Tied, share: Callable[[int, int], int]) -> Plan:
        """Random units of some rows. share: from a row's number and least size to the units that stay."""
        source = torch.Generator().manual_seed(0)
        orders = {c.size: torch.randperm(c.size, generator=source) for row in tied.rows for c in row}
        selections = []
        for i, row in enumerate(tied.rows):
            size = min(c.size for c in row)
            for c in row:
                keep = torch.zeros(c.carriers, c.size, dtype=torch.bool)
                for units in keep:
                    drawn = torch.randperm(c.size, generator=source)
                    order = orders[c.size] if tied.same and rotates(c) else drawn
                    units[order[: share(i, size) * (c.size // size)]] = True
                selections.append(Selection.of(c, keep))
        return Plan(tuple(selections), self.shapes)

    def fine(self, ties: Sequence[Tie], tie: Tie, kept: int) -> bool:
        """Whether a tie and those like it can keep this number of units."""
        size = tie.base.size
        if kept % tie.step or size > FEW or not self.uniform:
            return kept % tie.step == 0
        key = (tie.number, kept, self.configuration)
        if key not in self.known:
            rows = tuple(other.couplings for other in ties if other.number == tie.number)
            alike = Tied(rows, same=tie.same)
            self.known[key] = self.takes(self.plan(alike, lambda _, other: kept * other // size))
        return self.known[key]


def rotates(coupling: Coupling) -> bool:
    """Whether its units are pairs that are turned by an angle of their own, from a table that others may share."""
    return coupling.symmetry == "rotary"


def _outer_or_inner(probing: Probing, chosen: Sequence[Coupling]) -> list[Tied]:
    """What can be carried, by groups: of couplings within others the outer ones where not all inner ones can.

    Inner ones that must all keep the same pairs lose more than whole heads do, and only count where no heads can go.
    """
    names = {c.name for c in chosen}
    outer = [c for c in chosen if c.contains and names.issuperset(c.contains)]
    found = _tied(probing, [c for c in chosen if c not in outer])
    held: set[str] = set().union(*(tied.names for tied in found if not tied.same))
    taken: set[str] = set()
    whole = _alike(probing, [c for c in outer if not held.issuperset(c.contains)])
    for tied in sorted(whole, key=lambda t: t.elements, reverse=True):
        content = {name for row in tied.rows for c in row for name in c.contains}
        carried = None if taken & content else probing.carried(tied)
        if carried is not None:
            taken |= content
            found = [t for t in found if not t.names & content] + [carried]
    return found


def _alike(probing: Probing, chosen: Sequence[Coupling]) -> list[Tied]:
    """Couplings that the same code computes in other layers, one per row."""
    by_name = {c.name: c for c in chosen}
    plan = probing.plan(Tied(tuple((c,) for c in chosen)), lambda _, size: size // 2)
    return [Tied(tuple((by_name[s.name],) for s in g.selections)) for g in grouped(list(plan), probing.bench.model)]


def _tied(probing: Probing, chosen: Sequence[Coupling]) -> list[Tied]:
    """What can be carried alone, and what in step with others that the same parameters or integers hold."""
    found: list[Tied] = []
    left: list[Tied] = []
    for tied in _alike(probing, chosen):
        carried = probing.carried(tied)
        if carried is None:
            left.append(tied)
        else:
            found.append(carried)
    while left:
        first = left.pop(0)
        partners = [first, *(other for other in left if _joined(probing, first, other))]
        rows = _in_step(partners) if len(partners) > 1 else None
        carried = None if rows is None else probing.carried(rows)
        if carried is not None:
            found.append(carried)
            left = [other for other in left if other not in partners]
    return found


def _joined(probing: Probing, first: Tied, other: Tied) -> bool:
    """Whether two groups, one per row, cut the same parameters or are counted by the same integers."""
    rows = _in_step([first, other])
    if rows is None:
        return False
    plan = probing.plan(rows, lambda _, size: size // 2)
    parts = components(grouped(list(plan), probing.bench.model))
    return len(parts) == 1 or len(sharers(probing.bench, plan, parts[0], parts)) > 1


def _in_step(partners: Sequence[Tied]) -> Tied | None:
    """One row per layer with a coupling of each partner; None where they do not go together."""
    if len({len(tied.rows) for tied in partners}) != 1:
        return None
    rows = tuple(tuple(c for row in own for c in row) for own in zip(*(t.rows for t in partners), strict=True))
    fits = all(c.size % min(d.size for d in row) == 0 for row in rows for c in row)
    return Tied(rows) if fits else None
