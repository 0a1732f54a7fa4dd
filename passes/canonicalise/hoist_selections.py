"""Selections move in front of the view that made their axis.

``linear(x).view(b, t, heads, 3, d)[..., 0, :]`` selects a third of every head. As written, the view says that all
three thirds have rows of the same shape, which ties the widths of Q, K and V together. Selected from the flat axis
first, each has its own: the same elements, one more degree of freedom. Where the selected axis is the innermost one,
the flat axis is sliced in steps. Purely a rewrite of views; no number changes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from ecospa_fx.ir.alias import written_to
from ecospa_fx.ir.build import insert
from ecospa_fx.ir.passes import PassResult
from ecospa_fx.ir.schema import Args, Size, input_node, named_arguments

aten = torch.ops.aten
VIEWS = {aten.view.default, aten.reshape.default, aten.unflatten.int, aten._unsafe_view.default}
_CUTS = {aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default}
_SELECTIONS = {aten.select.int, aten.unbind.int, aten.slice.Tensor} | _CUTS
COPIES = {aten.contiguous.default, aten.clone.default}
_END = 2**63 - 1
STEPS = {aten.transpose.int, aten.permute.default, aten.unsqueeze.default, aten.squeeze.dim} | COPIES


@dataclass(frozen=True, slots=True)
class HoistSelections:
    """``x.view(b, t, 3, d).select(2, i)`` becomes a slice of `x`, viewed. Exact to the bit."""

    name: ClassVar[str] = "hoist-selections"

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite the graph in place; what is written to in place stays as it is."""
        graph, changes = graph_module.graph, 0
        for node in list(graph.nodes):
            if node.op == "call_function" and node.target in _SELECTIONS:
                chain = _chain(node)
                if chain is not None and not written_to(chain.source):
                    changes += _hoist(graph, node, chain)
        changes += graph.eliminate_dead_code(lambda n: n.is_impure() or n.op != "call_function" or not _movable(n))
        return PassResult(graph_module, changes)


def _movable(node: fx.Node) -> bool:
    return node.target in VIEWS | _SELECTIONS | STEPS or getattr(node.target, "__name__", "") == "getitem"


@dataclass(frozen=True, slots=True)
class _Chain:
    """source → view → steps → selection."""

    view: fx.Node
    source: fx.Node
    inner: int
    """The axis of the source that the view splits."""
    axis: int
    """The first axis of the view that it becomes."""
    parts: tuple[int, ...]
    """The sizes that the view gives to it."""
    part: int
    """Which of these is selected from."""
    position: int
    """Where that axis is when it is selected from."""
    steps: tuple[tuple[fx.Node, int], ...]
    """The moves between view and selection, in order, each with where the axis is after it."""

    @property
    def innermost(self) -> bool:
        """Whether positions of the selected axis are neighbours in the source."""
        return prod(self.parts[self.part + 1 :]) == 1


def _chain(node: fx.Node) -> _Chain | None:
    """Trace a selected axis back to the view that made it out of a longer one, if that is where it comes from."""
    source = node.args[0]
    if not isinstance(source, fx.Node) or not isinstance(source.meta.get("val"), Tensor):
        return None
    last = position = _dim_of(node) % max(source.meta["val"].dim(), 1)
    steps: list[tuple[fx.Node, int]] = []
    while isinstance(source, fx.Node) and source.target in STEPS | VIEWS:
        before = axis_before(source, position) if source.target in STEPS else _untouched(source, position)
        if before is None and source.target in VIEWS:
            break
        if before is None:
            return None
        position, steps = before, [(source, position), *steps]
        source = source.args[0]
    if not isinstance(source, fx.Node) or source.target not in VIEWS:
        return None
    return _split_of(source, position, last, tuple(steps))


def _dim_of(node: fx.Node) -> int:
    return int(named_arguments(node, defaults=True)["dim"])


def axis_before(step: fx.Node, position: int) -> int | None:
    """Where the axis at `position` after a step was before it; None where the step made it."""
    arguments = named_arguments(step)
    rank, inside = int(step.meta["val"].dim()), int(input_node(step).meta["val"].dim())
    if step.target in COPIES:
        return position
    if step.target is aten.permute.default:
        return int(arguments["dims"][position]) % rank
    if step.target is aten.transpose.int:
        a, b = (int(arguments[name]) % rank for name in ("dim0", "dim1"))
        return {a: b, b: a}.get(position, position)
    if step.target is aten.unsqueeze.default:
        new = int(arguments["dim"]) % rank
        return None if position == new else position - (position > new)
    removed = int(arguments["dim"]) % inside
    return position + (position >= removed and inside > rank)


def _untouched(view: fx.Node, position: int) -> int | None:
    """Where an axis of a view's output is in its input, if the view only regroups the axes before and after it."""
    source = input_node(view)
    if view.target is aten.unflatten.int or not isinstance(source.meta.get("val"), Tensor):
        return None
    inside, outside = source.meta["val"].shape, view.meta["val"].shape
    before = prod(outside[:position])
    for i, size in enumerate(inside):
        if _same(size, outside[position]) and _same(prod(inside[:i]), before) and len(inside) > 1:
            return i
    return None


