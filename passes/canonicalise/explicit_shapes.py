"""Shapes taken from another tensor are written out.

``x.reshape_as(y)`` needs the sizes of `y`, not its elements. Written out, each size follows the axis of the result, and
`y` may lose other positions than `x`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ecospa_fx.ir.build import insert

aten = torch.ops.aten
_VIEWS = {aten.reshape_as.default, aten.view_as.default}


def write_out_shapes(module: fx.GraphModule) -> bool:
    """Rewrite the graph in place. Returns whether anything changed."""
    graph, changed = module.graph, False
    for node in [n for n in graph.nodes if n.op == "call_function" and n.target in _VIEWS]:
        source: Any = node.args[0]
        with graph.inserting_before(node):
            sizes = _sizes(graph, node)
            if sizes is None:
                continue
            view = insert(graph, aten.reshape.default, (source, sizes), like=node)
        node.replace_all_uses_with(view)
        graph.erase_node(node)
        changed = True
    return changed


def _sizes(graph: fx.Graph, node: fx.Node) -> list[Any] | None:
    """Sizes as arguments: numbers, sizes of an input, and at most one that follows from the others."""
    other: Any = node.args[1]
    shape = node.meta["val"].shape
    composite = [i for i, n in enumerate(shape) if not isinstance(n, int) and not n.node.expr.is_symbol]
    if len(composite) > 1:
        return None
    found: list[Any] = []
    for i, n in enumerate(shape):
        plain = isinstance(n, int) or i in composite
        found.append(-1 if i in composite else n if plain else insert(graph, aten.sym_size.int, (other, i), like=node))
    return found
