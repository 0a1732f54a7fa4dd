"""Integers that running a model does not read, such as ``out_features``: they follow where they can only mean that."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from itertools import combinations
from math import prod
from typing import Any

import torch
from torch import nn

from ecospa_fx.inplace.attributes import Found, integers
from ecospa_fx.inplace.follow import alike, rules_of
from ecospa_fx.inplace.groups import Group, narrowed_axes, scaled, under
from ecospa_fx.inplace.proof import Bench
from ecospa_fx.inplace.tables import Spot
from ecospa_fx.plan import Plan, Selection

Axes = Mapping[tuple[str, int], tuple[int, int]]


def described(bench: Bench, plan: Plan, groups: Sequence[Group]) -> dict[Spot, int]:
    """What running the model does not read and what counts something that gets narrower, with its new value."""
    model, axes = bench.model, narrowed_axes(plan, bench.model)
    read = {place for rule in rules_of(bench, plan, groups) if rule.read for values in rule.options for place in values}
    owners = {name.rpartition(".")[0] for name, _ in axes}
    around = {path for path, _ in model.named_modules() if path and any(under(name, path) for name, _ in axes)}
    found: dict[Spot, int] = {}
    for own in alike([one for one in integers(model, around) if not one.place.steps], model):
        if any(one.place in read or one.place.index is not None for one in own):
            continue
        new = {
            one.place: _of_parameters(model, one, axes)
            if one.place.module in owners
            else _of_units(model, one, groups, axes)
            for one in own
        }
        if all(value is not None for value in new.values()):
            found.update({place: value for place, value in new.items() if value is not None})
    return found


# -- of the module that holds a parameter ------------------------------------------------------------------------


def _of_parameters(model: nn.Module, one: Found, axes: Axes) -> int | None:
    """The new size of an axis of a module's own parameter, if that is what an integer says."""
    owner, path = one.owner, one.place.module
    new, rest = set(), False
    for name, parameter in owner.named_parameters(recurse=False):
        full = f"{path}.{name}" if path else name
        for axis, size in enumerate(parameter.shape):
            old, cut = axes.get((full, axis), (size, size))
            new |= {cut} if old == one.value and cut != old else set()
            rest |= old == one.value and cut == old
    if len(new) != 1 or not rest:
        return new.pop() if len(new) == 1 else None
    have = dict(owner.named_parameters(recurse=False))
    told = [at for at in _built_by(owner, one.place.name) if at[0] in have]
    driven = {axes.get((f"{path}.{name}" if path else name, axis), (0, 0)) for name, axis in told}
    return driven.pop()[1] if len(driven) == 1 and next(iter(driven))[0] == one.value else None


def _built_by(module: nn.Module, name: str) -> set[tuple[str, int]]:
    """The parameter axes that are as long as an argument of the constructor of that name says, by building two."""
    try:
        parameters = inspect.signature(type(module)).parameters
        given: dict[str, Any] = {n: getattr(module, n) for n in parameters if type(getattr(module, n, None)) is int}
        shapes = []
        for value in (given[name], 2 * given[name]):
            with torch.device("meta"):
                built = type(module)(**{**given, name: value})
            shapes.append({n: tuple(p.shape) for n, p in built.named_parameters(recurse=False)})
    except Exception:  # a constructor that wants something else says nothing
        return set()
    before, after = shapes
    return {(n, i) for n in before for i, size in enumerate(before[n]) if after[n][i] != size}


# -- of the modules around it ------------------------------------------------------------------------------------


def _of_units(model: nn.Module, one: Found, groups: Sequence[Group], axes: Axes) -> int | None:
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
