"""Elementwise operators: zeros that stay zero, zeros that do not, and functions that are infinite there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ecospa_fx.axes import registry
from ecospa_fx.axes.rules import pointwise
from tests.support.oracle import Case, check_exact, check_literal, check_rule, sandwich, tagged

NOT_FINITE = "not finite at 0"
SUMMED = "summed over although removed elements are not zero there"


def summed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function, summed over the last axis, so that what is removed must be 0; its kind is qk."""
    return lambda *tensors: function(*tensors).sum(-1, keepdim=True)


CASES = [
    sandwich("aten.neg", lambda h: -h, "pair 8"),
    sandwich("aten.clone", lambda h: h.clone(), "pair 8"),
    sandwich("aten.dropout", lambda h: F.dropout(h, 0.5, False), "pair 8"),
    sandwich("aten.relu", torch.relu),
    sandwich("aten.gelu", summed(F.gelu), "ffn 8", label="summed"),
    sandwich("aten.hardtanh", summed(lambda h: F.hardtanh(h, -0.5, 2.0)), "ffn 8"),
    sandwich("aten.hardtanh", summed(lambda h: F.hardtanh(h, 0.5, 2.0)), "", SUMMED, label="without-0"),
    sandwich("aten.atanh", summed(lambda h: torch.atanh(h / 100)), "ffn 8"),
    sandwich("aten.erfinv", summed(lambda h: torch.erfinv(h / 100)), "ffn 8"),
    sandwich("aten.sigmoid", torch.sigmoid),
    sandwich("aten.sigmoid", summed(torch.sigmoid), "", SUMMED, label="summed"),
    sandwich("aten.sigmoid", summed(lambda h: h * torch.sigmoid(h)), "ffn 8", label="swish"),
    sandwich("aten.log", lambda h: h.abs().log(), "", NOT_FINITE),
    sandwich("aten.rsqrt", summed(lambda h: h * (h.square() + 1).rsqrt()), "ffn 8", label="shifted"),
    sandwich("aten.add", summed(lambda h: h + h.relu()), "ffn 8"),
    sandwich("aten.add", lambda h: h + 1, "pair 8", label="scalar"),
    sandwich("aten.add", summed(lambda h: h + 1), "", SUMMED, label="scalar-summed"),
    sandwich("aten.add", summed(lambda h: (h + 1j).abs()), "", SUMMED, label="complex-scalar"),
    sandwich("aten.add", summed(lambda h, bias: (h + bias).relu()), "ffn 8", shapes=[(8,)], label="bias"),
    sandwich("aten.add", lambda h: h + torch.arange(8), "pair 8", label="stored"),
    sandwich("aten.add", summed(lambda h: h + torch.arange(8)), "", SUMMED, label="stored-summed"),
    sandwich("aten.sub", summed(lambda h, p: (h - p).relu()), "ffn 8", shapes=[(1, 8)]),
    sandwich("aten.rsub", summed(lambda h: torch.rsub(h, h.relu())), "ffn 8"),
    sandwich("aten.mul", summed(lambda h: h * torch.arange(8)), "qk 8", label="stored"),
    sandwich("aten.mul", summed(lambda h, gate: h.exp() * gate), "ffn 8", shapes=[(8,)], label="parameter"),
    sandwich("aten.logical_and", lambda h: h * torch.logical_and(h, h > 0)),
    sandwich("aten.div", summed(lambda h: h / (h.exp() + 1)), "ffn 8"),
    sandwich("aten.div", lambda h: h / (h.square()), "", NOT_FINITE, label="by-0"),
    sandwich("aten.true_divide", summed(lambda h: torch.true_divide(h, 3)), "pair 8"),
    sandwich("aten.remainder", summed(lambda h: h % 2), "ffn 8"),
    sandwich("aten.pow", summed(lambda h: h**2), "ffn 8"),
    sandwich("aten.pow", lambda h: h**-1.0, "", NOT_FINITE, label="negative"),
    sandwich("aten.pow", summed(lambda h: h * 2**h), "ffn 8", label="of-a-number"),
    sandwich("aten.pow", lambda h: h.abs() ** torch.arange(-3.0, 5.0), "", NOT_FINITE, label="tensor-exponent"),
    sandwich("aten.where", summed(lambda h: torch.where(h > 0, h, 2 * h)), "ffn 8"),
    sandwich("aten.where", lambda h: torch.where(h > 0, h, 1.0), label="or-1"),
    sandwich("aten.where", summed(lambda h: torch.where(h > 0, h, 1.0)), "", SUMMED, label="or-1-summed"),
    sandwich("aten.where", lambda h: h + torch.where(h > 0)[0].sum(), "", "computes positions", label="positions"),
    sandwich("aten.maximum", summed(lambda h: torch.maximum(h, h.sin())), "ffn 8"),
    sandwich("aten.gt", summed(lambda h: h * (h > 0)), "ffn 8"),
    sandwich("aten.eq", summed(lambda h: h.eq(0).double()), "", SUMMED, label="summed"),
    sandwich("aten.complex", summed(lambda h: torch.view_as_real(torch.complex(h, 2 * h)).sum(-1)), "ffn 8"),
    sandwich("aten.clamp", summed(lambda h: h.clamp(-1, 1)), "ffn 8"),
    sandwich("aten.clamp", summed(lambda h: h.clamp(min=0.5)), "", SUMMED, label="without-0"),
    sandwich("aten.clamp", lambda h, low: h.clamp(min=low), shapes=[(8,)], label="tensor"),
    sandwich("aten.masked_fill", summed(lambda h: h.masked_fill(h > 1, 0.0)), "ffn 8"),
    sandwich("aten.masked_fill", summed(lambda h: h.masked_fill(h > 1, 3.0)), "", SUMMED, label="with-3"),
    sandwich("aten.addcmul", summed(lambda h, a, b: torch.addcmul(h, a, b)), "pair 8", shapes=[(1, 1, 8), (1, 1, 8)]),
    sandwich("aten.addcdiv", lambda h, a, b: torch.addcdiv(h, a, b), "", NOT_FINITE, shapes=[(8,), (8,)]),
    sandwich("aten.addcdiv_", lambda h, a, b: h.addcdiv_(a, b), "", NOT_FINITE, shapes=[(8,), (8,)]),
    sandwich("aten.lerp", lambda h, a: torch.lerp(h, a, 0.3), "pair 8", shapes=[(8,)]),
    sandwich("aten.copy_", summed(lambda h: torch.empty_like(h).copy_(h.relu())), "ffn 8"),
    sandwich("aten.prelu", lambda h, slope: F.prelu(h.transpose(1, 2), slope).transpose(1, 2), shapes=[(8,)]),
    sandwich("aten.prelu", summed(F.prelu), "ffn 8", shapes=[(1,)], label="one"),
    sandwich("aten.glu", summed(F.glu), "qk 4"),
    sandwich("aten.glu", lambda h: F.glu(torch.cat([h, h.relu()], 1), dim=1), label="rows"),
    sandwich("aten.native_dropout", lambda h: h * torch.native_dropout(h, 0.5, False)[0]),
]


