"""Symbolic elements of tensors: operators along an axis (tril, triu, cumsum, diff)."""

from __future__ import annotations

import sympy
import torch

from ecospa_fx.indexing.call import ElementCall, ElementRule, element_rule, same, shape_of
from ecospa_fx.indexing.values import (
    ElementValue,
    Piecewise,
    as_number,
    at_least_zero,
    combined,
    merged,
    negated,
    position,
)

aten = torch.ops.aten


def _triangle(lower: bool) -> ElementRule:
    def rule(call: ElementCall) -> ElementValue | None:
        rank, value = call.rank(), call.value()
        if not isinstance(value, Piecewise) or rank < 2:
            return None
        gap = position(rank - 2) - position(rank - 1) + as_number(call["diagonal"])
        kept = at_least_zero(gap if lower else -gap)
        outside = [(negated(kept), sympy.Integer(0))]
        return merged([*((sympy.And(c, kept), n) for c, n in value.cases), *outside])

    return rule


element_rule(aten.tril.default)(_triangle(lower=True))
element_rule(aten.triu.default)(_triangle(lower=False))


@element_rule(aten.cumsum.default)
def cumsum(call: ElementCall) -> ElementValue | None:
    """Sums of what does not change along the axis."""
    axis, value = call.axis("dim", call.rank()), call.value()
    if not isinstance(value, Piecewise) or call.dtype.is_floating_point:
        return None
    if any(c.has(position(axis)) or n.has(position(axis)) for c, n in value.cases):
        return None
    return combined(lambda n: sympy.expand(n * (position(axis) + 1)), value)


@element_rule(aten.diff.default)
def diff(call: ElementCall) -> ElementValue | None:
    """First differences, the first of them perhaps to what is put in front."""
    axis, value, front = call.axis("dim", call.rank()), call.value(), call["prepend"]
    if not isinstance(value, Piecewise) or call["n"] != 1 or call["append"] is not None:
        return None
    here = position(axis)
    if front is None:
        return combined(lambda a, b: sympy.expand(a - b), value.at({here: here + 1}), value)
    first = call.value("prepend")
    if not isinstance(first, Piecewise) or not same(shape_of(front)[axis], 1):
        return None
    start, later = first.at({here: sympy.Integer(0)}), at_least_zero(here - 1)
    step = combined(lambda a, b: sympy.expand(a - b), value, value.at({here: here - 1}))
    begin = combined(lambda a, b: sympy.expand(a - b), value.at({here: sympy.Integer(0)}), start)
    if step is None or begin is None:
        return None
    both_parts = [(sympy.And(c, later), n) for c, n in step.cases]
    return merged([*both_parts, *((sympy.And(c, negated(later)), n) for c, n in begin.cases)])
