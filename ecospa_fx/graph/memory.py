"""Which nodes share memory, and which write into it."""

from __future__ import annotations

from operator import getitem

from torch import fx


def shares(node: fx.Node) -> fx.Node | None:
    """The argument whose memory a call may return."""
    if node.target is getitem:
        return node.all_input_nodes[0]
    arguments = getattr(getattr(node.target, "_schema", None), "arguments", ())
    aliased = node.op == "call_function" and arguments and arguments[0].alias_info is not None
    return node.args[0] if aliased and node.args and isinstance(node.args[0], fx.Node) else None


def writes(node: fx.Node) -> bool:
    """Whether a call changes its first argument."""
    arguments = getattr(getattr(node.target, "_schema", None), "arguments", ())
    return any(a.alias_info is not None and a.alias_info.is_write for a in arguments[:1])


def base(node: fx.Node) -> fx.Node:
    """The node that made the memory that a node's result may share."""
    while (source := shares(node)) is not None:
        node = source
    return node


def written(graph: fx.Graph) -> set[fx.Node]:
    """The nodes into whose memory something is written in place, by way of a view or not."""
    owner: dict[fx.Node, fx.Node] = {}
    found = set()
    for node in graph.nodes:
        source = shares(node)
        owner[node] = node if source is None else owner[source]
        if source is not None and writes(node):
            found.add(owner[node])
    return found


def written_to(node: fx.Node) -> bool:
    """Whether anything is written in place into the memory that a node's result may share with others."""
    first = base(node)
    seen, waiting = {first}, [first]
    while waiting:
        for user in waiting.pop().users:
            if user not in seen and (user.target is getitem or shares(user) in seen):
                if writes(user):
                    return True
                seen.add(user)
                waiting.append(user)
    return False
