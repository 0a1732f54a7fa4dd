"""Selections move in front of the view that made their axis.

``linear(x).view(b, t, heads, 3, d)[..., 0, :]`` selects a third of every head. As written, the view says that all
three thirds have rows of the same shape, which ties the widths of Q, K and V together. Selected from the flat axis
first, each has its own: the same elements, one more degree of freedom. Purely a rewrite of views; no number changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from ecospa_fx.graph.edit import insert, written_to

aten = torch.ops.aten
VIEWS = {aten.view.default, aten.reshape.default, aten.unflatten.int, aten._unsafe_view.default}
_CUTS = {aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default}
_SELECTIONS = {aten.select.int, aten.unbind.int, aten.slice.Tensor} | _CUTS
COPIES = {aten.contiguous.default, aten.clone.default}
STEPS = {aten.transpose.int, aten.permute.default, aten.unsqueeze.default, aten.squeeze.dim} | COPIES


def hoist_selections(module: fx.GraphModule) -> bool:
    """Rewrite the graph in place. Returns whether anything moved."""
    graph, changed = module.graph, False
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in _SELECTIONS:
            chain = _chain(node)
            if chain is not None and not written_to(chain.source):
                changed |= _hoist(graph, node, chain)
    if changed:
        graph.eliminate_dead_code(lambda n: n.is_impure() or n.op != "call_function" or not _movable(n))
        graph.lint()
    return changed


def _movable(node: fx.Node) -> bool:
    return node.target in VIEWS | _SELECTIONS | STEPS or getattr(node.target, "__name__", "") == "getitem"


@dataclass(frozen=True, slots=True)
class _Chain:
    """source → view → steps → selection.

    parts: the sizes that the view gives to one flat axis of the source, beginning at `axis`; at: which of them is
    selected from; position: where that axis is when it is selected from; steps: the moves in between, in order.
    """

    view: fx.Node
    source: fx.Node
    axis: int
    parts: tuple[int, ...]
    at: int
    position: int
    steps: tuple[fx.Node, ...]


def _chain(node: fx.Node) -> _Chain | None:
    """Trace a selected axis back to the view that made it out of a longer one, if that is where it comes from."""
    source = node.args[0]
    if not isinstance(source, fx.Node) or not isinstance(source.meta.get("val"), Tensor):
        return None
    last = position = _dim_of(node) % max(source.meta["val"].dim(), 1)
    steps: list[fx.Node] = []
    while isinstance(source, fx.Node) and source.target in STEPS:
        before = axis_before(source, position)
        if before is None:
            return None
        position, steps = before, [source, *steps]
        source = source.args[0]
    if not isinstance(source, fx.Node) or source.target not in VIEWS:
        return None
    return _split_of(source, position, last, tuple(steps))


def _dim_of(node: fx.Node) -> int:
    index = 2 if node.target in _CUTS else 1
    found: Any = node.args[index] if len(node.args) > index else node.kwargs.get("dim", 0)
    return int(found)


def axis_before(step: fx.Node, position: int) -> int | None:
    """Where the axis at `position` after a step was before it; None where the step made it."""
    arguments: Any = step.args
    rank, inside = int(step.meta["val"].dim()), int(arguments[0].meta["val"].dim())
    if step.target in COPIES:
        return position
    if step.target is aten.permute.default:
        return int(arguments[1][position]) % rank
    if step.target is aten.transpose.int:
        a, b = (int(d) % rank for d in arguments[1:3])
        return {a: b, b: a}.get(position, position)
    if step.target is aten.unsqueeze.default:
        new = int(arguments[1]) % rank
        return None if position == new else position - (position > new)
    gone = int(arguments[1]) % inside
    return position + (position >= gone and inside > rank)


def _split_of(view: fx.Node, position: int, last: int, steps: tuple[fx.Node, ...]) -> _Chain | None:
    source = view.args[0]
    if not isinstance(source, fx.Node) or not isinstance(source.meta.get("val"), Tensor):
        return None
    inside, outside = source.meta["val"].shape, view.meta["val"].shape
    grown = len(outside) - len(inside)
    axis = next((i for i, (a, b) in enumerate(zip(inside, outside, strict=False)) if not _same(a, b)), len(inside) - 1)
    parts = outside[axis : axis + grown + 1]
    if grown < 1 or not all(isinstance(p, int) for p in (*parts, inside[axis])) or prod(parts) != inside[axis]:
        return None
    if not all(_same(a, b) for a, b in zip(inside[axis + 1 :], outside[axis + grown + 1 :], strict=True)):
        return None
    at = position - axis
    if not 0 <= at < len(parts) or prod(parts[at + 1 :]) == 1 or parts[at] == 1:
        return None
    return _Chain(view, source, axis, tuple(int(p) for p in parts), at, last, steps)


def _same(a: Any, b: Any) -> bool:
    return bool(a == b) if isinstance(a, int) and isinstance(b, int) else str(a) == str(b)


def _hoist(graph: fx.Graph, node: fx.Node, chain: _Chain) -> bool:
    """Replace the uses of one selection."""
    arguments: Any = node.args
    size = chain.parts[chain.at]
    if node.target is aten.select.int:
        index = int(arguments[2]) % size
        node.replace_all_uses_with(_part(graph, node, chain, (index, index + 1), drop=True))
        return True
    if node.target is aten.slice.Tensor:
        start, stop, step = slice(*[*arguments, None, None, None][2:5]).indices(size)
        if step != 1 or stop <= start or (start, stop) == (0, size):
            return False
        node.replace_all_uses_with(_part(graph, node, chain, (start, stop), drop=False))
        return True
    at, drop = 0, node.target is aten.unbind.int
    for i, value in enumerate(node.meta["val"]):
        length = 1 if drop else int(value.shape[chain.position])
        for user in [u for u in node.users if u.args[1] == i]:
            user.replace_all_uses_with(_part(graph, user, chain, (at, at + length), drop=drop))
        at += length
    return True


def _part(graph: fx.Graph, node: fx.Node, chain: _Chain, span: tuple[int, int], drop: bool) -> fx.Node:
    """Positions of the selected axis, cut out of the flat axis, then moved as the whole was."""
    left, right = chain.parts[: chain.at], chain.parts[chain.at + 1 :]
    inner, (start, stop), end = prod(right), span, chain.axis + len(chain.parts)
    with graph.inserting_before(node):
        shape = _sizes(graph, chain, node)
        before, after = shape[: chain.axis], shape[end:]
        result, axis = chain.source, chain.axis
        if left:
            rows = [*before, *left, chain.parts[chain.at] * inner, *after]
            result, axis = insert(graph, aten.reshape.default, (result, rows), like=node), axis + len(left)
        result = insert(graph, aten.slice.Tensor, (result, axis, start * inner, stop * inner), like=node)
        result = insert(
            graph, aten.reshape.default, (result, [*before, *left, stop - start, *right, *after]), like=node
        )
        for step in chain.steps:
            result = insert(graph, step.target, (result, *step.args[1:]), like=node, kwargs=dict(step.kwargs))
        if drop:
            result = insert(graph, aten.squeeze.dim, (result, chain.position), like=node)
    return result


def _sizes(graph: fx.Graph, chain: _Chain, like: fx.Node) -> list[Any]:
    """Sizes of the view's output as arguments; symbolic ones are read off its input."""
    outside, grown = chain.view.meta["val"].shape, len(chain.parts) - 1
    found: list[Any] = []
    for i, size in enumerate(outside):
        axis = i if i < chain.axis else i - grown
        symbolic = not isinstance(size, int)
        found.append(insert(graph, aten.sym_size.int, (chain.source, axis), like=like) if symbolic else size)
    return found
