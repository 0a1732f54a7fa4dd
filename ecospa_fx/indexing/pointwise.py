"""Symbolic elements of tensors: pointwise operators (comparisons, logic, arithmetic)."""

from __future__ import annotations

from collections.abc import Callable

import sympy
import torch

from ecospa_fx.indexing.call import ElementCall, ElementRule, element_rule
from ecospa_fx.indexing.values import Condition, ElementValue, Number, Piecewise, at_least_zero, negated

aten = torch.ops.aten


def _compare(function: Callable[[Number], Condition | None]) -> ElementRule:
    """A comparison from what it says of the difference of its operands."""

    def decide(a: Number, b: Number) -> Condition | None:
        if a == b:
            return function(sympy.Integer(0))
        gap = sympy.expand(a - b)
        return function(gap) if gap.is_integer or gap.is_number else None

    return lambda call: call.pointwise(decide, "self", "other")


def _least(gap: Number, strict: bool) -> Condition:
    if gap.is_number:
        return sympy.true if (gap > 0 if strict else gap >= 0) else sympy.false
    return at_least_zero(gap - 1 if strict else gap)


def _equal(gap: Number) -> Condition:
    if gap.is_number:
        return sympy.true if gap == 0 else sympy.false
    return sympy.And(at_least_zero(gap), at_least_zero(-gap))


for _name, _function in {
    "ge": lambda gap: _least(gap, False), "gt": lambda gap: _least(gap, True), "le": lambda gap: _least(-gap, False),
    "lt": lambda gap: _least(-gap, True), "eq": _equal, "ne": lambda gap: negated(_equal(gap)),
}.items():  # fmt: skip
    _packet = getattr(aten, _name)
    element_rule(_packet.Tensor, _packet.Scalar)(_compare(_function))


@element_rule(aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default)
def both(call: ElementCall) -> ElementValue | None:
    """Truth values only."""
    return call.pointwise(lambda a, b: a * b, "self", "other") if call.dtype is torch.bool else None


@element_rule(aten.__or__.Tensor, aten.bitwise_or.Tensor, aten.logical_or.default)
def either(call: ElementCall) -> ElementValue | None:
    """Truth values only."""
    return call.pointwise(lambda a, b: sympy.Max(a, b), "self", "other") if call.dtype is torch.bool else None


@element_rule(aten.logical_not.default, aten.bitwise_not.default)
def inverse(call: ElementCall) -> ElementValue | None:
    """Truth values only."""
    return call.pointwise(lambda a: 1 - a, "self") if call.dtype is torch.bool else None


@element_rule(aten.add.Tensor, aten.add.Scalar)
def add(call: ElementCall) -> ElementValue | None:
    """A sum."""
    return call.pointwise(lambda a, b: a + b, "self", "other") if call["alpha"] in {1, None} else None


@element_rule(aten.sub.Tensor, aten.sub.Scalar)
def subtract(call: ElementCall) -> ElementValue | None:
    """A difference."""
    return call.pointwise(lambda a, b: a - b, "self", "other") if call["alpha"] in {1, None} else None


@element_rule(aten.rsub.Scalar, aten.rsub.Tensor)
def subtract_from(call: ElementCall) -> ElementValue | None:
    """A difference the other way round."""
    return call.pointwise(lambda a, b: b - a, "self", "other") if call["alpha"] in {1, None} else None


@element_rule(aten.mul.Tensor, aten.mul.Scalar)
def multiply(call: ElementCall) -> ElementValue | None:
    """A product."""
    return call.pointwise(lambda a, b: sympy.expand(a * b), "self", "other")


@element_rule(aten.neg.default)
def negate(call: ElementCall) -> ElementValue | None:
    """Changed sign."""
    return call.pointwise(lambda a: -a, "self")


@element_rule(aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar)
def where(call: ElementCall) -> ElementValue | None:
    """One or the other."""
    return call.pointwise(lambda c, a, b: a if c == 1 else b, "condition", "self", "other")


@element_rule(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def masked_fill(call: ElementCall) -> ElementValue | None:
    """Another number where the mask holds."""
    return call.pointwise(lambda a, c, b: b if c == 1 else a, "self", "mask", "value")


@element_rule(aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten._to_copy.default)
def cast(call: ElementCall) -> ElementValue | None:
    """The same number in another type, where it is certain that the type holds it."""
    before: torch.dtype = call["self"].meta["val"].dtype
    if before == call.dtype:
        return call.value()
    if call.dtype is torch.bool:
        return call.pointwise(lambda a: negated(_equal(a)) if a.is_integer else None, "self")
    value = call.value()
    if not isinstance(value, Piecewise) or (before.is_floating_point and not call.dtype.is_floating_point):
        return None
    small = all(n.is_number and n.is_integer and abs(n) < 128 for _, n in value.cases)
    return value if small or not (call.dtype.is_floating_point or before.is_floating_point) else None
