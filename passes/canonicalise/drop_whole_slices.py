"""A slice of everything is the tensor itself.

``x[:, :, 1]`` of symbolic sizes reaches the graph as two slices from 0 to the end and a selection; with sizes known,
the exporter leaves the slices out. Without them the two graphs are alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from ecospa_fx.ir.passes import PassResult
from ecospa_fx.ir.schema import input_node, named_arguments

aten = torch.ops.aten
_END = 2**62


@dataclass(frozen=True, slots=True)
class DropWholeSlices:
    """``x[:]`` becomes ``x``, also where the sizes are symbols. Exact to the bit."""

    name: ClassVar[str] = "drop-whole-slices"

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite the graph in place."""
        graph = graph_module.graph
        whole = [n for n in graph.nodes if n.op == "call_function" and n.target is aten.slice.Tensor and _is_whole(n)]
        for node in whole:
            node.replace_all_uses_with(input_node(node))
            graph.erase_node(node)
        return PassResult(graph_module, len(whole))


def _is_whole(node: fx.Node) -> bool:
    arguments = named_arguments(node, defaults=True)
    start, stop, step = (arguments[name] for name in ("start", "end", "step"))
    return start in (None, 0) and step in (None, 1) and (stop is None or (isinstance(stop, int) and stop >= _END))
