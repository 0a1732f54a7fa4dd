"""Operators that move parts of tensors: slices, concatenations, copies along an axis, padding."""

from __future__ import annotations

from dataclasses import replace

from ecospa_fx.axes.call import UNIT, Call, Value
from ecospa_fx.axes.dims import Axis, DimKind
from ecospa_fx.axes.registry import axis_rule, refuse
from ecospa_fx.axes.resize import Resize, Term, resize_rule
from ecospa_fx.axes.zeros import alive_anywhere, alive_on

# -- parts of an axis --------------------------------------------------------------------------------------------


@axis_rule("aten.slice", "aten.slice_copy", linear=True)
def slice_(call: Call) -> Value:
    """Positions start, start + step, … below end."""
    value = call["self"]
    axis = call.axis_of(value)
    size = value.axes[axis].size
    start, stop, step = slice(call.get("start"), call.get("end"), call.get("step", 1)).indices(size)
    if call.get("step", 1) == 1:
        stop = start + call.outputs[0][axis]
    return call.sliced(value, axis, start, stop, step)


@axis_rule("aten.narrow", "aten.narrow_copy", linear=True)
def narrow(call: Call) -> Value:
    """`length` positions from `start`."""
    value = call["self"]
    axis = call.axis_of(value)
    start = call["start"]
    if isinstance(start, Value):
        call.block(value.axes[axis], "it is narrowed at a place that is computed", "start at a number")
        return call.value(call.fresh())
    start = int(start) % max(value.axes[axis].size, 1)
    return call.sliced(value, axis, start, start + call.outputs[0][axis])


@axis_rule("aten.select", "aten.select_copy", linear=True)
def select(call: Call) -> Value:
    """One position; the axis disappears."""
    value = call["self"]
    axis = call.axis_of(value)
    position = int(call["index"]) % max(value.axes[axis].size, 1)
    part = call.sliced(value, axis, position, position + 1)
    order = [i for i in range(len(value.axes)) if i != axis]
    return call.ordered(part, order)


@axis_rule("aten.unbind", linear=True)
def unbind(call: Call) -> list[Value]:
    """Every position by itself."""
    value = call["self"]
    axis = call.axis_of(value)
    order = [i for i in range(len(value.axes)) if i != axis]
    return [
        call.ordered(call.sliced(value, axis, position, position + 1), order)
        for position in range(value.axes[axis].size)
    ]


@axis_rule("aten.split", "aten.chunk", "aten.split_with_sizes", "aten.tensor_split", "aten.unsafe_split",
           "aten.unsafe_chunk", "aten.split_copy", "aten.split_with_sizes_copy", "aten.hsplit",
           linear=True)  # fmt: skip
def split(call: Call) -> list[Value]:
    """Consecutive parts of an axis."""
    value = call["self"]
    axis = min(1, len(value.axes) - 1) if call.operator == "aten.hsplit" else call.axis_of(value)
    parts, start = [], 0
    for shape in call.outputs:
        parts.append(call.sliced(value, axis, start, start + shape[axis]))
        start += shape[axis]
    return parts


@resize_rule("aten.slice", "aten.slice_copy")
def resize_slice(resize: Resize) -> None:
    """Ends move to the number of kept positions before them; a step becomes that of the kept rows."""
    resize.bounds("dim", "start", "end", "step")


@resize_rule("aten.narrow", "aten.narrow_copy")
def resize_narrow(resize: Resize) -> None:
    """Like a slice."""
    axis = resize.axis("dim")
    if not resize.changed(0, axis):
        return
    start = resize.argument("start") % resize.inputs[0].axes[axis].size
    resize.set("start", resize.rank_of(0, axis, start))
    resize.set("length", resize.size(resize.output, axis))


@resize_rule("aten.select", "aten.select_copy")
def resize_select(resize: Resize) -> None:
    """The position moves to its rank among the kept ones."""
    axis = resize.axis("dim")
    if resize.changed(0, axis):
        index = resize.argument("index") % resize.inputs[0].axes[axis].size
        resize.set("index", resize.rank_of(0, axis, index))


@resize_rule("aten.split", "aten.chunk", "aten.split_with_sizes", "aten.tensor_split", "aten.unsafe_split",
             "aten.unsafe_chunk", "aten.split_copy", "aten.split_with_sizes_copy", "aten.hsplit")  # fmt: skip
