"""Symbolic elements of tensors: operators that move elements (views, expand, slices, indices)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import TypeAlias

import sympy
import torch

from ecospa_fx.indexing.call import ElementCall, element_rule, same, shape_of
from ecospa_fx.indexing.values import ElementValue, Number, Piecewise, as_number, lowest, position

aten = torch.ops.aten
_Sized: TypeAlias = tuple[int, Number]
"""An axis and its size."""


@element_rule(aten.alias.default, aten.clone.default, aten.contiguous.default, aten.lift_fresh_copy.default)
def unchanged(call: ElementCall) -> ElementValue | None:
    """The same elements."""
    return call.value()


@element_rule(aten.detach.default)
def detached(call: ElementCall) -> ElementValue | None:
    """Constants stay constants; anything else loses its gradient, and so is something else."""
    value = call.value()
    return value if isinstance(value, Piecewise) else None


@element_rule(aten.unsqueeze.default)
def unsqueeze(call: ElementCall) -> ElementValue | None:
    """A new axis before the given one."""
    new = call.axis("dim", call.rank() + 1)
    return call.moved([position(axis + (axis >= new)) for axis in range(call.rank())])


@element_rule(aten.transpose.int)
def transpose(call: ElementCall) -> ElementValue | None:
    """Two axes exchanged."""
    a, b = (call.axis(name, call.rank()) for name in ("dim0", "dim1"))
    return call.moved([position({a: b, b: a}.get(axis, axis)) for axis in range(call.rank())])


@element_rule(aten.permute.default)
def permute(call: ElementCall) -> ElementValue | None:
    """Axes in another order."""
    order = [int(d) % call.rank() for d in call["dims"]]
    return call.moved([position(order.index(axis)) for axis in range(call.rank())])


@element_rule(aten.expand.default, aten.expand_as.default)
def expand(call: ElementCall) -> ElementValue | None:
    """Axes of size 1 repeated, new ones in front."""
    inside, offset = shape_of(call["self"]), len(call.shape) - call.rank()
    kept = [same(size, call.shape[axis + offset]) for axis, size in enumerate(inside)]
    return call.moved([position(axis + offset) if keep else 0 for axis, keep in enumerate(kept)])


@element_rule(aten.slice.Tensor)
def part(call: ElementCall) -> ElementValue | None:
    """From a start counted from the left, with a step."""
    axis, start, step = (
        call.axis("dim", call.rank()),
        as_number(0 if call["start"] is None else call["start"]),
        call["step"],
    )
    if start.is_nonnegative is not True:
        return None
    return call.moved([position(a) * step + start if a == axis else position(a) for a in range(call.rank())])


@element_rule(aten.select.int)
def select(call: ElementCall) -> ElementValue | None:
    """One position of an axis, counted from the left."""
    axis, index = call.axis("dim", call.rank()), as_number(call["index"])
    if index.is_nonnegative is not True:
        return None
    return call.moved([index if a == axis else position(a - (a > axis)) for a in range(call.rank())])


@element_rule(
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.unflatten.int,
    aten.squeeze.dim, aten.squeeze.default, aten.squeeze.dims,
)  # fmt: skip
def reshape(call: ElementCall) -> ElementValue | None:
    """Row-major order kept."""
    places = regrouped(shape_of(call["self"]), call.shape)
    return None if places is None else call.moved(places)


@element_rule(aten.repeat_interleave.self_int)
def repeat_interleave(call: ElementCall) -> ElementValue | None:
    """Every position several times in a row."""
    if call["dim"] is None:
        return None
    axis, times = call.axis("dim", call.rank()), as_number(call["repeats"])
    return call.moved([sympy.floor(position(a) / times) if a == axis else position(a) for a in range(call.rank())])


def regrouped(inside: Sequence[object], outside: Sequence[object]) -> list[Number] | None:
    """The position along each axis before a reshape, from those after it; None where sizes do not tell."""
    places: list[Number] = [0] * len(inside)
    before = [(axis, as_number(s)) for axis, s in enumerate(inside) if not same(s, 1)]
    after = [(axis, as_number(s)) for axis, s in enumerate(outside) if not same(s, 1)]
    while before or after:
        group = _group(before, after)
        if group is None:
            return None
        rows, columns = group
        before, after = before[len(rows) :], after[len(columns) :]
        flat = reduce(lambda total, column: total * column[1] + position(column[0]), columns, sympy.Integer(0))
        for axis, size in reversed(rows[1:]):
            places[axis] = sympy.Mod(flat, size)
            flat = sympy.floor(flat / size)
        places[rows[0][0]] = flat
    return places


def _group(before: list[_Sized], after: list[_Sized]) -> tuple[list[_Sized], list[_Sized]] | None:
    """The shortest runs at the beginning of both whose sizes have the same product."""
    rows, columns = 1, 1
    while rows <= len(before) and columns <= len(after):
        ratio = sympy.prod(s for _, s in after[:columns]) / sympy.prod(s for _, s in before[:rows])
        if ratio == 1:
            return before[:rows], after[:columns]
        if ratio.is_integer:
            rows += 1
        elif (1 / ratio).is_integer:
            columns += 1
        else:
            return None
    return None


@element_rule(aten.index.Tensor)
def index(call: ElementCall) -> ElementValue | None:
    """Positions that are computed, where none of them counts from the right."""
    indexed = [(axis, n) for axis, n in enumerate(call["indices"]) if n is not None]
    if any(n.meta["val"].dtype is torch.bool for _, n in indexed):
        return None
    ranks = [len(shape_of(n)) for _, n in indexed]
    adjacent = [a for a, _ in indexed] == list(range(indexed[0][0], indexed[0][0] + len(indexed)))
    first, wide = (indexed[0][0] if adjacent else 0), max(ranks)
    places: dict[int, Number] = {}
    for (axis, node), rank in zip(indexed, ranks, strict=True):
        value = call.computed[node]
        number = value.single if isinstance(value, Piecewise) else None
        if number is None or not lowest(number, shape_of(node)):
            return None
        ones_in = {position(a): sympy.Integer(0) for a, s in enumerate(shape_of(node)) if same(s, 1)}
        shift = {position(a): position(a + first + wide - rank) for a in range(rank)}
        places[axis] = number.xreplace({**shift, **ones_in})
    rest = iter([a for a in range(len(call.shape)) if not first <= a < first + wide])
    return call.moved([places[a] if a in places else position(next(rest)) for a in range(call.rank())])
