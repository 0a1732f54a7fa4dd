"""Infers the integers that running a model does not read, such as ``out_features``, from the new parameter shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import prod
from typing import cast

from torch import nn

from ecospa_fx.inplace.attributes import IntegerAttribute, integers
from ecospa_fx.inplace.buffers import EditTarget
from ecospa_fx.inplace.equivalence import EquivalenceCheck
from ecospa_fx.inplace.evidence import evidence
from ecospa_fx.inplace.groups import Group, NarrowedAxes, group_by_role, is_under, narrowed_axes, scaled_count
from ecospa_fx.inplace.integer_search import by_role, is_read
from ecospa_fx.inplace.trial import IntegerEdits
from ecospa_fx.plan import Plan, Selection


@dataclass(frozen=True, slots=True)
class InferredIntegers:
    """New integers by place."""

    unread: dict[EditTarget, int]
    """Those that running the model does not read; shapes of parameters say what they become."""
    unverified: dict[EditTarget, int]
    """Those that running the model reads: whether they fit has to be tried."""


def infer_integers(
    check: EquivalenceCheck, plan: Plan, groups: Sequence[Group], values: IntegerEdits
) -> InferredIntegers:
    """What counts something that gets narrower, with its new value. values: what follows for certain."""
    model, axes = check.model, narrowed_axes(plan, check.model)
    inferred = evidence(check, plan, values)
    following = dict(inferred.from_constructors)
    owners = {name.rpartition(".")[0] for name, _ in axes}
    around = {path for path, _ in model.named_modules() if path and any(is_under(name, path) for name, _ in axes)}
    decided = inferred.set_by_constructors | values.keys()
    attributes = [attribute for attribute in integers(model, around | owners) if not attribute.place.steps]
    for alike in by_role(attributes, model):
        places = [attribute.place for attribute in alike]
        if any(place in decided or place.index is not None for place in places):
            continue
        new = _by_axis(alike, axes) if all(place.module in owners for place in places) else None
        if new is None and not any(place.module in owners for place in places):
            ways = (groups, group_by_role(list(plan), model))  # what is cut; with what stays whole in some layers
            new = next(filter(None, (_by_units(model, alike, way, axes) for way in ways)), None)
        following.update(new or {})
    unverified = {place: value for place, value in following.items() if is_read(place, check)}
    unread = {place: value for place, value in following.items() if place not in unverified}
    return InferredIntegers(unread, {**inferred.from_inputs, **unverified})


# -- of the module that holds a parameter ------------------------------------------------------------------------


def _by_axis(attributes: Sequence[IntegerAttribute], axes: NarrowedAxes) -> dict[EditTarget, int] | None:
    """An attribute of modules that are alike and hold parameters, if it is the size of one axis in all of them."""
    sizes: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for attribute in attributes:
        for name, parameter in cast(nn.Module, attribute.owner).named_parameters(recurse=False):
            full = f"{attribute.place.module}.{name}" if attribute.place.module else name
            for axis, size in enumerate(parameter.shape):
                sizes.setdefault((name, axis), []).append(axes.get((full, axis), (size, size)))
    dense = [attribute.value for attribute in attributes]
    candidates = {tuple(new for _, new in pairs) for pairs in sizes.values() if [old for old, _ in pairs] == dense}
    if len(candidates) != 1:
        return None
    return {
        attribute.place: new
        for attribute, new in zip(attributes, candidates.pop(), strict=True)
        if new != attribute.value
    }


# -- of the modules around it ------------------------------------------------------------------------------------


def _by_units(
    model: nn.Module, attributes: Sequence[IntegerAttribute], groups: Sequence[Group], axes: NarrowedAxes
) -> dict[EditTarget, int] | None:
    """An attribute of modules that are alike, if it counts units of one coupling wherever they hold some."""
    beneath = [a for a in attributes if any(group.beneath([a.place.module]) for group in groups)]
    new: dict[EditTarget, int] = {
        attribute.place: value
        for attribute in beneath
        if (value := _of_units(model, attribute, groups, axes)) is not None
    }
    return new if len(new) == len(beneath) else None


def _of_units(model: nn.Module, attribute: IntegerAttribute, groups: Sequence[Group], axes: NarrowedAxes) -> int | None:
    """The new number of units of some coupling, if an integer can say nothing else."""
    module = model.get_submodule(attribute.place.module)
    for name, parameter in module.named_parameters():
        full = f"{attribute.place.module}.{name}"
        if any(size == attribute.value and (full, axis) not in axes for axis, size in enumerate(parameter.shape)):
            return None
    selections = [affected for group in groups if (affected := group.beneath([attribute.place.module]))]
    path = attribute.place.module
    counting = [some for some in selections if any(attribute.value in _products(s, path, set())[0] for s in some)]
    counted = {
        (m.parameter, m.axis, s.size, box.unit) for some in counting for s in some for m in s.members for box in m.boxes
    }
    if len(counting) != 1 or any(
        attribute.value in _products(s, path, counted)[1] for some in selections for s in some
    ):
        return None
    return scaled_count(attribute.value, counting)


Run = tuple[str, int, int, int | tuple[int, ...]]
"""Positions along an axis of a parameter: its name, the axis, how many they are, the stride or a table of them."""


def _products(selection: Selection, path: str, counted: set[Run]) -> tuple[set[int], set[int]]:
    """What integers about a coupling's members in a module may count: numbers of its units, and of anything else.

    counted: what is not anything else, as the heads of a group are not where a coupling of whole groups holds them.
    """
    with_units, without = set(), set()
    for member in (m for m in selection.members if is_under(m.parameter, path)):
        for box in member.boxes:
            runs = (*box.carriers, *box.width)
            with_units |= {n * selection.size for n in _multiples([len(member.boxes), *(n for n, _ in runs)])}
            others = [n for n, stride in runs if (member.parameter, member.axis, n, stride) not in counted]
            without |= _multiples([len(member.boxes), *others])
    return with_units, without


def _multiples(sizes: Sequence[int]) -> set[int]:
    """Products of some of the sizes, of none and of all."""
    return {prod(chosen) for count in range(len(sizes) + 1) for chosen in combinations(sizes, count)}
