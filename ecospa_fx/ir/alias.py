"""Which nodes may share memory, and which calls write into it: the one place that asks schemas and storages.

A schema says what a call writes into, whichever argument that is, and what its results are views of. What a schema is
silent about, such as operators that are made of others and return their argument where nothing is to do, the storages
of the example values tell, and those of parameters and buffers that lie in one another.
"""

from __future__ import annotations

from functools import cache
from operator import getitem
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ecospa_fx.ir.schema import is_operator, named_arguments


def shares(node: fx.Node) -> list[fx.Node]:
    """The arguments whose memory a call's result may show."""
    if node.op != "call_function":
        return []
    if node.target is getitem:
        return node.all_input_nodes[:1]
    storages = _storages(node)
    said = _views(node)
    return [n for n in node.all_input_nodes if n in said or not storages.isdisjoint(_storages(n))]


def written_by(node: fx.Node) -> list[fx.Node]:
    """The arguments that a call writes into, lists of tensors and arguments by name among them."""
    writes = _aliases(node.target)[0] if is_operator(node) else {}
    if not any(writes.values()):
        return []
    named = named_arguments(node)
    return list(dict.fromkeys(_nodes([named[name] for name, is_write in writes.items() if is_write and name in named])))


def bases(node: fx.Node) -> set[fx.Node]:
    """The nodes that made the memory that a node's result may share."""
    result, seen, waiting = set[fx.Node](), {node}, [node]
    while waiting:
        current = waiting.pop()
        sources = shares(current)
        if not sources:
            result.add(current)
        waiting += [source for source in sources if source not in seen]
        seen.update(sources)
    return _of_chosen_result(node, result)


def written_to(node: fx.Node) -> bool:
    """Whether anything is written in place into the memory that a node's result may share with others."""
    first = bases(node)
    first |= {other for base in first for other in _sharing_memory(base)}
    seen, waiting = set(first), list(first)
    while waiting:
        for user in waiting.pop().users:
            if not seen.isdisjoint(written_by(user)):
                return True
            if user not in seen and not seen.isdisjoint(shares(user)):
                seen.add(user)
                waiting.append(user)
    return False


def writers(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Who writes into what, by the nodes that made the memory."""
    result: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        for base in dict.fromkeys(base for argument in written_by(node) for base in _all_bases(argument)):
            result.setdefault(base, []).append(node)
    return result


def written(graph: fx.Graph) -> set[fx.Node]:
    """The nodes into whose memory something is written in place, by way of a view or not."""
    return set(writers(graph))


# -- what a call says of itself ----------------------------------------------------------------------------------


@cache
def _aliases(target: Any) -> tuple[dict[str, bool], dict[str, bool], bool]:
    """What an operator's schema says of its arguments.

    Which may be written into, by name, of those that have a letter; which of these the results may be part of; and
    whether it has a mode in which it returns its input.
    """
    schema = target._schema
    returned = [r.alias_info for r in schema.returns if r.alias_info is not None]
    marked = {a.name: a.alias_info for a in schema.arguments if a.alias_info is not None}
    writes = {name: info.is_write for name, info in marked.items()}
    shown = {name: any(_overlap(info, other) for other in returned) for name, info in marked.items()}
    return writes, shown, any(a.name == "train" for a in schema.arguments)


def _nodes(values: object) -> list[fx.Node]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, fx.Node)]


def _views(node: fx.Node) -> set[fx.Node]:
    """The arguments that the schema says the results are views of, or that they are where there is nothing to do."""
    if not is_operator(node):
        return set()
    _, shown, has_mode = _aliases(node.target)
    if not (shown or has_mode):
        return set()
    named = named_arguments(node)
    result = [named[name] for name, is_part in shown.items() if is_part and name in named]
    if "train" in named:  # returns its input in the other mode
        result += node.all_input_nodes[:1]
    return set(_nodes(result))


def _overlap(argument: Any, result: Any) -> bool:
    """Whether a result may be part of an argument; lists have no letters of their own."""
    letters = argument.before_set | argument.after_set
    return not letters or not result.before_set or "*" in letters or not letters.isdisjoint(result.before_set)


# -- what the example values say ---------------------------------------------------------------------------------


def _storages(node: fx.Node) -> set[int]:
    """The memory of a node's example values, by identity."""
    result = set()
    for leaf in pytree.tree_leaves(node.meta.get("val")):
        if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided:
            try:
                result.add(leaf.untyped_storage()._cdata)
            except (NotImplementedError, RuntimeError):  # wrapped by a transform: it has none of its own
                continue
    return result


def _of_chosen_result(node: fx.Node, result: set[fx.Node]) -> set[fx.Node]:
    """Of the bases of what was one of several results those whose memory it has."""
    storages = _storages(node)
    certain = {base for base in result if not storages.isdisjoint(_storages(base))}
    return certain if node.target is getitem and certain else result


def _all_bases(node: fx.Node) -> set[fx.Node]:
    """The bases, and parameters and buffers that lie in the same memory."""
    result = bases(node)
    return result | {other for base in result for other in _sharing_memory(base)}


def _sharing_memory(node: fx.Node) -> list[fx.Node]:
    """Other stored tensors and inputs in the memory of one."""
    storages = _storages(node) if node.op in ("placeholder", "get_attr") else set()
    stored = (n for op in ("placeholder", "get_attr") for n in node.graph.find_nodes(op=op)) if storages else ()
    return [n for n in stored if n is not node and not storages.isdisjoint(_storages(n))]
