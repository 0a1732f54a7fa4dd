"""Code that writes into parameters while it computes has no place in a graph, which would write at every call.

A graph shares its parameters with the model that it came from, and knows nothing of what made the code write: a flag
for "once only", say. So such code is refused, but for what changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from ecospa_fx.errors import CaptureError
from ecospa_fx.ir.alias import writers
from ecospa_fx.ir.passes import PassResult
from ecospa_fx.ir.provenance import source_of
from ecospa_fx.ir.schema import input_node

_NEUTRAL = {
    torch.ops.aten.mul_.Tensor: 1, torch.ops.aten.mul_.Scalar: 1, torch.ops.aten.div_.Tensor: 1,
    torch.ops.aten.div_.Scalar: 1, torch.ops.aten.add_.Tensor: 0, torch.ops.aten.add_.Scalar: 0,
    torch.ops.aten.sub_.Tensor: 0, torch.ops.aten.sub_.Scalar: 0,
}  # fmt: skip
"""By which number an operator leaves its first argument as it is."""


@dataclass(frozen=True, slots=True)
class RefuseParameterWrites:
    """Takes writes into parameters out that change nothing, and refuses others.

    Parameters are the inputs that have their names in ``node.meta["parameter"]``. Raises CaptureError with the user's
    line. Exact to the bit.
    """

    name: ClassVar[str] = "refuse-parameter-writes"

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite the graph in place."""
        graph = graph_module.graph
        writes: dict[fx.Node, fx.Node] = {}
        for base, nodes in writers(graph).items():
            if "parameter" in base.meta:
                writes = {**dict.fromkeys(nodes, base), **writes}
        for node, parameter in writes.items():
            if not _changes_nothing(node):
                raise _refusal(parameter.meta["parameter"], node)
            node.replace_all_uses_with(input_node(node))
            graph.erase_node(node)
        return PassResult(graph_module, len(writes))


def _refusal(name: str, node: fx.Node) -> CaptureError:
    place = source_of(node)
    return CaptureError(
        f"parameter {name!r} is written into while the model computes{f' at {place}' if place else ''}, and "
        "a graph would do that at every call: let it be done before, by a call of the model if it is done once"
    )


def _changes_nothing(node: fx.Node) -> bool:
    target, plain = node.target, len(node.args) == 2 and not node.kwargs
    return plain and target in _NEUTRAL and bool(node.args[1] == _NEUTRAL[target])
