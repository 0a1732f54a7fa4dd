"""Warns where a configuration no longer describes its model, naming the fields that set other widths."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from ecospa_fx.coupling.couplings import parameter_shapes
from ecospa_fx.errors import warn_caller
from ecospa_fx.inplace.attributes import IntegerAttribute, integers_of
from ecospa_fx.inplace.configuration import ShapesByName, built_shapes
from ecospa_fx.inplace.edits import Edits
from ecospa_fx.inplace.groups import narrowed_axes
from ecospa_fx.plan import Plan


def warn_of_stale(model: nn.Module, dense: nn.Module, plan: Plan, names: Iterable[str]) -> None:
    """Warn for every attribute from which the model's class builds the dense model and not the model as it is now.

    names: attributes from which the class builds the dense one.
    """
    for name in names:
        if built_shapes(model, vars(model)[name]) == parameter_shapes(model):
            continue
        fields = stale_fields(dense, plan, name)
        if not fields:  # what the class takes and reads no width from is no configuration
            continue
        stale = ", ".join(f"{name}.{field} = {value}" for field, value in fields.items())
        warn_caller(
            f"{stale} cannot say how wide the layers of this {type(model).__name__} are now, so that a model built "
            f"from its {name}, as from_pretrained does, does not take its weights: save it with ecospa_fx.save, "
            "or with ecospa_fx.export where it is a model of transformers, or plan with "
            "expressible_in='module' and uniform=True"
        )


def stale_fields(dense: nn.Module, plan: Plan, name: str) -> dict[str, int]:
    """The integers of a configuration that set the widths that a plan changes, with their values.

    Those that set the fewest other widths come first, until all that can be explained is.
    """
    cut = set(narrowed_axes(plan, dense))
    sizes = {old for old, _ in narrowed_axes(plan, dense).values()}
    driven: dict[str, set[tuple[str, int]]] = {}
    values: dict[str, int] = {}
    for attribute in integers_of(vars(dense)[name], "", (name,), set()):
        if attribute.value > 1 and any(size % attribute.value == 0 for size in sizes):
            field = str(attribute.place).removeprefix(f"{name}.")
            driven[field], values[field] = _driven(dense, attribute, name), attribute.value
    result: dict[str, int] = {}
    for field in sorted(driven, key=lambda f: len(driven[f] - cut) / max(len(driven[f]), 1)):
        if driven[field] & cut:
            result[field] = values[field]
            cut -= driven[field]
    return result


def _driven(model: nn.Module, attribute: IntegerAttribute, name: str) -> set[tuple[str, int]]:
    """The parameter axes that get other sizes where an integer of the configuration is another one."""
    dense: ShapesByName = parameter_shapes(model)
    for value in (attribute.value // 2, 2 * attribute.value, attribute.value + 1):
        edits = Edits()
        try:
            attribute.place.write(model, value, edits)
            shapes = built_shapes(model, vars(model)[name])
        finally:
            edits.undo()
        if shapes is not None and shapes != dense:
            return _changed(dense, shapes)
    return set()


def _changed(before: Mapping[str, tuple[int, ...]], after: Mapping[str, tuple[int, ...]]) -> set[tuple[str, int]]:
    return {
        (name, axis)
        for name, shape in before.items()
        if len(after.get(name, ())) == len(shape)
        for axis, size in enumerate(shape)
        if after[name][axis] != size
    }
