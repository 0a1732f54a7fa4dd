"""What a rule sees: one operator call with the axes of its inputs, and the verbs to say what happens to them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ecospa_fx.axes.algebra import Axis, Dims, Misaligned, Origin

Zero = Literal["all", "any", "lost"]
UNIT = Axis(1, ())


@dataclass(frozen=True, slots=True)
class Value:
    """The axes of one tensor.

    zero: per axis, whether the positions that masking removes hold exactly 0 in the masked model;
    parameter: the parameter this tensor is a view of, if any; node: the graph node, for the record of gathers.
    """

    axes: tuple[Axis, ...]
    zero: tuple[bool, ...]
    parameter: str | None = None
    node: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        return tuple(axis.size for axis in self.axes)


@dataclass(frozen=True, slots=True)
class Gather:
    """A stored tensor that meets a parameter's dim: where it is used, it must be reduced to the kept positions."""

    user: Any
    operand: Any
    operand_axis: int
    operand_rank: int
    target: tuple[Axis, ...]
    target_axis: int


@dataclass(frozen=True, slots=True)
class Event:
    """What one node does to one dim."""

    dim: int
    node: Any
    action: str
    detail: str = ""


class Record:
    """Everything that the walk learns, beyond the axes themselves."""

    def __init__(self) -> None:
        self.gathers: list[Gather] = []
        self.events: list[Event] = []
        self.blocks: list[tuple[int, Any, str]] = []
        self.consumed: list[tuple[str, int]] = []
        self.routed: dict[int, tuple[Axis, Any]] = {}
        """Stored dims whose positions each belong to one position of a parameter's axis (tokens of experts)."""


