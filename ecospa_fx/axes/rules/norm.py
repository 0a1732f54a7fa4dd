"""Norms and the statistics that they are made of: exact where what is removed is 0 and the number of positions stays.

A masked unit adds nothing to a sum or to a sum of squares, so of N positions the K kept ones tell every sum. What must
stay is N: with p = K / N, and with m and v the mean and the variance over what is kept,

    mean over N      = p · m
    variance over N  = p · v + p · (1 - p) · m²        (the law of total variance: no difference of large numbers)
    RMSNorm over N   = RMSNorm over K with the epsilon ε / p and the weight w / √p

Euclidean norms do not change at all, and groups of a GroupNorm do not meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from math import prod, sqrt
from typing import Any

import torch

from ecospa_fx.axes.call import UNIT, Call, Value
from ecospa_fx.axes.dims import DimKind, Misaligned
from ecospa_fx.axes.findings import Action
from ecospa_fx.axes.products import note_sum
from ecospa_fx.axes.reasons import EVAL, WHOLE
from ecospa_fx.axes.registry import axis_rule
from ecospa_fx.axes.resize import Resize, Term, resize_rule
from ecospa_fx.axes.rules.reduce import reduced, reduced_axes
from ecospa_fx.axes.zeros import alive_anywhere, flagged

# -- statistics --------------------------------------------------------------------------------------------------


@axis_rule("aten.mean", linear=True)
def mean(call: Call) -> Value:
    """A sum divided by the number of positions, which stays that of all."""
    value = call["self"]
    over = reduced_axes(call, value)
    note_sum(call, value, over, divided=True)
    return reduced(call, value, over)


@axis_rule("aten.var", "aten.std", "aten.var_mean", "aten.std_mean")
def deviations(call: Call) -> Value | list[Value]:
    """Variances divide by the number of positions less a correction; both stay those of all."""
    value = call["self"]
    over = reduced_axes(call, value)
    for i in over:
        call.note(value.axes[i], Action.CONTRACTS_ONES)
        call.averages(value, i, call.operator)
    enough = prod(value.axes[i].size for i in over) > _correction(call)
    if not enough:
        for i in over:
            call.mixes(value, i, f"{call.operator} is taken of fewer numbers than it corrects for")
    result = reduced(call, value, over, zero=enough)
    call.fixes((value.axes[i] for i in over), nonlinear=True)
    return [result] * len(call.outputs) if len(call.outputs) > 1 else result


def _correction(arguments: Any) -> float:
    """What a variance takes off the number of positions; 1 by default."""
    correction = arguments.get("correction")
    if correction is None:
        correction = int(arguments.get("unbiased") is not False)
    return float(correction)


@resize_rule("aten.mean")
def resize_mean(resize: Resize) -> None:
    """The mean over what is kept, times its share of all."""
    share = _share(resize)
    if share != 1:
        resize.replace_results([_scaled(_call(resize), float(share))])


@resize_rule("aten.var", "aten.std", "aten.var_mean", "aten.std_mean")
def resize_deviations(resize: Resize) -> None:
    """Mean and variance over all from those over what is kept."""
    share = _share(resize)
    if share == 1:
        return
    over, type_ = _over(resize), resize.dtype("self")
    average, variance = _moments(resize.raw("self"), type_, over, share, keep=bool(resize.raw("keepdim")))
    variance = _corrected(variance, resize.positions("self", over), _correction(resize.arguments))
    if resize.node_is("aten.std", "aten.std_mean"):
        variance = Term("aten.sqrt.default", (variance,))
    resize.replace_results([_cast(term, type_) for term in (variance, average)])


def _corrected(variance: Term, count: object, correction: float) -> Term:
    """Times N / (N - correction)."""
    if not correction:
        return variance
    if isinstance(count, int):
        return _scaled(variance, count / (count - correction))
    factor = Term("operator.truediv", (count, Term("operator.sub", (count, correction))))
    return Term("aten.mul.Tensor", (variance, factor))


def _over(resize: Resize) -> tuple[int, ...]:
    """Axis numbers that a statistic is taken over."""
    return reduced_axes(resize, resize.inputs[0])


def _share(resize: Resize) -> Fraction:
    """The share that is kept of what a statistic is taken over; all of it where it runs over what is kept."""
    value = resize.inputs[0]
    return Fraction(1) if resize.renormalises else resize.kept_share(value.axes[i] for i in _over(resize))


# -- terms -------------------------------------------------------------------------------------------------------


def _call(resize: Resize) -> Term:
    """The call as it is, with what has been edited."""
    target = resize.node.target
    assert isinstance(target, torch._ops.OpOverload)
    return Term(str(target), (), {**resize.arguments, **resize.edits})


def _scaled(term: object, factor: float) -> Term:
    return term if factor == 1 and isinstance(term, Term) else Term("aten.mul.Tensor", (term, factor))


def _plus(first: object, second: object) -> Term:
    return Term("aten.add.Tensor", (first, second))


def _precision(type_: torch.dtype) -> torch.dtype:
    """The type in which statistics are computed."""
    return torch.promote_types(type_, torch.float32)


def _cast(term: object, type_: torch.dtype) -> Term:
    """A result in the type of the input; statistics of shorter types are computed in float32."""
    cast = type_ != _precision(type_)
    return Term("aten.to.dtype", (term, type_)) if cast or not isinstance(term, Term) else term


def _moments(
    source: object, type_: torch.dtype, over: Sequence[int], share: Fraction, *, keep: bool = True
) -> tuple[Term, Term]:
    """Mean and variance over all positions, of which a share is kept and the others are 0."""
    precise = Term("aten.to.dtype", (source, _precision(type_)))  # autocast would choose another type
    kept = Term("aten.var_mean.correction", (precise, list(over)), {"correction": 0, "keepdim": keep})
    average = kept.output(1)
    between = Term("aten.mul.Tensor", (Term("aten.square.default", (average,)), float(share * (1 - share))))
    return _scaled(average, float(share)), _plus(_scaled(kept.output(0), float(share)), between)


# -- Euclidean norms ---------------------------------------------------------------------------------------------


@axis_rule("aten.linalg_vector_norm", "aten.norm", "aten.linalg_norm", "aten.frobenius_norm")
def lengths(call: Call) -> Value:
    """Zeros change no norm of an order above 0, nor the number of what is not 0."""
    value = call.values[0]
    over = reduced_axes(call, value)
    order = call.get("ord", call.get("p", 2))
    for i in over:
        call.note(value.axes[i], Action.CONTRACTS_ONES)
        if not isinstance(order, str) and order < 0:
            call.mixes(value, i, f"{call.operator} of order {order} is taken over it, which removed elements decide")
        elif not value.zero[i]:
            call.averages(value, i, call.operator)
    call.fixes((value.axes[i] for i in over), nonlinear=True)
    return reduced(call, value, over)


@axis_rule("aten.cosine_similarity")
def cosine(call: Call) -> Value:
    """A sum of products, divided by two Euclidean norms: on both sides removed elements must be 0."""
    operands = [call["x1"], call["x2"]]
    rank = max(len(v.axes) for v in operands)
    axis = int(call.get("dim", 1)) % rank
    lacking = [rank - len(v.axes) for v in operands]
    shape = list(call.outputs[0])
    shape.insert(axis, max(v.axes[axis - n].size for v, n in zip(operands, lacking, strict=True) if axis >= n))
    joint = call.pointwise(operands, "any", shape)
    both = all(axis >= n and v.zero[axis - n] for v, n in zip(operands, lacking, strict=True))
    note_sum(call, replace(joint, zero=(both,) * rank), [axis])
    call.fixes([joint.axes[axis]], nonlinear=True)
    left = [i for i in range(rank) if i != axis]
    return call.value([joint.axes[i] for i in left], [joint.zero[i] for i in left])


# -- norms with weights ------------------------------------------------------------------------------------------


def _learnt(call: Call) -> list[Value]:
    return [call[name] for name in ("weight", "bias") if isinstance(call.get(name), Value)]


@axis_rule("aten.layer_norm", "aten.native_layer_norm", "aten.rms_norm", "aten._fused_rms_norm")
def layer_norm(call: Call) -> Value | list[Value]:
    """Normalises over the last axes; its weights are along them, and make 0 what they are 0 for."""
    value = call["input"]
    first, last = len(value.axes) - len(call["normalized_shape"]), len(value.axes)
    both = _with_operands(call, value, _learnt(call), first, last - first)
    for i in range(first, last):
        call.note(both.axes[i], Action.CONTRACTS_ONES)
        call.averages(both, i, call.operator)
    flags = [i >= first and _stays_zero(call, both.zero[i], i - first) for i in range(last)]
    result = call.value(both.axes, flags)
    rest = [call.value([*value.axes[:first], *[UNIT] * (last - first)]) for _ in call.outputs[1:]]
    return [result, *rest] if rest else result


def _stays_zero(call: Call, zero: bool, axis: int) -> bool:
    """Whether removed positions of a normalised axis are 0: the mean is added to them, then they are scaled."""
    weight, bias = call.get("weight"), call.get("bias")
    centred = call.operator in {"aten.layer_norm", "aten.native_layer_norm"}
    scaled = isinstance(weight, Value) and weight.zero[axis]
    shifted = isinstance(bias, Value) and not bias.zero[axis]
    return (scaled or (zero and not centred)) and not shifted


def _with_operands(call: Call, value: Value, operands: Sequence[Value], first: int, count: int) -> Value:
    """The value with `count` axes, from `first`, that are those of some operands too."""
    axes = list(value.axes)
    for i in range(count):
        axes[first + i] = call.align([(value, first + i), *((v, i) for v in operands)])
    call.gathered([value], axes)
    for operand in operands:
        call.gathered([operand], axes[first : first + count])
    pairs = list(zip(value.axes, axes, strict=True))
    alive = {*alive_anywhere(call.dims, value), *(d for pair in pairs for d in call.lacking(*pair))}
    flags = [z and call.follows(*pair) for z, pair in zip(value.zero, pairs, strict=True)]
    return replace(value, axes=tuple(axes), zero=flagged(call.dims, axes, flags, alive))


def _normalised_sizes(resize: Resize) -> tuple[list[object], list[int], Fraction]:
    """The sizes that are kept of what a norm runs over, its axes, and the share that is kept."""
    sizes = list(resize.argument("normalized_shape"))
    first = len(resize.output.axes) - len(sizes)
    axes = list(resize.output.axes[first:])
    share = Fraction(1) if resize.renormalises else resize.kept_share(axes)
    over = list(range(first, first + len(sizes)))
    return [resize.scaled(n, axis) for n, axis in zip(sizes, axes, strict=True)], over, share


@resize_rule("aten.rms_norm", "aten._fused_rms_norm")
def resize_rms_norm(resize: Resize) -> None:
    """Σ x² / N + ε is K / N times Σ x² / K + ε · N / K: another epsilon, and a factor on the weight."""
    sizes, _, share = _normalised_sizes(resize)
    resize.set("normalized_shape", sizes)
    if share == 1:
        return
    default = torch.finfo(_precision(resize.dtype("input"))).eps
    resize.set("eps", float(resize.argument("eps") if resize.has("eps") else default) / float(share))
    factor = 1 / sqrt(share)
    weighted = resize.has("weight")
    if weighted:
        resize.set("weight", Term("aten.mul.Tensor", (resize.raw("weight"), factor)))
    norm = _call(resize)
    if len(resize.outputs) == 1:
        resize.replace_results([norm if weighted else _scaled(norm, factor)])
    else:
        result = norm.output(0)
        resize.replace_results([result if weighted else _scaled(result, factor), _scaled(norm.output(1), factor)])


@resize_rule("aten.layer_norm", "aten.native_layer_norm")
def resize_layer_norm(resize: Resize) -> None:
    """(x - μ) / √(σ² + ε), with mean and variance over all positions from those over what is kept."""
    sizes, over, share = _normalised_sizes(resize)
    if share == 1:
        resize.set("normalized_shape", sizes)
        return
    type_, source = resize.dtype("input"), resize.raw("input")
    average, variance = _moments(source, type_, over, share)
    epsilon = resize.argument("eps") if resize.has("eps") else 1e-5
    rate = Term("aten.rsqrt.default", (Term("aten.add.Tensor", (variance, epsilon)),))
    precise = Term("aten.to.dtype", (source, _precision(type_)))
    result = Term("aten.mul.Tensor", (Term("aten.sub.Tensor", (precise, average)), rate))
    if resize.has("weight"):
        result = Term("aten.mul.Tensor", (result, resize.raw("weight")))
    if resize.has("bias"):
        result = _plus(result, resize.raw("bias"))
    resize.replace_results([_cast(result, type_), average, rate][: len(resize.outputs)])


# -- norms of channels -------------------------------------------------------------------------------------------


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
    """Normalises over the channels of each group and all positions; groups do not meet, weights are per channel."""
    value, count = call["input"], call.get("num_groups", call.get("group"))
    both = _with_operands(call, value, _learnt(call), 1, 1)
    mixed = f"{call.operator} normalises over it: without an element the others change"
    try:
        groups, inside = call.dims.split(both.axes[1], (count, value.axes[1].size // count))
    except Misaligned as reason:
        call.block(both.axes[1], f"its groups are cut across ({reason})", WHOLE)
        groups, inside = (call.dims.fresh(n, DimKind.STORED) for n in (count, value.axes[1].size // count))
    apart = replace(both, axes=(both.axes[0], groups, inside, *both.axes[2:]))
    for i in range(2, len(apart.axes)):
        call.mixes(apart, i, mixed)
    call.record.tensors[apart.axes] = None
    channel = call.dims.merge([groups, inside])
    flag = _stays_zero(call, both.zero[1], 0)
    result = call.value([both.axes[0], channel, *both.axes[2:]], [False, flag, *[False] * (len(both.axes) - 2)])
    rest = [call.value([both.axes[0], groups]) for _ in call.outputs[1:]]
    return [result, *rest] if rest else result


@resize_rule("aten.group_norm")
def resize_group_norm(resize: Resize) -> None:
    """As many groups as are left."""
    resize.set("num_groups", _groups(resize, "num_groups"))


def _groups(resize: Resize, name: str) -> int:
    return int(resize.argument(name) * resize.kept_share([resize.output.axes[1]]))


@resize_rule("aten.native_group_norm")
def resize_native_group_norm(resize: Resize) -> None:
    """As many groups as are left; the sizes of the batch and of the channels are arguments, too."""
    batch, channels = resize.output.axes[:2]
    resize.set("group", _groups(resize, "group"))
    for name, axis in (("N", batch), ("C", channels)):
        resize.set(name, resize.scaled(resize.argument(name), axis))
