"""Code that writes into parameters while it computes has no place in a graph, which would write at every call.

A graph shares its parameters with the model that it came from, and knows nothing of what made the code write: a flag
for "once only", say. So such code is refused, but for what changes nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from ecospa_fx.errors import CaptureError
from ecospa_fx.ir.alias import writers as written_into
from ecospa_fx.ir.provenance import source_of

_NEUTRAL = {
    torch.ops.aten.mul_.Tensor: 1, torch.ops.aten.mul_.Scalar: 1, torch.ops.aten.div_.Tensor: 1,
    torch.ops.aten.div_.Scalar: 1, torch.ops.aten.add_.Tensor: 0, torch.ops.aten.add_.Scalar: 0,
    torch.ops.aten.sub_.Tensor: 0, torch.ops.aten.sub_.Scalar: 0,
}  # fmt: skip
"""By which number an operator leaves its first argument as it is."""


def refuse_parameter_writes(program: ExportedProgram) -> None:
    """Take writes out that change nothing. Raises CaptureError for others into parameters, with the user's line."""
    graph, parameters = program.graph_module.graph, program.graph_signature.inputs_to_parameters
    for base, writers in written_into(graph).items():
        for node in writers if base.name in parameters else ():
            if _changes_nothing(node):
                unwritten: Any = node.args[0]
                node.replace_all_uses_with(unwritten)
                graph.erase_node(node)
                continue
            name, place = parameters[base.name], source_of(node)
            raise CaptureError(
                f"parameter {name!r} is written into while the model computes{f' at {place}' if place else ''}, and "
                "a graph would do that at every call: let it be done before, by a call of the model if it is done once"
            )


def _changes_nothing(node: fx.Node) -> bool:
    target, plain = node.target, len(node.args) == 2 and not node.kwargs
    return plain and target in _NEUTRAL and bool(node.args[1] == _NEUTRAL[target])
