"""Saves the integers that `shrink_` wrote as JSON, and applies the same edit to the dense model when it is loaded."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import astuple, fields
from typing import cast

from torch import Tensor, nn

from ecospa_fx.errors import StorageError
from ecospa_fx.inplace.attributes import Place
from ecospa_fx.inplace.buffers import EditTarget
from ecospa_fx.inplace.edits import Edits
from ecospa_fx.inplace.norms import NormEdit
from ecospa_fx.inplace.trial import apply_edit
from ecospa_fx.plan import Plan
from ecospa_fx.strict_json import from_plain

SavedInteger = tuple[str, tuple[str | int, ...], str | int, int | None, int]
"""Module, steps, name and index of a `Place`, and the integer to write there."""

SavedNorm = tuple[str, str, str, int, float, int]
"""The fields of a `NormEdit`, and the units that stay."""


def integers_to_json(values: Mapping[EditTarget, int]) -> list[list[object]] | None:
    """Places and their new integers as JSON, or None where a key on the way has no place in JSON.

    Buffers that were cut are saved with the weights, and say themselves how wide they are.
    """
    places = {place: value for place, value in values.items() if isinstance(place, Place)}
    if not all(type(key) in (str, int) for place in places for key in (*place.steps, place.name)):
        return None
    norms = [[*astuple(norm), value] for norm, value in values.items() if isinstance(norm, NormEdit)]
    saved = [[place.module, list(place.steps), place.name, place.index, value] for place, value in places.items()]
    return [*saved, *norms]


def apply_saved_edit(dense: nn.Module, plan: Plan, integers: object, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the dense model with a plan's parameters cut, integers written and narrower buffers of `tensors`.

    Only integers that are there are replaced, by integers. Raises StorageError for anything else, PlanError where the
    plan was made for another model.
    """
    model = copy.deepcopy(dense)
    plan.check(model)
    buffers = {n: tensors[n] for n, b in model.named_buffers() if n in tensors and _narrower(tensors[n], b)}
    apply_edit(model, plan, dict(_read(entry, model) for entry in _entries(integers)), buffers, Edits())
    return model


def _narrower(new: Tensor, old: Tensor) -> bool:
    return (
        new.dim() == old.dim()
        and new.shape != old.shape
        and all(a <= b for a, b in zip(new.shape, old.shape, strict=True))
    )


def _entries(integers: object) -> list[object]:
    if not isinstance(integers, list):
        raise StorageError("what is written back into the module is no list of integers: save the model again")
    return integers


def _read(entry: object, model: nn.Module) -> tuple[EditTarget, int]:
    if isinstance(entry, list) and len(entry) == len(fields(NormEdit)) + 1:
        return _read_norm(entry, model)
    try:
        module, steps, name, index, value = from_plain(cast(type[SavedInteger], SavedInteger), entry)
        place = Place(module, steps, name, index)
        valid = type(place.value(model)) is int and value > 0
    except (TypeError, ValueError, AttributeError, KeyError, IndexError):
        valid = False
    if not valid:
        raise StorageError(
            f"the model has no integer at {entry!r:.120}: the architecture is not the one that was saved"
        )
    return place, value


def _read_norm(entry: list[object], model: nn.Module) -> tuple[NormEdit, int]:
    try:
        module, weight, epsilon, units, offset, kept = from_plain(cast(type[SavedNorm], SavedNorm), entry)
    except (TypeError, ValueError):
        units = kept = 0
    norm = NormEdit(module, weight, epsilon, units, offset) if 0 < kept <= units else None
    if norm is None or not norm.fits(model):
        raise StorageError(f"the model has no norm at {entry!r:.120}: the architecture is not the one that was saved")
    return norm, kept
