"""Selections in front of views: Q, K and V of a fused projection have widths of their own, and no number changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as attend

import ecospa_fx as eco
from ecospa_fx.coupling.couplings import Couplings
from ecospa_fx.passes.canonicalise.hoist_selections import HoistSelections
from ecospa_fx.verify import masked_error
from tests.support.exported_once import exported_once

HEADS, WIDTH = 2, 4
Split = Callable[[Tensor, int, int], tuple[Tensor, ...]]


def thirds_outside(y: Tensor, b: int, t: int) -> tuple[Tensor, ...]:
    """[3, heads, width]"""
    return tuple(y.view(b, t, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4).unbind(0))


def thirds_inside_heads(y: Tensor, b: int, t: int) -> tuple[Tensor, ...]:
    """[heads, 3, width]"""
    q, k, v = (y.view(b, t, HEADS, 3, WIDTH)[..., i, :].transpose(1, 2) for i in range(3))
    return q, k, v


def thirds_innermost(y: Tensor, b: int, t: int) -> tuple[Tensor, ...]:
    """[heads, width, 3]"""
    q, k, v = (y.view(b, t, HEADS, WIDTH, 3).select(-1, i).transpose(1, 2) for i in range(3))
    return q, k, v


def chunked_heads(y: Tensor, b: int, t: int) -> tuple[Tensor, ...]:
    """[heads, 3 · width], chunked inside the heads"""
    return tuple(y.view(b, t, HEADS, 3 * WIDTH).transpose(1, 2).chunk(3, -1))


def split_heads(y: Tensor, b: int, t: int) -> tuple[Tensor, ...]:
    """[heads, 3 · width], split inside the heads"""
    return torch.split_with_sizes(y.view(b, t, HEADS, 3 * WIDTH).transpose(1, 2), [WIDTH] * 3, dim=-1)


def indexed(y: Tensor, b: int, t: int) -> tuple[Tensor, ...]:
    """[3, heads, width], indexed from the front"""
    y = y.reshape(b, t, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4)
    return y[0], y[1], y[2]


def chunked(y: Tensor, b: int, t: int) -> tuple[Tensor, ...]:
    """Thirds first, heads after"""
    return tuple(p.view(b, t, HEADS, WIDTH).transpose(1, 2) for p in y.chunk(3, -1))


class Fused(nn.Module):
    """Self-attention with one projection for Q, K and V."""

    def __init__(self, split: Split) -> None:
        super().__init__()
        self.parts, n = split, HEADS * WIDTH
        self.qkv, self.o = nn.Linear(6, 3 * n), nn.Linear(n, 6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(self.qkv(x), x.shape[0], x.shape[1])
        result: Tensor = self.o(attend(q, k, v).transpose(1, 2).reshape(x.shape[0], x.shape[1], -1))
        return result


def thirds_unbound(y: Tensor, b: int, t: int) -> tuple[Tensor, ...]:
    """[heads, width, 3], unbound"""
    return tuple(y.view(b, t, HEADS, WIDTH, 3).permute(4, 0, 2, 1, 3).unbind(0))


SPLITS: list[Any] = [thirds_outside, thirds_inside_heads, chunked_heads, split_heads, indexed, chunked]
SPLITS += [thirds_innermost, thirds_unbound]


def sizes(couplings: Couplings) -> dict[str, tuple[int, int]]:
    return {c.kind: (c.size, c.carriers) for c in couplings.offered}


def shrunk(
    model: nn.Module, args: tuple[Any, ...], kinds: list[str], seed: int = 0, couplings: Couplings | None = None
) -> float:
    couplings = eco.detect(model, args) if couplings is None else couplings
    plan = eco.plan(couplings, ratio=0.5, scores="random", seed=seed, kinds=kinds)
    return masked_error(model, eco.shrink(model, plan, args), plan, args)


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS)
def test_query_and_value_widths_are_apart(split: Split) -> None:
    model, args = Fused(split).double(), (torch.randn(2, 5, 6).double(),)
    couplings = eco.detect(model, args)
    assert sizes(couplings) == {"heads": (HEADS, 1), "qk": (WIDTH, HEADS), "vo": (WIDTH, HEADS)}
    qk, vo = (next(c for c in couplings.offered if c.kind == kind) for kind in ("qk", "vo"))
    assert {m.parameter for m in qk.members} == {"qkv.weight", "qkv.bias"}
    assert {m.parameter for m in vo.members} == {"qkv.weight", "qkv.bias", "o.weight"}
    with exported_once():
        for kinds in (["qk"], ["vo"], ["heads"], ["qk", "vo", "heads"]):
            assert shrunk(model, args, kinds, couplings=couplings) <= 1e-9


@pytest.mark.parametrize("split", SPLITS)
def test_the_graph_computes_what_the_module_does(split: Split) -> None:
    model, x = Fused(split).double(), torch.randn(2, 5, 6).double()
    graph = torch.export.export(model, (x,)).module()
    assert isinstance(graph, torch.fx.GraphModule)
    HoistSelections().run(graph)
    graph.recompile()
    assert torch.equal(graph(x), model(x))
    assert not HoistSelections().run(graph).modified


def test_nothing_to_hoist_is_left_alone() -> None:
    graph = torch.export.export(Fused(chunked), (torch.randn(2, 5, 6),)).module()
    assert isinstance(graph, torch.fx.GraphModule)
    before = str(graph.graph)
    assert not HoistSelections().run(graph).modified
    assert str(graph.graph) == before


@pytest.mark.slow
@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention(batch_first: bool) -> None:
    class Self(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, HEADS, batch_first=batch_first)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.attention(x, x, x, need_weights=False)[0]
            return result

    model, args = Self().double().train(), (torch.randn(2, 5, 8).double(),)
    couplings = eco.detect(model, args)
    found = sizes(couplings)
    assert {k: found[k] for k in ("qk", "vo")} == {"qk": (4, HEADS), "vo": (4, HEADS)}
    with exported_once():
        for kinds in (["qk"], ["vo"], ["qk", "vo"]):
            assert shrunk(model, args, kinds, couplings=couplings) <= 1e-9


def test_a_gate_inside_every_head_is_apart_from_its_value() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 24), nn.Linear(12, 6)

        def forward(self, x: Tensor) -> Tensor:
            gate, value = self.up(x).unflatten(-1, (3, 2, 4)).unbind(-2)
            result: Tensor = self.down((gate.sigmoid() * value).flatten(-2))
            return result

    model, args = Gated().double(), (torch.randn(2, 5, 6).double(),)
    assert {c.kind for c in eco.detect(model, args).offered} == {"ffn"}
    assert shrunk(model, args, ["ffn"]) <= 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 2])
def test_heads_inside_the_width_are_exact(seed: int) -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (f(x).unflatten(-1, (4, 4)).permute(0, 3, 1, 2) for f in (self.q, self.k, self.v))
            result: Tensor = self.o(attend(q, k, v).permute(0, 2, 3, 1).flatten(2))
            return result

    assert shrunk(Inner().double(), (torch.randn(2, 5, 16).double(),), ["qk", "vo"], seed) <= 1e-9


class WrittenLater(nn.Module):
    """Selects from a copy of what is changed in place afterwards; `late` says what is changed."""

    def __init__(self, late: Callable[[Tensor, Tensor], object]) -> None:
        super().__init__()
        self.up, self.late = nn.Linear(6, 24), late

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        copy = h.unflatten(-1, (8, 3)).clone()
        self.late(h, copy)
        first, second, third = copy.unbind(-1)
        result: Tensor = first - second * third + h.sum(-1, keepdim=True)
        return result


def doubles_the_source(source: Tensor, copy: Tensor) -> None:
    source.mul_(2)


def doubles_a_view_of_the_source(source: Tensor, copy: Tensor) -> None:
    source[..., :5].mul_(2)


def doubles_the_copy(source: Tensor, copy: Tensor) -> None:
    copy.mul_(2)


@pytest.mark.parametrize("late", [doubles_the_source, doubles_a_view_of_the_source, doubles_the_copy])
def test_selections_from_what_is_written_into_stay(late: Callable[[Tensor, Tensor], object]) -> None:
    model, x = WrittenLater(late), torch.randn(2, 5, 6)
    graph = torch.export.export(model, (x,)).module()
    assert isinstance(graph, torch.fx.GraphModule)
    HoistSelections().run(graph)
    graph.recompile()
    assert torch.equal(graph(x), model(x))


class OneOfThree(nn.Module):
    """Reads one of three values of each hidden unit; two rows of three are computed in vain."""

    def __init__(self, chosen: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.chosen = nn.Linear(6, 24), nn.Linear(8, 5), chosen

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(self.chosen(self.up(x)).relu())
        return result


@pytest.mark.parametrize(
    "chosen", [lambda h: h.unflatten(-1, (8, 3))[..., 0], lambda h: h.unflatten(-1, (8, 3)).select(-1, 2)]
)
def test_a_single_selection_takes_the_rows_beside_it_along(chosen: Callable[[Tensor], Tensor]) -> None:
    model, args = OneOfThree(chosen).double(), (torch.randn(2, 5, 6).double(),)
    plan = eco.plan(eco.detect(model, args), ratio=0.5, scores="random")
    small = eco.shrink(model, plan, args)
    assert masked_error(model, small, plan, args) <= 1e-12
    assert small.get_parameter("up.weight").shape == (12, 6)
