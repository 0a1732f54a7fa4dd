"""Keys and values that are repeated for groups of query heads are handed to attention as they are.

Repeating costs memory and time that the kernels for grouped queries save. That query head h reads key head h // n is
read off the elements of the repeated tensor, however the repetition is spelt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import sympy
import torch
from torch import fx

from ecospa_fx.indexing.call import shape_of
from ecospa_fx.indexing.evaluate import Elements
from ecospa_fx.indexing.values import ElementValue, position
from ecospa_fx.ir.alias import bases, written
from ecospa_fx.ir.build import allow_other_strides
from ecospa_fx.ir.passes import CallablePass, PassResult
from ecospa_fx.ir.schema import named_arguments

ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


@dataclass(frozen=True, slots=True)
class GroupedAttention(CallablePass):
    """Repeated keys and values become ``enable_gqa=True``.

    Where the fast kernels take groups: without a mask, with keys and values of one width, and on a GPU in 16 bits.
    Exact up to the order of summation within attention.
    """

    name: ClassVar[str] = "grouped-attention"

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite the graph in place."""
        graph = graph_module.graph
        nodes = [n for n in graph.nodes if n.target is ATTENTION and _candidate(n)]
        if not nodes:
            return PassResult(graph_module, 0)
        values, changing = Elements(graph), written(graph)
        changes, reasons = 0, []
        for node in nodes:
            sources = [_unrepeated(n, node, values) for n in node.args[1:3]]
            if None in sources or shape_of(sources[0])[1] != shape_of(sources[1])[1]:
                continue
            why = _refusal(node, sources, [s for s in sources if not bases(s).isdisjoint(changing)])
            if why:
                reasons.append(f"node {node.name} keeps its repeated keys and values: {why}")
                continue
            node.args = (node.args[0], *sources, *node.args[3:])
            node.kwargs = {**node.kwargs, "enable_gqa": True}
            changes += 1
        graph.eliminate_dead_code()
        if changes:
            allow_other_strides(graph_module.graph)
        return PassResult(graph_module, changes, tuple(reasons))


def _refusal(node: fx.Node, sources: Sequence[fx.Node], changing: Sequence[fx.Node]) -> str:
    key, value = (n.meta["val"] for n in sources)
    if changing:
        return f"{changing[0].name} is written to"
    if named_arguments(node).get("attn_mask") is not None:
        return "the kernels that take a mask take no groups"
    if key.device.type == "cuda" and (key.dtype.itemsize > 2 or key.shape[-1] != value.shape[-1]):
        return "the kernels that take groups need 16 bits, and keys and values of one width"
    return "" if key.device.type in {"cpu", "cuda"} else f"nothing is known of the kernels on {key.device.type}"


def _candidate(node: fx.Node) -> bool:
    arguments = named_arguments(node)
    return not arguments.get("enable_gqa") and all(len(shape_of(n)) == 4 for n in node.args[:3])


def _unrepeated(repeated: Any, user: fx.Node, values: Mapping[fx.Node, ElementValue]) -> Any:
    """The nearest node whose head h // n is head h of the repeated tensor; None where there is none."""
    shape, node = shape_of(repeated), repeated
    while node.op == "call_function" and node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
        if node not in values:
            return None
        sizes = shape_of(node)
        if len(sizes) != 4 or not all(isinstance(s, int) for s in (sizes[1], shape[1])) or sizes[1] >= shape[1]:
            continue
        if shape[1] % sizes[1] or [str(s) for s in sizes[2:]] != [str(s) for s in shape[2:]]:
            continue
        group = sympy.floor(position(1) / (shape[1] // sizes[1]))
        return node if values[node].at({position(1): group}) == values[repeated] else None
    return None
