"""Attention of keys and values of different widths is computed at the wider of the two, the other filled up with zeros.

Couplings of queries with keys and of values with outputs lose units of their own, and the CPU's fused kernel takes one
width alone: without it the scores are written out, which costs several times what the zeros do.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Any, ClassVar

import torch
from torch import fx

from ecospa_fx.indexing.call import shape_of
from ecospa_fx.ir.build import allow_other_strides, insert
from ecospa_fx.ir.passes import CallablePass, PassResult
from ecospa_fx.ir.schema import named_arguments

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default


@dataclass(frozen=True, slots=True)
class EqualWidths(CallablePass):
    """Zeros make queries and keys as wide as values, or values as wide as these; what they add is cut off.

    On the CPU only: kernels of GPUs take different widths. Exact up to the order of summation within attention.
    """

    name: ClassVar[str] = "equal-widths"

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite the graph in place."""
        nodes = [n for n in graph_module.graph.nodes if n.target is ATTENTION and _unequal(n)]
        for node in nodes:
            _widen(node)
        if nodes:
            allow_other_strides(graph_module.graph)
        return PassResult(graph_module, len(nodes))


def _unequal(node: fx.Node) -> bool:
    query, _, value = node.args[:3]
    widths = shape_of(query)[-1], shape_of(value)[-1]
    on_cpu = query.meta["val"].device.type == "cpu"  # type: ignore[union-attr]  # attention takes tensors first
    return on_cpu and all(isinstance(w, int) and w > 0 for w in widths) and widths[0] != widths[1]


def _widen(node: fx.Node) -> None:
    graph, (query, key, value) = node.graph, node.args[:3]
    inner, outer = shape_of(query)[-1], shape_of(value)[-1]
    with graph.inserting_before(node):
        wide = [_filled(graph, n, max(inner, outer), node) for n in (query, key, value)]
    scale = named_arguments(node).get("scale")
    node.args = (*wide, *node.args[3:])
    node.kwargs = {**node.kwargs, "scale": 1 / sqrt(inner) if scale is None else scale}
    if outer < inner:
        node.meta["val"] = node.meta["val"].new_empty((*shape_of(node)[:-1], inner))
        with graph.inserting_after(node):
            cut = insert(graph, aten.slice.Tensor, (node, -1, 0, outer), node)
        node.replace_all_uses_with(cut, delete_user_cb=lambda user: user is not cut)


def _filled(graph: fx.Graph, node: object, width: int, user: fx.Node) -> Any:
    missing = width - shape_of(node)[-1]
    return insert(graph, aten.constant_pad_nd.default, (node, [0, missing]), user) if missing else node
