"""Attention of different widths runs at one, and gives the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as attend

import ecospa_fx as eco
from ecospa_fx import demo
from ecospa_fx.passes import CLEANUP, EqualWidths
from ecospa_fx.verify import masked_error
from tests.support.attention import calls, traced

CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "narrow values": (8, 3, {"is_causal": True}),
    "narrow keys": (3, 8, {"is_causal": True}),
    "scaled": (3, 8, {"scale": 0.7}),
    "grouped": (6, 4, {"is_causal": True, "enable_gqa": True}),
}


class Attending(nn.Module):
    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, **self.options).transpose(1, 2).flatten(2)


def example(inner: int, outer: int, grouped: bool, batch: int = 2, length: int = 5) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    heads = 2 if grouped else 4
    sizes = ((4, inner), (heads, inner), (heads, outer))
    return tuple(torch.randn(batch, h, length, w, generator=generator).double() for h, w in sizes)


def attending(name: str) -> torch.fx.GraphModule:
    inner, outer, options = CASES[name]
    return traced(Attending(options), example(inner, outer, name == "grouped"))


@pytest.mark.parametrize("name", CASES)
def test_golden_widths(name: str) -> None:
    inner, outer, _ = CASES[name]
    graph = attending(name)
    assert EqualWidths().run(graph).changes == 1
    names = calls(graph)
    assert names.count("constant_pad_nd") == (1 if outer < inner else 2)
    assert names.count("slice") == (1 if outer < inner else 0)
    (node,) = (n for n in graph.graph.nodes if "scaled_dot" in str(n.target))
    assert len({n.meta["val"].shape[-1] for n in (*node.args[:3], node)}) == 1


@pytest.mark.parametrize("name", CASES)
def test_equal_to_different_widths(name: str) -> None:
    inner, outer, _ = CASES[name]
    graph = attending(name)
    samples = [example(inner, outer, name == "grouped", *size) for size in ((2, 5), (3, 9))]
    wants = [graph(*sample) for sample in samples]
    EqualWidths().run(graph)
    graph.recompile()
    for sample, want in zip(samples, wants, strict=True):
        assert torch.allclose(graph(*sample), want, rtol=1e-12, atol=1e-12)


def test_twin_equal_widths_stay() -> None:
    graph = traced(Attending({"is_causal": True}), example(6, 6, False))
    before = str(graph.graph)
    assert EqualWidths().run(graph).changes == 0
    assert str(graph.graph) == before


@pytest.mark.parametrize("name", CASES)
def test_again_changes_nothing(name: str) -> None:
    graph = attending(name)
    EqualWidths().run(graph)
    before = str(graph.graph)
    assert EqualWidths().run(graph).modified is False
    assert str(graph.graph) == before


@pytest.mark.slow
@pytest.mark.parametrize("kinds", ["qk", "vo"])
def test_a_shrunk_model_keeps_the_fused_kernel(kinds: str) -> None:
    """And equals the masked one; the kernel is told by what a profile of the call names."""
    model, ids = demo.load().double(), torch.randint(0, 256, (2, 12))
    plan = eco.plan(eco.detect(model, (ids,)), 0.4, "random", kinds=kinds)
    small = eco.shrink(model, plan, (ids,))
    assert masked_error(model, small, plan, (ids,)) < 1e-9
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        small(ids)
    names = {event.key for event in profile.key_averages()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in names
    assert "aten::_scaled_dot_product_attention_math" not in names
    assert any(isinstance(one, EqualWidths) for one in CLEANUP)
