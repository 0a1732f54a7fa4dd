"""Operators along an axis: a sum is a contraction, a statistic needs every element, a norm mixes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.oracle import Case, Sandwich, check_exact, check_literal, check_rule, sandwich, tagged

TAKEN, RUNS, ORDERS, NORMS = "is taken over it", "runs along it", "orders its elements", "normalises over it"


def turned(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The function with channels on axis 1, as [batch, channels, time]."""
    return lambda h: function(h.mT).mT


class Norm(nn.Module):
    """linear → normalisation over channels first → relu → linear, and a normalisation of the input itself."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.first, self.up, self.norm, self.down = norm(6), nn.Linear(6, 8), norm(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.norm(self.up(self.first(x.mT).mT).mT)
        result: Tensor = self.down(h.mT.relu())
        return result


CASES = [
    sandwich("aten.sum", lambda h: h.relu().sum(-1, keepdim=True), "ffn 8"),
    sandwich("aten.sum", lambda h: h.relu().sum(1), label="time"),
    sandwich("aten.sum", lambda h: h.exp().sum(-1, keepdim=True), "", "summed over although", label="not-0"),
    sandwich("aten.nansum", lambda h: h.relu().nansum((0, 1)), label="several"),
    sandwich("aten.mean", lambda h: h.relu().mean(1), label="time"),
    sandwich("aten.mean", lambda h: h.relu().mean(-1, keepdim=True), "", TAKEN, label="channels"),
    sandwich("aten.amax", lambda h: h.amax(-1, keepdim=True), "", TAKEN),
    sandwich("aten.argmax", lambda h: h.relu() + h.argmax(-1, keepdim=True), "", TAKEN),
    sandwich("aten.linalg_vector_norm", lambda h: h.relu() * torch.linalg.vector_norm(h, dim=1, keepdim=True)),
    sandwich("aten.std", lambda h: h.relu() * h.std(), "", TAKEN, label="all"),
    sandwich("aten.max", lambda h: h.relu().max(1).values, label="time"),
    sandwich("aten.max", lambda h: torch.max(h, h.sin()), label="of-two"),
    sandwich("aten.median", lambda h: h.relu().median(1).values[:, None], label="time"),
    sandwich("aten.mode", lambda h: h.relu().mode().values[..., None], "", TAKEN, label="default-axis"),
    sandwich("aten.kthvalue", lambda h: h.relu().mT.kthvalue(2).values[:, None], label="time"),
    sandwich("aten.var_mean", lambda h: h * torch.var_mean(h, -1, keepdim=True)[1], "", TAKEN),
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
    sandwich("aten.layer_norm", lambda h, w, b: F.layer_norm(h.relu(), (8,), w, b), "", NORMS, shapes=[(8,), (8,)]),
    sandwich("aten.layer_norm", lambda h: F.layer_norm(h.relu().mT, (3,)).mT, label="time"),
    sandwich("aten.rms_norm", lambda h, w: F.rms_norm(h.relu(), (8,), w), "", NORMS, shapes=[(8,)]),
    sandwich(
        "aten.native_layer_norm", lambda h: torch.native_layer_norm(h.relu(), (8,), None, None, 1e-5)[0], "", NORMS
    ),
    sandwich("aten.batch_norm", turned(lambda h: F.batch_norm(h.relu(), torch.arange(8).to(h), torch.ones(8).to(h)))),
    sandwich("aten.instance_norm", turned(lambda h: F.instance_norm(h.relu()))),
    Case("aten.batch_norm", lambda: Norm(nn.BatchNorm1d), "ffn 6, ffn 8", label="module"),
    Case("aten.group_norm", lambda: Norm(lambda n: nn.GroupNorm(2, n)), "", NORMS),
    Case("aten.linear", lambda: Sandwich(torch.relu), "ffn 8", label="twin"),
]


def test_literal(case: Case) -> None:
    check_literal(case)


@pytest.mark.slow
def test_exact(case: Case) -> None:
    check_exact(case)


REDUCTIONS: list[Callable[[Tensor], Any]] = [
    lambda a: a.sum(1), lambda a: a.sum(), lambda a: a.nansum(-1, keepdim=True), lambda a: a.mean(0),
    lambda a: a.prod(1),
    lambda a: a.std(1), lambda a: a.var(0), lambda a: a.norm(dim=1), lambda a: torch.linalg.vector_norm(a, dim=0),
    lambda a: a.amax(1), lambda a: a.amin(0, keepdim=True), lambda a: a.argmax(1), lambda a: a.argmin(),
    lambda a: a.all(1),
    lambda a: a.any(0), lambda a: a.logsumexp(0), lambda a: a.nanmean(1), lambda a: a.count_nonzero(0),
    lambda a: a.median(1), lambda a: a.median(), lambda a: a.max(1), lambda a: a.min(), lambda a: a.mode(),
    lambda a: a.kthvalue(2), lambda a: torch.var_mean(a, 0), lambda a: torch.std_mean(a), lambda a: a.aminmax(dim=1),
    lambda a: a.softmax(1), lambda a: a.log_softmax(0), lambda a: a.cumsum(1), lambda a: a.cumprod(0),
    lambda a: a.cummin(1),
    lambda a: a.logcumsumexp(1), lambda a: a.renorm(2, 0, 1.0), lambda a: a.exp().renorm(2, 1, 1.0),
    lambda a: a.sort(0), lambda a: a.topk(2), lambda a: a.msort(),
    lambda a: a.argsort(), lambda a: F.layer_norm(a, (5,)), lambda a: F.rms_norm(a, (4, 5)), lambda a: F.group_norm(a,
    2),
    lambda a: F.batch_norm(a, None, None, training=True), lambda a: F.instance_norm(a),
    lambda a: torch.native_layer_norm(a, (5,), None, None, 1e-5), lambda a: torch.native_layer_norm(a, (4, 5), None,
    None, 1e-5),
    lambda a: torch.native_batch_norm(a, None, None, None, None, True, 0.1, 1e-5),
    lambda a: torch.native_group_norm(a, None, None, 6, 4, 5, 2, 1e-5),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("function", REDUCTIONS)
def test_one_reduction(function: Callable[[Tensor], Any]) -> None:
    for seed in range(2):
        check_rule(function, [tagged(6, 4, 5).sin()], seed=seed)


def test_statistics_of_parameters_are_gathered() -> None:
    def normalised(a: Tensor, w: Tensor, b: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        return F.batch_norm(a, mean, variance, w, b)

    assert check_rule(normalised, [tagged(3, 6), tagged(6), tagged(6)], [tagged(6), tagged(6)]) == 1
