"""Integers that running a model does not read, such as ``out_features``: they follow where they can only mean that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import prod

from torch import nn

from ecospa_fx.inplace.attributes import IntegerAttribute, integers
from ecospa_fx.inplace.buffers import Spot
from ecospa_fx.inplace.equivalence import EquivalenceCheck
from ecospa_fx.inplace.evidence import evidence
from ecospa_fx.inplace.groups import Group, narrowed_axes, scaled, under
from ecospa_fx.inplace.integer_search import alike, is_read
from ecospa_fx.inplace.trial import IntegerEdits
from ecospa_fx.plan import Plan, Selection

Axes = Mapping[tuple[str, int], tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Described:
    """Integers that follow, by place.

    unread: what running the model does not read, and shapes of parameters tell; other: what has to be tried.
    """

    unread: dict[Spot, int]
    other: dict[Spot, int]


def described(bench: EquivalenceCheck, plan: Plan, groups: Sequence[Group], values: IntegerEdits) -> Described:
    """What counts something that gets narrower, with its new value. values: what follows for certain."""
    model, axes = bench.model, narrowed_axes(plan, bench.model)
    told = evidence(bench, plan, values)
    following = dict(told.constructed)
    owners = {name.rpartition(".")[0] for name, _ in axes}
    around = {path for path, _ in model.named_modules() if path and any(under(name, path) for name, _ in axes)}
    for own in alike([one for one in integers(model, around | owners) if not one.place.steps], model):
        if any(one.place in told.known or one.place in values or one.place.index is not None for one in own):
            continue
        new = _by_axis(own, axes) if all(one.place.module in owners for one in own) else None
        if new is None and not any(one.place.module in owners or is_read(one.place, bench) for one in own):
            new = _by_units(model, own, groups, axes)
        following.update(new or {})
    other = {place: value for place, value in following.items() if is_read(place, bench)}
    unread = {place: value for place, value in following.items() if place not in other}
    return Described(unread, {**told.given, **other})


# -- of the module that holds a parameter ------------------------------------------------------------------------


def _by_axis(own: Sequence[IntegerAttribute], axes: Axes) -> dict[Spot, int] | None:
    """An attribute of modules that are alike and hold parameters, if it is the size of one axis in all of them."""
    sizes: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for one in own:
        for name, parameter in one.owner.named_parameters(recurse=False):
            full = f"{one.place.module}.{name}" if one.place.module else name
            for axis, size in enumerate(parameter.shape):
                sizes.setdefault((name, axis), []).append(axes.get((full, axis), (size, size)))
    dense = [one.value for one in own]
    told = {tuple(new for _, new in pairs) for pairs in sizes.values() if [old for old, _ in pairs] == dense}
    if len(told) != 1:
        return None
    return {one.place: new for one, new in zip(own, told.pop(), strict=True) if new != one.value}


# -- of the modules around it ------------------------------------------------------------------------------------


def _by_units(
    model: nn.Module, own: Sequence[IntegerAttribute], groups: Sequence[Group], axes: Axes
) -> dict[Spot, int] | None:
    """An attribute of modules that are alike, if it counts units of one coupling in each of them."""
    new: dict[Spot, int] = {
        one.place: value for one in own if (value := _of_units(model, one, groups, axes)) is not None
    }
    return new if len(new) == len(own) else None


def _of_units(model: nn.Module, one: IntegerAttribute, groups: Sequence[Group], axes: Axes) -> int | None:
    """The new number of units of some coupling, if an integer can say nothing else."""
    module = model.get_submodule(one.place.module)
    for name, parameter in module.named_parameters():
        full = f"{one.place.module}.{name}"
        if any(size == one.value and (full, axis) not in axes for axis, size in enumerate(parameter.shape)):
            return None
    selections = [own for group in groups if (own := group.beneath([one.place.module]))]
    path = one.place.module
    counting = [own for own in selections if any(one.value in _products(s, path)[0] for s in own)]
    if len(counting) != 1 or any(one.value in _products(s, path)[1] for own in selections for s in own):
        return None
    return scaled(one.value, counting)


def _products(selection: Selection, path: str) -> tuple[set[int], set[int]]:
    """What integers about a coupling's members in a module may count: numbers of its units, and of anything else."""
    with_units, without = set(), set()
    for member in (m for m in selection.members if under(m.parameter, path)):
        for box in member.boxes:
            sizes = [len(member.boxes), *(n for n, _ in box.carriers), *(n for n, _ in box.width)]
            found = {prod(chosen) for count in range(len(sizes) + 1) for chosen in combinations(sizes, count)}
            without |= found
            with_units |= {n * selection.size for n in found}
    return with_units, without
