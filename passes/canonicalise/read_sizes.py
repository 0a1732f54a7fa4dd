"""Sizes are read off the inputs.

``y.shape[1]`` of a view keeps that view in the graph, and with it what the view says about widths, although nobody
reads its numbers. A size that is known is written as a number; one that an input has too is read there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import is_concrete_int

_SIZE = torch.ops.aten.sym_size.int


def read_sizes_off_inputs(module: fx.GraphModule) -> bool:
    """Rewrite the graph in place. Returns whether anything changed."""
    sources, changed = _sizes_of_inputs(module.graph), False
    for node in [n for n in module.graph.nodes if n.op == "call_function" and n.target is _SIZE]:
        value = node.meta.get("val")
        if any(user.op == "output" for user in node.users) or not isinstance(value, int | torch.SymInt):
            continue
        if is_concrete_int(value):
            _write(node, int(value))
            module.graph.erase_node(node)
            changed = True
        elif str(value) in sources and node.args[0] is not sources[str(value)][0]:
            node.args = sources[str(value)]
            changed = True
    return changed


def _sizes_of_inputs(graph: fx.Graph) -> dict[str, tuple[fx.Node, int]]:
    found: dict[str, tuple[fx.Node, int]] = {}
    for node in graph.nodes:
        value = node.meta.get("val")
        for axis, size in enumerate(value.shape if node.op == "placeholder" and isinstance(value, Tensor) else ()):
            if not is_concrete_int(size):
                found.setdefault(str(size), (node, axis))
    return found


def _write(node: fx.Node, number: int) -> None:
    def replaced(argument: Any) -> Any:
        return number if argument is node else argument

    for user in list(node.users):
        user.args = fx.node.map_arg(user.args, replaced)
        user.kwargs = fx.node.map_arg(user.kwargs, replaced)
