"""Concatenations move behind the view that merges their axis into a longer one.

``cat([a, b], 2).view(b, t, heads * d)`` of tensors [b, t, heads, d] puts all positions of `a` before all of `b`. As
written, the concatenation says that both have rows of the same shape, which ties their widths together. Viewed first
and concatenated along the flat axis, each has its own: the same elements, one more degree of freedom. Purely a rewrite
of views; no number changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from ecospa_fx.ir.alias import written_to
from ecospa_fx.ir.build import insert
from ecospa_fx.ir.passes import PassResult
from ecospa_fx.ir.schema import named_arguments
from ecospa_fx.passes.canonicalise.hoist_selections import COPIES, STEPS, VIEWS, axis_before

aten = torch.ops.aten
_FLATTEN = aten.flatten.using_ints
_JOINS = {aten.cat.default, aten.concat.default, aten.concatenate.default, aten.stack.default}


@dataclass(frozen=True, slots=True)
class SinkConcatenations:
    """``cat([a, b], 2).view(b, t, n * d)`` becomes ``cat([a.flatten(2), b.flatten(2)], 2)``. Exact to the bit."""

    name: ClassVar[str] = "sink-concatenations"

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite the graph in place; what is written to in place stays as it is."""
        graph, changes = graph_module.graph, 0
        for node in list(graph.nodes):
            if node.op == "call_function" and node.target in {*VIEWS, _FLATTEN}:
                chain = _chain(node)
                if chain is not None:
                    node.replace_all_uses_with(_sunk(graph, node, chain))
                    changes += 1
        if changes:
            graph.eliminate_dead_code(lambda n: n.is_impure() or n.op != "call_function" or not _movable(n))
        return PassResult(graph_module, changes)


def _movable(node: fx.Node) -> bool:
    return node.target in {*VIEWS, *STEPS, *_JOINS, _FLATTEN}


@dataclass(frozen=True, slots=True)
class _Concatenation:
    """join → steps → view, which merges the joined axis, as the outermost, into a longer one."""

    join: fx.Node
    joined: int
    """The axis along which the parts are joined."""
    axis: int
    """The axis of the view into which that is merged."""
    steps: tuple[fx.Node, ...]
    """The moves between join and view, in order."""


def _chain(view: fx.Node) -> _Concatenation | None:
    source: Any = view.args[0]
    axis = _merged(view, source)
    if axis is None:
        return None
    position = axis
    steps: list[fx.Node] = []
    while isinstance(source, fx.Node) and source.target in STEPS:
        before = axis_before(source, position)
        if before is None:
            return None
        position, steps = before, [source, *steps]
        source = source.args[0]
    if not isinstance(source, fx.Node) or source.target not in _JOINS or not _separable(source):
        return None
    joined = _dim_of(source) % source.meta["val"].dim()
    return _Concatenation(source, joined, axis, tuple(steps)) if joined == position else None


def _merged(view: fx.Node, source: object) -> int | None:
    """The axis that a view makes by merging several, where all others stay as they are; their places begin there."""
    if not isinstance(source, fx.Node) or not isinstance(source.meta.get("val"), Tensor):
        return None
    inside, outside = source.meta["val"].shape, view.meta["val"].shape
    merged = len(inside) - len(outside)
    if merged < 1:
        return None
    first = 0
    while first < len(outside) and _same(inside[first], outside[first]):
        first += 1
    tail = range(first + 1, len(outside))
    return first if first < len(outside) and all(_same(inside[i + merged], outside[i]) for i in tail) else None


def _same(a: object, b: object) -> bool:
    return bool(a == b) if isinstance(a, int) and isinstance(b, int) else str(a) == str(b)


def _separable(join: fx.Node) -> bool:
    """Whether the parts have one rank, which torch's empty tensors have not, and nothing is written into the whole."""
    parts = named_arguments(join)["tensors"]
    return len(parts) > 1 and len({part.meta["val"].dim() for part in parts}) == 1 and not written_to(join)


def _dim_of(join: fx.Node) -> int:
    return int(named_arguments(join, defaults=True)["dim"])


def _sunk(graph: fx.Graph, view: fx.Node, chain: _Concatenation) -> fx.Node:
    """The concatenation of the views of the parts."""
    parts = named_arguments(chain.join)["tensors"]
    with graph.inserting_before(view):
        return insert(graph, aten.cat.default, ([_viewed(graph, view, chain, p) for p in parts], chain.axis), like=view)


def _viewed(graph: fx.Graph, view: fx.Node, chain: _Concatenation, part: fx.Node) -> fx.Node:
    if chain.join.target is aten.stack.default:
        part = insert(graph, aten.unsqueeze.default, (part, chain.joined), like=view)
    for step in chain.steps:
        if step.target not in COPIES:
            part = insert(graph, step.target, (part, *step.args[1:]), like=view, kwargs=dict(step.kwargs))
    last = chain.axis + part.meta["val"].dim() - view.meta["val"].dim()
    return insert(graph, _FLATTEN, (part, chain.axis, last), like=view)
