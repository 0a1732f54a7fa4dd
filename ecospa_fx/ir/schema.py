"""Calls of operators by their schemas: the operator's name, and arguments by theirs, read and written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, TypeAlias, cast

import torch
from torch import fx

Size: TypeAlias = int | torch.SymInt
"""A size of a tensor: a number, or an expression of symbols."""
Sizes: TypeAlias = Callable[[Any], int]
"""From a size to a concrete number."""
Args: TypeAlias = tuple[Any, ...]
"""Positional arguments of a node: nodes, literals, and lists of them."""
Kwargs: TypeAlias = dict[str, Any]
"""Arguments of a node by name."""


def is_operator(node: fx.Node) -> bool:
    """Whether a node calls an operator of ``torch.ops`` that has a schema."""
    return node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)


def schema_of(node: fx.Node) -> torch._C.FunctionSchema:
    """The schema of an operator that a node calls."""
    return cast(torch._ops.OpOverload, node.target)._schema


def input_node(node: fx.Node, index: int = 0) -> fx.Node:
    """The node that is an argument of a call, by its position: what a schema declares as one tensor."""
    argument = node.args[index]
    assert isinstance(argument, fx.Node), f"argument {index} of {node.name} is no node"
    return argument


def operator_name(target: Any) -> str:
    """The qualified name of an operator without its overload: ``aten.linear``."""
    namespace, _, name = target._schema.name.partition("::")
    return f"{namespace}.{name}"


def named_arguments(node: fx.Node, *, defaults: bool = False) -> Kwargs:
    """Raw arguments of an operator by the names of its schema.

    defaults: whether those that a call leaves out have their default values, or are absent.
    """
    names, preset = _arguments_of(node.target)
    return {**(preset if defaults else {}), **dict(zip(names, node.args, strict=False)), **node.kwargs}


@cache
def _arguments_of(target: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Names and default values of an operator's arguments, of which torch makes new objects whenever it is asked."""
    arguments = target._schema.arguments
    return tuple(a.name for a in arguments), {a.name: a.default_value for a in arguments if a.has_default_value()}


def tensor_arguments(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes among an operator's arguments, those in lists included, in the order of its schema."""
    for argument in named_arguments(node).values():
        for value in argument if isinstance(argument, list | tuple) else [argument]:
            if isinstance(value, fx.Node):
                yield value


def with_arguments(node: fx.Node, values: Mapping[str, Any]) -> tuple[Args, Kwargs]:
    """The positional and keyword arguments of a call with some, by name, replaced or added."""
    names, _ = _arguments_of(node.target)
    args, kwargs = list(node.args), dict(node.kwargs)
    for name, value in values.items():
        index = names.index(name)
        if index < len(args):
            args[index] = value
        else:
            kwargs[name] = value
    return tuple(args), kwargs


def call_arguments(operator: torch._ops.OpOverload, values: Mapping[str, Any]) -> tuple[Args, Kwargs]:
    """Arguments by name as an exported call has them: by position up to the first that is left out."""
    rest, args = dict(values), []
    for argument in operator._schema.arguments:
        if argument.kwarg_only or argument.name not in rest:
            break
        args.append(rest.pop(argument.name))
    return tuple(args), rest
