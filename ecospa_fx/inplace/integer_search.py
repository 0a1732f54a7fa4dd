"""Searches the integers of a module, such as `num_heads`, that must change when its parameters get narrower.

Edits are tried, smallest first, until the edited module computes what the masked one does.

No table of architectures: an integer is tried where it counts units of what gets narrower (its value is a multiple of
theirs, and a divisor of an axis that holds them), in modules that hold or contain the parameters and in objects that
these refer to, if running the model reads it. Attributes of one name in modules of one class follow alike.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, combinations, islice, product
from typing import cast

from torch import nn

from ecospa_fx.errors import PlanError
from ecospa_fx.inplace.attributes import IntegerAttribute, Place, integers, recording_reads
from ecospa_fx.inplace.buffers import EditTarget, buffer_rules
from ecospa_fx.inplace.equivalence import EquivalenceCheck, Reference, Results
from ecospa_fx.inplace.evidence import evidence
from ecospa_fx.inplace.groups import (
    Group,
    NarrowedAxes,
    is_under,
    narrowed_axes,
    parameter_scope,
    paths_to,
    role_of,
    scaled_count,
    subplan,
)
from ecospa_fx.inplace.norms import norm_rules
from ecospa_fx.inplace.trial import IntegerEdits, edited, written
from ecospa_fx.plan import Plan

MAX_TRIALS = 3000


@dataclass(frozen=True, slots=True, eq=False)
class IntegerRule:
    """One attribute of all modules of one class, and the edits of it that are tried."""

    name: str
    """Class and attribute, for messages."""
    options: tuple[IntegerEdits, ...]
    """Alternative edits, each for all modules at once."""
    read: bool
    """Whether running the model reads it."""


def search_integers(check: EquivalenceCheck, plan: Plan, groups: Sequence[Group]) -> dict[EditTarget, int]:
    """The integers that must follow a plan of some groups, and their new values.

    Raises PlanError where no edit gives what masking gives.
    """
    wanted = subplan(plan, groups)
    reference = check.reference(wanted)
    if is_equivalent(check, wanted, {}, reference):
        return {}
    rules = [rule for rule in candidate_rules(check, wanted, groups) if rule.read]
    inferred = evidence(check, wanted, {})
    start: dict[EditTarget, int] = {
        p: value for p, value in (inferred.from_constructors | inferred.from_inputs).items() if is_read(p, check)
    }
    edits: Iterator[dict[EditTarget, int]] = (
        {**before, **values}
        for before in ([start, {}] if start else [{}])
        for values in islice(edit_combinations(rules), MAX_TRIALS)
    )
    edit = next(_equivalent(check, wanted, filter(None, edits), reference), None)
    if edit is None:
        raise PlanError(_refusal(groups, rules))
    return edit


def is_equivalent(check: EquivalenceCheck, plan: Plan, values: dict[EditTarget, int], reference: Reference) -> bool:
    """Whether a model that is cut by a plan, with some integers replaced, does what the reference does."""
    return next(_equivalent(check, plan, iter([values]), reference), None) is not None


def _equivalent(
    check: EquivalenceCheck, plan: Plan, edits: Iterator[dict[EditTarget, int]], reference: Reference
) -> Iterator[dict[EditTarget, int]]:
    """The edits that give what the reference does: in the example, which tells most of the wrong ones, and then in all
    other calls, whose results are made once something passes the example."""
    while True:
        with edited(check.model, plan, {}, reference.buffers):
            edit = next((values for values in edits if _gives(check, values, reference.first)), None)
        if edit is None:
            return
        rest = reference.rest
        with edited(check.model, plan, edit, reference.buffers):
            equal = check.gives(rest)
        if equal:
            yield edit


def _gives(check: EquivalenceCheck, values: IntegerEdits, results: Results) -> bool:
    with written(check.model, values):
        return check.gives(results)


def _refusal(groups: Sequence[Group], rules: Sequence[IntegerRule]) -> str:
    first = groups[0].selections[0]
    others = sum(len(g.selections) for g in groups) - 1
    more = f" (and {others} like it)" if others else ""
    tried = ", ".join(rule.name for rule in rules) or "that its code reads"
    return (
        f"coupling {first.name!r}{more} cannot be written back into the module: no edit of its integers ({tried}) "
        "gives what masking gives; use ecospa_fx.shrink, or ask for a plan with expressible_in='module'"
    )


def edit_combinations(rules: Sequence[IntegerRule]) -> Iterator[dict[EditTarget, int]]:
    """Every combination of the rules' options, those of fewer rules first."""
    for count in range(len(rules) + 1):
        for chosen in combinations(rules, count):
            for options in product(*(rule.options for rule in chosen)):
                yield dict(chain.from_iterable(values.items() for values in options))


