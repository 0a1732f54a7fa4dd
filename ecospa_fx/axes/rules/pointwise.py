"""Elementwise operators: dims pass; what matters is whether 0 stays 0, and what happens to a 0 that does not."""

from __future__ import annotations

from dataclasses import replace

from ecospa_fx.axes.call import Call, Value
from ecospa_fx.axes.findings import Action
from ecospa_fx.axes.reasons import FINITE
from ecospa_fx.axes.registry import axis_rule

_SAME = """
    clone contiguous detach alias lift_fresh lift_fresh_copy lift to _to_copy type_as detach_copy
"""
_COPIES = """
    dropout alpha_dropout neg positive conj _conj resolve_conj resolve_neg conj_physical real imag
    feature_dropout requires_grad_
"""
_KEEP_ZERO = """
    relu relu6 gelu silu tanh abs sin sinh asin asinh tan atan arctan erf sqrt square sign sgn leaky_relu elu celu
    selu hardswish mish softshrink hardshrink floor ceil round trunc fix frac log1p expm1 atanh arctanh erfinv
    nan_to_num rrelu deg2rad rad2deg angle isnan isinf
"""
_LOSE_ZERO = """
    sigmoid exp exp2 cos cosh acos softplus log_sigmoid hardsigmoid logical_not bitwise_not isfinite erfc sinc
    threshold special_expit
"""
_INFINITE_AT_ZERO = "log log2 log10 rsqrt reciprocal logit digamma lgamma"


def _names(text: str) -> list[str]:
    return [f"aten.{name}" for name in text.split()]


def _first(call: Call) -> Value:
    return call.values[0]


@axis_rule(*_names(_SAME), linear=True)
def same(call: Call) -> Value:
    """The same numbers, perhaps of another type."""
    return replace(call.passes(_first(call)), sorting=_first(call).sorting)


@axis_rule(*_names(_COPIES), linear=True)
def copies(call: Call) -> Value:
    """The same numbers, or each times a constant."""
    return call.passes(_first(call))


@axis_rule(*_names(_KEEP_ZERO))
def keeps_zero(call: Call) -> Value:
    """A nonlinear function with f(0) = 0."""
    call.note(_first(call).axes, Action.NONLINEAR)
    return call.passes(_first(call))


@axis_rule(*_names(_LOSE_ZERO))
def loses_zero(call: Call) -> Value:
    """A nonlinear function with f(0) ≠ 0, finite."""
    call.note(_first(call).axes, Action.NONLINEAR)
    return call.passes(_first(call), zero="lost")


@axis_rule(*_names(_INFINITE_AT_ZERO))
def infinite_at_zero(call: Call) -> Value:
    """A function that is infinite where removed elements are 0: the masked model itself would overflow."""
    value = _first(call)
    _refuse_zero(call, value)
    call.note(value.axes, Action.NONLINEAR)
    return call.passes(value, zero="lost")


def _refuse_zero(call: Call, value: Value) -> None:
    for axis, zero in zip(value.axes, value.zero, strict=True):
        if zero:
            call.block(axis, f"{call.operator} is not finite at 0, which is what a removed element becomes", FINITE)


@axis_rule("aten.add", "aten.sub", "aten.rsub", "aten.subtract", linear=True)
def add(call: Call) -> Value:
    """0 only where all terms are; a scalar other than 0 shifts it."""
    other = call.get("other", 0)
    shifted = not isinstance(other, Value) and other != 0
    for value in call.values if shifted else ():
        call.fixes(value.axes)
    if call.operator in ("aten.add", "aten.sub"):
        call.adds(call["self"], other)
    if call.operator == "aten.add" and call.get("alpha", 1) == 1:
        call.adds(other, call["self"])
    return call.pointwise(call.values, "lost" if shifted else "all")


@axis_rule("aten.mul", "aten.multiply", "aten.__and__", "aten.logical_and", "aten.bitwise_and", linear=True)
def mul(call: Call) -> Value:
    """0 where any factor is."""
    return call.pointwise(call.values, "any")


@axis_rule("aten.div", "aten.divide", "aten.true_divide", "aten.floor_divide", "aten.fmod", "aten.remainder",
           linear=("aten.div", "aten.divide", "aten.true_divide"))  # fmt: skip
def div(call: Call) -> Value:
    """0 where the numerator is; a divisor must not be 0 where elements are removed."""
    numerator, divisor = call.get("self"), call.get("other")
    if isinstance(divisor, Value):
        _refuse_zero(call, divisor)
        call.fixes(divisor.axes, nonlinear=True)
    if call.get("rounding_mode") is not None:
        call.fixes((axis for v in call.values for axis in v.axes), nonlinear=True)
    if not isinstance(numerator, Value):
        return call.passes(call.values[0], zero="lost")
    if not isinstance(divisor, Value):
        return call.passes(numerator)
    result = call.pointwise([numerator, divisor], "lost", scales=True)
    pad = [False] * (len(result.axes) - len(numerator.zero))
    flags = [*pad, *numerator.zero]
    axes = [*[None] * len(pad), *numerator.axes]
    kept = [z and a is not None and call.follows(a, b) for z, a, b in zip(flags, axes, result.axes, strict=True)]
    return call.value(result.axes, kept)


@axis_rule("aten.pow", "aten.float_power")
def power(call: Call) -> Value:
    """0 stays 0 under a positive exponent; a negative one is infinite there."""
    base, exponent = call["self"], call["exponent"]
    call.note([axis for v in call.values for axis in v.axes], Action.NONLINEAR)
    if isinstance(exponent, Value):
        if isinstance(base, Value):
            _refuse_zero(call, base)
        return call.pointwise(call.values, "lost")
    if exponent < 0:
        _refuse_zero(call, base)
    return call.passes(base, zero="all" if exponent > 0 else "lost")


