"""Code that computes with lengths: numbers in place of symbols are such that everything can be computed with them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import ecospa_fx as eco
from ecospa_fx.verify import masked_error


class Lengths(nn.Module):
    """An FFN after a function that computes with the length."""

    def __init__(self, shorten: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.shorten = nn.Linear(4, 6), nn.Linear(6, 4), shorten

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(torch.relu(self.up(self.shorten(x, x.shape[1]))))
        return result


@pytest.mark.parametrize(
    "shorten",
    [
        lambda x, n: x.unflatten(1, (n // 16, n // (n // 16))).mean(2),
        lambda x, n: x[:, : n - n % (n // 8)],
        lambda x, n: x[:, : n // (n - 20)],
        lambda x, n: x[:, : int(n / (n // 16))],
    ],
    ids=["groups", "remainder", "difference", "true division"],
)
def test_lengths_that_are_divided_by(shorten: Callable[[Tensor, int], Tensor]) -> None:
    model, args = Lengths(shorten).double().eval(), (torch.randn(2, 32, 4, dtype=torch.float64),)
    plan = eco.plan(eco.detect(model, args), ratio=0.5, scores="random")
    assert plan
    small = eco.shrink(model, plan, args)
    for rows in (2, 3):
        assert masked_error(model, small, plan, (torch.randn(rows, 32, 4, dtype=torch.float64),)) < 1e-12
