"""Which couplings a module's own code can carry, and which of them must keep equal shares: found by probing.

A probe is a plan of random units whose integers are searched for and proven as `shrink_` does. Couplings that one
attribute counts together, such as the head dimension of keys and of values, are carried in step only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ecospa_fx.coupling.couplings import Coupling, Couplings
from ecospa_fx.errors import PlanError
from ecospa_fx.inplace.configuration import builders, configured
from ecospa_fx.inplace.groups import Group, components, grouped
from ecospa_fx.inplace.proof import Bench
from ecospa_fx.inplace.shrink import sharers, solved
from ecospa_fx.plan import Plan, Selection

FEW = 64
"""Numbers of units that are all tried; of couplings with more, every one is taken to be as good as the probed one."""


@dataclass(frozen=True, slots=True, eq=False)
class Tie:
    """Couplings that keep the same share of their units. number: equal for ties of other layers that are like it."""

    couplings: tuple[Coupling, ...]
    number: int

    @property
    def base(self) -> Coupling:
        """The one with the fewest units; the others have multiples of them."""
        return min(self.couplings, key=lambda c: c.size)


@dataclass(frozen=True, slots=True, eq=False)
class Carried:
    """What can be carried: the ties, and which numbers of units of a tie's base are fine."""

    ties: tuple[Tie, ...]
    fine: Callable[[Tie, int], bool]

    @property
    def couplings(self) -> list[Coupling]:
        """The couplings of all ties, in order."""
        return [c for tie in self.ties for c in tie.couplings]


def carried_by(couplings: Couplings, chosen: Sequence[Coupling], uniform: bool) -> Carried:
    """What the model's own code can carry of some couplings.

    uniform: the same number of units in all layers; then, where the model has a configuration that describes any of
    it, what that can describe. Of couplings within others, the outer ones are taken where not all inner ones can be.
    Raises PlanError where nothing can be carried, or where the couplings do not say how they were detected.
    """
    if couplings.example is None:
        raise PlanError("these couplings do not know their example inputs: use those that detect(model, args) returned")
    probing = Probing(Bench(couplings.model, *couplings.example), couplings, uniform)
    names = builders(probing.bench.model) if uniform else []
    for name in [*names, None]:
        probing.configuration = name
        ties = _outer_or_inner(probing, chosen)
        if ties:
            rows = tuple(Tie(tuple(row), number) for number, tied in enumerate(ties) for row in tied)
            return Carried(rows, partial(probing.fine, rows))
    raise PlanError(
        f"the code of {type(couplings.model).__name__} can carry none of its couplings in narrower weights alone: "
        "leave expressible_in out and use ecospa_fx.shrink"
    )


Tied = list[list[Coupling]]
"""One row of tied couplings per layer."""


