"""What the elements of a tensor are, as expressions in their own positions.

``arange(n)[:, None] >= arange(n)`` is, at row i0 and column i1, the condition ``i0 - i1 >= 0``, however it is spelt.
`evaluate_elements` finds such expressions for everything that is computed from sizes and constants alone, for all
sizes at once, and for every view which element of which tensor it shows. What it cannot express is an element of
itself, so that nothing is ever guessed.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, fx

from ecospa_fx.elements.call import RULES, itself
from ecospa_fx.elements.values import Value, Values, constant


def evaluate_elements(graph: fx.Graph) -> dict[fx.Node, Value]:
    """What the elements of every tensor in a graph with example values are."""
    for family in ("create", "views", "pointwise", "along"):
        import_module(f"ecospa_fx.elements.{family}")
    values: dict[fx.Node, Value] = {}
    written = written_storages(graph)
    for node in graph.nodes:
        if not isinstance(node.meta.get("val"), Tensor):
            continue
        rule = RULES.get(node.target) if node.op == "call_function" else None
        found = rule(node, values) if rule is not None else _stored(node)
        if isinstance(found, Values) and storage_of(node) in written:
            found = None
        values[node] = found if found is not None else itself(node)
    return values


def _stored(node: fx.Node) -> Values | None:
    """A literal of the model's code that is one number, such as ``torch.tensor(-1e9)``."""
    held = node.meta.get("constant")
    if not isinstance(held, Tensor) or held.numel() != 1 or held.is_complex():
        return None
    return constant(held.item())


def writes(node: fx.Node) -> list[fx.Node]:
    """The arguments that a call writes to."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return []
    arguments = node.target._schema.arguments
    given = [(a, node.args[i] if i < len(node.args) else node.kwargs.get(a.name)) for i, a in enumerate(arguments)]
    touched = [v for a, v in given if a.alias_info is not None and a.alias_info.is_write]
    return [n for v in touched for n in (v if isinstance(v, list | tuple) else [v]) if isinstance(n, fx.Node)]


def storage_of(node: fx.Node) -> fx.Node:
    """The node whose memory this one may show."""
    while node.op == "call_function" and node.args:
        first: Any = node.args[0]
        target: Any = node.target
        if isinstance(target, torch._ops.OpOverload):
            arguments = target._schema.arguments
            if not arguments or arguments[0].alias_info is None:
                return node
        elif getattr(target, "__name__", "") != "getitem":
            return node
        if not isinstance(first, fx.Node):
            return node
        node = first
    return node


def written_storages(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Memory that is written to in a graph, by the node that made it, and who writes."""
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        for touched in writes(node) if node.op == "call_function" else ():
            found.setdefault(storage_of(touched), []).append(node)
    return found
