"""What the elements of tensors are is found where it is asked for, and given up where it takes too long to say."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ecospa_fx.indexing.evaluate import Elements
from ecospa_fx.indexing.values import LARGEST, Piecewise, all_of, at_least_zero, position
from ecospa_fx.passes import CLEANUP, CausalAttention, RemoveInert, run_passes
from tests.support.attention import Masked, attention_arguments, inputs, traced


def regions(q: Tensor) -> Tensor:
    """Which of many regions a position belongs to, compared in pairs as shifted windows are."""
    index = torch.arange(q.shape[2])
    row, column = (sum((index >= b).long() for b in bounds) for bounds in ((1, 2, 3), (2, 4, 5)))
    label = torch.as_tensor(row * 7 + column)
    gap = label[:, None] - label[None, :]
    return torch.zeros(gap.shape).masked_fill(gap != 0, -100.0).masked_fill(gap == 0, 0.0).to(q.dtype)


def folded(q: Tensor) -> Tensor:
    """Indices that a chain of views regroups again and again."""
    n = q.shape[2]
    index = torch.arange(36)
    for _ in range(12):
        index = index.view(6, 6).transpose(0, 1).reshape(36)
    return index[:n, None] >= index[None, :n]


def stripes(q: Tensor) -> Tensor:
    """One more region for every step."""
    index, mask = torch.arange(q.shape[2]), torch.zeros(q.shape[2], q.shape[2], dtype=q.dtype)
    for step in range(12):
        inside = (index >= step) & (index < 2 * step + 1)
        mask = torch.where(inside[:, None] & inside[None, :], mask + step, mask)
    return mask


@pytest.mark.slow
@pytest.mark.parametrize("mask", [regions, folded, stripes])
def test_what_takes_long_expressions_is_given_up_and_stays(
    mask: Callable[[Tensor], Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    graph = traced(Masked(mask), inputs())
    want = graph(*inputs(3, 11))
    with caplog.at_level(logging.DEBUG, "ecospa_fx"):
        assert CausalAttention().run(graph).changes == 0
    assert any("take too long an expression" in r.getMessage() for r in caplog.records)
    run_passes(graph, CLEANUP)
    assert torch.equal(graph(*inputs(3, 11)), want)


def test_expressions_stay_small() -> None:
    elements = Elements(traced(Masked(regions), inputs()).graph)
    sizes = [sum(1 for _ in _walk(c)) for v in elements.values() if isinstance(v, Piecewise) for c, _ in v.cases]
    assert 0 < max(sizes) <= LARGEST


def _walk(expression: object) -> list[object]:
    return [expression, *(part for inner in getattr(expression, "args", ()) for part in _walk(inner))]


def test_a_causal_mask_beside_many_regions_is_still_a_flag() -> None:
    class Both(Masked):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            first = super().forward(q, k, v)
            return first + nn.functional.scaled_dot_product_attention(q, k, v, regions(q)).transpose(1, 2).flatten(2)

    graph = traced(Both(lambda q: torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()), inputs())
    want = graph(*inputs(2, 9))
    assert CausalAttention().run(graph).changes == 1
    graph.recompile()
    assert torch.allclose(graph(*inputs(2, 9)), want, rtol=1e-12, atol=1e-12)


def test_masks_of_all_layers_are_worked_out_once() -> None:
    class Layers(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for _ in range(3):
                q = nn.functional.scaled_dot_product_attention(q, k, v, torch.ones(6, 6, dtype=torch.bool).tril())
            return q

    graph = traced(Layers(), inputs())
    elements = Elements(graph.graph)
    masks = [elements[n] for n in graph.graph.nodes if "tril" in str(n.target)]
    assert len(masks) == 3
    assert all(mask is masks[0] for mask in masks)
    assert CausalAttention().run(graph).changes == 3


def test_a_chain_longer_than_the_stack() -> None:
    class Deep(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            rows = torch.arange(q.shape[2])[:, None]
            for _ in range(120):
                rows = rows + 1
            for _ in range(120):
                rows = rows - 1
            return nn.functional.scaled_dot_product_attention(q, k, v, rows >= torch.arange(q.shape[2]))

    graph = traced(Deep(), inputs())
    assert CausalAttention().run(graph).changes == 1
    assert attention_arguments(graph) == {"attn_mask": None, "is_causal": True}


def test_comparisons_that_exclude_each_other_are_false_and_weaker_ones_go() -> None:
    row, column = position(0), position(1)
    atoms = [at_least_zero(row - 3), at_least_zero(2 - row), at_least_zero(row - 1), at_least_zero(row - column)]
    assert all_of(atoms[0], atoms[1]) == False  # noqa: E712 (sympy's)
    assert all_of(atoms[0], atoms[2]) == atoms[0]
    assert set(all_of(*atoms[1:]).args) == set(atoms[1:])


def test_only_views_of_the_whole_are_inert() -> None:
    class Views(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            same = x[:, 0:].view(4, 4).reshape(4, 4).expand(4, 4)
            return same + x.t().contiguous() + x[:, 1:].repeat(1, 2)[:, :4]

    graph = traced(Views(), (torch.randn(4, 4),), axes=())
    want = graph(torch.eye(4))
    RemoveInert().run(graph)
    graph.recompile()
    assert torch.equal(graph(torch.eye(4)), want)
    assert [str(n.target) for n in graph.graph.nodes if "view" in str(n.target) or "expand" in str(n.target)] == []
