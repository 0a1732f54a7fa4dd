"""Operators that make tensors: constants adopt what they meet, positions are never cut, noise blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.oracle import Case, check_exact, check_literal, check_rule, sandwich, tagged

NOISE = "random numbers are drawn"

CASES = [
    sandwich("aten.zeros", lambda h: torch.cat([h.relu(), torch.zeros(h.shape[0], 1, 8).to(h)], 1)),
    sandwich("aten.new_zeros", lambda h: (h.new_zeros(8) + h.relu()).sum(-1, keepdim=True), "ffn 8"),
    sandwich("aten.empty", lambda h: torch.empty(8).to(h).fill_(0.5) * h.relu()),
    sandwich("aten.ones", lambda h: torch.ones(3, 8).to(h) * h.relu()),
    sandwich("aten.full", lambda h: h.relu() + torch.full((8,), 2.0)),
    sandwich(
        "aten.new_full", lambda h: (h.relu() + h.new_full((8,), 2.0)).sum(-1, keepdim=True), "", "summed over although"
    ),
    sandwich("aten.zeros_like", lambda h: (torch.zeros_like(h) + h.relu()).sum(-1, keepdim=True), "ffn 8"),
    sandwich("aten.ones_like", lambda h: torch.ones_like(h) * h.relu()),
    sandwich("aten.full_like", lambda h: torch.full_like(h, 3.0).sum(-1, keepdim=True), "", "summed over although"),
    sandwich("aten.arange", lambda h: h.relu() * torch.arange(8)),
    sandwich("aten.eye", lambda h: h.relu() @ torch.eye(8).to(h), "", "meets a stored tensor"),
    sandwich("aten.linspace", lambda h: h.relu() + torch.linspace(0, 1, 3)[:, None]),
    sandwich("aten.randn", lambda h: h.relu() + 0 * torch.randn(8)),
    sandwich("aten.rand_like", lambda h: h.relu() + 0 * torch.rand_like(h), "", NOISE),
    sandwich("aten.bernoulli", lambda h: h + 0 * torch.bernoulli(h.sigmoid()), "", NOISE),
]


def test_literal(case: Case) -> None:
    check_literal(case)


@pytest.mark.slow
def test_exact(case: Case) -> None:
    check_exact(case)


MADE: list[Callable[[Tensor], Any]] = [
    lambda a: a * torch.ones(4, 6), lambda a: a + torch.zeros(6).double(), lambda a: a + torch.full((4, 1), 2.0),
    lambda a: a.new_ones(4, 6) @ a.T, lambda a: a.new_zeros(4, 6).copy_(a), lambda a: a * torch.arange(6),
    lambda a: torch.zeros_like(a) + a, lambda a: torch.full_like(a, 2.0), lambda a: a.new_empty(4, 6).copy_(a),
    lambda a: torch.ones(24).double().view(4, 6) * a, lambda a: torch.zeros(2, 12).double().view(4, 6) + a,
    lambda a: a + torch.tril_indices(6, 4)[0].sum(), lambda a: a + torch.tensor(3.0),
]  # fmt: skip


@pytest.mark.parametrize("function", MADE)
def test_what_is_made_adopts_dims(function: Callable[[Tensor], Any]) -> None:
    for seed in range(2):
        assert check_rule(function, [tagged(4, 6)], seed=seed)
