"""Axes as text: einsum letters for dims, parentheses for what is flattened, ``+`` for what is concatenated.

==================  ================================================================================================
(A B a)             Three axes of one dim each.
(A (a b))           The second of two axes is a pair of dims, flattened row by row: ``a`` is the outer one.
(A (a + b))         The second is a concatenation: first the positions of ``a``, then those of ``b``.
(A a (b + b))       Rotary halves: the same dim twice.
(A {2·a | 2·b+1})   Positions that do not lie in rows: each part is a formula of the indices of its dims.
(A {a[1 0 2]})      A fixed order: index 0 of ``a`` stands at position 1, index 1 at position 0.
==================  ================================================================================================

A dim that indexes elements of a parameter, and may therefore be cut, has a small letter, one that is stored and never
cut a capital, in the order in which they appear, parameters first: ``a`` to ``z``, then ``a1``. A dim whose positions
are all alike is ``_`` and its size. An axis of one position is ``1``. ``°`` behind an axis says that the positions
which masking removes are exactly 0 there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from sys import maxsize

from torch import fx

from ecospa_fx.axes.axis import Axis, DimKind, axis_text
from ecospa_fx.axes.findings import Findings, Gather, NodeValue, Product, Value
from ecospa_fx.ir.provenance import operator_of


class Notation:
    """Names for the dims of one graph, given in the order in which resolved axes are shown to it."""

    def __init__(self, sizes: Sequence[int], origins: Sequence[DimKind], axes: Iterable[Axis] = ()) -> None:
        self._sizes, self._origins = sizes, origins
        self._names: dict[int, str] = {}
        self._counts = {DimKind.PARAMETER: 0, DimKind.STORED: 0}
        for axis in axes:
            self.axis(axis)

    def dim(self, dim: int) -> str:
        """The name of a dim."""
        if dim not in self._names:
            kind = self._origins[dim]
            self._names[dim] = f"_{self._sizes[dim]}" if kind is DimKind.BLANK else self._next(kind)
        return self._names[dim]

    def _next(self, kind: DimKind) -> str:
        number, index = divmod(self._counts[kind], 26)
        self._counts[kind] += 1
        letter = chr(ord("a" if kind is DimKind.PARAMETER else "A") + index)
        return f"{letter}{number or ''}"

    def dims(self, dims: Iterable[int]) -> str:
        """Names of some dims, each once."""
        return ", ".join(dict.fromkeys(map(self.dim, dims)))

    def axis(self, axis: Axis) -> str:
        """One axis."""
        return axis_text(axis, self.dim, self._sizes.__getitem__)

    def axes(self, axes: Sequence[Axis], zero: Sequence[bool] = ()) -> str:
        """The axes of a tensor; zero: which of them hold 0 where masking removes."""
        marks = zero or [False] * len(axes)
        cut = [mark and self._cuttable(axis) for axis, mark in zip(axes, marks, strict=True)]
        texts = (self.axis(axis) + ("°" if mark else "") for axis, mark in zip(axes, cut, strict=True))
        return f"({' '.join(texts)})"

    def _cuttable(self, axis: Axis) -> bool:
        return any(self._origins[dim] is DimKind.PARAMETER for dim in axis.dims)

    def value(self, value: NodeValue) -> str:
        """The tensor, or the tensors, that a node gives."""
        if isinstance(value, list):
            return ", ".join(map(self.value, value))
        return self.axes(value.axes, value.zero) if value is not None else "nothing"

    def legend(self) -> str:
        """The sizes of all dims that were named."""
        letters = (f"{name}={self._sizes[dim]}" for dim, name in self._names.items() if not name.startswith("_"))
        return " ".join(letters)


# -- what rules said ---------------------------------------------------------------------------------------------


def statements(findings: Findings, notation: Notation) -> dict[fx.Node, list[str]]:
    """What was noted at each node, one line for all dims of which the same is said."""
    lines: dict[fx.Node, dict[str, list[int]]] = {}

    def note(node: fx.Node, text: str, dim: int) -> None:
        lines.setdefault(node, {}).setdefault(text, []).append(dim)

    for effect in findings.events:
        note(effect.node, effect.action, effect.dim)
    for basis in findings.fixed:
        note(basis.node, "a function of each position" if basis.nonlinear else "no other basis", basis.dim)
    for label, blockers in (
        ("blocked", findings.blocks),
        ("inexact", findings.inexact),
        ("narrower", findings.resized),
    ):
        for blocker in blockers:
            note(blocker.node, f"{label}, {blocker.reason}", blocker.dim)
    result = {
        node: [f"{notation.dims(dims)}: {text}" for text, dims in entries.items()] for node, entries in lines.items()
    }
    for gather in findings.gathers:
        result.setdefault(gather.user, []).append(_gather(gather, notation))
    return result


def _gather(gather: Gather, notation: Notation) -> str:
    target = notation.axis(gather.target[gather.target_axis])
    joined = ", its elements become the result's" if gather.joins else ""
    return f"{target}: {gather.source.name} is stored, and gathered along its axis {gather.operand_axis}{joined}"


def product_text(product: Product, notation: Notation) -> str:
    """A product of activations: what it sums over, what is alike on all sides and stays, and what each alone has."""
    contracted, shared = (
        " ".join(dict.fromkeys(map(notation.axis, axes))) or "nothing" for axes in (product.contracted, product.shared)
    )
    sides = " against ".join(notation.axes(axes) for axes in product.single)
    return f"product of activations over {contracted}, batched along {shared}, {sides}"


def flow_text(
    values: Mapping[fx.Node, NodeValue], parameters: Mapping[str, Value], findings: Findings, notation: Notation
) -> str:
    """A line for every parameter, input and call, what was noted there below it, and the sizes of the dims."""
    said = statements(findings, notation)
    lines = [f"{name}: {notation.value(value)}" for name, value in parameters.items()]
    names = {node: _name(node, value) for node, value in values.items()}
    for node, value in values.items():
        if node.op == "call_function" and value is not None:
            lines.append(f"{names[node]} = {_call(node, names)} : {notation.value(value)}")
        elif node.op != "call_function" and value is not None and names[node] == node.name:
            lines.append(f"{node.name}: {notation.value(value)}")
        lines += [f"    {text}" for text in said.pop(node, ())]
    for node, texts in said.items():
        lines += [node.name, *(f"    {text}" for text in texts)]
    return "\n".join([*lines, f"where {notation.legend()}"])


def _name(node: fx.Node, value: NodeValue) -> str:
    """A parameter's own name for the node that holds it."""
    named = node.op != "call_function" and isinstance(value, Value) and len(value.weights) == 1
    return value.weights[0] if named and isinstance(value, Value) else node.name


def _call(node: fx.Node, names: Mapping[fx.Node, str]) -> str:
    args = [_argument(argument, names) for argument in node.args]
    args += [f"{name}={_argument(argument, names)}" for name, argument in node.kwargs.items()]
    return f"{operator_of(node)}({', '.join(args)})"


def _argument(argument: fx.node.Argument, names: Mapping[fx.Node, str]) -> str:
    if isinstance(argument, fx.Node):
        return names.get(argument, argument.name)
    if isinstance(argument, list | tuple):
        return f"[{', '.join(_argument(item, names) for item in argument)}]"
    return "end" if argument == maxsize else str(argument)
