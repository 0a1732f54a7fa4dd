"""Matrix products: what is contracted, what is carried along, and what must not be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.support.oracle import Case, check_exact, check_literal, check_rule, sandwich, tagged

aten = torch.ops.aten

CASES = [
    sandwich("aten.linear", torch.relu),
    sandwich("aten.linear", lambda h, w: F.linear(h.relu(), w), "ffn 8, pair 4", shapes=[(4, 8)], label="middle"),
    sandwich("aten.linear", lambda h: F.linear(h.relu(), torch.arange(32).view(4, 8).to(h)), "",
             "meets a stored tensor", label="stored-weight"),
    sandwich("aten.matmul", lambda h, w: h.relu() @ w, "ffn 8, pair 4", shapes=[(8, 4)]),
    sandwich("aten.matmul", lambda h, w: (h.relu() @ w).unsqueeze(-1), shapes=[(8,)], label="vector"),
    sandwich("aten.matmul", lambda h: (h @ h.relu().mT) @ h.sin(), "qk 8", label="scores"),
    sandwich("aten.bmm", lambda h: torch.bmm(h, h.relu().mT) @ h, "qk 8"),
    sandwich("aten.mm", lambda h, w: torch.mm(h.relu()[0], w), "ffn 8, pair 4", shapes=[(8, 4)]),
    sandwich("aten.mv", lambda h, w: torch.mv(h[0].relu(), w).expand(h.shape[0], 1, -1), shapes=[(8,)]),
    sandwich("aten.dot", lambda h: h * torch.dot(h[0, 0].relu(), h[0, 1]), "ffn 8"),
    sandwich("aten.addmm", lambda h, b, w: torch.addmm(b, h[0].relu(), w), "ffn 8, pair 4", shapes=[(4,), (8, 4)]),
    sandwich("aten.baddbmm", lambda h, b: torch.baddbmm(b, h.relu(), h.mT) @ h, "qk 8", shapes=[(1, 1, 3)]),
    sandwich("aten.addbmm", lambda h, b, w: torch.addbmm(b, h.relu()[:2], w), "ffn 8, pair 4", shapes=[(4,), (2, 8,
             4)]),
    sandwich("aten.einsum", lambda h, w: torch.einsum("btd,dhe->bthe", h.relu(), w).sin().flatten(2),
             "ffn 2, ffn 4×2, ffn 8",
             shapes=[(8, 2, 4)]),
    sandwich("aten.einsum", lambda h: torch.einsum("...d,...d", h.relu(), h).unsqueeze(-1), "ffn 8", label="dots"),
    sandwich("aten.einsum", lambda h: h + torch.einsum("bii->bi", h @ h.mT).sum(), "ffn 8", "", label="diagonal"),
    sandwich("aten.tensordot", lambda h, w: torch.tensordot(h.relu(), w, ([2], [1])), "ffn 8, pair 4", shapes=[(4, 8)]),
    sandwich("aten.outer", lambda h, p, q: h.relu() + torch.outer(q, p), shapes=[(8,), (3,)]),
    sandwich("aten.linalg_vecdot", lambda h: torch.linalg.vecdot(h.relu(), h).unsqueeze(-1), "ffn 8"),
    sandwich("aten.linalg_vecdot", lambda h: torch.linalg.vecdot(h.relu(), h, dim=1).unsqueeze(1), label="time"),
    sandwich("aten.inner", lambda h, w: torch.inner(h.relu(), w), "ffn 8, pair 4", shapes=[(4, 8)]),
    sandwich("aten.bilinear", lambda h, w: F.bilinear(h.relu(), h, w), "ffn 8, pair 4", shapes=[(4, 8, 8)]),
    sandwich("aten.cdist", lambda h: torch.cdist(h, h.relu()), "", "mixed by a factorisation or a transform"),
]  # fmt: skip


def test_literal(case: Case) -> None:
    check_literal(case)


@pytest.mark.slow
def test_exact(case: Case) -> None:
    check_exact(case)


PRODUCTS: list[tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = [
    (F.linear, [(2, 3, 6), (4, 6), (4,)]),
    (F.linear, [(2, 3, 6), (6,)]),
    (torch.matmul, [(2, 1, 3, 6), (5, 6, 4)]),
    (torch.matmul, [(6,), (5, 6, 4)]),
    (torch.mm, [(3, 6), (6, 4)]),
    (torch.bmm, [(2, 3, 6), (2, 6, 4)]),
    (torch.mv, [(3, 6), (6,)]),
    (torch.dot, [(6,), (6,)]),
    (torch.addmm, [(4,), (3, 6), (6, 4)]),
    (torch.baddbmm, [(2, 3, 4), (2, 3, 6), (2, 6, 4)]),
    (torch.addbmm, [(3, 4), (2, 3, 6), (2, 6, 4)]),
    (lambda a, b, c: a.clone().addbmm_(b, c), [(3, 4), (2, 3, 6), (2, 6, 4)]),
    (torch.addmv, [(3,), (3, 6), (6,)]),
    (lambda a, b: torch.einsum("...ij,jk", a, b), [(2, 3, 6), (6, 4)]),
    (lambda a, b: torch.einsum("bij,bkj->kb", a, b), [(2, 3, 6), (2, 4, 6)]),
    (lambda a, b: torch.tensordot(a, b, 2), [(2, 3, 6), (3, 6, 4)]),
    (torch.outer, [(3,), (4,)]),
    (torch.linalg.vecdot, [(2, 3, 6), (6,)]),
    (lambda a, b: torch.linalg.vecdot(a, b, dim=0), [(6, 3), (6, 3)]),
    (torch.inner, [(3, 6), (2, 4, 6)]),
    (torch.inner, [(6,), (6,)]),
    (F.bilinear, [(2, 6), (2, 3), (4, 6, 3), (4,)]),
]


@pytest.mark.parametrize(("function", "shapes"), PRODUCTS)
def test_products(function: Callable[..., Tensor], shapes: list[tuple[int, ...]]) -> None:
    for seed in range(2):
        assert check_rule(function, [tagged(*shape).sin() for shape in shapes], seed=seed)


def test_rows_sent_to_groups_carry_what_a_group_carries() -> None:
    pytest.importorskip("transformers.integrations.moe")
    ends = torch.tensor([2, 5], dtype=torch.int32)

    def grouped(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        result: Tensor = torch.ops.transformers.grouped_mm_fallback(rows, weight, offsets)
        return result

    assert check_rule(grouped, [tagged(5, 6).sin(), tagged(2, 6, 4).sin()], [ends]) == 3
