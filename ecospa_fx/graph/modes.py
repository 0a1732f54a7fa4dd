"""Operators that behave differently in training follow ``train()`` and ``eval()``.

A trace writes down the mode that it was made in: ``dropout(x, 0.1, True)``. In a restored tree of modules such a call
becomes a small child module, which asks its own mode when it is called. The model must have been traced in training
mode, where the probabilities are known. What a model's own code does by ``if self.training`` is not in the graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

_FLAGS = ("train", "training")
_PROBABILITY = "dropout_p"


class ByMode(nn.Module):
    """A call of an operator, with one argument that is another in eval mode."""

    def __init__(self, operator: str, argument: str, in_training: Any, in_eval: Any) -> None:
        super().__init__()
        self.operator, self.argument, self.values = operator, argument, (in_eval, in_training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The operator's result; takes all its arguments but the one."""
        namespace, name, overload = self.operator.split(".")
        function = getattr(getattr(getattr(torch.ops, namespace), name), overload)
        return function(*args, **{self.argument: self.values[self.training]}, **kwargs)

    def extra_repr(self) -> str:
        in_eval, in_training = self.values
        return f"{self.operator}, {self.argument}={in_training}, in eval mode {in_eval}"


def follow_modes(tree: nn.Module) -> int:
    """Let every such call of an unflattened module follow its mode. Returns how many calls do."""
    return sum(_follow(part) for part in _parts(tree))


def _parts(tree: nn.Module) -> Iterator[nn.Module]:
    """All modules with a graph, those that stand for single calls of one module included."""
    seen: set[int] = set()
    for module in tree.modules():
        for part in (module, *getattr(module, "_call_modules", ())):
            if isinstance(getattr(part, "graph", None), fx.Graph) and id(part) not in seen:
                seen.add(id(part))
                yield part


def _follow(module: Any) -> int:
    graph, count = module.graph, 0
    graph.owning_module = module  # finishing it made it belong to the code that was generated from it
    for node in list(graph.nodes):
        found = _flag(node)
        if found is None:
            continue
        position, name, (now, in_eval) = found
        child = f"by_mode_{count}"
        module.add_module(child, ByMode(str(node.target), name, now, in_eval))
        later = dict(zip(_names(node)[position + 1 :], node.args[position + 1 :], strict=False))
        others = {key: value for key, value in node.kwargs.items() if key != name}
        with graph.inserting_before(node):
            call = graph.call_module(child, node.args[:position], {**later, **others})
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        graph.erase_node(node)
        count += 1
    if count:
        module.finalize()
    return count


def _flag(node: fx.Node) -> tuple[int, str, tuple[Any, Any]] | None:
    """Position and name of an argument that depends on the mode, its value in training and in eval mode.

    None where there is none, or where training makes no difference.
    """
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    for at, name in enumerate(_names(node)):
        value = node.args[at] if at < len(node.args) else node.kwargs.get(name)
        if name in _FLAGS and value is True:
            return at, name, (True, False)
        if name == _PROBABILITY and isinstance(value, float) and value > 0:
            return at, name, (value, 0.0)
    return None


def _names(node: fx.Node) -> list[str]:
    target: Any = node.target
    return [argument.name for argument in target._schema.arguments]
