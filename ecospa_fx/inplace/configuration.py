"""A configuration that follows a plan: an object from which the model's class builds a model of the new widths.

Which object that is and which of its integers must change is found by building: on ``meta`` first, for the shapes of
all parameters, and then for the numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import nn

from ecospa_fx.coupling.couplings import parameter_shapes
from ecospa_fx.inplace.attributes import INTERNAL, integers, integers_of
from ecospa_fx.inplace.buffers import Spot
from ecospa_fx.inplace.edits import Edits
from ecospa_fx.inplace.equivalence import EquivalenceCheck
from ecospa_fx.inplace.groups import Group, components, narrowed_axes, part
from ecospa_fx.inplace.integer_search import IntegerRule, edits_of, options_of
from ecospa_fx.inplace.trial import edited
from ecospa_fx.ir.pytrees import is_object
from ecospa_fx.plan import Plan

TRIALS = 500

ShapesByName = dict[str, tuple[int, ...]]


def builders(model: nn.Module) -> list[str]:
    """The attributes of a model that hold what its class builds one like it from."""
    dense = parameter_shapes(model)
    own = {n: held for n, held in vars(model).items() if n not in INTERNAL and is_object(held)}
    return [n for n, held in own.items() if built_shapes(model, held) == dense]


def read_again(config: Any) -> Any:
    """A configuration as it comes back from a file, or from its constructor, where it has a way to do that."""
    if hasattr(config, "to_dict") and hasattr(type(config), "from_dict"):
        return type(config).from_dict(config.to_dict())
    return replace(config) if is_dataclass(config) and not isinstance(config, type) else copy.deepcopy(config)


def built_shapes(model: nn.Module, config: Any) -> ShapesByName | None:
    """The parameters of a model that a configuration describes, None where it describes none."""
    try:
        with torch.device("meta"):
            return parameter_shapes(type(model)(read_again(config)))
    except Exception:  # the constructor refuses, in whatever way
        return None


def configured(bench: EquivalenceCheck, plan: Plan, groups: Sequence[Group], name: str) -> Configured | None:
    """The integers of a configuration that describe the model after a plan, None where there are none."""
    values: dict[Spot, int] = {}
    for component in components(groups):
        own = part(plan, component)
        found = (told for told in _describing(bench.model, own, component, name) if rebuilt(bench, own, told, name))
        told = next(found, None)
        if told is None:
            return None
        values.update(told)
    built = rebuilt(bench, plan, values, name)
    return None if built is None else Configured(values, built)


@dataclass(frozen=True, slots=True, eq=False)
class Configured:
    """New integers of a configuration, and a model that was built from it with the weights that a plan keeps."""

    values: dict[Spot, int]
    model: nn.Module


def _describing(model: nn.Module, plan: Plan, groups: Sequence[Group], name: str) -> Iterator[dict[Spot, int]]:
    axes, wanted = narrowed_axes(plan, model), shapes_after(plan, model)
    config = vars(model)[name]
    rules = []
    for one in integers_of(config, "", (name,), set()):
        options = options_of(model, [one], groups, axes)
        if options:
            rules.append(IntegerRule(str(one.place), tuple(options), True))
    for values in islice(edits_of(rules), TRIALS):
        if describes(model, values, name, wanted):
            yield values


def describes(model: nn.Module, values: Mapping[Spot, int], name: str, wanted: ShapesByName) -> bool:
    """Whether a configuration with some integers replaced builds a model of these shapes."""
    edits = Edits()
    try:
        for place, value in values.items():
            place.write(model, value, edits)
        return built_shapes(model, vars(model)[name]) == wanted
    finally:
        edits.undo()


def shapes_after(plan: Plan, model: nn.Module) -> ShapesByName:
    """Shape of every parameter after a plan."""
    axes = narrowed_axes(plan, model)
    return {
        name: tuple(axes.get((name, axis), (size, size))[1] for axis, size in enumerate(shape))
        for name, shape in plan.shapes
    }


def rebuilt(bench: EquivalenceCheck, plan: Plan, values: Mapping[Spot, int], name: str) -> nn.Module | None:
    """A model built from the configuration with the weights that a plan keeps; None where masking gives otherwise."""
    reference = bench.reference(plan)
    with edited(bench.model, plan, values, reference.buffers):
        try:
            with next(bench.model.parameters()).device:
                built = type(bench.model)(read_again(vars(bench.model)[name])).to(bench.dtype).eval()
            built.load_state_dict(bench.model.state_dict())
        except Exception:  # the constructor or the weights refuse, in whatever way
            return None
        own = bench.model
        try:
            bench.model = built
            return built if bench.equals(reference) else None
        finally:
            bench.model = own


def told_by(built: nn.Module, model: nn.Module) -> dict[Spot, int]:
    """The integers of a model's modules that the constructor sets to something else in a model built anew."""
    paths = {path for path, _ in model.named_modules()}
    ours = {one.place: one.value for one in integers(model, paths) if not one.place.steps}
    theirs = {one.place: one.value for one in integers(built, paths) if not one.place.steps}
    return {place: theirs[place] for place in ours if place in theirs and theirs[place] != ours[place]}
