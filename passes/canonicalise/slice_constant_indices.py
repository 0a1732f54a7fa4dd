"""Indexing by a constant run of positions is a slice, and is written as one.

``x[:, :, [-2]]`` reaches the graph as an index by a stored tensor, whose values the axis algebra does not look at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from ecospa_fx.ir.build import insert
from ecospa_fx.ir.passes import PassResult
from ecospa_fx.ir.schema import input_node, named_arguments

aten = torch.ops.aten
_COPIES = {aten.lift_fresh_copy.default, aten.clone.default, aten.detach.default, aten.detach_.default}


@dataclass(frozen=True, slots=True)
class SliceConstantIndices:
    """``x[:, [2, 3]]`` becomes ``x[:, 2:4]``. Exact to the bit.

    The values of constants stand in ``node.meta["constant"]``.
    """

    name: ClassVar[str] = "slice-constant-indices"

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite the graph in place."""
        graph, changes = graph_module.graph, 0
        for node in [n for n in graph.nodes if n.op == "call_function" and n.target is aten.index.Tensor]:
            span = _span(node)
            if span is None:
                continue
            with graph.inserting_before(node):
                part = insert(graph, aten.slice.Tensor, (node.args[0], *span), like=node)
            node.replace_all_uses_with(part)
            graph.erase_node(node)
            changes += 1
        return PassResult(graph_module, changes)


def _span(node: fx.Node) -> tuple[int, int, int] | None:
    """Axis, start and stop where the only index is a constant run of neighbouring positions."""
    source = input_node(node)
    indices = named_arguments(node)["indices"]
    axes = [i for i, entry in enumerate(indices) if entry is not None]
    if len(axes) != 1:
        return None
    values, size = _values(indices[axes[0]]), source.meta["val"].shape[axes[0]]
    if values is None or values.dim() != 1 or not is_concrete_int(size) or values.dtype is torch.bool:
        return None
    positions = [int(v) % int(size) for v in values]
    if not positions or positions != list(range(positions[0], positions[0] + len(positions))):
        return None
    return axes[0], positions[0], positions[-1] + 1


def _values(node: fx.node.Argument) -> Tensor | None:
    """The values of a constant, also behind copies of it; None for anything else."""
    while isinstance(node, fx.Node) and node.op == "call_function" and node.target in _COPIES:
        node = node.args[0]
    values = node.meta.get("constant") if isinstance(node, fx.Node) else None
    return values if isinstance(values, Tensor) else None
