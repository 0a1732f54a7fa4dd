"""Operators along an axis: sums are contractions, everything else mixes the positions it runs over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ecospa_fx.axes.call import UNIT, Call, Value
from ecospa_fx.axes.dims import DimKind
from ecospa_fx.axes.findings import Action, Order, Sorting
from ecospa_fx.axes.products import note_sum
from ecospa_fx.axes.reasons import EVAL
from ecospa_fx.axes.registry import axis_rule
from ecospa_fx.axes.resize import Resize, resize_rule

_LAST_BY_DEFAULT = {"aten.mode", "aten.kthvalue"}


def _over(call: Call, value: Value) -> tuple[int, ...]:
    """Axis numbers of the `dim` argument; all of them where it is absent or empty."""
    rank, dim = len(value.axes), call.get("dim", -1 if call.operator in _LAST_BY_DEFAULT else None)
    if dim is None or dim == []:
        return tuple(range(rank))
    dims = dim if isinstance(dim, list | tuple) else [dim]
    return tuple(int(d) % rank for d in dims) if rank else ()


def _without(call: Call, value: Value, over: Sequence[int], keep: bool, zero: bool = True) -> Value:
    """The value with some axes summed away."""
    left = [i for i in range(len(value.axes)) if keep or i not in over]
    axes = [UNIT if i in over else value.axes[i] for i in left]
    return call.value(axes, [zero and i not in over and value.zero[i] for i in left])


@axis_rule("aten.sum", "aten.nansum", linear=("aten.sum",))
def total(call: Call) -> Value:
    """A contraction with ones: removed elements must be 0."""
    value = call["self"]
    over = _over(call, value)
    note_sum(call, value, over)
    return _without(call, value, over, bool(call.get("keepdim", False)))


_NORMS = {"aten.mean", "aten.std", "aten.var", "aten.linalg_vector_norm", "aten.norm", "aten.var_mean", "aten.std_mean",
          "aten.linalg_norm", "aten.frobenius_norm", "aten.nanmean"}  # fmt: skip


def _reduces(call: Call, message: str, zero: bool) -> Value:
    value = call.values[0]
    over = _over(call, value)
    for i in over:
        if call.operator in _NORMS:
            call.normalises(value, i, message)
        else:
            call.mixes(value, i, message)
    return _without(call, value, over, bool(call.get("keepdim", False)), zero)


@axis_rule("aten.mean", "aten.std", "aten.var", "aten.linalg_vector_norm", "aten.norm", "aten.amax", "aten.amin",
           "aten.argmax", "aten.argmin", "aten.prod", "aten.logsumexp", "aten.any", "aten.all", "aten.nanmean",
           "aten.linalg_norm", "aten.frobenius_norm", "aten.count_nonzero", linear=("aten.mean",))  # fmt: skip
def statistic(call: Call) -> Value:
    """A statistic of all positions: without an element it is another."""
    zero = call.operator in {"aten.mean", "aten.linalg_vector_norm", "aten.norm", "aten.amax", "aten.amin", "aten.std"}
    return _reduces(call, f"{call.operator} is taken over it: without an element the result is another", zero)


@axis_rule("aten.max", "aten.min", "aten.var_mean", "aten.std_mean", "aten.aminmax", "aten.mode", "aten.kthvalue",
           "aten.median")  # fmt: skip
def statistics(call: Call) -> Value | list[Value]:
    """Statistics with several outputs, or the larger of two tensors."""
    if isinstance(call.get("other"), Value):
        return call.pointwise(call.values, "all")
    result = _reduces(call, f"{call.operator} is taken over it: without an element the result is another", False)
    return [result] * len(call.outputs) if len(call.outputs) > 1 else result


@axis_rule("aten.softmax", "aten._softmax", "aten.log_softmax", "aten._log_softmax", "aten._safe_softmax",
           "aten.cumsum", "aten.cumprod", "aten.logcumsumexp", "aten.cummax", "aten.cummin",
           "aten.special_softmax", linear=("aten.cumsum",))  # fmt: skip
def along(call: Call) -> Value | list[Value]:
    """The same shape, each position depending on the others along one axis."""
    value = call.values[0]
    keeps_zero = call.operator in {"aten.cumsum", "aten.cumprod"}
    for i in _over(call, value):
        call.mixes(value, i, f"{call.operator} runs along it: without an element the others change")
    axes = [call.dims.fresh(a.size, DimKind.STORED) if i in _over(call, value) else a for i, a in enumerate(value.axes)]
    result = call.value(axes, [keeps_zero and z and i not in _over(call, value) for i, z in enumerate(value.zero)])
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


@axis_rule("aten.layer_norm", "aten.rms_norm", "aten.native_layer_norm", "aten._fused_rms_norm")
def layer_norm(call: Call) -> Value | list[Value]:
    """Normalises over the last axes; its weights are along them."""
    value = call["input"]
    count = len(call["normalized_shape"])
    first, allowed = len(value.axes) - count, False
    learnt = [call[name] for name in ("weight", "bias") if isinstance(call.get(name), Value)]
    both = _with_operands(call, value, learnt, first, count)
    for i in range(first, len(value.axes)):
        message = f"{call.operator} normalises over it: without an element the others change"
        allowed = call.normalises(both, i, message)
    result = call.value(both.axes, [allowed and i >= first for i in range(len(value.axes))])
    rest = [call.value([*value.axes[:first], *[UNIT] * count]) for _ in call.outputs[1:]]
    return [result, *rest] if rest else result


def _with_operands(call: Call, value: Value, operands: Sequence[Value], first: int, count: int) -> Value:
    """The value with `count` axes, from `first`, that are those of some operands too."""
    axes = list(value.axes)
    for i in range(count):
        axes[first + i] = call.align([(value, first + i), *((v, i) for v in operands)])
    call.gathered([value], axes)
    for operand in operands:
        call.gathered([operand], axes[first : first + count])
    return replace(value, axes=tuple(axes))


@resize_rule("aten.layer_norm", "aten.rms_norm", "aten.native_layer_norm", "aten._fused_rms_norm")
def resize_layer_norm(resize: Resize) -> None:
    """The sizes that it runs over are those that are kept, where that was allowed."""
    sizes = list(resize.argument("normalized_shape"))
    first = len(resize.output.axes) - len(sizes)
    resize.set("normalized_shape", [resize.scaled(n, resize.output.axes[first + i]) for i, n in enumerate(sizes)])


@axis_rule("aten.batch_norm", "aten._native_batch_norm_legit_no_training", "aten.native_batch_norm",
           "aten.instance_norm", "aten.cudnn_batch_norm", "aten._native_batch_norm_legit_functional",
           "aten._native_batch_norm_legit", "aten._batch_norm_with_update", "aten._batch_norm_no_update")  # fmt: skip
def batch_norm(call: Call) -> Value | list[Value]:
    """Each channel for itself, by stored or batch statistics; a masked weight and bias make removed channels 0."""
    value = call["input"]
    operands = [call[n] for n in ("weight", "bias", "running_mean", "running_var") if isinstance(call.get(n), Value)]
    channel = call.align([(value, 1), *((v, 0) for v in operands)])
    for operand in operands:
        call.gathered([operand], [channel])
    call.gathered([value], [value.axes[0], channel, *value.axes[2:]])
    # Instance norm names the same switch differently, and one variant of batch norm has none: it always updates.
    moves = call.get("training", call.get("use_input_stats", call.operator == "aten._batch_norm_with_update"))
    if moves and isinstance(call.get("running_mean"), Value):
        call.block(channel, f"{call.operator} would update its running statistics in a copy", EVAL)
    learnt = [v for v in operands if v.weights]
    zero = len(learnt) == 2 and all(v.zero[0] for v in learnt)
    call.note(channel, Action.NONLINEAR)
    result = call.value([value.axes[0], channel, *value.axes[2:]], [False, zero, *[False] * len(value.axes[2:])])
    for i in (j for j in range(len(value.axes)) if j != 1):
        call.block(value.axes[i], f"{call.operator} uses statistics over it")
    alike = (channel.size,)
    rest = [call.value([channel]) if call.outputs[i] == alike else call.stored(i) for i in range(1, len(call.outputs))]
    return [result, *rest] if rest else result


@axis_rule("aten.group_norm", "aten.native_group_norm")
def group_norm(call: Call) -> Value | list[Value]:
    """Normalises over blocks of channels and all positions; weights per channel."""
    value = call["input"]
    learnt = [call[name] for name in ("weight", "bias") if isinstance(call.get(name), Value)]
    value = _with_operands(call, value, learnt, 1, 1)
    for i in range(1, len(value.axes)):
        call.mixes(value, i, f"{call.operator} normalises over it: without an element the others change")
    result = call.value(value.axes)
    rest = [call.value([value.axes[0], *call.fresh(i)[1:]]) for i in range(1, len(call.outputs))]
    return [result, *rest] if rest else result


@resize_rule("aten.native_group_norm")
def resize_group_norm(resize: Resize) -> None:
    """The size of the batch is an argument; channels and places are never cut."""
    if resize.changed(0, 0):
        resize.set("N", resize.size(resize.inputs[0], 0))