def resize_split(resize: Resize) -> None:
    """Parts of whatever sizes their kept positions have."""
    axis = min(1, len(resize.inputs[0].axes) - 1) if resize.node_is("aten.hsplit") else resize.axis("dim")
    if resize.changed(0, axis):
        sizes = [resize.size(output, axis) for output in resize.outputs]
        resize.replace(Term("aten.split_with_sizes.default", (resize.node.args[0], sizes, axis)))


# -- several tensors ---------------------------------------------------------------------------------------------


@axis_rule("aten.cat", "aten.concat", "aten.concatenate", linear=True)
def cat(call: Call) -> Value:
    """One after another along an axis; the other axes are the same dims."""
    values = [v for v in call["tensors"] if v.shape != (0,)]
    if not values:
        return call.stored()
    return _joined(call, values, call.axis_of(values[0]))


def _joined(call: Call, values: list[Value], axis: int) -> Value:
    axes: list[Axis] = []
    for i in range(len(values[0].axes)):
        along = [(v, i) for v in values]
        wide = values[0].axes[i].size != 1
        axes.append(call.dims.concat([v.axes[i] for v in values]) if i == axis else call.align(along) if wide else UNIT)
    flags = [all(v.zero[i] and call.follows(v.axes[i], a) for v in values) for i, a in enumerate(axes)]
    flags[axis] = call.all_zero([(v, axis) for v in values])
    for value in values:
        call.gathered([value], [value.axes[i] if i == axis else a for i, a in enumerate(axes)], joins=True)
    others = [
        d for a, zero in zip(axes, flags, strict=True) if a is not axes[axis] and not zero for d in call.dims.dims_of(a)
    ]
    return call.value(axes, flags, [*others, *(d for v in values for d in alive_on(call.dims, v, axis))])


@axis_rule("aten.stack", linear=True)
def stack(call: Call) -> Value:
    """A new axis, one position per tensor."""
    values = call["tensors"]
    axis = int(call.get("dim", 0)) % (len(values[0].axes) + 1)
    lifted = [
        replace(v, axes=(*v.axes[:axis], UNIT, *v.axes[axis:]), zero=(*v.zero[:axis], True, *v.zero[axis:]))
        for v in values
    ]
    axes = [call.align([(v, i) for v in lifted]) for i in range(len(lifted[0].axes)) if i != axis]
    for value in values:
        call.gathered([value], axes)
    new = Axis(len(values), tuple(replace(UNIT.pieces[0], offset=i) for i in range(len(values))))
    flags = [all(v.zero[i] and call.follows(v.axes[i], a) for v in values) for i, a in enumerate(axes)]
    return call.value([*axes[:axis], new, *axes[axis:]], [*flags[:axis], True, *flags[axis:]])


# -- copies along an axis ----------------------------------------------------------------------------------------


@axis_rule("aten.expand", "aten.broadcast_to", "aten.expand_copy", linear=True)
def expand(call: Call) -> Value:
    """An axis of size 1 becomes a blank one, which adopts the dim of whatever it meets."""
    value = call["self"]
    shape = call.outputs[0]
    pad = len(shape) - len(value.axes)
    axes, flags = [], []
    for i, size in enumerate(shape):
        same = i >= pad and value.axes[i - pad].size == size
        axes.append(value.axes[i - pad] if same else call.dims.fresh(size, DimKind.BLANK))
        flags.append(same and value.zero[i - pad])
    new = [d for a in axes if a not in value.axes for d in call.dims.dims_of(a)]
    return replace(call.value(axes, flags, [*new, *alive_anywhere(call.dims, value)]), weights=value.weights)


@axis_rule("aten.expand_as", linear=True)
def expand_as(call: Call) -> Value:
    """Axes of size 1 get the positions of the other tensor, the others are the same dims as there."""
    value, other = call["self"], call["other"]
    pad = len(other.axes) - len(value.axes)
    axes, flags = [], []
    for i in range(len(other.axes)):
        same = i >= pad and value.axes[i - pad].size == other.axes[i].size
        axes.append(call.align([(other, i), (value, i - pad)]) if same else other.axes[i])
        flags.append(same and value.zero[i - pad] and call.follows(value.axes[i - pad], axes[i]))
    call.gathered([value, other], axes)
    return call.value(axes, flags)