class Probing:
    """Tries plans on one bench. configuration: None, or the attribute that must be able to describe them too."""

    def __init__(self, bench: Bench, couplings: Couplings, uniform: bool) -> None:
        self.bench, self.shapes, self.uniform = bench, tuple(couplings.shapes.items()), uniform
        self.configuration: str | None = None
        self.known: dict[object, bool] = {}

    def carries(self, tied: Tied, share: Callable[[int, int], int] | None = None) -> bool:
        """Whether some rows can be carried. share: from a row's number and base size to the units that it keeps."""
        plan = self.plan(tied, share or (lambda i, size: size // 2 if self.uniform or size < 4 else size // 2 - i % 2))
        return self.takes(plan)

    def takes(self, plan: Plan) -> bool:
        """Whether a plan can be carried."""
        groups = grouped(list(plan), self.bench.model)
        try:
            solved(self.bench, plan, groups)
        except PlanError:
            return False
        return self.configuration is None or configured(self.bench, plan, groups, self.configuration) is not None

    def plan(self, tied: Tied, share: Callable[[int, int], int]) -> Plan:
        """Random units of some rows."""
        source = torch.Generator().manual_seed(0)
        selections = []
        for i, row in enumerate(tied):
            size = min(c.size for c in row)
            for c in row:
                keep = torch.zeros(c.carriers, c.size, dtype=torch.bool)
                for units in keep:
                    units[torch.randperm(c.size, generator=source)[: share(i, size) * (c.size // size)]] = True
                selections.append(Selection.of(c, keep))
        return Plan(tuple(selections), self.shapes)

    def groups(self, tied: Tied) -> list[Group]:
        """The groups of a probe."""
        return grouped(list(self.plan(tied, lambda i, size: size // 2)), self.bench.model)

    def fine(self, rows: Sequence[Tie], tie: Tie, kept: int) -> bool:
        """Whether a tie and those like it can keep this number of units."""
        size = tie.base.size
        if size > FEW or not self.uniform:
            return True
        key = (tie.number, kept, self.configuration)
        if key not in self.known:
            alike = [list(other.couplings) for other in rows if other.number == tie.number]
            self.known[key] = self.carries(alike, lambda i, other: kept * other // size)
        return self.known[key]


def _outer_or_inner(probing: Probing, chosen: Sequence[Coupling]) -> list[Tied]:
    """What can be carried, by groups: of couplings within others the outer ones where not all inner ones can."""
    names = {c.name for c in chosen}
    inner = {n for c in chosen for n in c.contains if names.issuperset(c.contains)}
    free = [c for c in chosen if not c.contains or not names.issuperset(c.contains)]
    outer = [c for c in chosen if c.contains and names.issuperset(c.contains)]
    found = _tied(probing, free)
    held = {c.name for tied in found for row in tied for c in row}
    whole = sorted(_rows_alike(probing, [c for c in outer if not held.issuperset(c.contains)]), key=_elements)
    for tied in reversed(whole):
        content = {name for row in tied for name in row[0].contains}
        taken = {n for other in found for row in other for c in row for n in c.contains} & content
        if not taken and probing.carries(tied):
            found = [t for t in found if not any(c.name in content & inner for row in t for c in row)] + [tied]
    return found


def _elements(tied: Tied) -> int:
    return sum(c.parameters for row in tied for c in row)


def _rows_alike(probing: Probing, chosen: Sequence[Coupling]) -> list[Tied]:
    """Couplings that the same code computes in other layers, one per row."""
    by_name = {c.name: c for c in chosen}
    groups = probing.groups([[c] for c in chosen]) if chosen else []
    return [[[by_name[s.name]] for s in group.selections] for group in groups]


def _tied(probing: Probing, chosen: Sequence[Coupling]) -> list[Tied]:
    """What can be carried alone, and what in step with others that the same parameters or integers hold."""
    alone = _rows_alike(probing, chosen)
    found = [tied for tied in alone if probing.carries(tied)]
    left = [tied for tied in alone if tied not in found]
    while left:
        first = left.pop(0)
        partners = [first, *(other for other in left if _joined(probing, first, other))]
        rows = _in_step(partners)
        if rows and len(partners) > 1 and probing.carries(rows):
            found.append(rows)
            left = [other for other in left if other not in partners]
    return found


def _joined(probing: Probing, first: Tied, other: Tied) -> bool:
    """Whether two groups, one per row, cut the same parameters or are counted by the same integers."""
    rows = _in_step([first, other])
    if not rows:
        return False
    plan = probing.plan(rows, lambda i, size: size // 2)
    groups = grouped(list(plan), probing.bench.model)
    parts = components(groups)
    return len(parts) == 1 or len(sharers(probing.bench, plan, parts[0], parts)) > 1


def _in_step(partners: Sequence[Tied]) -> Tied:
    """One row per layer with a coupling of each partner; nothing where they do not go together."""
    if len({len(tied) for tied in partners}) != 1:
        return []
    rows = [[c for tied in own for c in tied] for own in zip(*partners, strict=True)]
    fits = all(c.size % min(d.size for d in row) == 0 for row in rows for c in row)
    return rows if fits else []
