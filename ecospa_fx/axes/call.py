"""What a rule sees: one operator call with the axes of its inputs, and the verbs to say what happens to them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

from ecospa_fx.axes.dims import Axis, DimKind, Dims, Misaligned, Piece
from ecospa_fx.axes.findings import Action, Blocker, Descent, Effect, Findings, Gather
from ecospa_fx.axes.findings import Value as Value
from ecospa_fx.axes.products import descent_of, events_of, factors_of, note_product, note_sides, squares
from ecospa_fx.axes.reasons import NOTHING, PARAMETER, RENORMALISE, WHOLE, ZERO, Reason
from ecospa_fx.axes.shapes import regrouped

Zero = Literal["all", "any", "lost"]
UNIT = Axis(1, (Piece(0, ()),))
MAKERS = 12
"""More parameters than this make the residual stream, whose makers nobody asks for."""


class Call:
    """One operator call. Arguments are read by their schema names: ``call["input"]``, ``call.get("bias")``."""

    def __init__(
        self,
        node: Any,
        operator: str,
        arguments: dict[str, Any],
        outputs: list[tuple[int, ...]],
        dims: Dims,
        record: Findings,
    ) -> None:
        self.node = node
        self.operator = operator
        self.arguments = arguments
        self.outputs = outputs
        """Shapes of the tensor outputs, as concrete integers."""
        self._made: tuple[str, ...] | None = None
        self.descent: Descent | None = None
        """What the results descend from, where that is not what the arguments do."""
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
            several = argument if isinstance(argument, list | tuple) else [argument]
            found += [v for v in several if isinstance(v, Value)]
        return found

    def axis_of(self, value: Value, name: str = "dim", default: int = 0) -> int:
        """The number, counted from the front, of the axis that an argument names."""
        return int(self.get(name, default)) % max(len(value.axes), 1)

    # -- results ---------------------------------------------------------------------------------------------

    def value(self, axes: Iterable[Axis], zero: Iterable[bool] | None = None) -> Value:
        """An output with these axes; computed from weights alone where all tensor arguments are."""
        axes, values = tuple(axes), self.values
        flags = tuple(zero) if zero is not None else (False,) * len(axes)
        self.record.tensors[axes] = None
        made, descent = self._made or self._union(v.made for v in values), self.descent or descent_of(values)
        return Value(axes, flags, self._weights(values), self.node, made, descent=descent)

    def _union(self, several: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(name for made in several for name in made))
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

    # -- verbs -----------------------------------------------------------------------------------------------

    def note(self, axes: Axis | Iterable[Axis], action: Action) -> None:
        """Record what happens here to the dims of some axes. Raises ValueError for a text that is no `Action`."""
        for axis in [axes] if isinstance(axes, Axis) else axes:
            for dim in self.dims.dims_of(axis):
                if self.dims.origins[dim] is not DimKind.STORED:
                    self.record.events.append(Effect(dim, self.node, Action(action)))

    def fixes(self, axes: Iterable[Axis], nonlinear: bool = False) -> None:
        """No other basis may be chosen along some axes: something is added here, or a function applied."""
        self.record.fixed += [(dim, self.node, nonlinear) for axis in axes for dim in self._movable(axis)]

    def block(self, axis: Axis, why: str, remedy: str = NOTHING) -> None:
        """The dims of an axis cannot be removed because of this node; remedy: what the reader may do about it."""
        for dim in self._movable(axis):
            self._block_dim(dim, why, remedy)

    def block_all(self, why: str, remedy: str = NOTHING) -> list[Value]:
        """Nothing that reaches this node can be removed; its outputs are new."""
        for value in self.values:
            for axis in value.axes:
                self.block(axis, why, remedy)
        return [self.stored(i) for i in range(len(self.outputs))]

    def mixes(self, value: Value, index: int, why: str, remedy: str = NOTHING) -> None:
        """Positions along one axis influence one another: its dims are blocked, and carry no other dim."""
        self.block(value.axes[index], why, remedy)
        others = [d for i, a in enumerate(value.axes) if i != index for d in self._movable(a)]
        for dim in self._movable(value.axes[index]):
            self.record.mixed += [(other, dim) for other in others]

    def normalises(self, value: Value, index: int, why: str) -> bool:
        """Positions along one axis are divided by a statistic of all: blocked, unless the caller allowed otherwise.

        Allowed, the statistic runs over what is kept, and the dims are marked inexact. Returns whether it is allowed.
        """
        if "renormalise" not in self.record.allow:
            self.mixes(value, index, why, RENORMALISE)
            return False
        others = [d for i, a in enumerate(value.axes) if i != index for d in self._movable(a)]
        for dim in self._movable(value.axes[index]):
            self.record.inexact.append(Blocker(dim, self.node, Reason(why, remedy=""), self.node))
            self.record.mixed += [(other, dim) for other in others]
        return True

    def _movable(self, axis: Axis) -> list[int]:
        return [d for d in self.dims.dims_of(axis) if self.dims.origins[d] is not DimKind.STORED]

    def routed(self, rows: Axis, source: Axis, by: Value) -> None:
        """Each position of `rows` belongs to the position of `source` that `by` says: it carries what that carries.

        Sorted numbers and the ends of their runs say the same.
        """
        key = ("runs", by.tag[1]) if by.tag is not None and by.tag[0] in {"sorted", "ends"} else ("node", by.node)
        self.record.routed += [(dim, source, key) for dim in self.dims.dims_of(rows)]

    def is_mask(self, value: Value) -> bool:
        """Whether a tensor argument holds booleans."""
        return str(getattr(value.node.meta.get("val"), "dtype", "")) == "torch.bool"

    def tie(self, a: Axis, b: Axis) -> bool:
        """Make two axes the same index set; False (and a block) where a gather would be needed or none exists."""
        try:
            meetings = self.dims.unify(a, b)
        except Misaligned as reason:
            for axis in (a, b):
                self.block(axis, f"its positions are combined out of line ({reason})", WHOLE)
            return False
        for meeting in meetings:
            self._block_dim(meeting.dim, "it meets a stored tensor or a model input here", PARAMETER)
        return not meetings

    def _block_dim(self, dim: int, why: str, remedy: str) -> None:
        self.record.blocks.append(Blocker(dim, self.node, Reason(why, remedy), self.node))

    def align(self, operands: Sequence[tuple[Value, int]], product: bool = False) -> Axis:
        """Tie one axis of several operands, pointwise. Stored operands stay apart, see `gathered`.

        product: whether they are multiplied; otherwise what is stored or alike along it adds something of its own.
        """
        ranked = sorted((v.axes[i] for v, i in operands), key=self._rank)
        first = ranked[0]
        if not product and self._rank(ranked[-1]) and not self._rank(first):
            self.fixes([first])
        for axis in ranked[1:]:
            try:
                meetings = self.dims.unify(first, axis)
            except Misaligned as reason:
                for one in (first, axis):
                    self.block(one, f"its positions are combined out of line ({reason})", WHOLE)
                return self.dims.fresh(first.size, DimKind.STORED)
            for meeting in meetings:
                if meeting.stored_first:
                    self._block_dim(meeting.dim, "it meets a stored tensor inside a merged axis", PARAMETER)
        return first

    def _rank(self, axis: Axis) -> int:
        rank = {DimKind.PARAMETER: 0, DimKind.BLANK: 1, DimKind.STORED: 2}
        return min((rank[self.dims.origins[d]] for d in self.dims.dims_of(axis)), default=3)

    def follows(self, axis: Axis, target: Axis) -> bool:
        """Whether an axis is cut together with the target, so that no gather is needed."""
        mine, other = self.dims.resolve(axis), self.dims.resolve(target)
        return mine == other or not self._lacking(mine, other)

    def _lacking(self, axis: Axis, target: Axis) -> list[int]:
        """Parameters' dims of the target in whose place a resolved axis has another one."""
        own = {(piece.offset, stride, dim) for piece in axis.pieces for dim, stride in piece.dims}
        wanted = [(piece.offset, stride, dim) for piece in target.pieces for dim, stride in piece.dims]
        return [entry[2] for entry in wanted if entry not in own and self.dims.origins[entry[2]] is DimKind.PARAMETER]

    def gathered(self, operands: Iterable[Value], target: Sequence[Axis], joins: bool = False) -> None:
        """Record the gathers that operands, right-aligned with the target, need.

        joins: whether the elements of the operands themselves go into the result.
        """
        for value in operands:
            for index, axis in enumerate(value.axes):
                at = index + len(target) - len(value.axes)
                if at >= 0 and 1 < axis.size == target[at].size and not self.follows(axis, target[at]):
                    self._gather(value, index, target, at, joins)

    def _gather(self, value: Value, index: int, target: Sequence[Axis], at: int, joins: bool = False) -> None:
        if value.node is None or value.node is self.node:
            remedy = "write the fused operator out in its steps"
            self.block(target[at], "it meets something stored inside a fused operator", remedy)
            return
        self.record.gathers.append(Gather(self.node, value, index, tuple(target), at, joins))

    # -- combinators -----------------------------------------------------------------------------------------

    def pointwise(
        self,
        operands: Sequence[Value],
        zero: Zero,
        shape: Sequence[int] | None = None,
        joins: bool = False,
        scales: bool = False,
    ) -> Value:
        """Broadcast operands against one another, right-aligned.

        zero: "all" where the result is 0 if all operands are (add), "any" if one is (mul), "lost" if neither; joins:
        whether the result consists of elements of the operands; scales: whether it is a multiple of each, as under mul.
        """
        scales = scales or zero == "any"
        shape = tuple(shape if shape is not None else self.outputs[0])
        factors = factors_of(self, operands) if zero == "any" else ()
        axes: list[Axis] = []
        flags: list[bool] = []
        for position, size in enumerate(shape):
            at = [(v, position - len(shape) + len(v.axes)) for v in operands]
            here = [(v, i) for v, i in at if i >= 0 and v.axes[i].size == size]
            axes.append(self.align(here, scales) if here and size != 1 else UNIT)
            if zero == "any" and len(here) > 1 and size != 1:
                gates = sum(v.descent.learnt and not v.weights for v, _ in here)
                self.note(axes[-1], Action.MULTIPLIED_ACTIVATIONS if gates > 1 else Action.MULTIPLIED)
            if not scales and len(here) < len(operands) and size != 1:
                self.fixes([axes[-1]])
            live = [v.zero[i] for v, i in here if self.follows(v.axes[i], axes[-1])]
            flags.append((zero == "any" and any(live)) or (zero == "all" and len(live) == len(operands) and all(live)))
        self.gathered(operands, axes, joins)
        self._factors(operands, zero)
        return replace(self.value(axes, flags), factors=factors)

    def _factors(self, operands: Sequence[Value], zero: Zero) -> None:
        """Note what a parameter's values multiply, or that they are used otherwise."""
        for value in operands if len(operands) > 1 else ():
            if zero == "any" and len(value.made) == 1:
                others = (name for other in operands if other is not value for name in other.made)
                self.record.factors.setdefault(value.made[0], set()).add(tuple(sorted(set(others))))
            elif zero != "any" and value.weights:
                self.record.bound.update(value.weights)

    def contraction(
        self, operands: Sequence[Value], labels: Sequence[Sequence[Hashable]], out: Sequence[Hashable]
    ) -> Value:
        """An Einstein summation: axes with the same label are tied, labels missing from `out` are summed over."""
        if any(v.weights for v in operands) and not all(v.weights for v in operands):
            self._made = self._union(v.weights for v in self.values)
        same = squares(self, operands, labels)
        where: dict[Hashable, list[tuple[Value, int]]] = {}
        for value, names in zip(operands, labels, strict=True):
            for index, name in enumerate(names):
                where.setdefault(name, []).append((value, index))
        axes: dict[Hashable, Axis] = {}
        flags: dict[Hashable, bool] = {}
        for name, entries in where.items():
            wide = [(v, i) for v, i in entries if v.axes[i].size != 1]
            if not wide:
                axes[name], flags[name] = UNIT, True
            elif name in out:
                axes[name] = self.align(wide)
                flags[name] = any(v.zero[i] for v, i in wide if self.follows(v.axes[i], axes[name]))
            else:
                axes[name] = wide[0][0].axes[wide[0][1]]
                self._contracted(wide)
        events_of(self, operands, labels, out)
        self.descent = note_product(self, operands, labels, out, same)
        self.record.tensors[tuple(axes.values())] = None  # all products, before they are summed
        self.record.bound.update(name for value in operands for name in value.weights)
        for value, names in zip(operands, labels, strict=True):
            self._gather_batched(value, names, axes, out)
        return self.value([axes[name] for name in out], [flags[name] for name in out])

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
            self.block(axes[0], "it is summed over although removed elements are not zero there", ZERO)

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
        return replace(self.value(axes, flags), weights=source.weights)

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
        result = self.value([source.axes[i] for i in order], [source.zero[i] for i in order])
        return replace(result, weights=source.weights)

    def sliced(self, source: Value, axis: int, start: int, stop: int, step: int = 1) -> Value:
        """Positions start, start + step, … below stop of one axis."""
        axes = list(source.axes)
        try:
            axes[axis] = self.dims.take(axes[axis], start, stop, step)
        except Misaligned as reason:
            self.block(axes[axis], f"a slice cuts across it ({reason})", WHOLE)
            axes[axis] = self.dims.fresh(len(range(start, stop, step)), DimKind.STORED)
        return replace(self.value(axes, source.zero), weights=source.weights)
