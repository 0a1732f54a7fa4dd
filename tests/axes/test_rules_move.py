"""Operators that move elements: positions must land where the axes say, for any reshape, slice or concatenation."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from tests.support.oracle import Case, check_exact, check_literal, check_rule, sandwich, tagged

NEIGHBOURS = "its neighbours are subtracted"
aten = torch.ops.aten
INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}
BYTES = "read as another type"


def heads(h: Tensor) -> Tensor:
    """[batch, time, 8] to [batch, 2 heads, time, 4]."""
    return h.view(h.shape[0], 3, 2, 4).transpose(1, 2)


PADDINGS = {
    "reflection_pad1d": [1, 2],
    "reflection_pad2d": [1, 2, 0, 0],
    "replication_pad1d": [1, 2],
    "replication_pad2d": [1, 2, 0, 0],
}
"""Operators that pad with the tensor's own elements, and by how much."""


def padded(name: str) -> Callable[[Tensor], Tensor]:
    """What calls one of these by itself."""

    def call(h: Tensor) -> Tensor:
        result: Tensor = getattr(torch.ops.aten, name)(h.relu(), PADDINGS[name])
        return result

    return call


CASES = [
    sandwich("aten.view", lambda h: h.view(-1, 3, 2, 4).sin().view(-1, 3, 8), "ffn 2, ffn 4×2"),
    sandwich("aten.reshape", lambda h: h.relu().reshape(-1, 8).reshape(-1, 3, 8)),
    sandwich("aten.unflatten", lambda h: h.unflatten(-1, (4, 2)).sin().flatten(2), "ffn 2×4, ffn 4"),
    sandwich("aten.unsqueeze", lambda h: h.sin().unsqueeze(1).squeeze(1)),
    sandwich("aten.reshape", lambda h, p: h.view_as(p[None] + h).relu(), shapes=[(3, 8)]),
    sandwich("aten.reshape", lambda h: h[0].relu().view_as(torch.arange(24).view(3, 8)), label="stored"),
    sandwich("aten.reshape", lambda h: h + torch.arange(24).view_as(h[0]), "pair 8",
             label="by-h"),
    sandwich("aten.view", lambda h: h * h.view(INTEGERS[h.dtype]).sign(), "", BYTES, label="bytes"),
    sandwich("aten.view_as_real", lambda h: torch.view_as_real(torch.complex(h, h)).flatten(2).relu()),
    sandwich("aten.view_as_complex", lambda h: torch.view_as_complex(h.view(-1, 3, 4, 2)).abs(), "ffn 4",
             "parts of complex numbers"),
    sandwich("aten.transpose", lambda h: h.relu().transpose(1, 2).transpose(1, 2)),
    sandwich("aten.swapaxes", lambda h: h.relu().swapaxes(1, 2).swapaxes(-1, -2)),
    sandwich("aten.mT", lambda h: h.relu().mT.mT),
    sandwich("aten.numpy_T", lambda h: h.relu().permute(2, 1, 0).T),
    sandwich("aten.permute", lambda h: h.relu().permute(2, 0, 1).permute(1, 2, 0)),
    sandwich("aten.movedim", lambda h: h.relu().movedim(2, 0).movedim((0, 1), (2, 0))),
    sandwich("aten.slice", lambda h: h[..., 2:6].relu(), "ffn 4"),
    sandwich("aten.slice", lambda h: h[..., ::2].relu() + h[..., 1::2], "ffn 4", label="step"),
    sandwich("aten.slice", lambda h: torch.cat([-h[..., 4:], h[..., :4]], -1) * h, "ffn 4", label="rotated-halves"),
    sandwich("aten.narrow", lambda h: h.narrow(-1, 2, 4).relu() + h.narrow(-1, -4, 4), "ffn 2"),
    sandwich("aten.select", lambda h: h.relu() * h.select(1, -1)[:, None]),
    sandwich("aten.unbind", lambda h: torch.stack(h.relu().unbind(1)[:2], 1)),
    sandwich("aten.slice", lambda h: h.view(-1, 3, 4, 2).unbind(-1)[0].relu(), "ffn 4", label="unbound"),
    sandwich("aten.slice", lambda h: h[..., 1::3].relu(), "ffn 3", label="every-third"),
    sandwich("aten.slice", lambda h: torch.cat([h[..., ::2].relu(), h[..., 1::2]], -1), "ffn 4, pair 4", label="dealt"),
    sandwich("aten.slice", lambda h: torch.cat([h.unflatten(-1, (2, 6))[..., i::2].relu() for i in range(2)], -1)
             .flatten(2), "ffn 3, ffn 3", width=12, label="dealt-in-rows"),
    sandwich("aten.split", lambda h: h.split(5, -1)[0].relu(), "ffn 5"),
    sandwich("aten.chunk", lambda h: h.chunk(2, -1)[0].relu() * h.chunk(2, -1)[1], "ffn 4"),
    sandwich("aten.split_with_sizes", lambda h: h.split([2, 6], -1)[1].relu(), "ffn 6"),
    sandwich("aten.tensor_split", lambda h: h.tensor_split([3], -1)[0].relu(), "ffn 3"),
    sandwich("aten.hsplit", lambda h: h.mT.hsplit(2)[1].mT.relu(), "ffn 4"),
    sandwich("aten.cat", lambda h: torch.cat([h.relu(), h], -1)),
    sandwich("aten.cat", lambda h, p: torch.cat([h.relu(), p.expand(h.shape[0], -1, -1)], 1), shapes=[(1, 4, 8)],
             label="rows"),
    sandwich("aten.cat", lambda h: torch.cat([h, torch.arange(8.0).expand(h.shape[0], 1, 8)], 1).relu(),
             label="stored"),
    sandwich("aten.stack", lambda h: torch.stack([h.relu(), h], -1).flatten(2)),
    sandwich("aten.stack", lambda h: torch.stack([h.relu(), torch.arange(8.0).expand_as(h)], 1).sum(1), label="stored"),
    sandwich("aten.expand", lambda h: h.relu().unsqueeze(2).expand(-1, -1, 2, -1).reshape(-1, 3, 16),
             "ffn 8, pair 2"),
    sandwich("aten.expand", lambda h, p: h * p.expand(3, 8), "pair 8", shapes=[(1, 1)], label="blank"),
    sandwich("aten.expand_as", lambda h, p: h.relu() * p.expand_as(h), shapes=[(1,)]),
    sandwich("aten.expand_as", lambda h: torch.ones(1).expand_as(h) * 2 + h.relu(), label="blank"),
    sandwich("aten.broadcast_tensors", lambda h, p: torch.add(*aten.broadcast_tensors([h.relu(), p])), shapes=[(8,)]),
    sandwich("aten.meshgrid", lambda h: h + torch.meshgrid(h[0, 0], h[0, 0], indexing="ij")[0].sum(), "",
             "spans a grid"),
    sandwich("aten.repeat", lambda h: h.relu().repeat(1, 1, 2), "ffn 8, pair 2"),
    sandwich("aten.tile", lambda h: h.relu().tile(2), "ffn 8, pair 2"),
    sandwich("aten.repeat_interleave", lambda h: heads(h.relu()).repeat_interleave(2, 1).transpose(1, 2).flatten(2),
             "ffn 2, ffn 4×2, pair 2×2"),
    sandwich("aten.repeat", lambda h, p: p.repeat(1, 1, 8) * h, "pair 8", shapes=[(1, 1, 1)], label="blank"),
    sandwich("aten.roll", lambda h: h.relu().roll(1, 1), label="time"),
    sandwich("aten.roll", lambda h: h.relu().roll(3, -1), "ffn 3, ffn 5", label="channels"),
    sandwich("aten.roll", lambda h: h.roll((1, 2), (2, 1)).relu().unflatten(-1, (2, 4)).roll((-1, 1, 0), (2, 3, 0))
             .flatten(2), "ffn 2", label="twice"),
    sandwich("aten.roll", lambda h: h.relu().roll((1, 1), (-1, -1)), "", "rolled twice", label="one-dim-twice"),
    sandwich("aten.roll", lambda h: h.relu().roll(1), "", "one row of all its elements", label="flat"),
    sandwich("aten.flip", lambda h: h.relu().flip(1), label="time"),
    sandwich("aten.flip", lambda h: h.relu().flip(-1), "", "its order is reversed", label="channels"),
    sandwich("aten.rot90", lambda h: torch.rot90(h.relu(), 1, (1, 2)).mT, "", "its order is reversed"),
    sandwich("aten.pad", lambda h: F.pad(h.relu(), (0, 0, 1, 1)), label="time"),
    sandwich("aten.pad", lambda h: F.pad(h.relu(), (1, 2)), label="channels"),
    sandwich("aten.pad", lambda h: F.pad(h.relu(), (1, 2), mode="reflect"), "", "padded otherwise", label="reflect"),
    *[sandwich(f"aten.{name}", padded(name), "", "padded otherwise") for name in PADDINGS],
    sandwich("aten.pad", lambda h: F.pad(h, (0, 0, 1, 1), value=1.0).sum(-1, keepdim=True), "", "summed over although",
             label="with-1"),
    sandwich("aten.tril", lambda h: h.relu().tril(), "", "by position"),
    sandwich("aten.diff", lambda h: h.relu().diff(dim=1), label="time"),
    sandwich("aten.diff", lambda h: h.relu().diff(), "", NEIGHBOURS, label="channels"),
    sandwich("aten.unfold", lambda h: h.relu().unfold(1, 2, 1).mT),
    sandwich("aten.unfold", lambda h: h.relu().unfold(2, 2, 1).sum(-1), "", "windows slide over it", label="channels"),
    sandwich("aten.as_strided", lambda h: h.relu() + h.as_strided((1,), (1,)), "", "memory strides"),
    sandwich("aten.diagonal", lambda h: h.relu() + h.diagonal(0, 1, 2).sum(), "", "diagonal"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:The use of `x.T` on tensors:UserWarning")  # of the operator that it tests
def test_literal(case: Case) -> None:
    check_literal(case)


@pytest.mark.slow
def test_exact(case: Case) -> None:
    check_exact(case)


# -- one rule at a time, on index-tagged tensors -----------------------------------------------------------------

MOVES: list[tuple[Callable[..., Any], tuple[int, ...]]] = [
    (lambda a: a.transpose(0, 2), (4, 6, 2)),
    (lambda a: a.mT, (4, 6, 2)),
    (lambda a: a.t(), (4, 6)),
    (lambda a: a.permute(2, 0, 1), (4, 6, 2)),
    (lambda a: aten.numpy_T(a), (4, 6, 2)),
    (lambda a: a.movedim((0, 2), (1, 0)), (4, 6, 2)),
    (lambda a: a.moveaxis(-1, 0), (4, 6, 2)),
    (lambda a: a[1:5:2, ::3], (6, 6)),
    (lambda a: a[:, -4:-1], (6, 6)),
    (lambda a: a.narrow(1, 2, 3), (4, 6)),
    (lambda a: a.select(1, -2), (4, 6)),
    (lambda a: a.unbind(1), (4, 3)),
    (lambda a: a.split(4, 0), (6, 4)),
    (lambda a: aten.split_copy(a, 4, 0), (6, 4)),
    (lambda a: aten.split_with_sizes_copy(a, [1, 5], 0), (6, 4)),
    (lambda a: a.chunk(4, 1), (4, 6)),
    (lambda a: a.tensor_split(4, 1), (4, 6)),
    (lambda a: a.hsplit(3), (4, 6)),
    (lambda a: a.hsplit(3), (6,)),
    (lambda a: torch.cat([a, a[:, :2], a], 1), (4, 6)),
    (lambda a: torch.stack([a, a + 0], 1), (4, 6)),
    (lambda a: a.unsqueeze(1).expand(4, 3, 6), (4, 6)),
    (lambda a: a.expand(2, 4, 6), (4, 6)),
    (lambda a: a.repeat(2, 3, 1), (4, 6)),
    (lambda a: a.tile(2), (4, 6)),
    (lambda a: a.repeat_interleave(3, 1), (4, 6)),
    (lambda a: a.roll((1, 0), (0, 1)), (4, 6)),
    (lambda a: a.roll(0, 1), (4, 6)),
    (lambda a: a.flip(0), (4, 6)),
    (lambda a: a.rot90(1, (0, 2)), (4, 6, 2)),
    (lambda a: F.pad(a, (1, 2, 3, 0)), (4, 6)),
    (lambda a: F.pad(a, (-1, 2, 1, 0)), (4, 6)),
    (lambda a: a.tril(), (3, 4, 6)),
    (lambda a: a.unfold(0, 2, 2), (4, 6)),
    (lambda a: torch.view_as_complex(a), (4, 6, 2)),
    (lambda a: torch.view_as_real(torch.view_as_complex(a)), (4, 6, 2)),
    (lambda a: aten.broadcast_tensors([a, a[:1]]), (4, 6)),
    (lambda a: aten.atleast_2d(a), (6,)),
    (lambda a: a.squeeze(), (4, 1, 6)),
    (lambda a: a.view(2, 2, 2, 3).transpose(1, 2).reshape(4, 6), (4, 6)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("function", "shape"), MOVES)
def test_positions(function: Callable[..., Any], shape: tuple[int, ...]) -> None:
    for seed in range(3):
        check_rule(function, [tagged(*shape)], masked=False, seed=seed)
        check_rule(function, [tagged(*shape)], masked=True, seed=seed)


EMPTY: list[Callable[[Tensor], Any]] = [
    lambda a: torch.cat([a.new_zeros(0), a.new_zeros(0)]),
    lambda a: torch.cat([a.new_zeros(0), a]),
    lambda a: torch.cat([a, a.new_zeros(0)], 1),
    lambda a: torch.cat([a[:0], a[:0]]),
    lambda a: torch.cat([a[:0], a]),
    lambda a: torch.cat([a[:, :0], a[:, 2:]], 1),
    lambda a: torch.stack([a[:0], a[:0]]),
    lambda a: torch.stack([a.new_zeros(0), a.new_zeros(0)], -1),
    lambda a: torch.hstack([a.new_zeros(0), a.new_zeros(0)]),
    lambda a: torch.vstack([a[:0], a]),
    lambda a: torch.dstack([a[:0], a[:0]]),
    lambda a: torch.block_diag(a, a.new_zeros(0, 3)),  # type: ignore[no-untyped-call]
    lambda a: torch.split(a, [0, 4])[1],
    lambda a: torch.split(a, [2, 0, 2])[1],
    lambda a: a.tensor_split([0, 2])[1] ,
    lambda a: a.chunk(2)[0][2:],
    lambda a: a[2:2].sum(0) + a.sum(0),
    lambda a: a[:, 3:3].relu().reshape(0),
    lambda a: a[:0].reshape(0, 2, 3).transpose(0,1),
    lambda a: a[:, :0].reshape(2, 2, 0).flatten(1),
    lambda a: a[:0] @ a.mT,
    lambda a: a[:, :0] @ a.mT[:0],
    lambda a: F.linear(a, a[:0]),
    lambda a: F.pad(a[:0], (0,0,1,1)),
    lambda a: a.repeat(0, 1),
    lambda a: a[:, None].expand(4, 0, 6),
    lambda a: a[torch.zeros(0, dtype=torch.long)],
    lambda a: a.index_select(1, torch.zeros(0, dtype=torch.long)),
    lambda a: a.gather(1, torch.zeros(4, 0, dtype=torch.long)),
    lambda a: a.scatter(1, torch.zeros(4, 0, dtype=torch.long), 1.0),
    lambda a: a.index_add(0, torch.zeros(0, dtype=torch.long), a[:0]),
    lambda a: a.narrow(1, 3, 0),
    lambda a: a.unbind(0)[0][:0],
    lambda a: a[:0].unbind(1)[0],
    lambda a: a[:0].softmax(-1),
    lambda a: a[:0].mean(1),
    lambda a: F.layer_norm(a[:0], [6]),
    lambda a: a[:0].cumsum(0),
    lambda a: torch.einsum("bi,bj->ij", a[:0], a[:0]),
    lambda a: a[:0].sort(1)[0],
    lambda a: a[:0].roll(1, 0),
    lambda a: a[:, :0].flip(1),
    lambda a: a.repeat_interleave(0, 0),
    lambda a: F.embedding(torch.zeros(0, dtype=torch.long), a),
    lambda a: torch.where(a[:0] > 0, a[:0], 0.0),
    lambda a: a[:0].unfold(1, 2, 2),
    lambda a: a[:0].squeeze(0),
    lambda a: F.scaled_dot_product_attention(a[None,:0], a[None], a[None]),
    lambda a: a[..., None][..., :0].sum(-1) + a,
    lambda a: a.unflatten(1, (2, 3))[:, :0].flatten(1),  # type: ignore[no-untyped-call]
    lambda a: a[:0].view(0, 3),
    lambda a: torch.broadcast_tensors(a[:0], a[:1])[1],  # type: ignore[no-untyped-call]
    lambda a: torch.tensordot(a[:, :0], a[:, :0].T, 1),
    lambda a: F.glu(a[:0]),
    lambda a: a.slice_scatter(a[:0], 0, 2, 2),
    lambda a: torch.full((0, 6), 1.0).to(a) + a[:0],
]  # fmt: skip
"""Operations on tensors without elements, and some that make them; each stands for axes of size 0 somewhere."""


def test_tensors_without_elements() -> None:
    assert (
        check_rule(lambda *given: [f(a) for f, a in zip(EMPTY, given, strict=True)], [tagged(4, 6) for _ in EMPTY]) > 20
    )


def test_tensors_without_elements_beside_a_model() -> None:
    """They block nothing, whatever is put together of them, and whatever lies beside them."""

    def extras(h: Tensor) -> Tensor:
        none = torch.cat([h.new_zeros(0), h.new_zeros(0)])
        return torch.cat([h.relu(), h.new_zeros(0)], -1) + none.sum() + torch.stack([none, none]).sum()

    case = sandwich("aten.cat", extras)
    check_literal(case)
    check_exact(case)


def test_differences_with_a_prefix() -> None:
    check_rule(lambda a, b: a.diff(dim=0, prepend=b), [tagged(4, 6), tagged(1, 6)])


@st.composite
def regroupings(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two shapes of the same number of elements."""
    factors = draw(st.lists(st.sampled_from([2, 2, 3, 4, 5]), min_size=1, max_size=4))

    def shape() -> tuple[int, ...]:
        order, sizes = draw(st.permutations(factors)), [1]
        for factor in order:
            if draw(st.booleans()):
                sizes.append(1)
            sizes[-1] *= factor
        return tuple(sizes)

    return shape(), shape()


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(regroupings(), st.integers(0, 3))
def test_any_reshape(shapes: tuple[tuple[int, ...], tuple[int, ...]], seed: int) -> None:
    old, new = shapes
    assert prod(old) == prod(new)
    check_rule(lambda a: a.reshape(new), [tagged(*old)], masked=False, seed=seed)
    check_rule(lambda a: (2 * a.reshape(new)).reshape(old) + a, [tagged(*old)], masked=False, seed=seed)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 11), st.integers(1, 12), st.integers(1, 4), st.sampled_from([(12,), (3, 4), (2, 6), (2, 2, 3)]))
def test_any_slice(start: int, length: int, step: int, parts: tuple[int, ...]) -> None:
    stop = min(12, start + length)
    check_rule(lambda a: 2 * a.reshape(12)[start:stop:step], [tagged(*parts)], masked=False)
    check_rule(
        lambda a: a.reshape(12)[start:stop] + a.reshape(12)[12 - (stop - start) :], [tagged(*parts)], masked=False
    )
