"""Positions chosen by computed indices: the chosen axis stays, the others pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.support.oracle import Case, check_exact, check_literal, check_rule, sandwich, tagged

CHOSEN = "chooses its positions by computed indices"
WRITES, COMPUTED = "writes to computed positions", "computes positions"
EVEN = torch.tensor([0, 2, 4])
ORDER = torch.tensor([3, 0, 7, 1, 5, 2, 6, 4])


def turned(h: Tensor) -> Tensor:
    """A rotation of one half against the other."""
    return h + torch.cat([-h[..., 4:], h[..., :4]], -1)


CASES = [
    sandwich("aten.embedding", lambda h, w: h.relu() + F.embedding(torch.arange(3), w), shapes=[(4, 8)],
             blocked=CHOSEN),
    sandwich("aten.embedding", lambda h, w: F.embedding(torch.arange(3), w).expand(h.shape[0], -1, -1).relu(), "ffn 8",
             CHOSEN, shapes=[(4, 8)], label="alone"),
    sandwich("aten.index_select", lambda h: h.relu().index_select(1, torch.tensor([2, 0]))),
    sandwich("aten.index_select", lambda h: h.relu().index_select(2, EVEN + h.new_zeros(()).long()), "", CHOSEN,
             label="channels"),
    sandwich("aten.index", lambda h: h.relu()[:, torch.tensor([2, 0, 0])]),
    sandwich("aten.index", lambda h: h.relu()[..., torch.arange(6).remainder(4)], "ffn 2, ffn 2, ffn 4",
             label="channels"),
    sandwich("aten.index", lambda h: h.relu()[..., ORDER], label="fixed"),
    sandwich("aten.index", lambda h: h.relu()[..., ORDER - 8], label="from-the-end"),
    sandwich("aten.index", lambda h: h.relu()[..., ORDER][..., ORDER.flip(0)], label="twice"),
    sandwich("aten.index", lambda h: torch.cat([h.relu()[..., EVEN], h], -1), "ffn 3, ffn 5", label="beside"),
    sandwich("aten.index", lambda h: h.relu() + h[..., torch.tensor([1, 0, 3, 2, 4, 5, 7, 6])], "ffn 2, ffn 3",
             label="tied"),
    sandwich("aten.index", lambda h: turned(h[..., ORDER]), "pair 4", label="halves"),
    sandwich("aten.index", lambda h: h.unflatten(-1, (4, 2)).relu()[..., torch.tensor([3, 0, 2, 1]), :].flatten(-2),
             "ffn 2×4, ffn 4", label="heads"),
    sandwich("aten.index", lambda h: h.relu()[..., ORDER].unflatten(-1, (2, 4)).flatten(-2), "ffn 4", label="rows"),
    sandwich("aten.index", lambda h, p: h.relu() * p[ORDER], shapes=[(8,)], label="weight"),
    sandwich("aten.index", lambda h, p: h.relu() * p[ORDER // 2], blocked=CHOSEN, shapes=[(8,)], label="table"),
    sandwich("aten.index", lambda h: h.relu()[..., (ORDER + h.sum().isinf()) % 8], "", CHOSEN, label="computed"),
    sandwich("aten.index", lambda h: h.relu()[..., ORDER.view(2, 4)].flatten(-2), "", CHOSEN, label="two-dims"),
    sandwich("aten.index_select", lambda h: h.relu().index_select(2, ORDER), label="fixed"),
    sandwich("aten.gather", lambda h: h.relu().gather(2, ORDER.expand(h.shape[0], 3, 8)), label="fixed"),
    sandwich("aten.gather", lambda h: h[0].relu().gather(1, ORDER.repeat(3, 1)).expand(2, 3, 8), label="alike"),
    sandwich("aten.gather", lambda h: h[0].relu().gather(1, torch.stack([ORDER, ORDER, ORDER.flip(0)])), "", CHOSEN,
             label="otherwise"),
    sandwich("aten.gather", lambda h: h.relu().gather(2, ORDER.expand(h.shape[0], 2, 8)).sum(1, True), "", CHOSEN,
             label="part"),
    sandwich("aten.take_along_dim", lambda h: h[0].relu().take_along_dim(ORDER.repeat(3, 1), 1).expand(2, 3, 8),
             label="fixed"),
    sandwich("aten.index", lambda h: h.relu()[torch.arange(2)[:, None], torch.tensor([[0, 1]])], label="two"),
    sandwich("aten.index", lambda h: h.relu().mT[torch.arange(2)[:, None], :, torch.tensor([[0, 1]])], label="apart"),
    sandwich("aten.index", lambda h, mask: (h.relu() + mask)[:, torch.tensor([True, False, True])], shapes=[(8,)],
             label="mask"),
    sandwich("aten.gather", lambda h: h.relu().gather(1, torch.zeros(8, dtype=torch.long).expand(h.shape[0], 2, 8))),
    sandwich("aten.gather", lambda h: h.relu().gather(2, torch.ones(2, 3, 1).long()), "", CHOSEN, label="channels"),
    sandwich("aten.take_along_dim", lambda h: torch.take_along_dim(h[0].relu(), torch.zeros(2, 1).long(), 0)),
    sandwich("aten.take_along_dim", lambda h: h + torch.take_along_dim(h, torch.tensor([1])), "", "chooses from all",
             label="flat"),
    sandwich("aten.scatter", lambda h: h.relu().scatter(1, torch.zeros(2, 1, 8, dtype=torch.long), 1.0)),
    sandwich("aten.scatter", lambda h: h.relu().scatter(2, torch.zeros(2, 3, 1).long(), 1.0), "", WRITES,
             label="channels"),
    sandwich("aten.scatter", lambda h: h.scatter(1, torch.zeros(2, 1, 8).long(), 1.0).sum(-1, keepdim=True), "",
             "summed over although", label="with-1"),
    sandwich("aten.scatter_add", lambda h: h.scatter_add(1, torch.zeros(2, 3, 8).long(), h.relu()).sum(-1, True),
             "ffn 8"),
    sandwich("aten.scatter_add", lambda h: h.relu().scatter_add(1, torch.zeros(2, 3, 4).long(), h), "", "a part of it",
             label="part"),
    sandwich("aten.index_put", lambda h: h.relu().index_put((torch.tensor([0, 1]), torch.tensor([1, 2])), h[0, 0])),
    sandwich("aten.index_put", lambda h: torch.arange(24.0).view(3, 8).to(h).index_put((torch.tensor([1]),),
             h.relu()[0, 0]),
             label="into-stored"),
    sandwich("aten.index_put", lambda h: h.index_put((torch.tensor([0]),), torch.arange(8).to(h)).relu(),
             label="stored"),
    sandwich("aten.index_add", lambda h: h.relu().index_add(1, torch.tensor([0, 0, 1]), h)),
    sandwich("aten.index_copy", lambda h: h.relu().index_copy(1, torch.tensor([1]), h[:, 2:])),
    sandwich("aten.index_fill", lambda h: h.relu().index_fill(1, torch.tensor([1]), 0.0).sum(-1, keepdim=True),
             "ffn 8"),
    sandwich("aten.index_fill", lambda h: h.relu().index_fill(1, torch.tensor([1]), 2.0).sum(-1, keepdim=True), "",
             "summed over although", label="with-2"),
    sandwich("aten.index_fill", lambda h: h.relu().index_fill(2, torch.tensor([1]), 2.0), "", CHOSEN, label="channels"),
    sandwich("aten.slice_scatter", lambda h: h.relu().slice_scatter(h[:, :1], 1, 1, 2)),
    sandwich("aten.slice_scatter", lambda h: torch.zeros(3, 8).to(h).slice_scatter(h[0].relu()), label="whole"),
    sandwich("aten.slice_scatter", lambda h: h.relu().slice_scatter(h[..., :2], 2, 4, 6), "ffn 2, ffn 2, ffn 2",
             label="channels"),
    sandwich("aten.slice_scatter", lambda h: h.relu().slice_scatter(h[..., :2], 2, 0, 4, 2), "", "overwrites a part",
             label="steps"),
    sandwich("aten.embedding_bag", lambda h, w: F.embedding_bag(torch.arange(6).view(3, 2), w).expand_as(h).relu() * h,
             shapes=[(6, 8)], blocked=CHOSEN),
    sandwich("aten.embedding_bag", lambda h, w: h + F.embedding_bag(torch.arange(6).view(3, 2), w, mode="max"),
             "pair 8", "takes maxima", shapes=[(6, 8)], label="max"),
    sandwich("aten.index_put", lambda h: torch.zeros(4, 3, 8).to(h).index_put((torch.tensor([0, 1]),), h[:2].relu()),
             label="rows"),
    sandwich("aten.index_put",
             lambda h, p: p.relu().index_put((torch.tensor([[0], [1]]), torch.tensor([0, 1, 2])), h[:2]),
             shapes=[(4, 5, 8)], blocked="computed"),
    sandwich("aten.slice_scatter", lambda h: torch.arange(12).to(h).expand(3, 12).slice_scatter(h[0].relu(), 1, 4), "",
             "overwrites a part", label="into-stored"),
    sandwich("aten.select_scatter", lambda h: h.relu().select_scatter(h[:, 0], 1, 1)),
    sandwich("aten.one_hot", lambda h: h + F.one_hot(h.argmax(-1), 8), "", "is taken over it"),
    sandwich("aten.histc", lambda h: h + torch.histc(h.relu(), 4, 0, 3).sum(), "", "counts its elements"),
    sandwich("aten.nonzero", lambda h: h + h.relu().nonzero().sum(), "", COMPUTED),
    sandwich("aten.searchsorted", lambda h: h + torch.searchsorted(h.relu(), h), "", COMPUTED),
    sandwich("aten.masked_scatter", lambda h: h.masked_scatter(h > 0, h.relu()), "", COMPUTED),
]  # fmt: skip


def test_literal(case: Case) -> None:
    check_literal(case)


@pytest.mark.slow
def test_exact(case: Case) -> None:
    check_exact(case)


PICKS: list[Callable[[Tensor], Any]] = [
    lambda a: a.index_select(1, EVEN), lambda a: a[:, EVEN], lambda a: a[EVEN % 3, :, EVEN], lambda a: a[:, EVEN, EVEN],
    lambda a: a[EVEN[:, None] % 3, EVEN], lambda a: a[..., torch.tensor([True, False, True, True, False])],
    lambda a: a.gather(1, torch.zeros(3, 2, 5, dtype=torch.long)), lambda a: a.gather(2, torch.ones(2, 6, 1).long()),
    lambda a: torch.take_along_dim(a, EVEN[:, None, None] % 3, 0), lambda a: torch.take_along_dim(a, EVEN),
    lambda a: a.scatter(0, torch.zeros(1, 6, 5, dtype=torch.long), 2.0), lambda a: a.index_put((EVEN % 3,), a[0]),
    lambda a: a.index_put((EVEN % 3, EVEN), a[0, 0], accumulate=True), lambda a: a.index_add(1, EVEN, a[:, :3]),
    lambda a: a.index_copy(1, EVEN, a[:, :3]), lambda a: a.index_fill(1, EVEN, 2.0), lambda a: a.index_fill(1, EVEN,
    0.0),
    lambda a: a.slice_scatter(a[:1], 0, 1, 2), lambda a: a.select_scatter(a[0], 0, 2), lambda a: F.embedding(EVEN,
    a[0]),
    lambda a: a.slice_scatter(2 * a, 0), lambda a: a.scatter_add(1, torch.zeros(3, 1, 5, dtype=torch.long), a),
]  # fmt: skip


@pytest.mark.parametrize("function", PICKS)
def test_one_choice(function: Callable[[Tensor], Any]) -> None:
    for seed in range(2):
        check_rule(function, [tagged(3, 6, 5)], seed=seed)
