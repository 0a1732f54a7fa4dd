"""Which couplings can shrink in the user's own module, and which of them only in lockstep: found by trial plans.

A trial plan keeps random units, and its integers are searched for and verified as `shrink_` does. Couplings that one
attribute counts together, such as the head dimension of keys and of values, can only shrink in lockstep.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast
from weakref import WeakKeyDictionary

import torch

from ecospa_fx.budget.ties import Carried, Tie
from ecospa_fx.coupling.couplings import Couplings, parameter_shapes
from ecospa_fx.coupling.types import Coupling
from ecospa_fx.errors import PlanError
from ecospa_fx.inplace.configuration import config_attributes, search_configuration
from ecospa_fx.inplace.equivalence import EquivalenceCheck, Inputs
from ecospa_fx.inplace.groups import alike_in_layers, components, group_by_role
from ecospa_fx.inplace.shrink import components_sharing_integers, search_by_component
from ecospa_fx.inplace.stand_in import stand_in
from ecospa_fx.plan import Plan, Selection
from ecospa_fx.progress import progress_bar

STEPS = (1, 8)
"""Units that are taken at a time: one, or as many as fill the 16 bytes that some kernels want."""

MAX_TRIED_WIDTHS = 64
"""Numbers of units that are all tried; of couplings with more, every one is taken to be as good as the probed one."""


def expressible_couplings(
    couplings: Couplings, chosen: Sequence[Coupling], uniform: bool, *, progress: bool = False
) -> Carried:
    """Which of some couplings can shrink in the user's own module, and in what steps.

    It is tried on a small model of the same code (see `ecospa_fx.inplace.stand_in`), in a few layers for all that are
    alike, and confirmed by one plan for the whole model, unless its weights are on ``meta``; where that fails, the
    whole model is tried. Couplings that have been asked about before are not tried again.

    uniform: the same number of units in all layers; then, where the model has a configuration that describes any of
    it, what that can describe. Of couplings within others, the outer ones are taken where not all inner ones can be.
    progress: a bar on stderr. Raises PlanError where none can shrink, or where the couplings do not say how they were
    detected.
    """
    if couplings.example is None:
        raise PlanError("these couplings do not know their example inputs: use those that detect(model, args) returned")
    key = (uniform, tuple(c.name for c in chosen))
    answers = _ANSWERS.setdefault(couplings if couplings.whole is None else couplings.whole, {})
    if key not in answers:
        answers[key] = _carried_by_stand_in(couplings, chosen, uniform, progress) or _carried(
            EquivalenceCheck(couplings.model, *couplings.example), chosen, uniform, progress
        )
    carried = answers[key]
    if carried is None:
        raise PlanError(
            f"the code of {type(couplings.model).__name__} can carry none of its couplings in narrower weights alone: "
            "leave expressible_in out and use ecospa_fx.shrink"
        )
    return carried


_ANSWERS: WeakKeyDictionary[Couplings, dict[tuple[bool, tuple[str, ...]], Carried | None]] = WeakKeyDictionary()
"""What the modules of some couplings have been found to carry, by whether all layers are alike, and of which ones."""


def _carried(check: EquivalenceCheck, chosen: Sequence[Coupling], uniform: bool, progress: bool) -> Carried | None:
    """What the model of a check carries, None where it carries nothing."""
    probe = PlanProbe(check, uniform)
    ties = probe.search(chosen, progress)
    return probe.carried(ties, ties) if ties else None


def _carried_by_stand_in(
    couplings: Couplings, chosen: Sequence[Coupling], uniform: bool, progress: bool
) -> Carried | None:
    """What a small model of the same code carries, for all layers; None where the whole one has to be tried."""
    model, example = couplings.model, cast(Inputs, couplings.example)
    small = stand_in(model, *example, chosen)
    if small is None or (uniform and len(config_attributes(small.model)) < len(config_attributes(model))):
        return None
    probe = PlanProbe(EquivalenceCheck(small.model, small.call.args, small.call.kwargs), uniform)
    ties = probe.search(small.couplings, progress)
    everywhere = _in_all_layers(ties, alike_in_layers(chosen, model))
    if everywhere is None or not everywhere:
        return None
    if all(not p.is_meta for p in model.parameters()):
        whole = PlanProbe(EquivalenceCheck(small.deep(), small.call.args, small.call.kwargs, probe.check), uniform)
        if not whole.supports(whole.trial(everywhere)):
            return None
    return probe.carried(ties, everywhere)


def _in_all_layers(ties: Sequence[TiedCouplings], groups: Sequence[Sequence[Coupling]]) -> list[TiedCouplings] | None:
    """The same in all layers as in a few; None where these do not stand for all.

    groups: the couplings of all layers by what the same code computes in other layers.
    """
    group_of = {c.name: number for number, group in enumerate(groups) for c in group}
    everywhere = []
    for tied in ties:
        numbers = list(dict.fromkeys(group_of[c.name] for row in tied.rows for c in row))
        layers = [groups[number] for number in numbers]
        if len({len(group) for group in layers}) > 1:
            return None
        rows = tuple(zip(*layers, strict=True))
        in_step = len(tied.rows) == 1 and len(tied.rows[0]) > len(numbers)
        everywhere.append(replace(tied, rows=(tuple(c for row in rows for c in row),) if in_step else rows))
    return everywhere


@dataclass(frozen=True, slots=True, eq=False)
class TiedCouplings:
    """Couplings that the same code computes, in rows; those of one row shrink in lockstep."""

    rows: tuple[tuple[Coupling, ...], ...]
    """Each row keeps one number of units."""
    step: int = 1
    """Units that are removed at a time."""
    same: bool = False
    """Whether rotary units keep the same pairs everywhere, as a frequency table that all layers share asks for."""

    @property
    def names(self) -> set[str]:
        """Of all couplings."""
        return {c.name for row in self.rows for c in row}

    @property
    def elements(self) -> int:
        """What they hold."""
        return sum(c.parameters for row in self.rows for c in row)

    def trial_width(self, row: int, size: int, *, even: bool) -> int:
        """Units that a trial plan keeps: about half, others in every second row, an odd number of steps if possible."""
        steps, odd = size // self.step, row % 2 and not even
        if steps < 8:
            return size if odd or size <= self.step else max(steps // 2, 1) * self.step
        return (steps // 2 - 1 + steps // 2 % 2 - 2 * odd) * self.step


class PlanProbe:
    """Tries plans on one copy of a model.

    configuration: None, or the attribute that must be able to describe the smaller model too.
    """

    def __init__(self, check: EquivalenceCheck, uniform: bool) -> None:
        self.check, self.shapes, self.uniform = check, tuple(parameter_shapes(check.model).items()), uniform
        self.configuration: str | None = None
        self.supported_widths: dict[object, bool] = {}

    def search(self, chosen: Sequence[Coupling], progress: bool) -> list[TiedCouplings]:
        """What can shrink of some couplings, with a configuration that describes it where widths are to be uniform."""
        for name in [*(config_attributes(self.check.model) if self.uniform else []), None]:
            self.configuration = name
            ties = _outer_or_inner(self, chosen, progress)
            if ties:
                return ties
        return []

    def carried(self, ties: Sequence[TiedCouplings], everywhere: Sequence[TiedCouplings]) -> Carried:
        """What can shrink in all layers. ties: the same, in the layers of the model that is tried."""
        tried, all_ties = (
            tuple(Tie(tuple(row), number, t.step, t.same) for number, t in enumerate(some) for row in t.rows)
            for some in (ties, everywhere)
        )
        return Carried(all_ties, partial(self.supports_width, tried) if self.uniform else _in_steps)

    def trial(self, ties: Sequence[TiedCouplings]) -> Plan:
        """Random units of everything that can shrink."""
        plans = [self.plan(tied, partial(tied.trial_width, even=self.uniform or len(tied.rows) < 2)) for tied in ties]
        return Plan(tuple(s for plan in plans for s in plan), self.shapes)

    def supported(self, tied: TiedCouplings) -> TiedCouplings | None:
        """Rows that can shrink: as they are, or all in lockstep, or several units at a time; None where they cannot."""
        evens = (True,) if self.uniform or len(tied.rows) < 2 else (False, True)
        ways = [(False, step, even) for step in STEPS for even in evens]
        if any(rotates(c) for row in tied.rows for c in row):
            ways += [(True, step, True) for step in STEPS]
        for same, step, even in ways:
            steps = replace(tied, step=step, same=same)
            if self.supports(self.plan(steps, lambda i, size: steps.trial_width(i, size, even=even))):  # noqa: B023
                together = even and len(tied.rows) > 1 and (same or not self.uniform)
                return replace(steps, rows=(tuple(c for row in tied.rows for c in row),)) if together else steps
        return None

    def supports(self, plan: Plan) -> bool:
        """Whether a plan can be applied to the module in place."""
        groups = group_by_role([s for s in plan if s.kept < s.size], self.check.model)
        if not groups:
            return False
        try:
            search_by_component(self.check, plan, groups)
        except PlanError:
            return False
        return (
            self.configuration is None or search_configuration(self.check, plan, groups, self.configuration) is not None
        )

    def plan(self, tied: TiedCouplings, share: Callable[[int, int], int]) -> Plan:
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

    def supports_width(self, ties: Sequence[Tie], tie: Tie, kept: int) -> bool:
        """Whether a tie and those like it can keep this number of units."""
        size = tie.base.size
        if kept % tie.step or size > MAX_TRIED_WIDTHS:
            return _in_steps(tie, kept)
        key = (tie.number, kept, self.configuration)
        if key not in self.supported_widths:
            rows = tuple(other.couplings for other in ties if other.number == tie.number)
            alike = TiedCouplings(rows, same=tie.same)
            self.supported_widths[key] = self.supports(self.plan(alike, lambda _, other: kept * other // size))
        return self.supported_widths[key]


def _in_steps(tie: Tie, kept: int) -> bool:
    return kept % tie.step == 0


def rotates(coupling: Coupling) -> bool:
    """Whether its units are pairs that are turned by an angle of their own, from a table that others may share."""
    return coupling.symmetry == "rotary"


def _outer_or_inner(probe: PlanProbe, chosen: Sequence[Coupling], progress: bool) -> list[TiedCouplings]:
    """What can shrink, by groups: of couplings within others the outer ones where not all inner ones can.

    Inner ones that must all keep the same pairs lose more than whole heads do, and only count where no heads can go.
    Outer ones that hold the same, such as groups of heads and the heads of each group, both count where they can shrink
    together; not where all layers lose as many, for then shares say how much of each goes, and heads would go twice.
    """
    names = {c.name for c in chosen}
    outer = [c for c in chosen if c.contains and names.issuperset(c.contains)]
    supported = _supported_groups(probe, [c for c in chosen if c not in outer], progress)
    inner_names: set[str] = set().union(*(tied.names for tied in supported if not tied.same))
    taken: set[str] = set()
    whole = _groups_by_role(probe, [c for c in outer if not inner_names.issuperset(c.contains)])
    whole.sort(key=lambda tied: tied.elements, reverse=True)
    for tied in progress_bar(whole, "module, whole heads") if progress and whole else whole:
        content = {name for row in tied.rows for c in row for name in c.contains}
        candidate = None if taken & content and probe.uniform else probe.supported(tied)
        if candidate is None:
            continue
        beside = [*(t for t in supported if not t.names & content), candidate]
        if not taken & content or probe.supports(probe.trial(beside)):
            taken |= content
            supported = beside
    return supported


def _groups_by_role(probe: PlanProbe, chosen: Sequence[Coupling]) -> list[TiedCouplings]:
    """Couplings that the same code computes in other layers, one per row."""
    return [TiedCouplings(tuple((c,) for c in alike)) for alike in alike_in_layers(chosen, probe.check.model)]


def _supported_groups(probe: PlanProbe, chosen: Sequence[Coupling], progress: bool) -> list[TiedCouplings]:
    """What can shrink alone, and what in lockstep with others that the same parameters or integers hold."""
    supported: list[TiedCouplings] = []
    left: list[TiedCouplings] = []
    groups = _groups_by_role(probe, chosen)
    for tied in progress_bar(groups, "module") if progress else groups:
        candidate = probe.supported(tied)
        if candidate is None:
            left.append(tied)
        else:
            supported.append(candidate)
    while left:
        first = left.pop(0)
        partners = [first, *(other for other in left if _must_shrink_together(probe, first, other))]
        rows = _in_lockstep(partners) if len(partners) > 1 else None
        candidate = None if rows is None else probe.supported(rows)
        if candidate is not None:
            supported.append(candidate)
            left = [other for other in left if other not in partners]
    return supported


def _must_shrink_together(probe: PlanProbe, first: TiedCouplings, other: TiedCouplings) -> bool:
    """Whether two groups, one per row, cut the same parameters or are counted by the same integers."""
    rows = _in_lockstep([first, other])
    if rows is None:
        return False
    plan = probe.plan(rows, lambda _, size: size // 2)
    parts = components(group_by_role(list(plan), probe.check.model))
    return len(parts) == 1 or len(components_sharing_integers(probe.check, plan, parts[0], parts)) > 1


def _in_lockstep(partners: Sequence[TiedCouplings]) -> TiedCouplings | None:
    """One row per layer with a coupling of each partner; None where they do not go together."""
    if len({len(tied.rows) for tied in partners}) != 1:
        return None
    rows = tuple(tuple(c for row in layer for c in row) for layer in zip(*(t.rows for t in partners), strict=True))
    fits = all(c.size % min(d.size for d in row) == 0 for row in rows for c in row)
    return TiedCouplings(rows) if fits else None
