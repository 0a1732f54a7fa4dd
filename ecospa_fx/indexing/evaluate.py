"""Symbolic elements: every element of a tensor as an expression of its own position.

``arange(n)[:, None] >= arange(n)`` is, at row i0 and column i1, the condition ``i0 - i1 >= 0``, however it is spelt.
`Elements` finds such expressions for everything that is computed from sizes and constants alone, for all sizes at
once, and for every view which element of which tensor it shows. What it cannot express, or not in a few parts, is an
element of itself, so that nothing is ever guessed and no expression grows with the graph.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

from torch import Tensor, fx

from ecospa_fx.indexing.call import RULES, NodeRule, itself
from ecospa_fx.indexing.values import ElementValue, IndexedRead, Piecewise, TooLarge, constant, small_enough
from ecospa_fx.ir.alias import bases, written

log = logging.getLogger(__name__)


class Elements(Mapping[fx.Node, ElementValue]):
    """What the elements of the tensors of a graph with example values are, found when it is asked for.

    The graph may change meanwhile where what a node computes stays the same.
    """

    def __init__(self, graph: fx.Graph) -> None:
        load_rules()
        self.graph = graph
        self._written = written(graph)
        self._known: dict[fx.Node, ElementValue] = {}
        self._computed: dict[str, ElementValue | None] = {}

    def __iter__(self) -> Iterator[fx.Node]:
        return (node for node in self.graph.nodes if _is_tensor(node))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, node: object) -> bool:
        return isinstance(node, fx.Node) and _is_tensor(node)

    def __getitem__(self, node: fx.Node) -> ElementValue:
        waiting = [node]  # no recursion: chains of nodes are longer than Python's stack
        while waiting:
            last = waiting[-1]
            ahead = [] if last in self._known else [n for n in self._read(last) if n not in self._known]
            if not ahead and waiting.pop() not in self._known:
                self._known[last] = self._value(last)
            waiting += ahead
        return self._known[node]

    def _read(self, node: fx.Node) -> list[fx.Node]:
        """The tensors that tell what the elements of a node are."""
        rule = node.op == "call_function" and node.target in RULES
        return [n for n in node.all_input_nodes if _is_tensor(n)] if rule else []

    def _value(self, node: fx.Node) -> ElementValue:
        rule = RULES.get(node.target) if node.op == "call_function" else None
        value: ElementValue | None
        if rule is None:
            value = _stored(node)
        else:
            key = self._key(node)
            if key not in self._computed:
                self._computed[key] = self._bounded(rule, node)
            value = self._computed[key]
        if isinstance(value, Piecewise) and self._written and not bases(node).isdisjoint(self._written):
            value = None
        return value if value is not None else itself(node)

    def _bounded(self, rule: NodeRule, node: fx.Node) -> ElementValue | None:
        try:
            value = rule(node, self._known)
            if isinstance(value, IndexedRead):
                small_enough(value.places)
        except TooLarge:
            log.debug("node %s (%s) stays as it is: its elements take too long an expression", node, node.target)
            return None
        return value

    def _key(self, node: fx.Node) -> str:
        """Equal where nodes compute the same from the same values, as the masks of all layers often do."""

        def described(read: fx.Node) -> Any:
            example = read.meta.get("val")
            if not isinstance(example, Tensor):
                return str(example)
            return f"{id(self._known[read])} {tuple(example.shape)} {example.dtype}"

        arguments: Any = fx.node.map_arg((node.args, node.kwargs), described)
        return f"{node.target} {arguments} {tuple(node.meta['val'].shape)} {node.meta['val'].dtype}"


def load_rules() -> None:
    """Register the rules of all operators."""
    for family in ("create", "views", "pointwise", "along"):
        import_module(f"ecospa_fx.indexing.{family}")


def shows_all(node: fx.Node, source: fx.Node) -> bool:
    """Whether every element of a view is the element of its source in the same position."""
    load_rules()
    rule = RULES.get(node.target)
    return rule is not None and rule(node, {source: itself(source)}) == itself(source)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _stored(node: fx.Node) -> Piecewise | None:
    """A literal of the model's code that is one number, such as ``torch.tensor(-1e9)``."""
    value = node.meta.get("constant")
    if not isinstance(value, Tensor) or value.numel() != 1 or value.is_complex():
        return None
    return constant(value.item())