def _split_of(view: fx.Node, position: int, last: int, steps: tuple[tuple[fx.Node, int], ...]) -> _Chain | None:
    """The run of the view's axes around `position` that one axis of its source becomes."""
    source = view.args[0]
    if not isinstance(source, fx.Node) or not isinstance(source.meta.get("val"), Tensor):
        return None
    inside, outside = source.meta["val"].shape, view.meta["val"].shape
    for inner, size in enumerate(inside):
        for first in range(position + 1) if is_concrete_int(size) else ():
            parts = _run(outside[first:], int(size))
            if first <= position < first + len(parts) and _same(prod(inside[:inner]), prod(outside[:first])):
                part = position - first
                if len(parts) < 2 or parts[part] == 1:
                    return None
                return _Chain(view, source, inner, first, parts, part, last, steps)
    return None


def _run(sizes: Iterable[Size], whole: int) -> tuple[int, ...]:
    """The leading sizes whose product is `whole`, or none; sizes of 1 after them are left out."""
    product, parts = 1, []
    for size in sizes:
        if not is_concrete_int(size) or product == whole:
            break
        product *= int(size)
        parts.append(int(size))
    return tuple(parts) if product == whole else ()


def _same(a: object, b: object) -> bool:
    return bool(a == b) if isinstance(a, int) and isinstance(b, int) else str(a) == str(b)


def _hoist(graph: fx.Graph, node: fx.Node, chain: _Chain) -> bool:
    """Replace the uses of one selection."""
    arguments = named_arguments(node, defaults=True)
    size = chain.parts[chain.part]
    if chain.innermost and not _apart(node, chain):
        return False
    if node.target is aten.select.int:
        index = int(arguments["index"]) % size
        node.replace_all_uses_with(_part(graph, node, chain, (index, index + 1), drop=True))
        return True
    if node.target is aten.slice.Tensor:
        start, stop, step = slice(*(arguments[name] for name in ("start", "end", "step"))).indices(size)
        if step != 1 or stop <= start or (start, stop) == (0, size):
            return False
        node.replace_all_uses_with(_part(graph, node, chain, (start, stop), drop=False))
        return True
    begin, drop = 0, node.target is aten.unbind.int
    for i, value in enumerate(node.meta["val"]):
        length = 1 if drop else int(value.shape[chain.position])
        for user in [u for u in node.users if u.args[1] == i]:
            user.replace_all_uses_with(_part(graph, user, chain, (begin, begin + length), drop=drop))
        begin += length
    return True


def _apart(node: fx.Node, chain: _Chain) -> bool:
    """Whether every position of the selected axis is selected by itself, from this view or from others like it."""
    like = [n for n in chain.source.users if n.target is chain.view.target and n.args == chain.view.args]
    source = input_node(node)
    users = [user for n in dict.fromkeys([source, *like]) for user in n.users]
    singles = sum(user.target is aten.select.int for user in users)
    return node.target is aten.unbind.int or (node.target is aten.select.int and singles >= chain.parts[chain.part])


def _part(graph: fx.Graph, node: fx.Node, chain: _Chain, span: tuple[int, int], drop: bool) -> fx.Node:
    """Positions of the selected axis, cut out of the flat axis, then moved as the whole was."""
    left, right = chain.parts[: chain.part], chain.parts[chain.part + 1 :]
    inner, (start, stop), end, size = prod(right), span, chain.axis + len(chain.parts), chain.parts[chain.part]
    with graph.inserting_before(node):
        shape = _sizes(graph, chain, node)
        before, after = shape[: chain.axis], shape[end:]
        result, axis = chain.source, chain.inner
        if chain.innermost:
            result = insert(graph, aten.slice.Tensor, (result, axis, start, _END, size), like=node)
        elif left:
            rows = [*before, *left, size * inner, *after]
            result, axis = insert(graph, aten.reshape.default, (result, rows), like=node), chain.axis + len(left)
        if not chain.innermost:
            result = insert(graph, aten.slice.Tensor, (result, axis, start * inner, stop * inner), like=node)
        result = insert(
            graph, aten.reshape.default, (result, [*before, *left, stop - start, *right, *after]), like=node
        )
        for step, place in chain.steps:
            moved = _arguments(step, place, stop - start)
            result = insert(graph, step.target, (result, *moved), like=node, kwargs=dict(step.kwargs))
        if drop:
            result = insert(graph, aten.squeeze.dim, (result, chain.position), like=node)
    return result


def _arguments(step: fx.Node, place: int, size: int) -> Args:
    """What a step does to the part: a view has another size where the selected axis is."""
    if step.target not in VIEWS:
        return step.args[1:]
    shape: Any = step.args[1]
    return ([size if i == place and n != -1 else n for i, n in enumerate(shape)],)


def _sizes(graph: fx.Graph, chain: _Chain, like: fx.Node) -> list[int | fx.Node]:
    """Sizes of the view's output as arguments: numbers where they are known, else as the view has them."""
    outside, grown = chain.view.meta["val"].shape, len(chain.parts) - 1
    written: Any = chain.view.args[1] if chain.view.target is not aten.unflatten.int else None
    sizes: list[int | fx.Node] = []
    for i, size in enumerate(outside):
        if is_concrete_int(size) or written is not None:
            sizes.append(int(size) if is_concrete_int(size) else written[i])
            continue
        axis = i if i < chain.axis else i - grown
        sizes.append(insert(graph, aten.sym_size.int, (chain.source, axis), like=like))
    return sizes
