"""Calls of operators by what their schemas say: the operator's name, and its arguments by theirs, read and written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx

Sizes = Callable[[Any], int]
"""From a size (an int or a symbol) to a concrete number."""


def is_operator(node: fx.Node) -> bool:
    """Whether a node calls an operator of ``torch.ops`` that has a schema."""
    return node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)


def schema_of(node: fx.Node) -> torch._C.FunctionSchema:
    """The schema of an operator that a node calls."""
    target: Any = node.target
    schema: torch._C.FunctionSchema = target._schema
    return schema


def operator_name(target: Any) -> str:
    """The qualified name of an operator without its overload: ``aten.linear``."""
    namespace, _, name = target._schema.name.partition("::")
    return f"{namespace}.{name}"


def named_arguments(node: fx.Node, *, defaults: bool = False) -> dict[str, Any]:
    """Raw arguments of an operator by the names of its schema.

    defaults: whether those that a call leaves out have their default values, or are absent.
    """
    schema = schema_of(node).arguments
    left_out = {a.name: a.default_value for a in schema if a.has_default_value()} if defaults else {}
    return {**left_out, **dict(zip((a.name for a in schema), node.args, strict=False)), **node.kwargs}


def tensor_arguments(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes among an operator's arguments, those in lists included, in the order of its schema."""
    for argument in named_arguments(node).values():
        for value in argument if isinstance(argument, list | tuple) else [argument]:
            if isinstance(value, fx.Node):
                yield value


def with_arguments(node: fx.Node, values: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments of a call with some, by name, replaced or added."""
    names = [a.name for a in schema_of(node).arguments]
    args, kwargs = list(node.args), dict(node.kwargs)
    for name, value in values.items():
        index = names.index(name)
        if index < len(args):
            args[index] = value
        else:
            kwargs[name] = value
    return tuple(args), kwargs


def call_arguments(operator: Any, values: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments by name as an exported call has them: by position up to the first that is left out."""
    rest, args = dict(values), []
    for argument in operator._schema.arguments:
        if argument.kwarg_only or argument.name not in rest:
            break
        args.append(rest.pop(argument.name))
    return tuple(args), rest
