"""Operators along an axis: sums are contractions, everything else mixes the positions it runs over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from ecospa_fx.axes.call import UNIT, Call, Value
from ecospa_fx.axes.dims import DimKind
from ecospa_fx.axes.findings import Action, Order, Sorting
from ecospa_fx.axes.products import note_sum
from ecospa_fx.axes.registry import axis_rule

_LAST_BY_DEFAULT = {"aten.mode", "aten.kthvalue"}


class _Dims(Protocol):
    """A call: of an axis rule or of a resize rule."""

    operator: str
    arguments: dict[str, Any]


def reduced_axes(call: _Dims, value: Value) -> tuple[int, ...]:
    """Axis numbers of the `dim` argument; all of them where it is absent or empty."""
    rank, dim = len(value.axes), call.arguments.get("dim")
    if dim is None and call.operator in _LAST_BY_DEFAULT:
        dim = -1
    if dim is None or dim == []:
        return tuple(range(rank))
    dims = dim if isinstance(dim, list | tuple) else [dim]
    return tuple(int(d) % rank for d in dims) if rank else ()


def reduced(call: Call, value: Value, over: Sequence[int], zero: bool = True) -> Value:
    """The value with some axes summed away."""
    keep = bool(call.get("keepdim", False))
    left = [i for i in range(len(value.axes)) if keep or i not in over]
    axes = [UNIT if i in over else value.axes[i] for i in left]
    return call.value(axes, [zero and i not in over and value.zero[i] for i in left])


@axis_rule("aten.sum", "aten.nansum", linear=("aten.sum",))
def total(call: Call) -> Value:
    """A contraction with ones: removed elements must be 0."""
    value = call["self"]
    over = reduced_axes(call, value)
    note_sum(call, value, over)
    return reduced(call, value, over)


def _reduces(call: Call, zero: bool) -> Value:
    value = call.values[0]
    over = reduced_axes(call, value)
    for i in over:
        call.mixes(value, i, f"{call.operator} is taken over it: without an element the result is another")
    return reduced(call, value, over, zero)


@axis_rule("aten.amax", "aten.amin", "aten.argmax", "aten.argmin", "aten.prod", "aten.logsumexp", "aten.any",
           "aten.all", "aten.nanmean", "aten.count_nonzero")  # fmt: skip
def statistic(call: Call) -> Value:
    """A statistic of all positions: without an element it is another."""
    return _reduces(call, call.operator in {"aten.amax", "aten.amin"})


@axis_rule("aten.max", "aten.min", "aten.aminmax", "aten.mode", "aten.kthvalue", "aten.median")
def statistics(call: Call) -> Value | list[Value]:
    """Statistics with several outputs, or the larger of two tensors."""
    if isinstance(call.get("other"), Value):
        return call.pointwise(call.values, "all")
    result = _reduces(call, False)
    return [result] * len(call.outputs) if len(call.outputs) > 1 else result


@axis_rule("aten.softmax", "aten._softmax", "aten.log_softmax", "aten._log_softmax", "aten._safe_softmax",
           "aten.cumsum", "aten.cumprod", "aten.logcumsumexp", "aten.cummax", "aten.cummin",
           "aten.special_softmax", linear=("aten.cumsum",))  # fmt: skip
def along(call: Call) -> Value | list[Value]:
    """The same shape, each position depending on the others along one axis."""
    value = call.values[0]
    keeps_zero = call.operator in {"aten.cumsum", "aten.cumprod"}
    over = reduced_axes(call, value)
    for i in over:
        call.mixes(value, i, f"{call.operator} runs along it: without an element the others change")
    axes = [call.dims.fresh(a.size, DimKind.STORED) if i in over else a for i, a in enumerate(value.axes)]
    result = call.value(axes, [keeps_zero and z and i not in over for i, z in enumerate(value.zero)])
    if call.operator == "aten.cumsum" and value.sorting is not None and value.sorting.order is Order.COUNTS:
        result = replace(result, sorting=Sorting(Order.ENDS, value.sorting.node))
    return [result] * len(call.outputs) if len(call.outputs) > 1 else result


@axis_rule("aten.renorm")
def renorm(call: Call) -> Value:
    """Each slice along one axis is scaled by its own norm, which removed elements must not count in."""
    value = call["self"]
    axis = call["dim"] % len(value.axes)
    call.note(value.axes, Action.NONLINEAR)
    for i in (j for j in range(len(value.axes)) if j != axis and not value.zero[j]):
        call.mixes(value, i, "aten.renorm takes norms over it although removed elements are not zero there")
    return call.passes(value)


@axis_rule("aten.sort", "aten.topk", "aten.argsort", "aten.msort")
def orders(call: Call) -> Value | list[Value]:
    """Positions along one axis are put in order: that axis is new."""
    value = call.values[0]
    axis = call.get("dim", 0 if call.operator == "aten.msort" else -1) % max(len(value.axes), 1)
    outputs = []
    for fresh in (call.fresh(i) for i in range(len(call.outputs))):
        outputs.append(call.value([fresh[i] if i == axis else a for i, a in enumerate(value.axes)]))
    if value.axes:
        call.mixes(value, axis, f"{call.operator} orders its elements")
    if call.operator == "aten.sort" and len(value.axes) == 1 and not call.get("descending", False):
        outputs[0] = replace(outputs[0], sorting=Sorting(Order.SORTED, call.node))
    return outputs if len(outputs) > 1 else outputs[0]
