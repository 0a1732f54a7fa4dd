"""Which integers must follow when parameters get narrower: found by trying, smallest edit first, and by numbers.

No table of architectures: an integer is tried where it counts units of what gets narrower (its value is a multiple of
theirs, and a divisor of an axis that holds them), in modules that hold or contain the parameters and in objects that
these refer to, if running the model reads it. Attributes of one name in modules of one class follow alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations, islice, product
from typing import Any

from torch import nn

from ecospa_fx.errors import PlanError
from ecospa_fx.inplace.attributes import IntegerAttribute, Place, integers, reading
from ecospa_fx.inplace.buffers import Spot, tables
from ecospa_fx.inplace.equivalence import EquivalenceCheck, Reference
from ecospa_fx.inplace.evidence import evidence
from ecospa_fx.inplace.groups import Group, narrowed_axes, part, reach, role_of, scaled, under
from ecospa_fx.inplace.trial import IntegerEdits, edited
from ecospa_fx.plan import Plan

TRIALS = 3000


@dataclass(frozen=True, slots=True, eq=False)
class IntegerRule:
    """One attribute of all modules of one class, and the ways in which it may follow."""

    name: str
    options: tuple[IntegerEdits, ...]
    read: bool


def solve(bench: EquivalenceCheck, plan: Plan, groups: Sequence[Group]) -> dict[Spot, int]:
    """The integers that must follow a plan of some groups, and their new values.

    Raises PlanError where no edit gives what masking gives.
    """
    own = part(plan, groups)
    reference = bench.reference(own)
    if _works(bench, own, {}, reference):
        return {}
    rules = [rule for rule in rules_of(bench, own, groups) if rule.read]
    told = evidence(bench, own, {})
    start: dict[Spot, int] = {p: value for p, value in (told.constructed | told.given).items() if is_read(p, bench)}
    for before in [start, {}] if start else [{}]:
        for values in islice(edits_of(rules), TRIALS):
            edit: dict[Spot, int] = {**before, **values}
            if edit and _works(bench, own, edit, reference):
                return edit
    raise PlanError(_refusal(groups, rules))


def _works(bench: EquivalenceCheck, plan: Plan, values: IntegerEdits, reference: Reference) -> bool:
    with edited(bench.model, plan, values, reference.buffers):
        return bench.equals(reference)


def _refusal(groups: Sequence[Group], rules: Sequence[IntegerRule]) -> str:
    first = groups[0].selections[0]
    alike = sum(len(g.selections) for g in groups) - 1
    more = f" (and {alike} like it)" if alike else ""
    tried = ", ".join(rule.name for rule in rules) or "that its code reads"
    return (
        f"coupling {first.name!r}{more} cannot be written back into the module: no edit of its integers ({tried}) "
        "gives what masking gives; use ecospa_fx.shrink, or ask for a plan with expressible_in='module'"
    )


def edits_of(rules: Sequence[IntegerRule]) -> Iterator[dict[Spot, int]]:
    """Every combination of the rules' options, those of fewer rules first."""
    for count in range(len(rules) + 1):
        for chosen in combinations(rules, count):
            for options in product(*(rule.options for rule in chosen)):
                yield dict(chain.from_iterable(values.items() for values in options))


# -- candidates --------------------------------------------------------------------------------------------------


def rules_of(bench: EquivalenceCheck, plan: Plan, groups: Sequence[Group]) -> list[IntegerRule]:
    """The integers that may follow, by class and attribute."""
    model, axes = bench.model, narrowed_axes(plan, bench.model)
    paths = {p for p, _ in model.named_modules() if any(under(name, reach(p, model)) for name, _ in axes)}
    found = integers(model, paths)
    rules = []
    for own in alike(found, model):
        options = options_of(model, own, groups, axes)
        if options:
            told = f"{type(own[0].owner).__name__}.{own[0].place.name}"
            rules.append(IntegerRule(told, tuple(options), any(is_read(one.place, bench) for one in own)))
    return rules + [IntegerRule(told, options, True) for told, options in tables(model, groups)]


def alike(found: Sequence[IntegerAttribute], model: nn.Module) -> list[list[IntegerAttribute]]:
    """The integers that are the same attribute of modules of the same class in other layers, together."""
    result: dict[Any, list[IntegerAttribute]] = {}
    for one in found:
        place = one.place
        where = (place.module, place.steps) if place.steps else role_of(place.module, model)
        result.setdefault((where, place.name, place.index), []).append(one)
    return list(result.values())


def counted(bench: EquivalenceCheck, plan: Plan, groups: Sequence[Group]) -> set[Spot]:
    """The integers that running the model reads and that may follow some groups."""
    rules = rules_of(bench, part(plan, groups), groups)
    return {place for rule in rules if rule.read for values in rule.options for place in values}


def is_read(place: Spot, bench: EquivalenceCheck) -> bool:
    """Whether running the dense model reads an integer, as far as can be seen."""
    if bench.read is None:
        everything = integers(bench.model, {path for path, _ in bench.model.named_modules()})
        with reading([one.owner for one in everything if not isinstance(one.owner, dict)]) as read:
            for call in bench.calls:
                bench.run(call)
        bench.read = read
    if not isinstance(place, Place):
        return True
    owner = place.owner(bench.model)
    return isinstance(owner, dict) or (id(owner), place.name) in bench.read


def options_of(
    model: nn.Module,
    places: Sequence[IntegerAttribute],
    groups: Sequence[Group],
    axes: Mapping[tuple[str, int], tuple[int, int]],
) -> list[IntegerEdits]:
    """The ways in which one attribute may follow everywhere: as units of one or several groups, or as an axis."""
    ways: list[Callable[[IntegerAttribute], int | None]] = [
        lambda one, chosen=chosen: _as_units(model, one, chosen, axes)  # type: ignore[misc]
        for count in range(1, len(groups) + 1)
        for chosen in combinations(groups, count)
    ]
    ways.append(lambda one: _as_axis(model, one, axes))
    new = [{one.place: way(one) for one in places} for way in ways]
    options: list[IntegerEdits] = []
    # those first that say something of all places; modules may be alike only because they are numbered
    for told in sorted(new, key=lambda values: None in values.values()):
        following = {one.place: told[one.place] or one.value for one in places}
        values: IntegerEdits = {one.place: following[one.place] for one in places if following[one.place] != one.value}
        if values and values not in options:
            options.append(values)
    return options


def _as_units(
    model: nn.Module, one: IntegerAttribute, groups: Sequence[Group], axes: Mapping[tuple[str, int], tuple[int, int]]
) -> int | None:
    selections = [group.beneath([reach(one.place.module, model)]) for group in groups]
    if not all(selections):
        return one.value if not any(selections) else None
    cut = {(m.parameter, m.axis) for own in selections for s in own for m in s.members}
    if one.value < 2 or not any(axes[at][0] % one.value == 0 for at in cut & axes.keys()):
        return None
    return scaled(one.value, selections)


def _as_axis(model: nn.Module, one: IntegerAttribute, axes: Mapping[tuple[str, int], tuple[int, int]]) -> int | None:
    path = reach(one.place.module, model)
    new = {size for (name, _), (old, size) in axes.items() if under(name, path) and old == one.value}
    return new.pop() if len(new) == 1 else None
