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
from tests.oracle import Case, check_exact, check_literal, check_rule, sandwich, tagged

NOT_FINITE = "not finite at 0"
SUMMED = "summed over although removed elements are not zero there"

CASES = [
    sandwich("aten.neg", lambda h: -h.clone(), "pair 8"),
    sandwich("aten.dropout", lambda h: F.dropout(h, 0.5, False), "pair 8"),
    sandwich("aten.relu", torch.relu),
    sandwich("aten.gelu", F.gelu),
    sandwich("aten.hardtanh", lambda h: F.hardtanh(h, -0.5, 2.0)),
    sandwich("aten.hardtanh", lambda h: F.hardtanh(h, 0.5, 2.0), "", SUMMED, label="without-0"),
    sandwich("aten.atanh", lambda h: torch.atanh(h / 100)),
    sandwich("aten.erfinv", lambda h: torch.erfinv(h / 100)),
    sandwich("aten.sigmoid", torch.sigmoid, "", SUMMED),
    sandwich("aten.sigmoid", lambda h: h * torch.sigmoid(h), label="swish"),
    sandwich("aten.log", lambda h: h.abs().log(), "", NOT_FINITE),
    sandwich("aten.rsqrt", lambda h: h * (h.square() + 1).rsqrt(), label="shifted"),
    sandwich("aten.add", lambda h: h + h.relu(), "ffn 8"),
    sandwich("aten.add", lambda h: h + 1, "", SUMMED, label="scalar"),
    sandwich("aten.add", lambda h: (h + 1j).real + h, "pair 8", label="complex-scalar"),
    sandwich("aten.add", lambda h, bias: (h + bias).relu(), shapes=[(8,)], label="bias"),
    sandwich("aten.add", lambda h: h + torch.arange(8), "", "summed over although", label="stored"),
    sandwich("aten.sub", lambda h, p: (h - p).relu(), shapes=[(1, 8)]),
    sandwich("aten.rsub", lambda h: torch.rsub(h, h.relu())),
    sandwich("aten.mul", lambda h: h * torch.arange(8), "ffn 8", label="stored"),
    sandwich("aten.mul", lambda h, gate: h * gate, shapes=[(8,)], label="parameter"),
    sandwich("aten.logical_and", lambda h: h * torch.logical_and(h, h > 0), "ffn 8"),
    sandwich("aten.div", lambda h: h / (h.exp() + 1)),
    sandwich("aten.div", lambda h: h / (h.square()), "", NOT_FINITE, label="by-0"),
    sandwich("aten.div", lambda h: 1 / (h.abs() + 1), "", SUMMED, label="under-1"),
    sandwich("aten.remainder", lambda h: h % 2, "pair 8"),
    sandwich("aten.pow", lambda h: h**2),
    sandwich("aten.pow", lambda h: h**-1.0, "", NOT_FINITE, label="negative"),
    sandwich("aten.pow", lambda h: h * 2**h, label="of-a-number"),
    sandwich("aten.pow", lambda h: h.abs() ** torch.arange(-3.0, 5.0), "", NOT_FINITE, label="tensor-exponent"),
    sandwich("aten.where", lambda h: torch.where(h > 0, h, 2 * h)),
    sandwich("aten.where", lambda h: torch.where(h > 0, h, 1.0), "", SUMMED, label="or-1"),
    sandwich("aten.where", lambda h: h + torch.where(h > 0)[0].sum(), "", "positions", label="positions"),
    sandwich("aten.maximum", lambda h: torch.maximum(h, h.sin())),
    sandwich("aten.gt", lambda h: h * (h > 0)),
    sandwich("aten.eq", lambda h: h.eq(0).double(), "", SUMMED, label="summed"),
    sandwich("aten.complex", lambda h: torch.view_as_real(torch.complex(h, 2 * h)).sum(-1), "ffn 8"),
    sandwich("aten.clamp", lambda h: h.clamp(-1, 1)),
    sandwich("aten.clamp", lambda h: h.clamp(min=0.5), "", SUMMED, label="without-0"),
    sandwich("aten.clamp", lambda h, low: h * h.clamp(min=low), shapes=[(8,)], label="tensor"),
    sandwich("aten.masked_fill", lambda h: h.masked_fill(h > 1, 0.0), "ffn 8"),
    sandwich("aten.masked_fill", lambda h: h.masked_fill(h > 1, 3.0), "", SUMMED, label="with-3"),
    sandwich("aten.addcmul", lambda h, a, b: torch.addcmul(h, a, b), "pair 8", shapes=[(8,), (8,)]),
    sandwich("aten.addcdiv", lambda h, a, b: torch.addcdiv(h, a, b), "", NOT_FINITE, shapes=[(8,), (8,)]),
    sandwich("aten.lerp", lambda h, a: torch.lerp(h, a, 0.3), "", SUMMED, shapes=[(8,)]),
    sandwich("aten.copy_", lambda h: torch.empty_like(h).copy_(h.relu())),
    sandwich("aten.prelu", lambda h, slope: F.prelu(h.transpose(1, 2), slope).transpose(1, 2), shapes=[(8,)]),
    sandwich("aten.prelu", F.prelu, shapes=[(1,)], label="one"),
    sandwich("aten.glu", F.glu, "ffn 4"),
    sandwich("aten.glu", lambda h: F.glu(h, dim=1), "", "", width=8, label="rows")
    if False
    else sandwich("aten.glu", lambda h: F.glu(torch.cat([h, h.relu()], 1), dim=1), "ffn 8", label="rows"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_literal(case: Case) -> None:
    check_literal(case)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_exact(case: Case) -> None:
    check_exact(case)
