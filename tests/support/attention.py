"""Attention with masks and repetitions spelt in many ways, exported with symbolic batch and length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.functional import scaled_dot_product_attention as attend

HEADS, WIDTH = 4, 8
Mask = Callable[[Tensor], Tensor]
"""From queries [batch, heads, length, width] to a mask."""


def ones(q: Tensor) -> Tensor:
    return torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device)


def infinite(q: Tensor) -> Tensor:
    return torch.full((q.shape[2], q.shape[2]), float("-inf"), dtype=q.dtype, device=q.device)


def places(q: Tensor) -> tuple[Tensor, Tensor]:
    index = torch.arange(q.shape[2], device=q.device)
    return index[:, None], index[None, :]


def batched(q: Tensor) -> Tensor:
    """By indices over batch, heads, queries and keys, as a general mask function is vectorised."""
    length = torch.arange(q.shape[2])
    batch, row, column = torch.arange(q.shape[0])[:, None, None, None], length[None, None, :, None], length
    position = length.expand(q.shape[0], -1)
    segment = (torch.diff(position, prepend=position[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    same = segment[batch, row] == segment[batch, column]
    return (position[batch, column] <= position[batch, row]) & same


CAUSAL: dict[str, Mask] = {
    "tril": lambda q: ones(q).tril(),
    "not triu": lambda q: ~ones(q).triu(1),
    "compared": lambda q: places(q)[0] >= places(q)[1],
    "difference": lambda q: places(q)[1] - places(q)[0] < 1,
    "and itself": lambda q: (places(q)[0] >= places(q)[1]) & ones(q).tril(3),
    "infinite": lambda q: infinite(q).triu(1),
    "where": lambda q: torch.where(ones(q).tril(), q.new_zeros(()), torch.finfo(q.dtype).min),
    "filled": lambda q: torch.zeros_like(infinite(q)).masked_fill(ones(q).triu(1), float("-inf")),
    "scaled": lambda q: (1.0 - ones(q).tril().to(q.dtype)) * torch.finfo(q.dtype).min,
    "expanded": lambda q: ones(q).tril()[None, None].expand(q.shape[0], 1, -1, -1),
    "batched": batched,
}  # fmt: skip
HIDES_NOTHING: dict[str, Mask] = {
    "ones": ones,
    "zeros": lambda q: torch.zeros_like(infinite(q)),
    "wide": lambda q: places(q)[0] + 1 > -places(q)[1],
}
OTHERS: dict[str, tuple[Mask, str]] = {
    "window": (lambda q: ones(q).tril() & (places(q)[0] - places(q)[1] < 3), "which no flag says"),
    "one ahead": (lambda q: ones(q).tril(1), "which no flag says"),
    "reversed": (lambda q: ones(q).triu(), "which no flag says"),
    "small": (lambda q: torch.where(ones(q).tril(), q.new_zeros(()), -1e4), "neither 0 nor as good as -inf"),
    "sloped": (lambda q: (places(q)[1] - places(q)[0]).to(q.dtype), "come from node"),
    "data": (lambda q: ones(q).tril() | (q.sum((0, 1, 3)) > 1e9), "come from node"),
    "written": (lambda q: ones(q).tril().index_fill_(1, torch.tensor([0]), False), "come from node"),
}


class Masked(nn.Module):
    """Attention of a sequence to itself under a mask."""

    def __init__(self, mask: Mask | None) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = None if self.mask is None else self.mask(q)
        return attend(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def inputs(batch: int = 2, length: int = 6, heads: int = HEADS) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(batch + length)
    many = [torch.randn(batch, h, length, WIDTH, generator=generator) for h in (HEADS, heads, heads)]
    return tuple(t.double() for t in many)


def traced(model: nn.Module, args: tuple[Tensor, ...], axes: tuple[int, ...] = (0, 2)) -> fx.GraphModule:
    """The exported graph, with some axes of every input symbolic."""
    shapes = tuple(dict.fromkeys(axes, torch.export.Dim.AUTO) for _ in args)
    graph: Any = torch.export.export(model, args, dynamic_shapes=shapes).module()
    return graph  # type: ignore[no-any-return]  # a graph module, whatever its annotation says


def calls(graph: fx.GraphModule) -> list[str]:
    """The operators of a graph in order, those that only check left out."""
    targets = [n.target for n in graph.graph.nodes if n.op == "call_function"]
    names = [str(t).removeprefix("aten.").partition(".")[0] for t in targets]
    return [n for n in names if not n.startswith(("_assert", "sym_size", "<built"))]


def attention_arguments(graph: fx.GraphModule) -> dict[str, Any]:
    """The keyword arguments of the one attention in a graph, and its mask."""
    (node,) = (n for n in graph.graph.nodes if "scaled_dot" in str(n.target))
    return {**node.kwargs, "attn_mask": node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")}