@axis_rule("aten.where", linear=True)
def where(call: Call) -> Value | list[Value]:
    """0 where both branches are; without branches, the positions where a condition holds."""
    if "self" not in call.arguments:
        return call.block_all(f"{call.operator} computes positions from it")
    branches = [call.get("self"), call.get("other")]
    chosen = [b for b in branches if isinstance(b, Value)]
    result = call.pointwise(call.values, "lost", joins=chosen)
    constants = [b for b in branches if not isinstance(b, Value) and b not in (0, None)]
    return _zero_if(call, result, chosen, not constants)


def _zero_if(call: Call, result: Value, operands: list[Value], possible: bool = True) -> Value:
    """`result` with the flags of an operation that is 0 where all `operands` are."""
    flags = []
    for position, axis in enumerate(result.axes):
        aligned = [(v, position - len(result.axes) + len(v.axes)) for v in operands]
        here = [(v, i) for v, i in aligned if i >= 0 and v.axes[i].size == axis.size and call.follows(v.axes[i], axis)]
        flags.append(possible and len(here) == len(operands) and all(v.zero[i] for v, i in here))
    return call.value(result.axes, flags)


@axis_rule(*_names("maximum minimum fmax fmin __or__ logical_or bitwise_or"))
def extremum(call: Call) -> Value:
    """0 where both operands are."""
    call.note([axis for v in call.values for axis in v.axes], Action.NONLINEAR)
    return call.pointwise(call.values, "all" if len(call.values) == 2 else "lost")


@axis_rule(*_names("eq ne lt le gt ge isclose logical_xor __xor__ bitwise_xor atan2 hypot copysign complex polar"),
           "aten.xlogy")  # fmt: skip
def comparison(call: Call) -> Value:
    """A function of two operands about whose zeros nothing is claimed."""
    call.note([axis for v in call.values for axis in v.axes], Action.NONLINEAR)
    return call.pointwise(call.values, "all" if call.operator == "aten.complex" else "lost")


@axis_rule("aten.clamp", "aten.clip", "aten.clamp_min", "aten.clamp_max", "aten.hardtanh")
def clamp(call: Call) -> Value:
    """0 stays 0 where the bounds allow it."""
    low, high = call.get("min"), call.get("max")
    if call.operator.startswith("aten.hardtanh"):
        low, high = call.get("min_val", -1), call.get("max_val", 1)
    bounds = isinstance(low, Value) or isinstance(high, Value)
    call.note(call.values[0].axes, Action.NONLINEAR)
    if bounds:
        return call.pointwise(call.values, "lost")
    inside = (low is None or low <= 0) and (high is None or high >= 0)
    return call.passes(call.values[0], zero="all" if inside else "lost")


@axis_rule("aten.masked_fill", linear=True)
def masked_fill(call: Call) -> Value:
    """0 stays 0 when filled with 0."""
    result = call.pointwise(call.values, "lost")
    value = call["value"]
    return _zero_if(call, result, [call["self"]], not isinstance(value, Value) and value == 0)


@axis_rule("aten.addcmul", "aten.addcdiv", "aten.lerp", linear=True)
def three(call: Call) -> Value:
    """Sums of products: 0 where every operand is."""
    divides = call.operator.startswith("aten.addcdiv")
    if divides:
        _refuse_zero(call, call["tensor2"])
        call.fixes(call["tensor2"].axes, nonlinear=True)
    if len(call.values) > 2:
        call.fixes(axis for v in call.values for axis in v.axes)
    return call.pointwise(call.values, "lost" if divides else "all")


@axis_rule("aten.copy", linear=True)
def copy(call: Call) -> Value:
    """Overwrite: the numbers of the source in the shape of the destination."""
    result = call.pointwise(call.values, "lost", scales=True)  # nothing of the destination is left
    return _zero_if(call, result, [call["src"]])


@axis_rule("aten.prelu", "aten._prelu_kernel")
def prelu(call: Call) -> Value:
    """A slope per channel (axis 1), or one for all."""
    value, weight = call["self"], call["weight"]
    call.note(value.axes, Action.NONLINEAR)
    if len(weight.axes) != 1 or len(value.axes) < 2:
        return _zero_if(call, call.pointwise([value, weight], "lost"), [value])
    if weight.axes[0].size == 1:
        return call.value(value.axes, value.zero)
    channel = call.align([(value, 1), (weight, 0)])
    axes = [value.axes[0], channel, *value.axes[2:]]
    call.gathered([value], axes)
    call.gathered([weight], [channel])
    return call.value(axes, [z and (i != 1 or call.follows(value.axes[1], channel)) for i, z in enumerate(value.zero)])


@axis_rule("aten.glu")
def glu(call: Call) -> Value:
    """First half times the sigmoid of the second."""
    value = call["self"]
    axis = call.get("dim", -1) % len(value.axes)
    half = value.axes[axis].size // 2
    parts = [call.sliced(value, axis, 0, half), call.sliced(value, axis, half, 2 * half)]
    call.note(value.axes, Action.NONLINEAR)
    return call.pointwise(parts, "any")


@axis_rule("aten.native_dropout")
def native_dropout(call: Call) -> list[Value]:
    """Values and the mask."""
    value = call["input"]
    return [call.passes(value), call.passes(value, zero="lost")]
