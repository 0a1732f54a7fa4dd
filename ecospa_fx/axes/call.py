"""What a rule sees: one operator call with the axes of its inputs, and the verbs to say what happens to them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor, fx

from ecospa_fx.axes.dims import Axis, DimKind, Dims, Misaligned, Piece
from ecospa_fx.axes.findings import Action, Descent, Effect, Findings
from ecospa_fx.axes.findings import Value as Value
from ecospa_fx.axes.products import descent_of, events_of, factors_of, note_product, note_sides, squares
from ecospa_fx.axes.reasons import NOTHING, PARAMETER, WHOLE
from ecospa_fx.axes.shapes import regrouped
from ecospa_fx.axes.verbs import Verbs
from ecospa_fx.axes.zeros import Zeros, alive_anywhere, alive_on, cut_dims, flagged

Zero = Literal["all", "any", "lost"]
UNIT = Axis(1, (Piece(0, ()),))
MAKERS = 12
"""More parameters than this make the residual stream, whose makers nobody asks for."""


class Call(Verbs):
    """One operator call. Arguments are read by their schema names: ``call["input"]``, ``call.get("bias")``."""

    def __init__(
        self,
        node: fx.Node,
        operator: str,
        arguments: dict[str, Any],
        outputs: list[tuple[int, ...]],
        dims: Dims,
        record: Findings,
        numbers: Callable[[fx.Node], Tensor | None] = lambda node: None,
    ) -> None:
        super().__init__(node, dims, record)
        self._numbers = numbers
        self.operator = operator
        self.arguments = arguments
        self.outputs = outputs
        """Shapes of the tensor outputs, as concrete integers."""
        self._makers: tuple[str, ...] | None = None
        self.descent: Descent | None = None
        """What the results descend from, where that is not what the arguments do."""

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def get(self, name: str, default: Any = None) -> Any:
        """An argument, or the default where it was not given or is None."""
        value = self.arguments.get(name)
        return default if value is None else value

    @property
    def values(self) -> list[Value]:
        """All tensor arguments, lists flattened, in order."""
        lists = (a if isinstance(a, list | tuple) else [a] for a in self.arguments.values())
        return [value for values in lists for value in values if isinstance(value, Value)]

    def axis_of(self, value: Value, name: str = "dim", default: int = 0) -> int:
        """The number, counted from the front, of the axis that an argument names."""
        return int(self.get(name, default)) % max(len(value.axes), 1)

    # -- results ---------------------------------------------------------------------------------------------

    def value(
        self, axes: Iterable[Axis], zero: Iterable[bool] | None = None, alive: Iterable[int] | None = None
    ) -> Value:
        """An output with these axes; computed from weights alone where all tensor arguments are.

        zero: per axis whether removed elements are 0; alive: the dims for which that is not so, where that is known.
        """
        axes, values = tuple(axes), self.values
        if alive is None and isinstance(zero, Zeros):
            alive = zero.alive
        flags = tuple(zero) if zero is not None else (False,) * len(axes)
        if alive is not None and len(flags) == len(axes):
            flags = flagged(self.dims, axes, flags, alive)
        self.record.tensors[axes] = None
        makers = self._makers or self._union(v.makers for v in values)
        descent = self.descent or descent_of(values)
        return Value(axes, flags, self._weights(values), self.node, makers, descent=descent)

    def _union(self, makers: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(name for names in makers for name in names))
        return names if len(names) <= MAKERS else ()

    @staticmethod
    def _weights(values: Sequence[Value]) -> tuple[str, ...]:
        if not all(v.weights for v in values):
            return ()
        return tuple(dict.fromkeys(w for v in values for w in v.weights))

    def fresh(self, output: int = 0) -> list[Axis]:
        """New axes, never cut, of the shape of an output."""
        return [self.dims.fresh(size, DimKind.STORED) for size in self.outputs[output]]

    def stored(self, output: int = 0) -> Value:
        """An output all of whose axes are new and are never cut."""
        return Value(tuple(self.fresh(output)), (False,) * len(self.outputs[output]), (), self.node)

    def blank(self, zero: bool, output: int = 0) -> Value:
        """An output whose positions are all alike: its sizes follow whatever it is combined with."""
        axes = tuple(self.dims.fresh(size, DimKind.BLANK) for size in self.outputs[output])
        return Value(axes, (zero,) * len(axes), (), self.node)

    def passes(self, value: Value, zero: Zero = "all") -> Value:
        """An output with the axes of `value`; zero="lost" where f(0) is not 0."""
        return self.value(value.axes, value.zero if zero != "lost" else None)

    def block_all(self, why: str, remedy: str = NOTHING) -> list[Value]:
        """Nothing that reaches this node can be removed; its outputs are new."""
        for value in self.values:
            for axis in value.axes:
                self.block(axis, why, remedy)
        return [self.stored(i) for i in range(len(self.outputs))]

    # -- combinators -----------------------------------------------------------------------------------------

    def pointwise(
        self,
        operands: Sequence[Value],
        zero: Zero,
        shape: Sequence[int] | None = None,
        joins: Sequence[Value] = (),
        scales: bool = False,
    ) -> Value:
        """Broadcast operands against one another, right-aligned.

        zero: "all" where the result is 0 if all operands are (add), "any" if one is (mul), "lost" if neither; joins:
        operands whose own elements the result consists of; scales: whether it is a multiple of each, as under mul.
        """
        scales = scales or zero == "any"
        shape = tuple(shape if shape is not None else self.outputs[0])
        factors = factors_of(self, operands) if zero == "any" else ()
        axes: list[Axis] = []
        flags: list[bool] = []
        alive: set[int] = set()
        for position, size in enumerate(shape):
            aligned = [(v, position - len(shape) + len(v.axes)) for v in operands]
            here = [(v, i) for v, i in aligned if i >= 0 and v.axes[i].size == size]
            axes.append(self.align(here, scales) if here and size != 1 else UNIT)
            if zero == "any" and len(here) > 1 and size != 1:
                gates = sum(v.descent.learnt and not v.weights for v, _ in here)
                self.note(axes[-1], Action.MULTIPLIED_ACTIVATIONS if gates > 1 else Action.MULTIPLIED)
            if not scales and len(here) < len(operands) and size != 1:
                self.fixes([axes[-1]])
            live = [v.zero[i] for v, i in here if self.follows(v.axes[i], axes[-1])]
            flags.append((zero == "any" and any(live)) or (zero == "all" and len(live) == len(operands) and all(live)))
            alive |= self._alive(here, axes[-1], zero, len(operands)) if size != 1 and not flags[-1] else set()
        for value in operands:
            self.gathered([value], axes, joins=any(value is other for other in joins))
        self._factors(operands, zero)
        return replace(self.value(axes, flags, alive), factors=factors)

    def _alive(self, entries: Sequence[tuple[Value, int]], axis: Axis, zero: Zero, count: int) -> set[int]:
        """The dims of an axis of the result that leave something, of operands of which some have it."""
        whole = cut_dims(self.dims, axis)
        parts = [alive_on(self.dims, v, i) | set(self.lacking(v.axes[i], axis)) for v, i in entries]
        if zero == "all" and len(parts) == count:
            return whole & set[int]().union(*parts)
        return whole.intersection(*parts) if zero == "any" else whole

    def _factors(self, operands: Sequence[Value], zero: Zero) -> None:
        """Note what a parameter's values multiply, or that they are used otherwise."""
        for value in operands if len(operands) > 1 else ():
            if zero == "any" and len(value.makers) == 1:
                others = (name for other in operands if other is not value for name in other.makers)
                self.record.factors.setdefault(value.makers[0], set()).add(tuple(sorted(set(others))))
            elif zero != "any" and value.weights:
                self.record.bound.update(value.weights)

    def contraction(
        self, operands: Sequence[Value], labels: Sequence[Sequence[Hashable]], out: Sequence[Hashable]
    ) -> Value:
        """An Einstein summation: axes with the same label are tied, labels missing from `out` are summed over."""
        if any(v.weights for v in operands) and not all(v.weights for v in operands):
            self._makers = self._union(v.weights for v in self.values)
        same = squares(self, operands, labels)
        where: dict[Hashable, list[tuple[Value, int]]] = {}
        for value, names in zip(operands, labels, strict=True):
            for index, name in enumerate(names):
                where.setdefault(name, []).append((value, index))
        axes: dict[Hashable, Axis] = {}
        flags: dict[Hashable, bool] = {}
        alive: set[int] = set()
        for name, entries in where.items():
            wide = [(v, i) for v, i in entries if v.axes[i].size != 1]
            if not wide:
                axes[name], flags[name] = UNIT, True
            elif name in out:
                axes[name] = self.align(wide)
                flags[name] = any(v.zero[i] for v, i in wide if self.follows(v.axes[i], axes[name]))
                alive |= self._alive(wide, axes[name], "any", len(wide)) if not flags[name] else set()
            else:
                axes[name] = wide[0][0].axes[wide[0][1]]
                self._contracted(wide)
        events_of(self, operands, labels, out)
        self.descent = note_product(self, operands, labels, out, same)
        self.record.tensors[tuple(axes.values())] = None  # all products, before they are summed
        self.record.bound.update(name for value in operands for name in value.weights)
        for value, names in zip(operands, labels, strict=True):
            self._gather_batched(value, names, axes, out)
        return self.value([axes[name] for name in out], [flags[name] for name in out], alive)

    def _gather_batched(
        self, value: Value, names: Sequence[Hashable], axes: dict[Hashable, Axis], out: Sequence[Hashable]
    ) -> None:
        # The operand cannot gain an axis here: only along its own ones may the choice differ.
        target = tuple(axes[name] for name in names)
        for index, name in enumerate(names):
            if name not in out or value.axes[index].size == 1 or self.follows(value.axes[index], axes[name]):
                continue
            others = [other for i, other in enumerate(names) if other != name and value.axes[i].size > 1]
            if all(other in out for other in others) or not self._carried(value, index, axes[name]):
                self._gather(value, index, target, index)
            else:
                self.block(axes[name], "it indexes matrices that are stored or given as inputs", PARAMETER)

    def _carried(self, value: Value, index: int, axis: Axis) -> bool:
        """Whether another axis of the operand is cut, so that a plain gather along one axis would not do."""
        return any(self.dims.cuttable(a) for i, a in enumerate(value.axes) if i != index) and self.dims.cuttable(axis)

    def _contracted(self, entries: Sequence[tuple[Value, int]]) -> None:
        """Sum over one label."""
        axes = [v.axes[i] for v, i in entries]
        apart = len({self.dims.resolve(axis) for axis in axes}) > 1
        for axis in axes[1:]:
            self.tie(axes[0], axis)
        if any(self.dims.cuttable(a) for a in axes):
            for axis in (a for a in axes if not self.dims.cuttable(a)):
                met = axes[0] if axis is not axes[0] else axes[1]
                self.block(met, "it is contracted with a stored tensor or a model input", PARAMETER)
        weights = [v for v, _ in entries if v.weights or v.descent.picked]
        alone = Action.CONTRACTS_ACTIVATIONS if len(entries) > 1 else Action.CONTRACTS_ONES
        self.note(axes[0], Action.CONTRACTS_PARAMETER if weights else alone)
        pieces = [d for p in self.dims.resolve(axes[0]).pieces for d, _ in p.dims]
        for dim in dict.fromkeys(d for d in pieces if pieces.count(d) > 1):
            self.record.events.append(Effect(dim, self.node, Action.PAIRED))
        note_sides(self, entries, len(weights), apart)
        if not any(v.zero[i] for v, i in entries):
            self.not_zero(self._alive(entries, axes[0], "any", len(entries)))

    def all_zero(self, parts: Iterable[tuple[Value, int]]) -> bool:
        """Whether removed positions are 0 on every one of these axes; what is never cut does not count."""
        return all(v.zero[i] for v, i in parts if not self._stored_only(v.axes[i]))

    def _stored_only(self, axis: Axis) -> bool:
        return all(self.dims.origins[d] is DimKind.STORED for d in self.dims.dims_of(axis))

    # -- moving ----------------------------------------------------------------------------------------------

    def reshaped(self, source: Value, shape: Sequence[int]) -> Value:
        """A row-major view of `source` in another shape."""
        if 0 in source.shape:
            return self._reshaped_nothing(source, shape)
        axes: list[Axis] = []
        flags: list[bool] = []
        for inside, sizes in regrouped(source.shape, tuple(shape)):
            old = [source.axes[i] for i in inside]
            axes += self._regroup(old, sizes)
            flags += [self.all_zero([(source, i) for i in inside])] * len(sizes)
        return replace(self.value(axes, flags, alive_anywhere(self.dims, source)), weights=source.weights)

    def _reshaped_nothing(self, source: Value, shape: Sequence[int]) -> Value:
        """A view of a tensor without elements: axes in front that keep their sizes are the same, all others are new."""
        pairs = list(zip(source.axes, shape, strict=False))
        same = next((i for i, (axis, size) in enumerate(pairs) if axis.size != size), len(pairs))
        new = [self.dims.fresh(size, DimKind.STORED) for size in shape[same:]]
        result = self.value([*source.axes[:same], *new], [*source.zero[:same], *(False for _ in new)])
        return replace(result, weights=source.weights)

    def _regroup(self, old: Sequence[Axis], sizes: Sequence[int]) -> Sequence[Axis]:
        if len(old) == len(sizes) == 1:
            return old
        if not sizes:
            return ()
        merged = self.dims.merge(old)
        try:
            return self.dims.split(merged, sizes) if len(sizes) > 1 else [merged]
        except Misaligned as reason:
            self.block(merged, f"a reshape cuts across it ({reason})", WHOLE)
            return [self.dims.fresh(size, DimKind.STORED) for size in sizes]

    def ordered(self, source: Value, order: Sequence[int]) -> Value:
        """A view with some of the source's axes, in another order."""
        alive = alive_anywhere(self.dims, source)
        result = self.value([source.axes[i] for i in order], [source.zero[i] for i in order], alive)
        return replace(result, weights=source.weights)

    def numbers(self, value: Value) -> Tensor | None:
        """The whole numbers in a tensor argument, where they are the same at every call; None where they are not."""
        return self._numbers(value.node) if value.node is not None else None

    def picked(self, source: Value, axis: int, positions: Sequence[int]) -> Value:
        """Positions of one axis in a fixed order, counted from the end where negative; some twice, some never."""
        size, axes = source.axes[axis].size, list(source.axes)
        places = tuple(position % size for position in positions)
        try:
            axes[axis] = self.dims.pick(axes[axis], places)
        except Misaligned as reason:
            self.block(axes[axis], f"it is read in an order that cuts across it ({reason})", WHOLE)
            axes[axis] = self.dims.fresh(len(places), DimKind.STORED)
        result = self.value(axes, source.zero, alive_anywhere(self.dims, source))
        return replace(result, weights=source.weights, reads=(axis, places))

    def sliced(self, source: Value, axis: int, start: int, stop: int, step: int = 1) -> Value:
        """Positions start, start + step, … below stop of one axis."""
        axes = list(source.axes)
        try:
            axes[axis] = self.dims.take(axes[axis], start, stop, step)
        except Misaligned as reason:
            self.block(axes[axis], f"a slice cuts across it ({reason})", WHOLE)
            axes[axis] = self.dims.fresh(len(range(start, stop, step)), DimKind.STORED)
        flags, alive = source.zero, alive_anywhere(self.dims, source)
        return replace(self.value(axes, flags, alive), weights=source.weights)
