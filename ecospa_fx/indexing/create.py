"""Symbolic elements of tensors: operators that make them (arange, full, zeros, ones)."""

from __future__ import annotations

import torch

from ecospa_fx.indexing.call import ElementCall, element_rule
from ecospa_fx.indexing.values import TRUE, ElementValue, as_number, constant, merged, position

aten = torch.ops.aten


@element_rule(aten.arange.default, aten.arange.start, aten.arange.start_step)
def arange(call: ElementCall) -> ElementValue | None:
    """Whole numbers only: floating-point steps round."""
    if call.dtype.is_floating_point:
        return None
    start, step = (
        as_number(0 if call["start"] is None else call["start"]),
        as_number(call["step"] if call["step"] is not None else 1),
    )
    return merged([(TRUE, start + step * position(0))]) if start.is_integer and step.is_integer else None


@element_rule(aten.full.default, aten.full_like.default, aten.new_full.default)
def full(call: ElementCall) -> ElementValue | None:
    """One number."""
    return constant(call["fill_value"])


@element_rule(aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)
def zeros(call: ElementCall) -> ElementValue | None:
    """Zero."""
    return constant(0)


@element_rule(aten.ones.default, aten.ones_like.default, aten.new_ones.default)
def ones(call: ElementCall) -> ElementValue | None:
    """One."""
    return constant(1)


@element_rule(aten.scalar_tensor.default)
def scalar(call: ElementCall) -> ElementValue | None:
    """A number as a tensor."""
    return constant(call["s"])
