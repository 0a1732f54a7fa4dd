"""Sizes are read off the inputs.

``y.shape[1]`` of a view keeps that view in the graph, and with it what the view says about widths, although nobody
reads its numbers. A size that is known is written as a number; one that an input has too is read there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from ecospa_fx.ir.passes import PassResult

_SIZE = torch.ops.aten.sym_size.int


@dataclass(frozen=True, slots=True)
class ReadSizes:
    """``y.shape[1]`` becomes a number, or the size of an input that has it. Exact to the bit."""

    name: ClassVar[str] = "read-sizes"

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite the graph in place; sizes that are outputs stay."""
        graph, changes = graph_module.graph, 0
        sources = _sizes_of_inputs(graph)
        for node in [n for n in graph.nodes if n.op == "call_function" and n.target is _SIZE]:
            value = node.meta.get("val")
            if any(user.op == "output" for user in node.users) or not isinstance(value, int | torch.SymInt):
                continue
            if is_concrete_int(value):
                _write(node, int(value))
                graph.erase_node(node)
                changes += 1
            elif str(value) in sources and node.args[0] is not sources[str(value)][0]:
                node.args = sources[str(value)]
                changes += 1
        return PassResult(graph_module, changes)


def _sizes_of_inputs(graph: fx.Graph) -> dict[str, tuple[fx.Node, int]]:
    """For every symbol the first input, and its axis, whose size it is."""
    sources: dict[str, tuple[fx.Node, int]] = {}
    for node in graph.nodes:
        value = node.meta.get("val")
        for axis, size in enumerate(value.shape if node.op == "placeholder" and isinstance(value, Tensor) else ()):
            if not is_concrete_int(size):
                sources.setdefault(str(size), (node, axis))
    return sources


def _write(node: fx.Node, number: int) -> None:
    def replaced(argument: fx.Node) -> fx.node.Argument:
        return number if argument is node else argument

    for user in list(node.users):
        user.args = fx.node.map_arg(user.args, replaced)
        user.kwargs = fx.node.map_arg(user.kwargs, replaced)
