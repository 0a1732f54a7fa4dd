"""Regions that the exporter wraps into sub-graphs (no_grad, autocast) become part of the graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ecospa_fx.graph.edit import insert

_WRAPPERS = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}
"""Higher-order operators that call a sub-graph, and at which argument it stands."""


def inline_regions(module: fx.GraphModule) -> bool:
    """Inline every wrapped region, in place. Returns whether there was any.

    A region without gradients keeps that: its floating-point outputs are detached. An autocast region has its casts
    written out by the exporter already.
    """
    changed = False
    while regions := [n for n in module.graph.nodes if n.op == "call_function" and str(n.target) in _WRAPPERS]:
        for node in regions:
            _inline(module, node)
        changed = True
    if changed:
        module.graph.lint()
    return changed


def _inline(module: fx.GraphModule, node: fx.Node) -> None:
    at = _WRAPPERS[str(node.target)]
    region = node.args[at]
    assert isinstance(region, fx.Node)  # the operator's own contract
    body = getattr(module, str(region.target))
    known: dict[fx.Node, Any] = dict(
        zip((n for n in body.graph.nodes if n.op == "placeholder"), node.args[at + 1 :], strict=True)
    )
    frozen = str(node.target) == "wrap_with_set_grad_enabled" and node.args[0] is False
    with module.graph.inserting_before(node):
        results = module.graph.graph_copy(body.graph, known)
        outputs = [_detached(module.graph, r, like=node) if frozen else r for r in _several(results)]
    for user in list(node.users):
        position: Any = user.args[1]
        user.replace_all_uses_with(outputs[position])
        module.graph.erase_node(user)
    module.graph.erase_node(node)
    if not region.users:
        module.graph.erase_node(region)
        module.delete_submodule(str(region.target))


def _several(results: Any) -> list[Any]:
    return list(results) if isinstance(results, list | tuple) else [results]


def _detached(graph: fx.Graph, node: Any, like: fx.Node) -> Any:
    """The node without gradients; it belongs to the module that left them out, not to the one that made the node."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return node
    return insert(graph, torch.ops.aten.detach.default, (node,), like=like)
