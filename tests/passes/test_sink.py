"""Concatenations behind views: heads of several kinds side by side keep widths of their own, and no number changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import ecospa_fx as eco
from ecospa_fx.passes.canonicalise.sink_concatenations import SinkConcatenations
from ecospa_fx.verify import masked_error
from tests.support.exported_once import exported_once

HEADS, WIDTH = 2, 4
Join = Callable[[Tensor, Tensor], Tensor]


def viewed(a: Tensor, b: Tensor) -> Tensor:
    """[batch, time, heads, width] side by side along the heads"""
    return torch.cat([a, b], 2).view(a.shape[0], a.shape[1], -1)


def transposed(a: Tensor, b: Tensor) -> Tensor:
    """[batch, heads, time, width] side by side along the heads, heads moved inside"""
    return torch.cat([a.transpose(1, 2), b.transpose(1, 2)], 1).transpose(1, 2).contiguous().flatten(2)


def stacked(a: Tensor, b: Tensor) -> Tensor:
    """[batch, time, 2, heads, width]"""
    return torch.stack([a, b], -3).reshape(a.shape[0], a.shape[1], -1)


def written(a: Tensor, b: Tensor) -> Tensor:
    """The whole is written into before it is viewed."""
    whole = torch.cat([a, b], 2)
    whole[..., 0] += 0.0
    return whole.view(a.shape[0], a.shape[1], -1)


class TwoKinds(nn.Module):
    """Two groups of heads, each behind a mixture of its own, into one output projection."""

    def __init__(self, join: Join) -> None:
        super().__init__()
        self.join, n = join, HEADS * WIDTH
        self.a, self.b, self.out = nn.Linear(6, n), nn.Linear(6, n), nn.Linear(2 * n, 6)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x).unflatten(-1, (HEADS, WIDTH)).relu()
        b = torch.einsum("bthw,bsh->bshw", self.b(x).unflatten(-1, (HEADS, WIDTH)), x[..., :HEADS])
        result: Tensor = self.out(self.join(a, b))
        return result


@pytest.mark.slow
@pytest.mark.parametrize("join", [viewed, transposed, stacked])
def test_each_kind_has_its_own_width(join: Join) -> None:
    model, args = TwoKinds(join).double(), (torch.randn(3, 5, 6).double(),)
    couplings = eco.detect(model, args)
    inner = [c for c in couplings.offered if c.size == WIDTH]
    assert sorted((c.kind, c.carriers) for c in inner) == [("ffn", HEADS), ("pair", HEADS)]
    with exported_once():
        for seed in range(2):
            plan = eco.plan(couplings, ratio=0.5, scores="random", seed=seed)
            assert masked_error(model, eco.shrink(model, plan, args), plan, args) <= 1e-9


@pytest.mark.parametrize("join", [viewed, transposed, stacked])
def test_the_graph_computes_what_the_module_does(join: Join) -> None:
    model, x = TwoKinds(join).double(), torch.randn(3, 5, 6).double()
    graph = torch.export.export(model, (x,)).module()
    assert isinstance(graph, torch.fx.GraphModule)
    assert SinkConcatenations().run(graph).modified
    graph.recompile()
    assert torch.equal(graph(x), model(x))
    assert not SinkConcatenations().run(graph).modified


def test_what_is_written_into_stays() -> None:
    graph = torch.export.export(TwoKinds(written), (torch.randn(3, 5, 6),)).module()
    assert isinstance(graph, torch.fx.GraphModule)
    before = str(graph.graph)
    assert not SinkConcatenations().run(graph).modified
    assert str(graph.graph) == before


def test_a_join_along_an_inner_axis_stays() -> None:
    def inner(a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([a, b], -1).flatten(2)

    graph = torch.export.export(TwoKinds(inner), (torch.randn(3, 5, 6),)).module()
    assert isinstance(graph, torch.fx.GraphModule)
    assert not SinkConcatenations().run(graph).modified
