"""Operators that make tensors: constants are blank and adopt the dims of what they meet; the rest is stored."""

from __future__ import annotations

from ecospa_fx.axes.call import Call, Value
from ecospa_fx.axes.reasons import EVAL
from ecospa_fx.axes.registry import axis_rule
from ecospa_fx.axes.resize import Resize, resize_rule


@axis_rule("aten.zeros", "aten.new_zeros", "aten.empty", "aten.new_empty", "aten.empty_permuted", "aten.empty_strided",
           linear=True)  # fmt: skip
def zeros(call: Call) -> Value:
    """All 0, or not written yet."""
    return call.blank(zero=not call.operator.endswith(("empty", "empty_permuted", "empty_strided")))


@axis_rule("aten.ones", "aten.new_ones", "aten.full", "aten.new_full", linear=True)
def full(call: Call) -> Value:
    """One number everywhere."""
    return call.blank(zero=False)


@axis_rule("aten.zeros_like", "aten.ones_like", "aten.full_like", "aten.empty_like", "aten.fill",
           linear=("aten.zeros_like", "aten.empty_like"))  # fmt: skip
def like(call: Call) -> Value:
    """The shape of another tensor, so its dims."""
    value = call.values[0]
    return Value(value.axes, (call.operator == "aten.zeros_like",) * len(value.axes), (), call.node)


@axis_rule(
    "aten.arange",
    "aten.linspace",
    "aten.eye",
    "aten.rand",
    "aten.randn",
    "aten.randint",
    "aten.scalar_tensor",
    "aten.tensor",
    "aten.randperm",
    "aten.tril_indices",
    "aten.triu_indices",
    "aten.hann_window",
)
def positions(call: Call) -> Value:
    """Every position different: never cut."""
    return call.stored()


@axis_rule("aten.rand_like", "aten.randn_like", "aten.bernoulli", "aten.normal", "aten.randint_like")
def noise(call: Call) -> Value:
    """Fresh numbers per position; a removed one is missed by nobody, but the stream of random numbers shifts."""
    return call.block_all("random numbers are drawn for each of its elements", EVAL)[0]


@resize_rule(
    "aten.zeros",
    "aten.new_zeros",
    "aten.empty",
    "aten.new_empty",
    "aten.ones",
    "aten.new_ones",
    "aten.full",
    "aten.new_full",
)
def resize_size(resize: Resize) -> None:
    """Literal sizes follow the output."""
    resize.sizes("size")
