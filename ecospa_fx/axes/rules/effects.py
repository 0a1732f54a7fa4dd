"""Operators without a tensor result: assertions about shapes and types, annotations."""

from __future__ import annotations

from ecospa_fx.axes.call import Call, Value
from ecospa_fx.axes.registry import axis_rule, refuse
from ecospa_fx.axes.resize import Resize, resize_rule


@axis_rule("aten._assert_tensor_metadata", "aten._assert_async", "aten._assert_scalar", "aten.sym_constrain_range",
           "aten.sym_constrain_range_for_size", "aten.sym_size", "aten.sym_numel", "aten.sym_stride",
           "aten.sym_storage_offset", "aten._functional_assert_async")  # fmt: skip
def nothing(call: Call) -> list[Value]:
    """No tensor comes out, and dims do not care."""
    _ = call
    return []


@resize_rule("aten._assert_tensor_metadata")
def resize_assertion(resize: Resize) -> None:
    """An assertion about sizes or strides would no longer be true."""
    if resize.raw("size") is not None or resize.raw("stride") is not None:
        resize.set("size", None)
        resize.set("stride", None)


refuse(
    "the graph that it calls is not followed",
    "cond",
    "while_loop",
    "map_impl",
    "scan",
    "associative_scan",
    remedy="write the branch or loop out, or choose it by the example inputs",
)
