"""Nodes that do nothing go: assertions on metadata, casts to the type at hand, views of the whole, dropout of none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from ecospa_fx.indexing.evaluate import shows_all
from ecospa_fx.ir.alias import written_by
from ecospa_fx.ir.modes import drops_nothing
from ecospa_fx.ir.passes import CallablePass, PassResult
from ecospa_fx.ir.schema import named_arguments

aten = torch.ops.aten
_ASSERTIONS = {aten._assert_tensor_metadata.default}
_CASTS = {aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other}
_VIEWS = {aten.alias.default, aten.slice.Tensor, aten.expand.default, aten.expand_as.default} | {
    aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.squeeze.default,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class RemoveInert(CallablePass):
    """Removes what has no effect on any number.

    Sizes, types and devices are those of the example values, so a graph that is moved to another type afterwards
    computes in that type throughout. Exact to the bit.
    """

    name: ClassVar[str] = "remove-inert"

    casts: bool = True
    """Whether casts to the type at hand go; under autocast, which chooses types while the graph runs, they have an
    effect."""

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite the graph in place."""
        graph = graph_module.graph
        before = len(graph.nodes)
        for node in list(graph.nodes):
            if node.target in _ASSERTIONS:
                graph.erase_node(node)
        for node in list(graph.nodes):
            if node.op == "call_function" and (self.casts or node.target not in _CASTS) and _inert(node):
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
        graph.eliminate_dead_code(_effective)
        return PassResult(graph_module, before - len(graph.nodes))


def _inert(node: fx.Node) -> bool:
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or not _alike(node, source):
        return False
    if drops_nothing(node):
        return True
    if node.target in _CASTS:
        # what a caller passes may be of another type than the example
        return source.op != "placeholder" and not named_arguments(node).get("copy", False)
    return node.target in _VIEWS and shows_all(node, source)


def _alike(node: fx.Node, source: fx.Node) -> bool:
    """Whether two nodes have the same shape, strides, type and device."""
    a, b = node.meta.get("val"), source.meta.get("val")
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or (a.dtype, a.device) != (b.dtype, b.device):
        return False
    return _sizes_and_strides(a) == _sizes_and_strides(b)


def _sizes_and_strides(tensor: Tensor) -> list[str]:
    return [str(s) for s in (*tensor.shape, "|", *tensor.stride())]


def _effective(node: fx.Node) -> bool:
    return node.is_impure() or bool(written_by(node))
