"""Applies an edit to a model for a trial, and undoes it: parameters cut, integers and buffers replaced."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from ecospa_fx.inplace.buffers import EditTarget
from ecospa_fx.inplace.edits import Edits
from ecospa_fx.plan import Plan

IntegerEdits = Mapping[EditTarget, int]
"""New integers by place, and what stays of buffers."""


@contextmanager
def edited(model: nn.Module, plan: Plan, values: IntegerEdits, buffers: Mapping[str, Tensor]) -> Iterator[None]:
    """A model with a plan's parameters cut, and some integers and buffers replaced, inside, and as it was outside."""
    edits = Edits()
    try:
        apply_edit(model, plan, values, buffers, edits)
        yield
    finally:
        edits.undo()


@contextmanager
def written(model: nn.Module, values: IntegerEdits) -> Iterator[None]:
    """A model with some integers, and what stays of some buffers, written inside, and as it was outside."""
    edits = Edits()
    try:
        for place, value in values.items():
            place.write(model, value, edits)
        yield
    finally:
        edits.undo()


def apply_edit(model: nn.Module, plan: Plan, values: IntegerEdits, buffers: Mapping[str, Tensor], edits: Edits) -> None:
    """Cut a plan's parameters, put buffers in their places and write integers, noted in `edits`."""
    plan.check(model)
    edits.parameters(model, plan.factors())
    for name, tensor in buffers.items():
        edits.buffer(model, name, tensor)
    for place, value in values.items():
        place.write(model, value, edits)
