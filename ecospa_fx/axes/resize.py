"""How the literal arguments of an operator follow when axes get smaller, operator by operator.

Most operators carry no sizes and need nothing. A resize rule edits the arguments of one call through a `Resize`.
"""

from __future__ import annotations

import operator as python
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from ecospa_fx.axes.call import Value
from ecospa_fx.axes.dims import Axis
from ecospa_fx.axes.narrowing import Narrowing
from ecospa_fx.axes.registry import check_operators
from ecospa_fx.errors import InputError

ResizeRule = Callable[["Resize"], None]

_RULES: dict[str, ResizeRule] = {}


def resize_rule(*operators: str) -> Callable[[ResizeRule], ResizeRule]:
    """Register how the literal sizes of operators follow their axes. Raises InputError for a second registration."""
    check_operators("resize_rule", operators)

    def register(rule: ResizeRule) -> ResizeRule:
        for operator in operators:
            if operator in _RULES:
                raise InputError(f"operator {operator} has a resize rule already")
            _RULES[operator] = rule
        return rule

    return register


def find_resize(operator: str) -> ResizeRule | None:
    """The resize rule of an operator, or None where its arguments need no change."""
    rule = _RULES.get(operator)
    return rule if rule is not None else _RULES.get(operator.removesuffix("_"))


@dataclass(frozen=True, slots=True, eq=False)
class Term:
    """A call that a rule wants in the graph; a term that stands in several places is computed once."""

    operator: str
    """Qualified name with its overload, ``"aten.mul.Tensor"``, or of a function of Python, ``"operator.getitem"``."""
    arguments: tuple[object, ...]
    """Numbers, nodes of the graph, other terms, and tensors, which become buffers."""
    options: Mapping[str, object] = field(default_factory=dict)
    """Arguments by name."""

    @property
    def target(self) -> Callable[..., Any]:
        """The function that is called."""
        namespace, *names = self.operator.split(".")
        target: Any = python if namespace == "operator" else getattr(torch.ops, namespace)
        for name in names:
            target = getattr(target, name)
        return cast(Callable[..., Any], target)

    def output(self, index: int) -> Term:
        """One of several results."""
        return Term("operator.getitem", (self, index))


