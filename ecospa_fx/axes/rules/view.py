"""Operators that look at the same elements in another shape or order: reshapes and transposes."""

from __future__ import annotations

from dataclasses import replace

from ecospa_fx.axes.call import Call, Value
from ecospa_fx.axes.dims import DimKind
from ecospa_fx.axes.findings import Action
from ecospa_fx.axes.reasons import PARAMETER
from ecospa_fx.axes.registry import axis_rule
from ecospa_fx.axes.resize import Resize, resize_rule

# -- row-major views ---------------------------------------------------------------------------------------------


@axis_rule("aten.view", "aten.reshape", "aten._unsafe_view", "aten.flatten", "aten.unflatten", "aten.squeeze",
           "aten.unsqueeze", "aten._reshape_alias", "aten.ravel", "aten._reshape_copy", "aten.view_copy",
           "aten.atleast_1d", "aten.atleast_2d", linear=True)  # fmt: skip
def reshape(call: Call) -> Value:
    """Row-major regrouping of axes."""
    if "dtype" in call.arguments:
        return call.block_all("its bytes are read as another type")[0]
    return call.reshaped(call["self"], call.outputs[0])


@axis_rule("aten.view_as", "aten.reshape_as", linear=True)
def reshape_as(call: Call) -> Value:
    """Row-major regrouping into the shape of another tensor, whose axes are the same dims."""
    result, other = call.reshaped(call["self"], call.outputs[0]), call["other"]
    axes = [call.align([(result, i), (other, i)]) for i in range(len(result.axes))]
    for axis, target in zip(result.axes, axes, strict=True):
        if not call.follows(axis, target):
            call.block(target, "a stored tensor is viewed in its shape", PARAMETER)
    call.gathered([other], axes)
    return result


@resize_rule("aten.view", "aten._unsafe_view", "aten._reshape_copy", "aten.view_copy")
def resize_view(resize: Resize) -> None:
    """Literal sizes follow the output."""
    resize.sizes("size")


@resize_rule("aten.reshape")
def resize_reshape(resize: Resize) -> None:
    """Literal sizes follow the output."""
    resize.sizes("shape")


@resize_rule("aten.unflatten")
def resize_unflatten(resize: Resize) -> None:
    """The sizes are those of the axes that one axis becomes."""
    rank = len(resize.output.axes)
    sizes = len(resize.argument("sizes"))
    first = int(resize.argument("dim")) % (rank - sizes + 1)
    resize.sizes("sizes", first)


@axis_rule("aten.view_as_real", "aten.view_as_real_copy", linear=True)
def view_as_real(call: Call) -> Value:
    """A complex number becomes two real ones along a new last axis."""
    value = call["self"]
    return call.value([*value.axes, call.dims.fresh(2, DimKind.STORED)], [*value.zero, False])


@axis_rule("aten.view_as_complex", "aten.view_as_complex_copy", linear=True)
def view_as_complex(call: Call) -> Value:
    """The last axis, of size 2, becomes one complex number: its two positions go together."""
    value = call["self"]
    call.mixes(value, len(value.axes) - 1, "its elements become parts of complex numbers")
    call.note(value.axes[:-1], Action.PAIRED)
    result = call.value(value.axes[:-1], value.zero[:-1])
    return replace(result, weights=value.weights)


# -- transposes --------------------------------------------------------------------------------------------------


@axis_rule("aten.transpose", "aten.swapaxes", "aten.swapdims", linear=True)
def transpose(call: Call) -> Value:
    """Two axes change places."""
    value = call["self"]
    names = ("dim0", "dim1") if "dim0" in call.arguments else ("axis0", "axis1")
    a, b = (call.axis_of(value, name) for name in names)
    order = list(range(len(value.axes)))
    order[a], order[b] = order[b], order[a]
    return call.ordered(value, order)


@axis_rule("aten.numpy_T", linear=True)
def reverse(call: Call) -> Value:
    """All axes in reverse."""
    value = call["self"]
    return call.ordered(value, list(reversed(range(len(value.axes)))))


@axis_rule("aten.t", "aten.mT", "aten.adjoint", "aten.matrix_H", "aten.mH", linear=True)
def transpose_last(call: Call) -> Value:
    """The last two axes change places."""
    value = call["self"]
    order = list(range(len(value.axes)))
    order[-2:] = order[-2:][::-1]
    return call.ordered(value, order)


@axis_rule("aten.permute", "aten.permute_copy", linear=True)
def permute(call: Call) -> Value:
    """Axes in the given order."""
    value = call["self"]
    return call.ordered(value, [int(d) % len(value.axes) for d in call["dims"]])


@axis_rule("aten.movedim", "aten.moveaxis", linear=True)
def movedim(call: Call) -> Value:
    """Axes moved to given places, the others in their order."""
    value = call["self"]
    rank = len(value.axes)
    lists = [call[n] if isinstance(call[n], list | tuple) else [call[n]] for n in ("source", "destination")]
    source, target = ([int(d) % rank for d in dims] for dims in lists)
    rest = iter(i for i in range(rank) if i not in source)
    moved = dict(zip(target, source, strict=True))
    return call.ordered(value, [moved[i] if i in moved else next(rest) for i in range(rank)])
