"""Convolutions, pooling and resampling: channels are contracted or pass, places in space mix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from re import search

from ecospa_fx.axes.call import Call, Value
from ecospa_fx.axes.dims import DimKind, Misaligned
from ecospa_fx.axes.reasons import WHOLE
from ecospa_fx.axes.registry import axis_rule
from ecospa_fx.axes.resize import Resize, resize_rule

_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "convolution", "_convolution")
_TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")


@axis_rule(*(f"aten.{n}" for n in (*_CONVOLUTIONS, *_TRANSPOSED)), linear=True)
def convolution(call: Call) -> Value:
    """input [batch, in, …] against weight [out, in / groups, …] (transposed: [in, out / groups, …])."""
    value, weight, groups = call["input"], call["weight"], int(call.get("groups", 1))
    space = len(weight.axes) - 2
    turned = call.operator.removeprefix("aten.") in _TRANSPOSED or bool(call.get("transposed", False))
    batched = len(value.axes) == space + 2
    places, fresh = [], call.fresh()
    for i in range(space):
        axis, passes = len(value.axes) - space + i, _apart(call, weight, i)
        if not passes:
            call.mixes(value, axis, f"{call.operator} mixes neighbours along it")
        call.block(weight.axes[2 + i], f"it is the window of {call.operator}")
        call.record.windows += call.dims.dims_of(weight.axes[2 + i]) if weight.weights else ()
        places.append((value.axes[axis], value.zero[axis]) if passes else (fresh[i - space], False))
    product = _channels(call, value, weight, groups, turned)
    out, zero, bias = product.axes[0], product.zero[0], call.get("bias")
    if isinstance(bias, Value):
        biased = call.pointwise([product, bias], "all", product.shape)
        out, zero = biased.axes[0], biased.zero[0]
    batch = [(value.axes[0], value.zero[0])] if batched else []
    return call.value(
        [*(a for a, _ in batch), out, *(a for a, _ in places)],
        [*(z and bias is None for _, z in batch), zero, *(z and bias is None for _, z in places)],
    )


def _apart(call: Call, weight: Value, place: int) -> bool:
    """Whether positions along an axis of places do not meet: a window of one, in steps of one, without padding."""

    def setting(name: str, default: int) -> object:
        option: int | str | Sequence[int] = call.get(name, default)
        if isinstance(option, int | str) or not option:
            return option
        return option[place] if len(option) > 1 else option[0]

    window, step, edge = weight.axes[2 + place].size, setting("stride", 1), setting("padding", 0)
    return window == step == 1 and edge in (0, "valid", "same") and setting("output_padding", 0) == 0


def _channels(call: Call, value: Value, weight: Value, groups: int, turned: bool) -> Value:
    """Contract the input's channels group by group; the axis of channels that come out."""
    channel = len(value.axes) - len(weight.axes) + 1
    inside, sides = value.axes[channel], weight.axes[:2]
    rows = Value(sides, weight.zero[:2], weight.weights)
    if groups == 1:
        source = replace(value, axes=(inside,), zero=(value.zero[channel],), node=None)
        labels = ["in", "out"] if turned else ["out", "in"]
        return call.contraction([source, rows], [["in"], labels], ["out"])
    try:
        split = call.dims.split(inside, (groups, inside.size // groups))
        lead = call.dims.split(sides[0], (groups, sides[0].size // groups))
    except Misaligned as reason:
        for axis in (inside, *sides):
            call.block(axis, f"its groups cut across it ({reason})", WHOLE)
        return Value((call.dims.fresh(call.outputs[0][channel], DimKind.STORED),), (False,))
    source = replace(value, axes=tuple(split), zero=(value.zero[channel],) * 2, node=None)
    parts = replace(rows, axes=(*lead, sides[1]), zero=(weight.zero[0], weight.zero[0], weight.zero[1]))
    labels = ["group", "in", "out"] if turned else ["group", "out", "in"]
    result = call.contraction([source, parts], [["group", "in"], labels], ["group", "out"])
    return Value((call.dims.merge(result.axes),), (call.all_zero([(result, 0), (result, 1)]),), (), call.node)


@resize_rule(*(f"aten.{n}" for n in (*_CONVOLUTIONS, *_TRANSPOSED)))
def resize_convolution(resize: Resize) -> None:
    """The number of groups follows the channels that are left."""
    groups = resize.argument("groups") if resize.has("groups") else 1
    weight = resize.inputs[1]
    if groups == 1:
        return
    turned = resize.node_is(*(f"aten.{n}" for n in _TRANSPOSED)) or bool(resize.raw("transposed"))
    channels = (resize.output if turned else resize.inputs[0]).axes[-(len(weight.axes) - 1)]
    per_group = weight.axes[1]
    if resize.kept.changed(channels) or resize.kept.changed(per_group):
        resize.set("groups", resize.size_of(channels) // resize.size_of(per_group))


@axis_rule("aten.max_pool1d", "aten.max_pool2d", "aten.max_pool3d", "aten.avg_pool1d", "aten.avg_pool2d",
           "aten.avg_pool3d", "aten.adaptive_avg_pool1d", "aten.adaptive_avg_pool2d", "aten.adaptive_max_pool2d",
           "aten.adaptive_avg_pool3d", "aten.upsample_bilinear2d", "aten.upsample_nearest2d",
           "aten.upsample_bicubic2d", "aten.upsample_nearest1d", "aten.upsample_linear1d",
           "aten.upsample_trilinear3d", "aten.upsample_nearest3d", "aten._upsample_bilinear2d_aa",
           "aten._upsample_bicubic2d_aa", "aten._adaptive_avg_pool2d", "aten.max_pool2d_with_indices",
           "aten._upsample_nearest_exact2d",
           linear=[f"aten.{n}" for n in (
               "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
               "adaptive_avg_pool3d", "_adaptive_avg_pool2d", "upsample_bilinear2d", "upsample_nearest2d",
               "upsample_bicubic2d", "upsample_nearest1d", "upsample_linear1d", "upsample_trilinear3d",
               "upsample_nearest3d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
               "_upsample_nearest_exact2d")])  # fmt: skip
def resample(call: Call) -> Value | list[Value]:
    """Batch and channels pass; places mix."""
    (value,) = call.values
    rank = search(r"([123])d", call.operator)
    space = int(rank[1]) if rank else len(value.axes) - 2
    channel = len(value.axes) - space - 1
    for i in range(channel + 1, len(value.axes)):
        call.mixes(value, i, f"{call.operator} mixes neighbours along it")
    fresh = call.fresh()
    axes = [a if i <= channel else fresh[i] for i, a in enumerate(value.axes)]
    result = call.value(axes, [z and i <= channel for i, z in enumerate(value.zero)])
    positions = [call.value(axes)] * (len(call.outputs) - 1)
    return [result, *positions] if positions else result


@axis_rule("aten.grid_sampler", "aten.grid_sampler_2d", "aten.grid_sampler_3d")
def sample(call: Call) -> Value:
    """input [batch, channels, …] read at the places grid [batch, …, 2 or 3] says: one place after another."""
    value, grid = call["input"], call["grid"]
    batch = call.align([(value, 0), (grid, 0)])
    for i in range(2, len(value.axes)):
        call.mixes(value, i, f"{call.operator} mixes neighbours along it")
    call.mixes(grid, len(grid.axes) - 1, f"{call.operator} reads places from it")
    call.gathered([value], [batch, *value.axes[1:]])
    call.gathered([grid], [batch, *grid.axes[1:]])
    zero = value.zero[0] and call.follows(value.axes[0], batch)
    return call.value(
        [batch, value.axes[1], *grid.axes[1:-1]], [zero, value.zero[1], *(False for _ in grid.axes[1:-1])]
    )


@axis_rule("aten.im2col", "aten.col2im", linear=True)
def patches(call: Call) -> Value:
    """[batch, channels, …] to [batch, channels · window, places] and back."""
    value = call["self"]
    if len(value.axes) < (3 if call.operator == "aten.col2im" else 4):
        return call.block_all(f"{call.operator} moves windows along it")[0]
    for i in range(len(value.axes)):
        if i > 1 or call.operator == "aten.col2im":
            call.mixes(value, i, f"{call.operator} moves windows along it")
    fresh = call.fresh()
    if call.operator == "aten.col2im":
        return call.value([value.axes[0], *fresh[1:]])
    window = call.outputs[0][1] // value.axes[1].size
    columns = call.dims.merge([value.axes[1], call.dims.fresh(window, DimKind.STORED)])
    return call.value([value.axes[0], columns, fresh[2]], [False, value.zero[1], False])


@axis_rule("aten.pixel_shuffle", linear=True)
def pixel_shuffle(call: Call) -> Value:
    """[…, channels · r · r, height, width] to […, channels, height · r, width · r]."""
    value, r, message = call["self"], int(call["upscale_factor"]), f"{call.operator} moves channels into places"
    *rows, wide, height, width = value.shape
    parts = call.reshaped(value, [*rows, wide // (r * r), r, r, height, width])
    first = len(rows)
    for i in (first + 1, first + 2):
        call.mixes(parts, i, message)
    turned = call.ordered(parts, [*range(first + 1), first + 3, first + 1, first + 4, first + 2])
    return call.reshaped(turned, call.outputs[0])


@axis_rule("aten.pixel_unshuffle", linear=True)
def pixel_unshuffle(call: Call) -> Value:
    """[…, channels, height · r, width · r] to […, channels · r · r, height, width]."""
    value, r, message = call["self"], int(call["downscale_factor"]), f"{call.operator} moves places into channels"
    *rows, high, wide = value.shape
    first = len(rows)
    for i in (first, first + 1):
        call.mixes(value, i, message)
    parts = call.reshaped(value, [*rows, high // r, r, wide // r, r])
    turned = call.ordered(parts, [*range(first), first + 1, first + 3, first, first + 2])
    return call.reshaped(turned, call.outputs[0])


@axis_rule("aten.channel_shuffle", linear=True)
def channel_shuffle(call: Call) -> Value:
    """[batch, groups · channels, …] to [batch, channels · groups, …]."""
    value, groups = call["self"], int(call["groups"])
    batch, wide, *places = value.shape
    parts = call.reshaped(value, [batch, groups, wide // groups, *places])
    turned = call.ordered(parts, [0, 2, 1, *range(3, len(parts.axes))])
    call.block(parts.axes[1], f"{call.operator} exchanges its groups", "write it out with a view and a transpose")
    return call.reshaped(turned, call.outputs[0])
