"""Operators along an axis: a sum is a contraction, a statistic needs every element."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.oracle import Case, Sandwich, check_exact, check_literal, check_rule, sandwich, tagged

TAKEN, RUNS, ORDERS = "is taken over it", "runs along it", "orders its elements"


CASES = [
    sandwich("aten.sum", lambda h: h.relu().sum(-1, keepdim=True), "ffn 8"),
    sandwich("aten.sum", lambda h: h.relu().sum(1), label="time"),
    sandwich("aten.sum", lambda h: h.exp().sum(-1, keepdim=True), "", "summed over although", label="not-0"),
    sandwich("aten.nansum", lambda h: h.relu().nansum((0, 1)), label="several"),
    sandwich("aten.amax", lambda h: h.amax(-1, keepdim=True), "", TAKEN),
    sandwich("aten.argmax", lambda h: h.relu() + h.argmax(-1, keepdim=True), "", TAKEN),
    sandwich("aten.max", lambda h: h.relu().max(1).values, label="time"),
    sandwich("aten.max", lambda h: torch.max(h, h.sin()), label="of-two"),
    sandwich("aten.median", lambda h: h.relu().median(1).values[:, None], label="time"),
    sandwich("aten.mode", lambda h: h.relu().mode().values[..., None], "", TAKEN, label="default-axis"),
    sandwich("aten.kthvalue", lambda h: h.relu().mT.kthvalue(2).values[:, None], label="time"),
    sandwich("aten.softmax", lambda h: h.softmax(1), label="time"),
    sandwich("aten.softmax", lambda h: h.softmax(-1), "", RUNS, label="channels"),
    sandwich("aten.cumsum", lambda h: h.relu().cumsum(1).sum(-1, keepdim=True), "ffn 8", label="time"),
    sandwich("aten.cumsum", lambda h: h.relu().cumsum(2), "", RUNS, label="channels"),
    sandwich("aten.cummax", lambda h: h.relu().cummax(1)[0], label="time"),
    sandwich("aten.renorm", lambda h: h.relu().renorm(2, 1, 0.1)),
    sandwich("aten.renorm", lambda h: h.exp().renorm(2, 1, 0.1), "", "takes norms over it", label="not-0"),
    sandwich("aten.sort", lambda h: h.relu().sort(1)[0], label="time"),
    sandwich("aten.sort", lambda h: h.relu().sort()[0], "", ORDERS, label="channels"),
    sandwich("aten.topk", lambda h: h.relu().topk(2, 1)[0], label="time"),
    sandwich("aten.argsort", lambda h: h * h.argsort(), "", ORDERS),
    sandwich("aten.msort", lambda h: h.relu().permute(1, 0, 2).msort().permute(1, 0, 2), label="time"),
    Case("aten.linear", lambda: Sandwich(torch.relu), "ffn 8", label="twin"),
]


def test_literal(case: Case) -> None:
    check_literal(case)


@pytest.mark.slow
def test_exact(case: Case) -> None:
    check_exact(case)


REDUCTIONS: list[Callable[[Tensor], Any]] = [
    lambda a: a.sum(1), lambda a: a.sum(), lambda a: a.nansum(-1, keepdim=True), lambda a: a.prod(1),
    lambda a: a.amax(1), lambda a: a.amin(0, keepdim=True), lambda a: a.argmax(1), lambda a: a.argmin(),
    lambda a: a.all(1), lambda a: a.any(0), lambda a: a.logsumexp(0), lambda a: a.nanmean(1),
    lambda a: a.count_nonzero(0), lambda a: a.median(1), lambda a: a.median(), lambda a: a.max(1), lambda a: a.min(),
    lambda a: a.mode(), lambda a: a.kthvalue(2), lambda a: a.aminmax(dim=1), lambda a: a.softmax(1),
    lambda a: a.log_softmax(0), lambda a: a.cumsum(1), lambda a: a.cumprod(0), lambda a: a.cummin(1),
    lambda a: a.logcumsumexp(1), lambda a: a.renorm(2, 0, 1.0), lambda a: a.exp().renorm(2, 1, 1.0),
    lambda a: a.sort(0), lambda a: a.topk(2), lambda a: a.msort(), lambda a: a.argsort(),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("function", REDUCTIONS)
def test_one_reduction(function: Callable[[Tensor], Any]) -> None:
    for seed in range(2):
        check_rule(function, [tagged(6, 4, 5).sin()], seed=seed)
