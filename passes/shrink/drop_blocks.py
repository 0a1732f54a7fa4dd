"""Takes whole blocks out of a graph: what they were added to is left, and all that fed them alone goes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from ecospa_fx.coupling.blocks import AddedBranch
from ecospa_fx.ir.program import Program


def drop_blocks(program: Program, blocks: Sequence[AddedBranch]) -> int:
    """Drop some blocks of a program in place, with the parameters that nothing reads any more; returns how many."""
    for block in blocks:
        node, branch = block.addition.node, block.addition.branch
        node.target, node.args, node.kwargs = torch.ops.aten.alias.default, (block.addition.stays,), {}
        _erase(program.graph, branch)
    removed = {member.parameter for block in blocks for member in block.coupling.members}
    read = {name for node, name in program.parameters.items() if node.users}
    for name in sorted(removed - read):
        program.drop_parameter(name)
    return len(blocks)


def _erase(graph: fx.Graph, last: fx.Node) -> None:
    """Erase a call that nothing reads, and all that is read by nothing else."""
    waiting, erased = [last], set[fx.Node]()
    while waiting:
        node = waiting.pop()
        if node.op == "call_function" and not node.users and node not in erased:
            waiting += node.all_input_nodes
            graph.erase_node(node)
            erased.add(node)
