"""Selections move in front of the view that made their axis.

``linear(x).view(b, t, heads, 3, d)[..., 0, :]`` selects a third of every head. As written, the view says that all three
thirds have rows of the same shape, which ties the widths of Q, K and V together. Selected from the flat axis first, each
has its own: the same elements, one more degree of freedom. Purely a rewrite of views; no number changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from ecospa_fx.graph.edit import insert

aten = torch.ops.aten
_VIEWS = {aten.view.default, aten.reshape.default, aten.unflatten.int, aten._unsafe_view.default}
_SELECTIONS = {
    aten.select.int,
    aten.unbind.int,
    aten.chunk.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.slice.Tensor,
}


def hoist_selections(module: fx.GraphModule) -> bool:
    """Rewrite the graph in place. Returns whether anything moved."""
    graph, changed = module.graph, False
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in _SELECTIONS:
            chain = _chain(node)
            if chain is not None:
                _hoist(graph, node, chain)
                changed = True
    if changed:
        graph.eliminate_dead_code(lambda n: n.is_impure() or (n.op == "call_function" and not _movable(n)))
        graph.lint()
    return changed


def _movable(node: fx.Node) -> bool:
    return node.target in _VIEWS | _SELECTIONS | _PERMUTES or getattr(node.target, "__name__", "") == "getitem"


_PERMUTES = {aten.transpose.int, aten.permute.default}


@dataclass(frozen=True, slots=True)
class _Chain:
    """view → permutes → selection. parts: sizes that the view gives to one flat axis of its input; at: which of them
    is selected from; first: where they begin among the view's output axes; order: the permutes, composed."""

    view: fx.Node
    source: fx.Node
    axis: int
    first: int
    parts: tuple[int, ...]
    at: int
    order: tuple[int, ...]


def _chain(node: fx.Node) -> _Chain | None:
    """Trace a selected axis back to the view that made it out of a longer one, if that is where it comes from."""
    source = node.args[0]
    if not isinstance(source, fx.Node) or not isinstance(source.meta.get("val"), Tensor):
        return None
    rank = source.meta["val"].dim()
    position = _dim_of(node) % max(rank, 1)
    order = list(range(rank))
    while isinstance(source, fx.Node) and source.target in _PERMUTES:
        step = _order_of(source)
        order = [step[i] for i in order]
        source = source.args[0]  # type: ignore[assignment]  # a view's first argument is a node
    if not isinstance(source, fx.Node) or source.target not in _VIEWS:
        return None
    return _split_of(source, order, position)


def _dim_of(node: fx.Node) -> int:
    default = -1 if node.target is None else 0
    index = 2 if node.target in {aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default} else 1
    found = node.args[index] if len(node.args) > index else node.kwargs.get("dim", default)
    return int(found)  # type: ignore[arg-type]  # schema: int


def _order_of(node: fx.Node) -> list[int]:
    rank = node.meta["val"].dim()
    order = list(range(rank))
    if node.target is aten.permute.default:
        return [int(d) % rank for d in node.args[1]]  # type: ignore[union-attr, arg-type]  # schema: int[]
    a, b = (int(d) % rank for d in node.args[1:3])  # type: ignore[arg-type]  # schema: int
    order[a], order[b] = order[b], order[a]
    return order


def _split_of(view: fx.Node, order: list[int], position: int) -> _Chain | None:
    source = view.args[0]
    if not isinstance(source, fx.Node) or not isinstance(source.meta.get("val"), Tensor):
        return None
    inside, outside = source.meta["val"].shape, view.meta["val"].shape
    grown = len(outside) - len(inside)
    axis = next((i for i, (a, b) in enumerate(zip(inside, outside, strict=False)) if not _same(a, b)), len(inside) - 1)
    parts = outside[axis : axis + grown + 1]
    if grown < 1 or not all(isinstance(p, int) for p in parts) or not isinstance(inside[axis], int):
        return None
    if prod(parts) != inside[axis] or any(
        not _same(a, b) for a, b in zip(inside[axis + 1 :], outside[axis + grown + 1 :], strict=True)
    ):
        return None
    at = order[position] - axis
    if not 0 <= at < len(parts) or prod(parts[at + 1 :]) == 1 or parts[at] == 1:
        return None
    return _Chain(view, source, axis, axis, tuple(int(p) for p in parts), at, tuple(order))


def _same(a: Any, b: Any) -> bool:
    return a is b or (isinstance(a, int) and isinstance(b, int) and a == b) or str(a) == str(b)


def _hoist(graph: fx.Graph, node: fx.Node, chain: _Chain) -> None:
    """Replace the uses of one selection."""
    if node.target is aten.select.int:
        size = chain.parts[chain.at]
        index = int(node.args[2]) % size  # type: ignore[arg-type]  # schema: int
        node.replace_all_uses_with(_part(graph, node, node, chain, (index, index + 1), drop=True))
        return
    if node.target is aten.slice.Tensor:
        _hoist_slice(graph, node, chain)
        return
    at = 0
    for i, value in enumerate(node.meta["val"]):
        drop = node.target is aten.unbind.int
        length = 1 if drop else int(value.shape[_dim_of(node)])
        for user in [u for u in node.users if u.args[1] == i]:
            user.replace_all_uses_with(_part(graph, user, node, chain, (at, at + length), drop=drop))
        at += length


def _hoist_slice(graph: fx.Graph, node: fx.Node, chain: _Chain) -> None:
    arguments = [*node.args, *[None] * 5][2:5]
    start, stop, step = slice(*arguments).indices(chain.parts[chain.at])  # type: ignore[misc]  # ints or None
    if step == 1 and (start, stop) != (0, chain.parts[chain.at]):
        node.replace_all_uses_with(_part(graph, node, node, chain, (start, stop), drop=False))


def _part(graph: fx.Graph, before: fx.Node, node: fx.Node, chain: _Chain, span: tuple[int, int], drop: bool) -> fx.Node:
    """Positions of the selected axis, cut out of the flat axis, in the shape that the selection has."""
    left, right = chain.parts[: chain.at], chain.parts[chain.at + 1 :]
    inner, (start, stop) = prod(right), span
    shape = list(_sizes(graph, before, chain))
    with graph.inserting_before(before):
        flat, axis = chain.source, chain.axis
        if left:
            rows = [*shape[:axis], *left, chain.parts[chain.at] * inner, *shape[axis + len(chain.parts) :]]
            flat = insert(graph, aten.reshape.default, (flat, rows), like=node)
            axis += len(left)
        flat = insert(graph, aten.slice.Tensor, (flat, axis, start * inner, stop * inner), like=node)
        sizes = [*shape[: chain.axis], *left, stop - start, *right, *shape[chain.axis + len(chain.parts) :]]
        position, order = chain.axis + chain.at, list(chain.order)
        if drop:
            del sizes[position]
            order = [i - (i > position) for i in order if i != position]
        result = insert(graph, aten.reshape.default, (flat, sizes), like=node)
        if order != sorted(order):
            result = insert(graph, aten.permute.default, (result, order), like=node)
    return result


def _sizes(graph: fx.Graph, before: fx.Node, chain: _Chain) -> list[Any]:
    """Sizes of the view's output as arguments; symbolic ones are read off its input."""
    outside, grown = chain.view.meta["val"].shape, len(chain.parts) - 1
    found: list[Any] = []
    with graph.inserting_before(before):
        for i, size in enumerate(outside):
            if isinstance(size, int):
                found.append(size)
                continue
            axis = i if i < chain.axis else i - grown
            found.append(insert(graph, aten.sym_size.int, (chain.source, axis), like=chain.view))
    return found


