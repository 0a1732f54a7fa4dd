"""Regions that the exporter wraps into sub-graphs (no_grad, autocast) become part of the graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ecospa_fx.errors import CaptureError
from ecospa_fx.ir.build import evaluate, insert
from ecospa_fx.ir.module_stacks import KEY, stack_between
from ecospa_fx.ir.passes import PassResult
from ecospa_fx.ir.provenance import source_of
from ecospa_fx.ir.schema import is_operator

_WRAPPERS = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}
"""Higher-order operators that call a sub-graph, and at which argument it stands."""


@dataclass(frozen=True, slots=True)
class InlineRegions:
    """The nodes of ``torch.no_grad()`` and ``torch.autocast()`` regions stand in the graph itself.

    A region without gradients keeps that: its floating-point outputs are detached. Of an autocast region the casts are
    written out. Raises CaptureError where they cannot be told.
    """

    name: ClassVar[str] = "inline-regions"

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite the graph in place, regions within regions included."""
        changes = 0
        while regions := [n for n in graph_module.graph.nodes if _is_region(n)]:
            for node in regions:
                _inline(graph_module, node)
            changes += len(regions)
        return PassResult(graph_module, changes)


def _is_region(node: fx.Node) -> bool:
    return node.op == "call_function" and str(node.target) in _WRAPPERS


def _inline(module: fx.GraphModule, node: fx.Node) -> None:
    index = _WRAPPERS[str(node.target)]
    region = node.args[index]
    assert isinstance(region, fx.Node)  # the operator's own contract
    body = getattr(module, str(region.target))
    copies: dict[fx.Node, Any] = dict(
        zip((n for n in body.graph.nodes if n.op == "placeholder"), node.args[index + 1 :], strict=True)
    )
    frozen = str(node.target) == "wrap_with_set_grad_enabled" and node.args[0] is False
    with module.graph.inserting_before(node):
        results = module.graph.graph_copy(body.graph, copies)
        for inner in (n for n in body.graph.nodes if n.op == "get_attr"):  # regions within the region, above all
            copies[inner].target = f"{region.target}_{inner.target}"
            setattr(module, copies[inner].target, getattr(body, str(inner.target)))
        if str(node.target) == "wrap_with_autocast" and node.args[2]:
            _write_out_casts([copies[n] for n in body.graph.nodes if n.op == "call_function"], str(node.args[0]))
        readers = set(node.users)
        after = next((n for n in _following(node) if n not in readers), None)
        node.meta[KEY] = stack_between(node.prev, after, node.meta.get(KEY) or {})
        outputs = [_detached(module.graph, r, like=node) if frozen else r for r in _listed(results)]
    for user in list(node.users):
        position: Any = user.args[1]
        user.replace_all_uses_with(outputs[position])
        module.graph.erase_node(user)
    module.graph.erase_node(node)
    if not region.users:
        module.graph.erase_node(region)
        module.delete_submodule(str(region.target))


def _write_out_casts(nodes: Sequence[fx.Node], device: str) -> None:
    """Let nodes compute in the types that they were traced in under autocast, without it."""
    for node in nodes:
        if not is_operator(node):
            continue
        wanted = _types(node.meta.get("val"))
        if not wanted or _computed(node, device) == wanted:
            continue
        for read in node.all_input_nodes:
            if _types(read.meta.get("val")) not in ([], wanted[:1]):
                with node.graph.inserting_before(node):
                    cast = insert(node.graph, torch.ops.aten.to.dtype, (read, wanted[0]), like=node)
                node.replace_input_with(read, cast)
        if _computed(node, device) != wanted:
            raise CaptureError(
                f"{node.target} under autocast{f' at {place}' if (place := source_of(node)) else ''} computes in "
                f"{wanted[0]}, and by which casts cannot be told: write them yourself, or convert the model"
            )


def _computed(node: fx.Node, device: str) -> list[torch.dtype]:
    """The floating-point types of a node's results without autocast; none where it does not compute."""
    try:
        with torch.autocast(device, enabled=False):
            return _types(evaluate(node))
    except (RuntimeError, TypeError):  # its inputs have types that do not go together
        return []


def _types(value: object) -> list[torch.dtype]:
    leaves = pytree.tree_leaves(value)
    return [t.dtype for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point()]


def _following(node: fx.Node) -> Iterator[fx.Node]:
    while node.next.op != "root":
        node = node.next
        yield node


def _listed(results: fx.node.Argument) -> list[fx.node.Argument]:
    return list(results) if isinstance(results, list | tuple) else [results]


def _detached(graph: fx.Graph, node: fx.node.Argument, like: fx.Node) -> fx.node.Argument:
    """The node without gradients; it belongs to the module that left them out, not to the one that made the node."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return node
    return insert(graph, torch.ops.aten.detach.default, (node,), like=like)