# -- candidates --------------------------------------------------------------------------------------------------


def candidate_rules(check: EquivalenceCheck, plan: Plan, groups: Sequence[Group]) -> list[IntegerRule]:
    """The integers that may follow, by class and attribute."""
    model, axes = check.model, narrowed_axes(plan, check.model)
    holding = {path for name, _ in axes for path in paths_to(name)}
    paths = {path for path, _ in model.named_modules() if parameter_scope(path, model) in holding}
    attributes = integers(model, paths)
    rules = []
    for alike in by_role(attributes, model):
        options = candidate_edits(model, alike, groups, axes)
        if options:
            label = f"{type(alike[0].owner).__name__}.{alike[0].place.name}"
            read = any(is_read(attribute.place, check) for attribute in alike)
            rules.append(IntegerRule(label, tuple(options), read))
    rules += [IntegerRule(label, options, True) for label, options in buffer_rules(model, groups)]
    norms = norm_rules(model, axes)
    return rules + [IntegerRule(label, cast(tuple[IntegerEdits, ...], options), True) for label, options in norms]


def by_role(attributes: Sequence[IntegerAttribute], model: nn.Module) -> list[list[IntegerAttribute]]:
    """The integers that are the same attribute of modules of the same class in other layers, together."""
    result: dict[Hashable, list[IntegerAttribute]] = {}
    for attribute in attributes:
        place = attribute.place
        where = (place.module, place.steps) if place.steps else role_of(place.module, model)
        result.setdefault((where, place.name, place.index), []).append(attribute)
    return list(result.values())


def candidate_targets(check: EquivalenceCheck, plan: Plan, groups: Sequence[Group]) -> set[EditTarget]:
    """The integers that running the model reads and that may follow some groups."""
    rules = candidate_rules(check, subplan(plan, groups), groups)
    return {place for rule in rules if rule.read for values in rule.options for place in values}


def is_read(place: EditTarget, check: EquivalenceCheck) -> bool:
    """Whether running the dense model reads an integer, as far as can be seen."""
    if check.read is None:
        attributes = integers(check.model, {path for path, _ in check.model.named_modules()})
        owners = [attribute.owner for attribute in attributes if not isinstance(attribute.owner, dict)]
        with recording_reads(owners) as read:
            for call in check.calls:
                check.run(call)
        check.read = read
    if not isinstance(place, Place):
        return True
    owner = place.owner(check.model)
    return isinstance(owner, dict) or (id(owner), place.name) in check.read


def candidate_edits(
    model: nn.Module, attributes: Sequence[IntegerAttribute], groups: Sequence[Group], axes: NarrowedAxes
) -> list[IntegerEdits]:
    """The ways in which one attribute may follow everywhere: as units of one or several groups, or as an axis."""
    ways: list[Callable[[IntegerAttribute], int | None]] = [
        lambda attribute, chosen=chosen: _as_units(model, attribute, chosen, axes)  # type: ignore[misc]
        for count in range(1, len(groups) + 1)
        for chosen in combinations(groups, count)
    ]
    ways.append(lambda attribute: _as_axis(model, attribute, axes))
    old = {attribute.place: attribute.value for attribute in attributes}
    new = [{attribute.place: way(attribute) for attribute in attributes} for way in ways]
    options: list[IntegerEdits] = []
    # those first that say something of all places; modules may be alike only because they are numbered
    for values in sorted(new, key=lambda values: None in values.values()):
        edit: IntegerEdits = {place: value for place, value in values.items() if value and value != old[place]}
        if edit and edit not in options:
            options.append(edit)
    return options


def _as_units(model: nn.Module, attribute: IntegerAttribute, groups: Sequence[Group], axes: NarrowedAxes) -> int | None:
    selections = [group.beneath([parameter_scope(attribute.place.module, model)]) for group in groups]
    if not all(selections):
        return attribute.value if not any(selections) else None
    cut = {(m.parameter, m.axis) for members in selections for s in members for m in s.members}
    if attribute.value < 2 or not any(axes[key][0] % attribute.value == 0 for key in cut & axes.keys()):
        return None
    return scaled_count(attribute.value, selections)


def _as_axis(model: nn.Module, attribute: IntegerAttribute, axes: NarrowedAxes) -> int | None:
    path = parameter_scope(attribute.place.module, model)
    new = {size for (name, _), (old, size) in axes.items() if is_under(name, path) and old == attribute.value}
    return new.pop() if len(new) == 1 else None
