"""A slice of everything is the tensor itself.

``x[:, :, 1]`` of symbolic sizes reaches the graph as two slices from 0 to the end and a selection; with sizes known,
the exporter leaves the slices out. Without them the two graphs are alike.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
_END = 2**62


def drop_whole_slices(module: fx.GraphModule) -> bool:
    """Rewrite the graph in place. Returns whether there was any."""
    whole = [n for n in module.graph.nodes if n.op == "call_function" and n.target is aten.slice.Tensor and _whole(n)]
    for node in whole:
        source: Any = node.args[0]
        node.replace_all_uses_with(source)
        module.graph.erase_node(node)
    return bool(whole)


def _whole(node: fx.Node) -> bool:
    arguments: Any = [*node.args[1:], None, None, None, None][:4]
    _, start, stop, step = arguments
    return start in (None, 0) and step in (None, 1) and (stop is None or (isinstance(stop, int) and stop >= _END))
