"""The configuration that describes a model of transformers as it is now: plain fields where all layers are alike.

Where they are not, `per_layer_config` says what differs. Which fields that are is found by `LayerSearch`, once for all
layers that got the same shapes from the same ones.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, product
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ecospa_fx.errors import StorageError
from ecospa_fx.export.layer_fields import Fields, LayerSearch, Shapes, differing_numbers, tensor_shapes
from ecospa_fx.huggingface import PretrainedConfig, import_transformers

MOST_CHOICES = 16
"""Configurations that are tried with numbers: where several give the right shapes, the likeliest first."""

Role = tuple[object, ...]
"""What layers have in common that one search is enough for."""


def stock_class(model: nn.Module) -> Any:
    """The class of transformers that a model is of. Raises StorageError where there is none."""
    transformers = import_transformers()
    for kind in type(model).__mro__:
        if kind.__module__.startswith("transformers.models.") and getattr(transformers, kind.__name__, None) is kind:
            return kind
    raise StorageError(
        f"a {type(model).__name__} is no model of transformers, which builds it when it is loaded: export a model of "
        "one of its classes, without adapters around it, or save this one with ecospa_fx.save"
    )


def candidate_configurations(model: nn.Module) -> Iterator[PretrainedConfig]:
    """Configurations that give a model its shapes, the likeliest first. The model's own one is not changed.

    Raises StorageError with the parameter that no field gives its shape, and where transformers is too old.
    """
    kind = stock_class(model)
    config: PretrainedConfig = copy.deepcopy(model.config)
    if getattr(config, "is_heterogeneous", False):
        config.per_layer_config = None
    config.__dict__.pop("auto_map", None)
    with torch.device("meta"):
        if changed_or_other(tensor_shapes(kind(config)), tensor_shapes(model)) is None:
            yield config
            return
    searches = _searches(model, kind, config)
    by_role: dict[Role, list[Fields]] = {}
    for path, (role, search) in searches.items():
        if role not in by_role:
            by_role[role] = search.solutions() or _refuse(model, path, search)
    for chosen in islice(product(*by_role.values()), MOST_CHOICES):
        fields_of = dict(zip(by_role, chosen, strict=True))
        yield from _configured(config, [fields_of[role] for role, _ in searches.values()], _pins(searches))


def _searches(model: nn.Module, kind: Any, config: PretrainedConfig) -> dict[str, tuple[Role, LayerSearch]]:
    """Role and search of each layer by its path, in the order of their numbers."""
    building = per_layer_module()
    with building.layer_configurations() as built, torch.device("meta"):
        dense = kind(config)
    paths = {id(module): path for path, module in dense.named_modules()}
    layers = {paths[id(layer.layer)]: layer for layer in built if id(layer.layer) in paths}
    inside = tuple(f"{path}." for path in layers)
    outside = [{n: s for n, s in tensor_shapes(m).items() if not n.startswith(inside)} for m in (dense, model)]
    other = changed_or_other(*outside)
    if other is not None:
        raise StorageError(
            f"{other} of this {kind.__name__} has another shape than its configuration gives it, and only layers can "
            "have widths of their own: save the model with ecospa_fx.save"
        )
    searches = {}
    for path, layer in sorted(layers.items(), key=lambda item: item[1].index):
        search = LayerSearch(model.get_submodule(path), layer.call)
        searches[path] = (_role(search, layer.layer), search)
    return searches


def _role(search: LayerSearch, dense: nn.Module) -> Role:
    numbers = dict(differing_numbers(search.layer, dense))
    shapes = (tuple(sorted(s.items())) for s in (search.wanted, tensor_shapes(dense)))
    return type(search.layer), *shapes, tuple(sorted(numbers.items()))


def _refuse(model: nn.Module, path: str, search: LayerSearch) -> list[Fields]:
    base = search.shapes({})
    name, axis = min(search.missed, default=("", 0))
    was = f" of {base[name]}" if name in base else ""
    raise StorageError(
        f"{path}.{name} has the shape {search.wanted.get(name, ())} in place{was}, and no field of "
        f"{type(model.config).__name__} gives it axis {axis} of that size: save the model with ecospa_fx.save, or plan "
        "with expressible_in='module' and uniform=True"
    )


def _pins(searches: Mapping[str, tuple[Role, LayerSearch]]) -> Fields:
    return {name: value for _, search in searches.values() for name, value in search.pinned.items()}


def _configured(config: PretrainedConfig, layers: Sequence[Fields], pins: Fields) -> Iterator[PretrainedConfig]:
    """The configuration with the fields of each layer: plain ones where all are alike, then per layer."""
    if all(fields == layers[0] for fields in layers):
        plain = copy.deepcopy(config)
        for name, value in layers[0].items():
            setattr(plain, name, value)
        yield plain
    per_layer = copy.deepcopy(config)
    for name, value in pins.items():  # what layers override has to be there for all
        if any(name in fields for fields in layers):
            setattr(per_layer, name, value)
    per_layer.allow_global_per_layer_attribute_access = True
    per_layer.per_layer_config = {index: dict(fields) for index, fields in enumerate(layers) if fields}
    yield per_layer


def per_layer_module() -> ModuleType:
    """The modelling file of every exported folder, imported. Raises StorageError where transformers is too old."""
    import_transformers()
    try:
        from ecospa_fx.export import modeling_per_layer
    except ImportError as error:
        raise StorageError(f"{error}, or plan with uniform=True, which needs no such widths") from error
    return modeling_per_layer


def changed_or_other(first: Shapes, second: Shapes) -> str | None:
    """The name of a tensor that only one has, or that has another shape; None where there is none."""
    names = sorted(first.keys() ^ second.keys()) or sorted(n for n in first if first[n] != second[n])
    return names[0] if names else None
