"""Fused attention: two contractions around a softmax."""

from __future__ import annotations

from dataclasses import replace
from math import sqrt

from ecospa_fx.axes.call import Call, Value
from ecospa_fx.axes.dims import DimKind, Misaligned
from ecospa_fx.axes.reasons import WHOLE
from ecospa_fx.axes.registry import axis_rule, refuse
from ecospa_fx.axes.resize import Resize, resize_rule
from ecospa_fx.axes.zeros import alive_anywhere, flagged


@axis_rule("aten.scaled_dot_product_attention", linear=True)
def attention(call: Call) -> Value:
    """softmax(query · keyᵀ · scale + mask) · value, heads and batch alike; grouped heads where asked for."""
    query, key, value = call["query"], call["key"], call["value"]
    if call.get("enable_gqa", False):
        key, value = (_spread(call, query, v) for v in (key, value))
    rank = max(len(v.axes) for v in (query, key, value))
    rows = [f"batch{i}" for i in range(rank - 2)]
    labels = [[*rows[rank - len(v.axes) :], *last] for v, last in ((query, "tk"), (key, "sk"), (value, "sv"))]
    scores = call.contraction([query, key], labels[:2], [*rows, "t", "s"])
    mask = call.get("attn_mask")
    shape = [query.axes[-2].size, key.axes[-2].size]
    call.block(scores.axes[-1], "attention weights are normalised over it")
    if call.get("is_causal", False):
        call.block(scores.axes[-2], "a causal mask chooses by its positions")
    if mask is not None:
        scores = call.pointwise([scores, mask], "lost", [*scores.shape[:-2], *shape])
    weights = replace(scores, zero=(False,) * rank, weights=())
    return call.contraction([weights, value], [[*rows, "t", "s"], labels[2]], [*rows, "t", "v"])


@axis_rule("flex_attention", linear=True)
def flexible_attention(call: Call) -> list[Value]:
    """Attention with functions of scores and positions inside, which may read all but the head dimensions."""
    query, key, value = (call[str(i)] for i in range(3))
    read = "a function inside the attention reads its positions"
    for axis in (a for v in call.values[3:] for a in v.axes):
        call.block(axis, read)
    key, value = (_spread(call, query, v) for v in (key, value))
    scores = call.contraction([query, key], ["bhtk", "bhsk"], "bhts")
    for axis in scores.axes:
        call.block(axis, read)
    weights = replace(scores, zero=(False,) * 4, weights=())
    mixed = call.contraction([weights, value], ["bhts", "bhsv"], "bhtv")
    return [mixed, *(call.value(scores.axes[:-1]) for _ in call.outputs[1:])]


def _spread(call: Call, query: Value, value: Value) -> Value:
    """Keys or values with their heads repeated to those of the query."""
    heads, groups = query.axes[-3], value.axes[-3]
    if heads.size == groups.size:
        return value
    try:
        outer, inner = call.dims.split(heads, (groups.size, heads.size // groups.size))
    except Misaligned as reason:
        call.block(heads, f"its heads are not grouped evenly ({reason})", WHOLE)
        outer, inner = call.dims.split(
            call.dims.fresh(heads.size, DimKind.STORED), (groups.size, heads.size // groups.size)
        )
    call.tie(outer, groups)
    axes = list(value.axes)
    axes[-3] = call.dims.merge([outer, inner])
    alive = [*alive_anywhere(call.dims, value), *call.dims.dims_of(inner)]
    zero = flagged(call.dims, axes, (*value.zero[:-3], False, *value.zero[-2:]), alive)
    return replace(value, axes=tuple(axes), zero=zero, node=None)


@resize_rule("aten.scaled_dot_product_attention")
def resize_attention(resize: Resize) -> None:
    """The default scale is 1 / sqrt(head dim): it stays what it was."""
    query = resize.inputs[0]
    if resize.raw("scale") is None and resize.changed(0, len(query.axes) - 1):
        resize.set("scale", 1 / sqrt(query.axes[-1].size))


refuse(
    "it fuses projections and attention into one kernel",
    "aten._native_multi_head_attention",
    "aten._transformer_encoder_layer_fwd",
    remedy="trace the model in training mode or with gradients enabled",
)
