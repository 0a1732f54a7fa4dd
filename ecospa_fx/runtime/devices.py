"""Devices that a graph names follow the module to another one, as ``x.device`` in the code that it came from did."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

ATTRIBUTE = "_graph_device"
"""Where a module that runs a graph keeps the device that it is on."""


def follow_device(graph: fx.Graph, device: torch.device, of: str = "") -> None:
    """Read the model's device, wherever a graph names it, from the module that runs the graph.

    of: the attribute of that module which is moved in its place.
    """

    def names(value: object) -> bool:
        return isinstance(value, torch.device) and value.type == device.type and value.index in (None, device.index)

    naming = [node for node in graph.nodes if node.op == "call_function" and any(map(names, _leaves(node)))]
    if not naming:
        return
    with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder")):
        read = graph.create_node("get_attr", f"{of}.{ATTRIBUTE}" if of else ATTRIBUTE)
    for node in naming:
        node.args, node.kwargs = (
            fx.node.map_aggregate(part, lambda value: read if names(value) else value)
            for part in (node.args, node.kwargs)
        )


def _leaves(node: fx.Node) -> list[object]:
    leaves: list[object] = []
    fx.node.map_aggregate((node.args, node.kwargs), leaves.append)
    return leaves


def moved(device: torch.device, fn: Callable[[torch.Tensor], torch.Tensor]) -> torch.device:
    """Where a function of tensors, as `nn.Module._apply` takes it, puts what is on a device."""
    return fn(torch.empty(0, device=device)).device
