"""Indexing by a constant run of positions is a slice, and is written as one.

``x[:, :, [-2]]`` reaches the graph as an index by a stored tensor, whose values the axis algebra does not look at.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from ecospa_fx.ir.build import insert

aten = torch.ops.aten
_COPIES = {aten.lift_fresh_copy.default, aten.clone.default, aten.detach.default, aten.detach_.default}


def slice_constant_indices(module: fx.GraphModule, constants: Mapping[fx.Node, Tensor]) -> bool:
    """Rewrite the graph in place. constants: nodes whose values are known and never written to."""
    graph, changed = module.graph, False
    for node in [n for n in graph.nodes if n.op == "call_function" and n.target is aten.index.Tensor]:
        found = _run(node, constants)
        if found is None:
            continue
        axis, start, stop = found
        with graph.inserting_before(node):
            part = insert(graph, aten.slice.Tensor, (node.args[0], axis, start, stop), like=node)
        node.replace_all_uses_with(part)
        graph.erase_node(node)
        changed = True
    return changed


def _run(node: fx.Node, constants: Mapping[fx.Node, Tensor]) -> tuple[int, int, int] | None:
    """Axis, start and stop where the only index is a constant run of neighbouring positions."""
    source: Any = node.args[0]
    indices: Any = node.args[1]
    given = [i for i, entry in enumerate(indices) if entry is not None]
    if len(given) != 1:
        return None
    values, size = _values(indices[given[0]], constants), source.meta["val"].shape[given[0]]
    if values is None or values.dim() != 1 or not is_concrete_int(size) or values.dtype is torch.bool:
        return None
    positions = [int(v) % int(size) for v in values]
    if not positions or positions != list(range(positions[0], positions[0] + len(positions))):
        return None
    return given[0], positions[0], positions[-1] + 1


def _values(node: Any, constants: Mapping[fx.Node, Tensor]) -> Tensor | None:
    while isinstance(node, fx.Node) and node.op == "call_function" and node.target in _COPIES:
        node = node.args[0]
    return constants.get(node)
