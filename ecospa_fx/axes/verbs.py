"""The verbs by which a rule says what happens to dims at its node: noted, blocked, mixed, tied, gathered."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import fx

from ecospa_fx.axes.dims import Axis, DimKind, Dims, Misaligned
from ecospa_fx.axes.findings import (
    ROUNDED,
    Action,
    Addition,
    Blocker,
    Effect,
    Findings,
    FixedBasis,
    Gather,
    Order,
    Route,
    RouteKey,
    Value,
)  # fmt: skip
from ecospa_fx.axes.reasons import NOTHING, PARAMETER, RENORMALISE, WHOLE, ZERO, Reason
from ecospa_fx.axes.zeros import alive_on


class Verbs:
    """What may be said about dims at one node."""

    def __init__(self, node: fx.Node, dims: Dims, record: Findings) -> None:
        self.node = node
        """The node that is spoken of."""
        self.dims = dims
        """The dims of the graph."""
        self.record = record
        """Where everything is written down."""

    def note(self, axes: Axis | Iterable[Axis], action: Action) -> None:
        """Record what happens here to the dims of some axes. Raises ValueError for a text that is no `Action`."""
        for axis in [axes] if isinstance(axes, Axis) else axes:
            for dim in self.dims.dims_of(axis):
                if self.dims.origins[dim] is not DimKind.STORED:
                    self.record.events.append(Effect(dim, self.node, Action(action)))

    def fixes(self, axes: Iterable[Axis], nonlinear: bool = False) -> None:
        """No other basis may be chosen along some axes: something is added here, or a function applied."""
        dims = (dim for axis in axes for dim in self._movable(axis))
        self.record.fixed += [FixedBasis(dim, self.node, nonlinear) for dim in dims]

    def block(self, axis: Axis, why: str, remedy: str = NOTHING) -> None:
        """The dims of an axis cannot be removed because of this node; remedy: what the reader may do about it."""
        for dim in self._movable(axis):
            self._block_dim(dim, why, remedy)

    def mixes(self, value: Value, index: int, why: str, remedy: str = NOTHING) -> None:
        """Positions along one axis influence one another: its dims are blocked, and carry no other dim."""
        self.block(value.axes[index], why, remedy)
        self._carries_none(value, index)

    def needs_zero(self, value: Value, index: int) -> None:
        """What is removed along one axis must be 0, because it is summed over: otherwise its dims are blocked."""
        self._bind(value)
        self.not_zero(alive_on(self.dims, value, index))
        self._adds_up_exactly(value, index)

    def not_zero(self, dims: Iterable[int]) -> None:
        """Dims are summed over that leave something."""
        for dim in sorted(dims):
            self._block_dim(dim, "it is summed over although removed elements are not zero there", ZERO)

    def averages(self, value: Value, index: int, operator: str) -> None:
        """Positions along one axis are summed and divided by their number, which stays that of all.

        So what is removed must be 0 there: otherwise the dims are blocked, unless the caller allowed that the number is
        that of what is kept. Then nothing need be 0, and the dims are marked inexact.
        """
        self._bind(value)
        if "renormalise" in self.record.allow:
            reason = Reason(f"{operator} runs over what is kept of it", remedy="")
            self.record.inexact += [Blocker(d, self.node, reason, self.node) for d in self._movable(value.axes[index])]
            self._carries_none(value, index)
            return
        for dim in sorted(alive_on(self.dims, value, index)):
            why = f"{operator} is taken over it although removed elements are not zero there"
            self._block_dim(dim, why, f"{ZERO}; or {RENORMALISE}")
        self._adds_up_exactly(value, index)

    def _adds_up_exactly(self, value: Value, index: int) -> None:
        """A sum in a shorter type than the weights have is none of those of fewer numbers: it rounds at other places.

        In the type of the weights this is their own rounding; in a shorter one it is larger than any proof allows.
        """
        dtype = getattr(value.node and value.node.meta.get("val"), "dtype", None)
        precision = None if ROUNDED in self.record.allow else self.record.precision
        if dtype is None or not dtype.is_floating_point or precision is None:
            return
        if torch.finfo(dtype).eps > torch.finfo(precision).eps:
            short, long = (str(d).removeprefix("torch.") for d in (dtype, precision))
            why = f"it is summed over in {short} while weights are {long}: a sum of fewer numbers rounds otherwise"
            self.block(value.axes[index], why, f"convert the model to {short} first, or sum in {long}")

    def _bind(self, value: Value) -> None:
        """What alone makes a tensor that is summed does more than multiply elementwise."""
        self.record.bound.update(value.makers if len(value.makers) == 1 else ())

    def _carries_none(self, value: Value, index: int) -> None:
        """The dims of one axis are no carriers of those of the others."""
        others = [d for i, a in enumerate(value.axes) if i != index for d in self._movable(a)]
        self.record.mixed += [(other, dim) for dim in self._movable(value.axes[index]) for other in others]

    def _movable(self, axis: Axis) -> list[int]:
        return [d for d in self.dims.dims_of(axis) if self.dims.origins[d] is not DimKind.STORED]

    def routed(self, rows: Axis, source: Axis, by: Value) -> None:
        """Each position of `rows` belongs to the position of `source` that `by` says: it carries what that carries.

        Sorted numbers and the ends of their runs say the same.
        """
        runs = by.sorting is not None and by.sorting.order is not Order.COUNTS
        key: RouteKey = ("runs", by.sorting.node) if by.sorting is not None and runs else ("node", by.node)
        self.record.routed += [Route(dim, source, key) for dim in self.dims.dims_of(rows)]

    def adds(self, stays: object, branch: object) -> None:
        """A sum is the first of two terms where the second one is 0, which is so where what makes it is."""
        if not isinstance(stays, Value) or not isinstance(branch, Value) or stays.node is None or branch.node is None:
            return
        whole = [a for a, zero in zip(branch.axes, branch.zero, strict=True) if zero and self._goes_whole(a)]
        dims = {dim for axis in whole[-1:] for dim in self.dims.dims_of(axis)}
        if not dims or any(dims.intersection(self.dims.dims_of(axis)) for axis in stays.axes):
            return
        makers = {name: self.record.parameters[name] for name in branch.makers if name in self.record.parameters}
        names = [n for n, v in makers.items() if any(dims.intersection(self.dims.dims_of(a)) for a in v.axes)]
        if names:
            self.record.additions.append(Addition(self.node, stays.node, branch.node, tuple(names), whole[-1]))

    def _goes_whole(self, axis: Axis) -> bool:
        """Whether every position of an axis belongs to a parameter's dim."""
        pieces = self.dims.resolve(axis).pieces
        return all(any(self.dims.origins[d] is DimKind.PARAMETER for d, _ in piece.dims) for piece in pieces)

    def is_mask(self, value: Value) -> bool:
        """Whether a tensor argument holds booleans."""
        return str(getattr(value.node and value.node.meta.get("val"), "dtype", "")) == "torch.bool"

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
                for misaligned in (first, axis):
                    self.block(misaligned, f"its positions are combined out of line ({reason})", WHOLE)
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

    def lacking(self, axis: Axis, target: Axis) -> list[int]:
        """Parameters' dims of the target in whose place an axis has another one."""
        return self._lacking(self.dims.resolve(axis), self.dims.resolve(target))

    def _lacking(self, axis: Axis, target: Axis) -> list[int]:
        present = {(piece.offset, stride, dim) for piece in axis.pieces for dim, stride in piece.dims}
        wanted = [(piece.offset, stride, dim) for piece in target.pieces for dim, stride in piece.dims]
        return [e[2] for e in wanted if e not in present and self.dims.origins[e[2]] is DimKind.PARAMETER]

    def gathered(self, operands: Iterable[Value], target: Sequence[Axis], joins: bool = False) -> None:
        """Record the gathers that operands, right-aligned with the target, need.

        joins: whether the elements of the operands themselves go into the result.
        """
        for value in operands:
            for index, axis in enumerate(value.axes):
                place = index + len(target) - len(value.axes)
                if place >= 0 and 1 < axis.size == target[place].size and not self.follows(axis, target[place]):
                    self._gather(value, index, target, place, joins)

    def _gather(self, value: Value, index: int, target: Sequence[Axis], place: int, joins: bool = False) -> None:
        if value.node is None or value.node is self.node:
            remedy = "write the fused operator out in its steps"
            self.block(target[place], "it meets something stored inside a fused operator", remedy)
            return
        self.record.gathers.append(Gather(self.node, value, index, tuple(target), place, joins))