class Call:
    """One operator call. Arguments are read by their schema names: ``call["input"]``, ``call.get("bias")``."""

    def __init__(
        self,
        node: Any,
        operator: str,
        arguments: dict[str, Any],
        outputs: list[tuple[int, ...]],
        dims: Dims,
        record: Record,
    ) -> None:
        self.node = node
        self.operator = operator
        self.arguments = arguments
        self.outputs = outputs
        """Shapes of the tensor outputs, as concrete integers."""
        self.dims = dims
        self.record = record

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def get(self, name: str, default: Any = None) -> Any:
        """An argument, or the default where it was not given or is None."""
        value = self.arguments.get(name)
        return default if value is None else value

    @property
    def values(self) -> list[Value]:
        """All tensor arguments, lists flattened, in order."""
        found: list[Value] = []
        for argument in self.arguments.values():
            found += [v for v in (argument if isinstance(argument, list | tuple) else [argument]) if isinstance(v, Value)]
        return found

    # -- results ---------------------------------------------------------------------------------------------

    def value(self, axes: Iterable[Axis], zero: Iterable[bool] | None = None, parameter: str | None = None) -> Value:
        """An output with these axes."""
        axes = tuple(axes)
        flags = tuple(zero) if zero is not None else (False,) * len(axes)
        return Value(axes, flags, parameter, self.node)

    def stored(self, output: int = 0) -> Value:
        """An output all of whose axes are new and are never cut."""
        return self.value(self.dims.fresh(size, Origin.STORED) for size in self.outputs[output])

    def passes(self, value: Value, zero: Zero = "all") -> Value:
        """An output with the axes of `value`."""
        kept = value.zero if zero != "lost" else (False,) * len(value.axes)
        return self.value(value.axes, kept)

    def moved(self, source: Value, axes: Iterable[Axis], zero: Iterable[bool]) -> Value:
        """An output that is a view of `source`."""
        return self.value(axes, zero, source.parameter)

    # -- verbs -----------------------------------------------------------------------------------------------

    def note(self, axis: Axis, action: str, detail: str = "") -> None:
        """Record what happens to the dims of an axis here."""
        for dim in self.dims.dims_of(axis):
            if self.dims.origins[dim] is not Origin.STORED:
                self.record.events.append(Event(dim, self.node, action, detail))

    def block(self, axis: Axis, message: str) -> None:
        """The dims of an axis cannot be removed because of this node."""
        for dim in self.dims.dims_of(axis):
            self.block_dim(dim, message)

    def block_dim(self, dim: int, message: str) -> None:
        """One dim cannot be removed because of this node."""
        if self.dims.origins[dim] is not Origin.STORED:
            self.record.blocks.append((dim, self.node, message))

    def block_all(self, message: str) -> list[Value]:
        """Nothing that reaches this node can be removed; its outputs are new."""
        for value in self.values:
            for axis in value.axes:
                self.block(axis, message)
        return [self.stored(i) for i in range(len(self.outputs))]

    def mixes(self, axis: Axis, message: str) -> Axis:
        """Positions along this axis influence one another: blocked, and new on the other side."""
        self.block(axis, message)
        return self.dims.fresh(axis.size, Origin.STORED)

    def tie(self, a: Axis, b: Axis) -> bool:
        """Make two axes the same index set; False (and a block) where a gather would be needed or none exists."""
        try:
            gathers = self.dims.unify(a, b)
        except Misaligned as reason:
            for axis in (a, b):
                self.block(axis, f"its positions are combined out of line ({reason})")
            return False
        for dim, _ in gathers:
            self.block_dim(dim, "it meets a stored tensor or a model input here")
        return not gathers

    def align(self, operands: Sequence[tuple[Value, int]], out: Sequence[Axis | None], at: int) -> Axis:
        """Tie one axis of several operands, pointwise; stored operands are recorded for a gather.

        out: axes of the output known so far, for gathers whose choice differs along another axis.
        """
        rank = {Origin.PARAMETER: 0, Origin.BLANK: 1, Origin.STORED: 2}

        def order(entry: tuple[Value, int]) -> int:
            return min((rank[self.dims.origins[d]] for d in self.dims.dims_of(entry[0].axes[entry[1]])), default=3)

        ranked = sorted(operands, key=order)
        first = ranked[0][0].axes[ranked[0][1]]
        for value, index in ranked[1:]:
            axis = value.axes[index]
            try:
                pairs = self.dims.unify(first, axis)
            except Misaligned as reason:
                for one in (first, axis):
                    self.block(one, f"its positions are combined out of line ({reason})")
                first = self.dims.fresh(first.size, Origin.STORED)
                continue
            if any(stored >= 0 for _, stored in pairs):
                for dim, _ in pairs:
                    self.block_dim(dim, "it meets a stored tensor inside a merged axis")
        return first

    # -- combinators -----------------------------------------------------------------------------------------

    def pointwise(self, operands: Sequence[Value], zero: Zero, shape: Sequence[int] | None = None) -> Value:
        """Broadcast operands against one another, right-aligned.

        zero: "all" where the result is 0 if all operands are (add), "any" if one is (mul), "lost" if neither.
        """
        shape = tuple(shape if shape is not None else self.outputs[0])
        axes: list[Axis] = []
        flags: list[bool] = []
        for position, size in enumerate(shape):
            here = [(v, position - len(shape) + len(v.axes)) for v in operands]
            here = [(v, i) for v, i in here if i >= 0 and v.axes[i].size == size]
            axes.append(self.align(here, axes, position) if here and size != 1 else UNIT)
            live = [v.zero[i] for v, i in here if self._follows(v.axes[i], axes[-1])]
            flags.append(zero == "any" and any(live) or zero == "all" and len(live) == len(operands) and all(live))
        self._record_gathers(operands, axes)
        return self.value(axes, flags)

    def _follows(self, axis: Axis, target: Axis) -> bool:
        """Whether the axis is cut together with the target rather than gathered."""
        return self.dims.resolve(axis) == self.dims.resolve(target) or not self.dims.cuttable(target)

    def _record_gathers(self, operands: Sequence[Value], axes: Sequence[Axis]) -> None:
        for value in operands:
            for index, axis in enumerate(value.axes):
                at = index + len(axes) - len(value.axes)
                if at >= 0 and axis.size == axes[at].size and axis.size > 1 and self.dims.cuttable(axes[at]):
                    gather = Gather(self.node, value.node, index, len(value.axes), tuple(axes), at)
                    self.record.gathers.append(gather)

    def contraction(
        self, operands: Sequence[Value], labels: Sequence[Sequence[Hashable]], out: Sequence[Hashable]
    ) -> Value:
        """An Einstein summation: axes with the same label are tied, labels missing from `out` are summed over."""
        where: dict[Hashable, list[tuple[Value, int]]] = {}
        for value, names in zip(operands, labels, strict=True):
            for index, name in enumerate(names):
                where.setdefault(name, []).append((value, index))
        axes: dict[Hashable, Axis] = {}
        flags: dict[Hashable, bool] = {}
        for name, entries in where.items():
            wide = [(v, i) for v, i in entries if v.axes[i].size > 1]
            if not wide:
                axes[name], flags[name] = UNIT, True
            elif name in out:
                axes[name] = self.align(wide, (), 0) if len(wide) > 1 else wide[0][0].axes[wide[0][1]]
                flags[name] = any(v.zero[i] for v, i in wide if self._follows(v.axes[i], axes[name]))
                if len(wide) > 1:
                    self._batched(wide, axes[name])
            else:
                self._contracted(wide)
        for value, names in zip(operands, labels, strict=True):
            self._gather_batched(value, names, axes, out)
        return self.value([axes[name] for name in out], [flags[name] for name in out])

    def _batched(self, entries: Sequence[tuple[Value, int]], axis: Axis) -> None:
        both = all(v.parameter is None for v, _ in entries)
        self.note(axis, "batched", "activations" if both else "parameter")

    def _gather_batched(
        self, value: Value, names: Sequence[Hashable], axes: dict[Hashable, Axis], out: Sequence[Hashable]
    ) -> None:
        target = tuple(axes[name] for name in out)
        for index, name in enumerate(names):
            if name in axes and name in out and self.dims.cuttable(axes[name]):
                if self._follows(value.axes[index], axes[name]) or value.axes[index].size == 1:
                    continue
                others = [i for i, other in enumerate(names) if other != name and value.axes[i].size > 1]
                if all(names[i] in out for i in others):
                    at = list(out).index(name)
                    self.record.gathers.append(Gather(self.node, value.node, index, len(names), target, at))
                else:
                    self.block(axes[name], "it indexes matrices that are stored or given as inputs")

    def _contracted(self, entries: Sequence[tuple[Value, int]]) -> None:
        """Sum over one label."""
        axes = [v.axes[i] for v, i in entries]
        for axis in axes[1:]:
            self.tie(axes[0], axis)
        if len(axes) > 1 and any(self.dims.cuttable(a) for a in axes):
            for axis in axes:
                if not self.dims.cuttable(axis):
                    self.block(axes[0], "it is contracted with a stored tensor or a model input")
        activations = [v for v, _ in entries if v.parameter is None]
        detail = "activations" if len(activations) == len(entries) else "parameter"
        self.note(axes[0], "contracts", detail)
        for value, index in entries:
            if value.parameter is not None:
                for dim in self.dims.dims_of(value.axes[index]):
                    self.record.consumed.append((value.parameter, dim))
        if not any(v.zero[i] for v, i in entries):
            self.block(axes[0], "it is summed over although removed elements are not zero there")
