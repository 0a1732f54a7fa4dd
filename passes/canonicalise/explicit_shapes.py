"""Shapes taken from another tensor are written out.

``x.reshape_as(y)`` needs the sizes of `y`, not its elements. Written out, each size follows the axis of the result, and
`y` may lose other positions than `x`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from ecospa_fx.ir.build import insert
from ecospa_fx.ir.passes import PassResult

aten = torch.ops.aten
_VIEWS = {aten.reshape_as.default, aten.view_as.default}


@dataclass(frozen=True, slots=True)
class ExplicitShapes:
    """``x.reshape_as(y)`` and ``x.view_as(y)`` become ``x.reshape(sizes)``. Exact to the bit."""

    name: ClassVar[str] = "explicit-shapes"

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite the graph in place; a shape with more than one composite size, such as ``2 * s``, stays."""
        graph, changes = graph_module.graph, 0
        for node in [n for n in graph.nodes if n.op == "call_function" and n.target in _VIEWS]:
            with graph.inserting_before(node):
                sizes = _sizes(graph, node)
                if sizes is None:
                    continue
                view = insert(graph, aten.reshape.default, (node.args[0], sizes), like=node)
            node.replace_all_uses_with(view)
            graph.erase_node(node)
            changes += 1
        return PassResult(graph_module, changes)


def _sizes(graph: fx.Graph, node: fx.Node) -> list[int | fx.Node] | None:
    """Sizes as arguments: numbers, sizes of an input, and at most one that follows from the others."""
    other = node.args[1]
    shape = node.meta["val"].shape
    composite = [i for i, n in enumerate(shape) if not isinstance(n, int) and not n.node.expr.is_symbol]
    if len(composite) > 1:
        return None
    sizes: list[int | fx.Node] = []
    for i, n in enumerate(shape):
        if i in composite:
            sizes.append(-1)
        else:
            sizes.append(n if isinstance(n, int) else insert(graph, aten.sym_size.int, (other, i), like=node))
    return sizes
