"""The call of an operator as a rule for symbolic elements sees it; a rule that does not know returns None."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from ecospa_fx.indexing.values import ElementValue, IndexedRead, Piecewise, as_number, combined, constant, position
from ecospa_fx.ir.schema import named_arguments

Computed = dict[fx.Node, ElementValue]
ElementRule = Callable[["ElementCall"], ElementValue | None]
NodeRule = Callable[[fx.Node, Computed], ElementValue | None]
RULES: dict[object, NodeRule] = {}


class ElementCall:
    """A call as a rule sees it: arguments by name, defaults included."""

    def __init__(self, node: fx.Node, computed: Computed) -> None:
        self.node, self.computed = node, computed
        self.arguments = named_arguments(node, defaults=True)
        self.shape = shape_of(node)
        self.dtype: torch.dtype = node.meta["val"].dtype

    def __getitem__(self, name: str) -> Any:
        """An argument; sizes as numbers or symbols, tensors as nodes."""
        argument = self.arguments.get(name)
        return _scalar(argument)

    def rank(self, name: str = "self") -> int:
        """How many axes a tensor argument has."""
        return len(shape_of(self[name]))

    def axis(self, name: str, rank: int) -> int:
        """An axis argument, counted from the left."""
        return int(self[name]) % max(rank, 1)

    def value(self, name: str = "self") -> ElementValue:
        """What the elements of a tensor argument are, in their own positions."""
        argument = self[name]
        return self.computed[argument] if isinstance(argument, fx.Node) else constant(argument)

    def aligned(self, name: str) -> Piecewise | None:
        """What the elements of an argument are, in the positions of the result; None for those of other tensors."""
        argument, value = self[name], self.value(name)
        if not isinstance(value, Piecewise):
            return None
        shape = shape_of(argument) if isinstance(argument, fx.Node) else ()
        offset, places = len(self.shape) - len(shape), {}
        for axis, size in enumerate(shape):
            if same(size, self.shape[axis + offset]):
                places[position(axis)] = position(axis + offset)
            elif same(size, 1):
                places[position(axis)] = sympy.Integer(0)
            else:
                return None
        return value.at(places)

    def pointwise(self, function: Callable[..., object], *names: str) -> Piecewise | None:
        """A function of numbers, position by position."""
        values = [self.aligned(name) for name in names]
        return None if any(v is None for v in values) else combined(function, *(v for v in values if v is not None))

    def moved(self, places: Sequence[object]) -> ElementValue:
        """The elements of ``self`` at other positions: one expression for each of its axes."""
        return self.value().at({position(axis): sympy.sympify(place) for axis, place in enumerate(places)})


def _scalar(argument: object) -> Any:
    if isinstance(argument, fx.Node) and not isinstance(argument.meta.get("val"), Tensor):
        return argument.meta["val"]
    return argument


def same(a: object, b: object) -> bool:
    """Whether two sizes are equal, whatever the symbols stand for."""
    return bool(sympy.expand(as_number(a) - as_number(b)) == 0)


def element_rule(*operators: object) -> Callable[[ElementRule], ElementRule]:
    """Register a rule for operators."""

    def register(rule: ElementRule) -> ElementRule:
        for operator in operators:
            RULES[operator] = lambda node, computed: rule(ElementCall(node, computed))
        return rule

    return register


def shape_of(node: object) -> tuple[Any, ...]:
    """The sizes of a node's tensor."""
    assert isinstance(node, fx.Node)  # whatever an operator takes as a tensor
    return tuple(node.meta["val"].shape)


def itself(node: fx.Node) -> IndexedRead:
    """An element of the node's own tensor."""
    return IndexedRead(node, tuple(position(axis) for axis in range(len(shape_of(node)))))
