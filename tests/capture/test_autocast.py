"""Regions under autocast become part of the graph with the casts that autocast makes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import ecospa_fx as eco
from ecospa_fx.coupling.couplings import parameter_shapes
from ecospa_fx.plan import Plan
from ecospa_fx.verify import masked_error


class Mixed(nn.Module):
    """Products in bfloat16, a norm and a softmax between them, a loss in float32, a region without autocast within."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(8, 16), nn.Linear(16, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            y = self.norm(self.down(self.up(x).relu()))
            with torch.autocast("cpu", enabled=False):
                scale = x.square().mean(-1, keepdim=True).rsqrt()
            y = torch.cat([y.softmax(-1), self.down(self.up(y).relu()) * scale], -1)
            loss = functional.mse_loss(y, torch.zeros_like(y))
        return y.float(), loss


def kept(model: nn.Module, x: Tensor) -> nn.Module:
    """The graph of a model of which nothing goes."""
    return eco.shrink(model, Plan((), tuple(parameter_shapes(model).items())), (x,))


@pytest.mark.slow
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_region_computes_in_the_types_that_it_had(gradients: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = Mixed().to(dtype), torch.randn(3, 5, 8, dtype=dtype)
    with torch.set_grad_enabled(gradients):
        plan = eco.plan(eco.detect(model, (x,)), 0.4, scores="magnitude")
        small = eco.shrink(model, plan, (x,))
    assert {s.kind: s.kept < s.size for s in plan}["ffn"]
    assert masked_error(model, small, plan, (x,)) < 1e-2  # a product of fewer numbers is rounded elsewhere
    for got, want in zip(kept(model, x)(x), model(x), strict=True):
        assert got.dtype is want.dtype
        assert torch.equal(got, want)


def test_gradients_pass_the_casts() -> None:
    torch.manual_seed(0)
    model, x = Mixed(), torch.randn(3, 5, 8)
    found = []
    for tree in (model, kept(model, x)):
        loss: Tensor = tree(x)[1]
        found.append(torch.autograd.grad(loss, list(tree.parameters())))
    for got, want in zip(*found, strict=True):
        assert got.dtype is want.dtype
        torch.testing.assert_close(got, want, rtol=2e-2, atol=1e-4)
