"""Edits a model's configuration, such as a Hugging Face config, so that its class builds a model of the new widths.

Which object that is and which of its integers must change is found by building: on ``meta`` first, for the shapes of
all parameters, and then for the numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from itertools import islice
from typing import Protocol, TypeVar, cast

import torch
from torch import nn

from ecospa_fx.coupling.couplings import parameter_shapes
from ecospa_fx.inplace.attributes import INTERNAL, integers, integers_of
from ecospa_fx.inplace.buffers import EditTarget
from ecospa_fx.inplace.edits import Edits
from ecospa_fx.inplace.equivalence import EquivalenceCheck
from ecospa_fx.inplace.groups import Group, components, narrowed_axes, subplan
from ecospa_fx.inplace.integer_search import IntegerRule, candidate_edits, edit_combinations
from ecospa_fx.inplace.trial import edited
from ecospa_fx.ir.pytrees import is_object
from ecospa_fx.plan import Plan

MAX_TRIALS = 500

ShapesByName = dict[str, tuple[int, ...]]

Config = TypeVar("Config")


def config_attributes(model: nn.Module) -> list[str]:
    """The attributes of a model that hold what its class builds one like it from."""
    dense = parameter_shapes(model)
    attributes = {n: value for n, value in vars(model).items() if n not in INTERNAL and is_object(value)}
    return [n for n, value in attributes.items() if built_shapes(model, value) == dense]


def reloaded(config: Config) -> Config:
    """A configuration as it comes back from a file, or from its constructor, where it has a way to do that."""
    kind = cast(type[_Serialisable], type(config))
    if hasattr(config, "to_dict") and hasattr(kind, "from_dict"):
        return cast(Config, kind.from_dict(config.to_dict()))
    if is_dataclass(config) and not isinstance(config, type):
        return cast(Config, replace(config))
    return copy.deepcopy(config)


class _Serialisable(Protocol):
    """A configuration with a way to a file and back, such as those of transformers."""

    @classmethod
    def from_dict(cls, values: dict[str, object]) -> object: ...


def built_shapes(model: nn.Module, config: object) -> ShapesByName | None:
    """The parameters of a model that a configuration describes, None where it describes none."""
    try:
        with torch.device("meta"):
            return parameter_shapes(type(model)(reloaded(config)))
    except Exception:  # the constructor refuses, in whatever way
        return None


def search_configuration(
    check: EquivalenceCheck, plan: Plan, groups: Sequence[Group], name: str
) -> ConfigurationEdit | None:
    """The integers of a configuration that describe the model after a plan, None where there are none."""
    values: dict[EditTarget, int] = {}
    for component in components(groups):
        component_plan = subplan(plan, component)
        matching = (
            edit
            for edit in _matching_edits(check.model, component_plan, component, name)
            if rebuilt(check, component_plan, edit, name)
        )
        edit = next(matching, None)
        if edit is None:
            return None
        values.update(edit)
    built = rebuilt(check, plan, values, name)
    return None if built is None else ConfigurationEdit(values, built)


@dataclass(frozen=True, slots=True, eq=False)
class ConfigurationEdit:
    """New integers of a configuration."""

    values: dict[EditTarget, int]
    """The integers by place."""
    model: nn.Module
    """Built from the edited configuration, with the weights that a plan keeps."""


def _matching_edits(
    model: nn.Module, plan: Plan, groups: Sequence[Group], name: str
) -> Iterator[dict[EditTarget, int]]:
    axes, wanted = narrowed_axes(plan, model), shapes_after(plan, model)
    config = vars(model)[name]
    rules = []
    for attribute in integers_of(config, "", (name,), set()):
        options = candidate_edits(model, [attribute], groups, axes)
        if options:
            rules.append(IntegerRule(str(attribute.place), tuple(options), True))
    for values in islice(edit_combinations(rules), MAX_TRIALS):
        if builds_shapes(model, values, name, wanted):
            yield values


def builds_shapes(model: nn.Module, values: Mapping[EditTarget, int], name: str, wanted: ShapesByName) -> bool:
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


def rebuilt(check: EquivalenceCheck, plan: Plan, values: Mapping[EditTarget, int], name: str) -> nn.Module | None:
    """A model built from the configuration with the weights that a plan keeps; None where masking gives otherwise."""
    reference = check.reference(plan)
    results = (*reference.first, *reference.rest)
    with edited(check.model, plan, values, reference.buffers):
        try:
            with next(check.model.parameters()).device:
                built = type(check.model)(reloaded(vars(check.model)[name])).to(check.dtype).eval()
            built.load_state_dict(check.model.state_dict())
        except Exception:  # the constructor or the weights refuse, in whatever way
            return None
        original = check.model
        try:
            check.model = built
            return built if check.gives(results) else None
        finally:
            check.model = original


def constructor_differences(built: nn.Module, model: nn.Module) -> dict[EditTarget, int]:
    """The integers of a model's modules that the constructor sets to something else in a model built anew."""
    paths = {path for path, _ in model.named_modules()}
    before = {attribute.place: attribute.value for attribute in integers(model, paths) if not attribute.place.steps}
    after = {attribute.place: attribute.value for attribute in integers(built, paths) if not attribute.place.steps}
    return {place: after[place] for place in before if place in after and after[place] != before[place]}