class Resize:
    """One call whose axes get smaller: what they were, what they become, and the arguments to edit."""

    def __init__(
        self,
        node: fx.Node,
        operator: str,
        arguments: dict[str, object],
        values: tuple[list[Value], list[Value]],
        kept: Narrowing,
        scale: Callable[[object, int, int], object],
        *,
        renormalises: bool = False,
    ) -> None:
        self.node = node
        self.operator = operator
        self.arguments = arguments
        """Raw arguments by schema name: numbers, or graph nodes."""
        self.inputs, self.outputs = values
        self.kept = kept
        self.edits: dict[str, object] = {}
        self.replacement: Term | None = None
        self.results: tuple[Term, ...] = ()
        self.renormalises = renormalises
        """Whether a statistic runs over what is kept, because the caller allowed it, and not over all."""
        self._scale = scale

    @property
    def output(self) -> Value:
        """The first output."""
        return self.outputs[0]

    # -- reading ---------------------------------------------------------------------------------------------

    def has(self, name: str) -> bool:
        """Whether the operator has an argument of this name, given."""
        return self.arguments.get(name) is not None

    def raw(self, name: str) -> object:
        """An argument as it stands in the graph."""
        return self.arguments.get(name)

    def argument(self, name: str) -> Any:
        """An argument that must be a number or a list, of which the schema of the operator says which."""
        return self.arguments[name]

    def axis(self, name: str) -> int:
        """An axis number of the first input, counted from the front."""
        return (self.argument(name) if self.has(name) else 0) % max(len(self.inputs[0].axes), 1)

    def node_is(self, *operators: str) -> bool:
        """Whether the call is of one of these operators."""
        return self.operator in operators

    def changed(self, index: int, axis: int) -> bool:
        """Whether an axis of an input loses positions."""
        return self.kept.changed(self.inputs[index].axes[axis])

    def output_changed(self, axis: int) -> bool:
        """Whether an axis of the output loses positions."""
        return self.kept.changed(self.output.axes[axis])

    def size(self, value: Value, axis: int) -> int:
        """The new size of an axis."""
        return self.kept.count(value.axes[axis])

    def size_of(self, axis: Axis) -> int:
        """The new size of an axis that is held."""
        return self.kept.count(axis)

    def rank_of(self, index: int, axis: int, position: int) -> int:
        """Kept positions before `position` on an axis of an input."""
        return self.kept.rank(self.inputs[index].axes, axis, position)

    def copies(self, count: object, output_axis: int, input_axis: int | None) -> object:
        """How many copies of an axis of the first input (None: of one position) make an axis of the output now."""
        inner = self.inputs[0].axes[input_axis] if input_axis is not None else None
        whole = self.output.axes[output_axis]
        old = whole.size // (inner.size if inner is not None else 1)
        new = self.size_of(whole) // (self.size_of(inner) if inner is not None else 1)
        return count if old == new else new if isinstance(count, int) else self._scale(count, old, new)

    def kept_share(self, axes: Iterable[Axis]) -> Fraction:
        """The share of the positions of some axes that is kept."""
        share = Fraction(1)
        for axis in axes:
            share *= Fraction(self.kept.count(axis), axis.size)
        return share

    def dtype(self, name: str) -> torch.dtype:
        """The type of a tensor argument."""
        node = self.arguments[name]
        assert isinstance(node, fx.Node)
        example: Tensor = node.meta["val"]
        return example.dtype

    def positions(self, name: str, axes: Iterable[int]) -> object:
        """How many positions some axes of the first input, an argument of this name, had: a number or a term."""
        node = self.arguments[name]
        assert isinstance(node, fx.Node)
        count: object = 1
        for axis in axes:
            size: object = self.inputs[0].axes[axis].size
            if not is_concrete_int(node.meta["val"].shape[axis]):
                size = Term("aten.sym_size.int", (node, axis))
            literal = isinstance(count, int) and isinstance(size, int)
            count = python.mul(count, size) if literal else Term("operator.mul", (count, size))
        return count

    def scaled(self, size: object, axis: Axis) -> object:
        """The new size of an axis in place of a literal or computed one."""
        new = self.kept.count(axis)
        return new if isinstance(size, int) else self._scale(size, axis.size, new)

    # -- editing ---------------------------------------------------------------------------------------------

    def set(self, name: str, value: object) -> None:
        """Replace an argument."""
        self.edits[name] = value

    def replace(self, term: Term) -> None:
        """Compute something else instead, which gives as many results."""
        self.replacement = term

    def replace_results(self, terms: Iterable[Term]) -> None:
        """Compute each result by itself instead; of an operator that gives one, or a list of them."""
        self.results = tuple(terms)

    def sizes(self, name: str, first: int = 0) -> None:
        """A list of sizes, the i-th for axis first + i of the output; -1 stays, computed sizes are rescaled."""
        if not self.has(name):
            return
        sizes = list(self.argument(name))
        for i, size in enumerate(sizes):
            axis = self.output.axes[first + i]
            if self.kept.changed(axis) and size != -1:
                sizes[i] = self.scaled(size, axis)
        self.edits[name] = sizes

    def bounds(self, dim: str, start: str, stop: str, step: str) -> None:
        """Start, stop and step of a slice of the first input."""
        axis = self.axis(dim)
        if not self.changed(0, axis):
            return
        size = self.inputs[0].axes[axis].size
        by = self.argument(step) if self.has(step) else 1
        begin, end, _ = slice(self.arguments.get(start), self.arguments.get(stop), by).indices(size)
        if by == 1:
            self.edits[start] = self.rank_of(0, axis, begin)
            self.edits[stop] = self.rank_of(0, axis, end)
            return
        ranks = self.kept.ranks(self.inputs[0].axes, axis, range(begin, end, by))
        spacing = {b - a for a, b in pairwise(ranks[0].tolist())} or {1}
        if len(spacing) == len(ranks) == 1:
            self.edits.update({start: int(ranks[0, 0]), stop: int(ranks[0, -1]) + 1, step: spacing.pop()})
        else:
            self._pick(axis, ranks)

    def pick(self) -> None:
        """Of positions of the first input that are read in a fixed order those that stay, among those that stay."""
        if self.output.reads is None or not self.changed(0, self.output.reads[0]):
            return
        axis, positions = self.output.reads
        self._pick(axis, self.kept.ranks(self.inputs[0].axes, axis, positions))

    def _pick(self, axis: int, positions: Tensor) -> None:
        """Choose positions [places, count] along an axis of the first input instead of calling the operator."""
        source, other = self.raw("self"), self.kept.carrier_axis(self.inputs[0].axes, axis)
        if len(positions) == 1 or other is None:
            self.replace(Term("aten.index_select.default", (source, axis, positions[0])))
            return
        view = [1] * len(self.inputs[0].axes)
        view[other], view[axis] = positions.shape
        index = (positions if other < axis else positions.T).reshape(view)
        self.replace(Term("aten.take_along_dim.default", (source, index, axis)))
