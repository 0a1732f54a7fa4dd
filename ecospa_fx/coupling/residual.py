"""Residual widths: dims over which a norm runs, and to which what reads them is added again.

The stream of a transformer is one: every block reads it through weights, and other weights of the block make what is
added to it. An inner width is none, even where one set of weights is applied again and again: nothing that is left of
an earlier round is added to what a later one makes.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from ecospa_fx.axes.findings import Action, several
from ecospa_fx.axes.flow import AxisFlow


def residual_dims(flow: AxisFlow) -> set[int]:
    """The dims of parameters that are residual widths. Linear in the size of the graph, and in that of each stream."""
    normed = {effect.dim for effect in flow.record.events if effect.action is Action.CONTRACTS_ONES}
    if not normed:
        return set()
    carriers: dict[int, list[fx.Node]] = {dim: [] for dim in normed}
    for node, value in flow.values.items():
        dims = {d for tensor in several(value) if not tensor.weights for axis in tensor.axes for d in axis.dims}
        for dim in dims & normed:
            carriers[dim].append(node)
    reads: dict[int, list[fx.Node]] = {}
    for effect in flow.record.events:
        if effect.dim in normed and effect.action is Action.CONTRACTS_PARAMETER:
            reads.setdefault(effect.dim, []).append(effect.node)
    return {dim for dim, nodes in carriers.items() if _returns(nodes, reads.get(dim, ()))}


def _returns(carriers: Iterable[fx.Node], reads: Iterable[fx.Node]) -> bool:
    """Whether what reads some tensors is added to one of them, or to what was made of it elementwise, again.

    carriers: the activations with a dim, in graph order; reads: where that is contracted with weights.
    """
    whole = dict.fromkeys(carriers)
    root: dict[fx.Node, fx.Node] = {}

    def find(node: fx.Node) -> fx.Node:
        while root[node] is not node:
            root[node] = node = root[root[node]]
        return node

    sources = []
    for node in whole:
        before = [n for n in node.all_input_nodes if n in whole]
        root[node] = find(before[0]) if before else node
        sources += [] if before else [node]
        for other in before:
            root[find(other)] = root[node]
    streams = {node: {find(n) for n in node.all_input_nodes if n in whole} for node in reads}
    stream_of = {node: find(node) for node in sources}
    return any(
        _reaches(node, {n for n, stream in stream_of.items() if stream in ends}) for node, ends in streams.items()
    )


def _reaches(start: fx.Node, ends: set[fx.Node]) -> bool:
    """Whether a node's result enters one of some later nodes."""
    last = max((end for end in ends if start < end), default=None)
    seen, waiting = {start}, [start]
    while waiting and last is not None:
        for user in waiting.pop().users:
            if user in ends:
                return True
            if user not in seen and user < last:
                seen.add(user)
                waiting.append(user)
    return False