@axis_rule("aten.broadcast_tensors", "aten.meshgrid")
def broadcast(call: Call) -> list[Value]:
    """Tensors broadcast against one another."""
    if call.operator == "aten.meshgrid":
        return call.block_all("it spans a grid")
    result = call.pointwise(call.values, "lost")
    return [result] * len(call.outputs)


@resize_rule("aten.expand", "aten.broadcast_to", "aten.expand_copy")
def resize_expand(resize: Resize) -> None:
    """Literal sizes follow the output."""
    resize.sizes("size")


@axis_rule("aten.repeat", "aten.tile", linear=True)
def repeat(call: Call) -> Value:
    """Whole copies one after another: a blank dim outside the axis."""
    value = call["self"]
    name = "repeats" if "repeats" in call.arguments else "dims"
    counts = [int(c) for c in call[name]]
    counts = [1] * (len(value.axes) - len(counts)) + counts
    pad = len(counts) - len(value.axes)
    axes, flags = [], []
    for i, count in enumerate(counts):
        axis = value.axes[i - pad] if i >= pad else UNIT
        outer = call.dims.fresh(count, DimKind.BLANK)
        axes.append(axis if count == 1 else outer if axis.size == 1 else call.dims.merge([outer, axis]))
        flags.append(count == 1 and i >= pad and value.zero[i - pad])
    return call.value(axes, flags)


@axis_rule("aten.repeat_interleave", linear=True)
def repeat_interleave(call: Call) -> Value:
    """Every position several times: a blank dim inside the axis."""
    value, repeats, dim = call.get("self"), call.get("repeats"), call.get("dim")
    if not isinstance(value, Value) or not isinstance(repeats, int) or dim is None:
        return call.block_all("its positions are repeated an unequal number of times", "repeat all alike")[0]
    axes, flags, i = list(value.axes), list(value.zero), int(dim) % len(value.axes)
    copies = call.dims.fresh(repeats, DimKind.BLANK)
    axes[i] = call.dims.merge([axes[i], copies])
    flags[i] = False
    return call.value(axes, flags, [*call.dims.dims_of(copies), *alive_anywhere(call.dims, value)])


@resize_rule("aten.repeat", "aten.tile")
def resize_repeat(resize: Resize) -> None:
    """The number of copies follows the output where the copies themselves are cut."""
    name = "repeats" if resize.has("repeats") else "dims"
    pad = len(resize.output.axes) - len(resize.inputs[0].axes)
    counts = list(resize.argument(name))
    counts = [1] * (len(resize.output.axes) - len(counts)) + counts
    for i in range(len(resize.output.axes)):
        counts[i] = resize.copies(counts[i], i, i - pad if i >= pad else None)
    resize.set(name, counts)


@resize_rule("aten.repeat_interleave")
def resize_repeat_interleave(resize: Resize) -> None:
    """The number of copies follows the output where the copies themselves are cut, and so does the size of it all."""
    i = resize.axis("dim")
    if resize.output_changed(i):
        resize.set("repeats", resize.copies(resize.argument("repeats"), i, i))
        if resize.has("output_size"):
            resize.set("output_size", resize.scaled(resize.argument("output_size"), resize.output.axes[i]))


# -- order and edges ---------------------------------------------------------------------------------------------


@axis_rule("aten.roll", linear=True)
def roll(call: Call) -> Value:
    """The end of an axis moves to its front."""
    value, dims = call["self"], call.get("dims", [])
    if len(set(dims)) < len(dims):
        return call.block_all("it is rolled twice along one dim", "roll it once, by the sum")[0]
    if not dims:
        return call.block_all("it is rolled as one row of all its elements", "name the dim that it is rolled along")[0]
    for shift, dim in zip(call["shifts"], dims, strict=True):
        i = int(dim) % len(value.axes)
        size = value.axes[i].size
        cut = -int(shift) % max(size, 1)
        if cut and call.dims.cuttable(value.axes[i]):
            parts = [call.sliced(value, i, *part).axes[i] for part in ((cut, size), (0, cut))]
            value = replace(value, axes=(*value.axes[:i], call.dims.concat(parts), *value.axes[i + 1 :]))
    return call.value(value.axes, value.zero)


