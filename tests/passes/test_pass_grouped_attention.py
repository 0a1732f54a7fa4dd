"""Repeated keys and values are recognised by which head reads which, however they are repeated."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as attend

from ecospa_fx.passes import GroupedAttention, RemoveInert
from tests.support.attention import HEADS, attention_arguments, calls, inputs, traced

GROUPS = 2
Repeat = Callable[[Tensor], Tensor]


def expanded(x: Tensor) -> Tensor:
    batch, groups, length, width = x.shape
    wide = x[:, :, None, :, :].expand(batch, groups, HEADS // GROUPS, length, width)
    return wide.reshape(batch, HEADS, length, width)


REPEATED: dict[str, Repeat] = {
    "expanded": expanded,
    "interleaved": lambda x: x.repeat_interleave(HEADS // GROUPS, 1),
    "before transposing": lambda x: x.transpose(1, 2).repeat_interleave(HEADS // GROUPS, 2).transpose(1, 2),
}
OTHERS: dict[str, Repeat] = {
    "tiled": lambda x: x.repeat(1, HEADS // GROUPS, 1, 1),
    "tiled by views": lambda x: x[:, None].expand(-1, 2, -1, -1, -1).reshape(x.shape[0], HEADS, -1, x.shape[3]),
    "changed": lambda x: expanded(x).sin(),
}


class Grouped(nn.Module):
    """Attention of many query heads to few key heads, the keys turned before, as rotary embedding does."""

    def __init__(self, key: Repeat, value: Repeat | None = None) -> None:
        super().__init__()
        self.key, self.value = key, value or key

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, self.key(k.cos()), self.value(v), is_causal=True)


def grouped(key: Repeat, value: Repeat | None = None) -> torch.fx.GraphModule:
    return traced(Grouped(key, value), inputs(heads=GROUPS))


@pytest.mark.parametrize("name", REPEATED)
def test_golden_repetitions(name: str) -> None:
    graph = grouped(REPEATED[name])
    result = GroupedAttention().run(graph)
    assert (result.changes, result.reasons) == (1, ())
    assert attention_arguments(graph)["enable_gqa"] is True
    RemoveInert().run(graph)
    assert calls(graph) == ["cos", "scaled_dot_product_attention"]


@pytest.mark.parametrize("name", OTHERS)
def test_twin_other_arrangements_stay(name: str) -> None:
    for graph in (grouped(OTHERS[name]), grouped(expanded, OTHERS[name])):
        before = str(graph.graph)
        assert GroupedAttention().run(graph).changes == 0
        assert str(graph.graph) == before


def test_twin_a_key_that_is_written_to_stays() -> None:
    class Written(Grouped):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k = k.clone()
            repeated = expanded(k)
            k.zero_()
            return attend(q, repeated, expanded(v))

    graph = traced(Written(expanded), inputs(heads=GROUPS))
    result = GroupedAttention().run(graph)
    assert result.changes == 0
    assert "is written to" in result.reasons[0]


@pytest.mark.parametrize("name", REPEATED)
def test_equal_to_repetition(name: str) -> None:
    graph = grouped(REPEATED[name])
    sizes = ((2, 6), (3, 9))
    wants = [graph(*inputs(*size, heads=GROUPS)) for size in sizes]
    GroupedAttention().run(graph)
    graph.recompile()
    for size, want in zip(sizes, wants, strict=True):
        assert torch.allclose(graph(*inputs(*size, heads=GROUPS)), want, rtol=1e-12, atol=1e-12)


def test_again_changes_nothing() -> None:
    graph = grouped(expanded)
    GroupedAttention().run(graph)
    before = str(graph.graph)
    assert GroupedAttention().run(graph).modified is False
    assert str(graph.graph) == before
