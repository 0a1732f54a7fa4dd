"""Adding nodes to a graph with everything that later readers need: values, source lines, module paths."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from ecospa_fx.ir.schema import Args, Kwargs

_INHERITED = ("nn_module_stack", "stack_trace", "torch_fn", "source_fn_stack", "custom")


def insert(graph: fx.Graph, target: fx.node.Target, args: Args, like: fx.Node, kwargs: Kwargs | None = None) -> fx.Node:
    """A call at the graph's insertion point that belongs where `like` belongs, with its value propagated."""
    node = inherit(graph.create_node("call_function", target, args, kwargs or {}), like)
    node.meta["val"] = evaluate(node)
    return node


def inherit(node: fx.Node, like: fx.Node) -> fx.Node:
    """Let a new node belong to the module and source line of another."""
    node.meta = {key: like.meta[key] for key in _INHERITED if key in like.meta}
    return node


def evaluate(node: fx.Node) -> Any:
    """The fake value of a call from those of its arguments."""
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), _value)
    function: Any = node.target
    mode = detect_fake_mode([a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)])
    mode = mode or fake_mode(node.graph)
    if mode is None:
        return function(*args, **kwargs)
    with mode, enable_python_dispatcher():
        return function(*args, **kwargs)


def _value(node: fx.Node) -> Any:
    """The value of a node; graphs that higher-order operators call are their own."""
    owner = node.graph.owning_module if node.op == "get_attr" and "val" not in node.meta else None
    return node.meta["val"] if owner is None else owner.get_submodule(str(node.target))


def fake_mode(graph: fx.Graph) -> FakeTensorMode | None:
    """The mode that the example values of a graph live in; None for real ones."""
    first = next((n.meta["val"] for n in graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)), None)
    return detect_fake_mode([first]) if first is not None else None


def layout(value: object) -> object:
    """Sizes and strides as text: comparing symbols would tie them."""
    if isinstance(value, list | tuple):
        return [layout(item) for item in value]
    return str((tuple(value.shape), value.stride())) if isinstance(value, torch.Tensor) else str(value)


def allow_other_strides(graph: fx.Graph) -> None:
    """Let views copy where they must: other kernels leave their results in other orders in memory."""
    for node in graph.nodes:
        if node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default


def sync_users(graph: fx.Graph) -> bool:
    """Let the users of every node be the nodes that read it. Returns whether any were not."""
    wrong = [node for node in graph.nodes if _read(node) != set(node.all_input_nodes) or not _is_known(node)]
    for node in wrong:
        for source in node.all_input_nodes:
            source.users.setdefault(node)
        node.args, node.kwargs = node.args, node.kwargs  # which counts inputs and users anew
    stale = [(node, user) for node in graph.nodes for user in node.users if node not in user.all_input_nodes]
    for node, user in stale:
        del node.users[user]
    return bool(wrong or stale)


def _is_known(node: fx.Node) -> bool:
    """Whether a node is among the users of everything that it reads."""
    return all(node in source.users for source in node.all_input_nodes)


def _read(node: fx.Node) -> set[fx.Node]:
    nodes: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), nodes.append)
    return set(nodes)