@resize_rule("aten.roll")
def resize_roll(resize: Resize) -> None:
    """As many positions move to the front as are kept of those that do."""
    shifts = list(resize.argument("shifts"))
    for k, dim in enumerate(resize.argument("dims") if resize.has("dims") else ()):
        i = int(dim) % len(resize.output.axes)
        if resize.changed(0, i):
            size = resize.inputs[0].axes[i].size
            shifts[k] = resize.size(resize.output, i) - resize.rank_of(0, i, -int(shifts[k]) % size)
    resize.set("shifts", shifts)


@axis_rule("aten.flip", "aten.fliplr", "aten.flipud", "aten.rot90", linear=True)
def flip(call: Call) -> Value:
    """Reversed order has no place in the algebra; a rotation also exchanges two axes."""
    value, fresh = call["self"], call.fresh()
    axes = list(value.axes)
    for dim in call.get("dims", range(len(axes))):
        i = int(dim) % len(axes)
        call.block(axes[i], "its order is reversed")
        axes[i] = fresh[i]
    return call.value(axes, value.zero)


@axis_rule("aten.pad", "aten.constant_pad_nd", "aten.reflection_pad1d", "aten.reflection_pad2d",
           "aten.replication_pad1d", "aten.replication_pad2d", linear=True)  # fmt: skip
def pad(call: Call) -> Value:
    """Positions that belong to nothing before and after an axis."""
    value = call["self"]
    modes = {"aten.constant_pad_nd": "constant", "aten.pad": call.get("mode", "constant")}
    constant = modes.get(call.operator) == "constant"  # the other operators reflect or replicate
    axes, flags = list(value.axes), list(value.zero)
    amounts = call.get("pad") or call["padding"]
    for k in range(len(amounts) // 2):
        before, after = int(amounts[2 * k]), int(amounts[2 * k + 1])
        i = len(axes) - 1 - k
        if before == after == 0:
            continue
        if min(before, after) < 0 or not constant:
            call.block(axes[i], "it is padded otherwise than with a constant", "pad with a constant, or slice")
            axes[i], flags[i] = call.dims.fresh(call.outputs[0][i], DimKind.STORED), False
        else:
            parts = [call.dims.fresh(n, DimKind.STORED) for n in (before, after)]
            axes[i] = call.dims.concat([parts[0], axes[i], parts[1]])
    filled = (call.get("value") or 0) == 0
    if constant and not filled:
        call.fixes(axes)
    return call.value(axes, [f and filled for f in flags])


@axis_rule("aten.tril", "aten.triu", linear=True)
def triangle(call: Call) -> Value:
    """Zeros chosen by position in the last two axes."""
    value = call["self"]
    for i in (-2, -1):
        call.block(value.axes[i], f"{call.operator} chooses its elements by position")
    return call.value(value.axes, value.zero)


@axis_rule("aten.diff", linear=True)
def diff(call: Call) -> Value:
    """Differences of neighbours."""
    value = call["self"]
    if len(call.values) > 1:
        return call.block_all("its neighbours are subtracted")[0]
    axis = call.axis_of(value, default=-1)
    call.mixes(value, axis, "its neighbours are subtracted")
    fresh = call.fresh()
    return call.value([fresh[i] if i == axis else a for i, a in enumerate(value.axes)])


@axis_rule("aten.unfold", linear=True)
def unfold(call: Call) -> Value:
    """Sliding windows over one axis; the window's positions come last."""
    value = call["self"]
    axis = call.axis_of(value, "dimension")
    call.mixes(value, axis, "windows slide over it")
    fresh = call.fresh()
    return call.value(
        [*(fresh[i] if i == axis else a for i, a in enumerate(value.axes)), fresh[-1]],
        [*(z and i != axis for i, z in enumerate(value.zero)), False],
    )


refuse("it is read by memory strides, which say nothing about dims", "aten.as_strided", "aten.as_strided_copy",
       remedy="use slices, views and transposes")  # fmt: skip
refuse("the diagonal ties two axes element by element", "aten.diagonal", "aten.diag", "aten.diag_embed", "aten.trace")
