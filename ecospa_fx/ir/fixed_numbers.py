"""Whole numbers of a graph that are the same at every call: buffers, literals, and what is computed from them alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode

from ecospa_fx.ir.alias import bases, writers
from ecospa_fx.ir.schema import is_operator, operator_name

LARGEST = 1 << 16
"""More elements than this are not looked at: no order of channels has as many."""


KEEPS_NUMBERS = "aten.detach_"
"""In place, but it writes no number: export puts it behind every literal."""


class FixedNumbers:
    """The fixed whole numbers of one graph, found when they are asked for.

    constant: what a node that is no call holds, or None where that is given at each call.
    """

    def __init__(self, constant: Callable[[fx.Node], Tensor | None]) -> None:
        self._constant = constant
        self._known: dict[fx.Node, Tensor | None] = {}
        self._writers: dict[fx.Node, list[fx.Node]] | None = None

    def __call__(self, node: fx.Node) -> Tensor | None:
        """The numbers of a node, on the CPU; None where they are not fixed, not whole, too many or not known."""
        waiting = [node]  # no recursion: chains of nodes are longer than Python's stack
        while waiting:
            last = waiting[-1]
            ahead = [n for n in self._read(last) if n not in self._known]
            if not ahead and waiting.pop() not in self._known:
                self._known[last] = self._value(last)
            waiting += ahead
        return self._known[node]

    def _read(self, node: fx.Node) -> list[fx.Node]:
        return node.all_input_nodes if node.op == "call_function" and _is_small(node) else []

    def _value(self, node: fx.Node) -> Tensor | None:
        if not _is_small(node) or self._changes(node):
            return None
        if node.op != "call_function":
            value = self._constant(node)
            return None if value is None or value.is_meta or detect_fake_mode([value]) is not None else value.cpu()
        target: Any = node.target
        if not is_operator(node) or torch.Tag.nondeterministic_seeded in target.tags:
            return None
        if any(self._known[n] is None for n in node.all_input_nodes):
            return None
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), self._known.__getitem__)
        with torch.no_grad():
            result = target(*args, **{**kwargs, **_on_cpu(kwargs)})
        return result if isinstance(result, Tensor) else None

    def _changes(self, node: fx.Node) -> bool:
        """Whether anything writes into the memory of a node's result."""
        if self._writers is None:
            self._writers = writers(node.graph)
        here = (writer for base in bases(node) for writer in self._writers.get(base, ()))
        return any(operator_name(writer.target) != KEEPS_NUMBERS for writer in here)


def _on_cpu(options: Mapping[str, object]) -> dict[str, object]:
    return {name: torch.device("cpu") for name in ("device",) if options.get(name) is not None}


def _is_small(node: fx.Node) -> bool:
    """Whether a node gives whole numbers, few enough to look at, whose count is no symbol."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex():
        return False
    return all(isinstance(size, int) for size in value.shape) and value.numel() <= LARGEST