@pytest.mark.slow
def test_literal(case: Case) -> None:
    check_literal(case)


@pytest.mark.slow
def test_exact(case: Case) -> None:
    check_exact(case)


# -- every operator of a family by its value at 0 ----------------------------------------------------------------

ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "threshold": (0.0, 2.0), "to": (torch.float64,), "dropout": (0.5, False), "alpha_dropout": (0.5, False),
    "feature_dropout": (0.5, False), "requires_grad_": (True,),
}  # fmt: skip
"""What else an operator needs to be called on one tensor."""


def at_zero(operator: str) -> Tensor:
    """An operator's value on zeros."""
    name = operator.removeprefix("aten.")
    kind = torch.complex128 if name in {"imag", "_conj"} else torch.float64
    zeros = torch.zeros(2, 3, dtype=torch.int64 if name == "bitwise_not" else kind)
    arguments = (zeros,) if name == "type_as" else ARGUMENTS.get(name, ())
    result: Tensor = getattr(torch.ops.aten, name)(zeros, *arguments)
    return result


def family(*rules: registry.Rule) -> list[str]:
    """Operators that these rules speak for."""
    return [o for o in registry.operators() if registry.find(o) in rules]


@pytest.mark.parametrize("operator", family(pointwise.copies, pointwise.keeps_zero))
def test_zero_stays_zero(operator: str) -> None:
    result = at_zero(operator)
    assert result.shape == (2, 3)
    assert not result.count_nonzero()


@pytest.mark.parametrize("operator", family(pointwise.loses_zero))
def test_zero_becomes_finite(operator: str) -> None:
    result = at_zero(operator)
    assert result.count_nonzero() == 6
    assert result.isfinite().all()


@pytest.mark.parametrize("operator", family(pointwise.infinite_at_zero))
def test_zero_becomes_infinite(operator: str) -> None:
    assert not at_zero(operator).isfinite().any()


# -- one rule at a time ------------------------------------------------------------------------------------------

BINARY = [
    torch.add, torch.sub, torch.mul, torch.maximum, torch.fmin, torch.eq, torch.atan2, torch.hypot, torch.complex,
    lambda a, b: torch.div(a, b.exp()), lambda a, b: torch.where(a > 2, a, b), lambda a, b: a.masked_fill(b > 4, 0),
    lambda a, b: torch.clamp(a, min=b), lambda a, b: torch.lerp(a, b, 0.5), lambda a, b: torch.addcmul(a, b, b),
    lambda a, b: torch.addcdiv(a, b, b.exp()), lambda a, b: torch.pow(a.exp(), b), lambda a, b: torch.xlogy(a, b.exp()),
    lambda a, b: (a + 0 * b).copy_(b), lambda a, b: torch.prelu(a[None], b.flatten()[:4].sum()[None]),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("function", BINARY)
@pytest.mark.parametrize("shape", [(4, 6), (6,), (4, 1), (1, 6), (3, 4, 6)])
def test_broadcasting(function: Callable[..., Tensor], shape: tuple[int, ...]) -> None:
    assert check_rule(function, [tagged(4, 6), tagged(*shape)])


def test_stored_operands_are_gathered() -> None:
    assert check_rule(lambda a, table: a * table + table[0], [tagged(4, 6)], [tagged(4, 6) / 7]) == 2


def test_halves_of_a_gate_go_together() -> None:
    assert check_rule(lambda a: torch.nn.functional.glu(a, 0), [tagged(8, 6)]) == 2
