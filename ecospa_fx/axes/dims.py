"""The algebra of dims: how the positions of a tensor axis decompose into index sets.

A *dim* is an index set with a size. An *axis* of a tensor is a disjoint union of *pieces*; a piece is a product of
dims, each with a stride, starting at an offset: piece ``(offset, ((d0, s0), (d1, s1)))`` holds the positions
``offset + i0·s0 + i1·s1``. Row-major reshapes, slices (with steps), concatenations and their inverses stay inside this
form, so no size is ever matched by guessing:

    fused QKV        [q ‖ k ‖ v]             three pieces of one dim each
    heads            heads · head_dim        one piece, two dims
    rotary halves    [r ‖ r]                 two pieces of the same dim

In place of a stride may stand a table, one distance per index, where a fixed permutation or selection was read
(`ecospa_fx.axes.selection`).

Dims are refined lazily: splitting a dim replaces it everywhere by pieces over smaller dims, and making two dims the
same replaces one by the other. Both are one substitution table, so every axis recorded earlier follows
(`ecospa_fx.axes.substitution`).

Costs are independent of sizes where there are no tables; they grow with the number of pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd, prod

from ecospa_fx.axes.axis import Axis as Axis
from ecospa_fx.axes.axis import DimKind as DimKind
from ecospa_fx.axes.axis import FixedContact as FixedContact
from ecospa_fx.axes.axis import Misaligned as Misaligned
from ecospa_fx.axes.axis import Piece as Piece
from ecospa_fx.axes.axis import Steps, divided, has_table, is_multiple, reach, scaled, strided
from ecospa_fx.axes.selection import by_rows, picked, unify_tables
from ecospa_fx.axes.substitution import Substitution

Entries = tuple[tuple[int, Steps], ...]
"""Dims of a piece with their strides or tables."""


class Dims(Substitution):
    """The dims of one graph and what has been learnt about them."""

    # -- moving ------------------------------------------------------------------------------------------------

    def concat(self, axes: Sequence[Axis]) -> Axis:
        """The axis of ``torch.cat`` along it."""
        pieces, size = [], 0
        for axis in axes:
            pieces += [Piece(size + p.offset, p.dims) for p in axis.pieces]
            size += axis.size
        return Axis(size, tuple(pieces))

    def merge(self, axes: Sequence[Axis]) -> Axis:
        """The axis that flattening adjacent axes gives (row-major)."""
        result = Axis(1, (Piece(0, ()),))
        for axis in axes:
            pieces = tuple(
                Piece(p.offset * axis.size + q.offset, (*((d, scaled(s, axis.size)) for d, s in p.dims), *q.dims))
                for p in result.pieces
                for q in axis.pieces
            )
            result = Axis(result.size * axis.size, pieces)
        return result

    def take(self, axis: Axis, start: int, stop: int, step: int = 1) -> Axis:
        """Positions start, start+step, … below stop."""
        count = max(0, -(-(stop - start) // step))
        if count == axis.size:
            return axis
        if step != 1 and count > 1 and all(self.origins[d] is DimKind.STORED for d in self.dims_of(axis)):
            return self.fresh(count, DimKind.STORED)  # nothing of it is ever cut, so which positions does not matter
        if has_table(self.resolve(axis)):
            return self.pick(axis, range(start, start + count * step, step))
        if step == 1 or count <= 1:
            return self._interval(axis, start, start + count)
        first = start // step
        return self._interval(self._every(axis, start % step, step), first, first + count)

    def pick(self, axis: Axis, positions: Sequence[int]) -> Axis:
        """The axis whose i-th position is the positions[i]-th of another, in any order, some never and some repeatedly.

        Raises Misaligned where no dims say so.
        """
        return picked(self, axis, positions)

    def _every(self, axis: Axis, first: int, step: int) -> Axis:
        """Positions first, first + step, …: what lies between them is dealt out to dims of their own."""
        for _ in range(self.REFINEMENTS):
            uneven = ((d, s) for p in self.resolve(axis).pieces for d, s in strided(p) if s % step)
            dim, stride = next(uneven, (None, 0))
            if dim is None:
                break
            self._deal(dim, step // gcd(stride, step))
        else:
            raise Misaligned(f"every {step}th position of {axis.size} from {first}")
        inside = [p for p in self.resolve(axis).pieces if p.offset % step == first]
        thinner = [Piece(p.offset // step, tuple((d, s // step) for d, s in strided(p))) for p in inside]
        return Axis(-(-(axis.size - first) // step), tuple(thinner))

    def _deal(self, dim: int, hands: int) -> None:
        """Split a dim into positions 0, hands, … ‖ 1, hands + 1, … ‖ …, each a dim of its own."""
        size, origin = self.sizes[dim], self.origins[dim]
        sizes = [-(-(size - hand) // hands) for hand in range(min(hands, size))]
        dims = [tuple((d, hands) for d, _ in self._piece_of(n, origin).dims) for n in sizes]
        self.replace(dim, tuple(Piece(hand, inside) for hand, inside in enumerate(dims)))

    def _interval(self, axis: Axis, start: int, stop: int) -> Axis:
        for edge in (start, stop):
            self._separate(axis, edge)
        inside = [p for p in self.resolve(axis).pieces if start <= p.offset and p.offset + self.span(p) <= stop]
        return Axis(stop - start, tuple(Piece(p.offset - start, p.dims) for p in inside))

    def _separate(self, axis: Axis, edge: int) -> None:
        """Refine until no piece of the axis crosses `edge`."""
        for _ in range(self.REFINEMENTS):
            across = next(
                (p for p in self.resolve(axis).pieces if p.offset < edge < p.offset + self.span(p)),
                None,
            )
            if across is None:
                return
            dim, stride = strided(across)[0]
            index, rest = divmod(edge - across.offset, stride)
            if index == 0 or rest == 0:
                self.cut(dim, max(index, 1))
            else:
                inner = self.span(Piece(0, across.dims[1:]))
                self.cut(dim, index + 1 if rest >= inner and index + 1 < self.sizes[dim] else index)
        raise Misaligned(f"cut at {edge} of {axis.size}")

    def split(self, axis: Axis, sizes: Sequence[int]) -> list[Axis]:
        """The axes that viewing one axis as `sizes` gives (row-major)."""
        if prod(sizes) != axis.size:
            raise Misaligned(f"{axis.size} positions viewed as {tuple(sizes)}")
        result, rest = [], axis
        for index, size in enumerate(sizes):
            outer, rest = self._split_two(rest, size, prod(sizes[index + 1 :]))
            result.append(outer)
        return result

    def _split_two(self, axis: Axis, outer: int, inner: int) -> tuple[Axis, Axis]:
        if inner == 1:
            return axis, Axis(1, (Piece(0, ()),))
        if outer == 1:
            return Axis(1, (Piece(0, ()),)), axis
        if has_table(self.resolve(axis)):
            together = by_rows(self, axis, inner)
            if together is not None:
                return together
        for _ in range(self.REFINEMENTS):
            if not self._refine_straddling(self.resolve(axis), inner) and not self._line_up(self.resolve(axis), inner):
                break
        else:
            raise Misaligned(f"{axis.size} positions viewed as {outer}·{inner}")
        rows: dict[Piece, list[Piece]] = {}
        for piece in self.resolve(axis).pieces:
            outside, inside = self._row_and_column(piece, inner)
            row, column = divmod(piece.offset, inner)
            rows.setdefault(Piece(row, outside), []).append(Piece(column, inside))
        blocks = [Axis(inner, tuple(columns)) for columns in rows.values()]
        for other in blocks[1:]:
            if self.unify(blocks[0], other):
                raise Misaligned(f"rows of {inner} positions, of which some are stored and others are not")
        return Axis(outer, tuple(rows)), blocks[0]

    @staticmethod
    def _row_and_column(piece: Piece, inner: int) -> tuple[Entries, Entries]:
        """The dims of a piece that go from row to row, in rows, and those that stay in one."""
        outside = tuple((d, divided(s, inner)) for d, s in piece.dims if is_multiple(s, inner))
        return outside, tuple((d, s) for d, s in piece.dims if not is_multiple(s, inner))

    def _line_up(self, axis: Axis, inner: int) -> bool:
        """One step towards the same dims of rows in all columns that begin in one row; False where they are."""
        begun: dict[int, Piece] = {}
        for piece in axis.pieces:
            row = Piece(piece.offset // inner, self._row_and_column(piece, inner)[0])
            first = begun.setdefault(row.offset, row)
            if first == row:
                continue
            if self._shape(first) != self._shape(row):
                self._refine_pair(first, row)
                return True
            for (d, _), (e, _) in zip(first.dims, row.dims, strict=True):
                if self._tie_current(d, e):
                    raise Misaligned(f"rows of {inner} positions, of which some are stored and others are not")
            return True
        return False

    def _refine_straddling(self, axis: Axis, inner: int) -> bool:
        """One refinement of a dim that lies across rows of `inner` positions; False where none does."""
        for piece in axis.pieces:
            column = piece.offset % inner
            for dim, stride in reversed(piece.dims):
                size = self.sizes[dim]
                if is_multiple(stride, inner):
                    continue
                if column + reach(stride, size) < inner:
                    column += reach(stride, size)
                    continue
                if not isinstance(stride, int) or stride > inner:
                    raise Misaligned(f"stride {stride} against rows of {inner}")
                per_row = -(-(inner - column) // stride)
                whole = inner // stride
                if column < stride and inner % stride == 0 and size % whole == 0:
                    self.factor(dim, whole)
                else:
                    self.cut(dim, per_row)
                return True
        return False

    # -- tying -------------------------------------------------------------------------------------------------

    def unify(self, a: Axis, b: Axis) -> list[FixedContact]:
        """Make two axes of equal size the same index set, position by position.

        A stored dim is never tied to a parameter's: each place where the two meet is returned. A gather of the
        stored side makes up for it. Raises Misaligned without a common refinement.
        """
        if a.size != b.size:
            raise Misaligned(f"{a.size} positions against {b.size}")
        whole = self._whole_stored(a, b)
        if whole is not None:
            stored_first = whole is a
            return [FixedContact(d, stored_first) for d in self.dims_of(b if stored_first else a) if self._cut_by(d)]
        if has_table(self.resolve(a)) or has_table(self.resolve(b)):
            return unify_tables(self, a, b)
        for _ in range(self.REFINEMENTS):
            if not self._refine_first_difference(self.resolve(a), self.resolve(b)):
                break
        else:
            raise Misaligned(f"no common refinement of {a.size} positions")
        meetings = []
        for p, q in zip(self.resolve(a).pieces, self.resolve(b).pieces, strict=True):
            for (d, _), (e, _) in zip(p.dims, q.dims, strict=True):
                meetings += self._tie_current(d, e)
        return meetings

    def _cut_by(self, dim: int) -> bool:
        return self.origins[dim] is DimKind.PARAMETER

    def _whole_stored(self, a: Axis, b: Axis) -> Axis | None:
        """The axis that is stored as a whole where the other is not; it is not refined in vain."""
        for x, y in ((a, b), (b, a)):
            mine, other = ({self.origins[d] for d in self.dims_of(axis)} for axis in (x, y))
            if mine == {DimKind.STORED} and DimKind.PARAMETER in other and DimKind.STORED not in other:
                return x
        return None

    def _tie_current(self, d: int, e: int) -> list[FixedContact]:
        (p,), (q,) = self.roots(d), self.roots(e)
        x, y = p.dims[0][0], q.dims[0][0]
        if {self.origins[x], self.origins[y]} == {DimKind.PARAMETER, DimKind.STORED}:
            return [FixedContact(y, True) if self._cut_by(y) else FixedContact(x, False)]
        self.tie(x, y)
        return []

    def _refine_first_difference(self, a: Axis, b: Axis) -> bool:
        """One refinement towards equal pieces; False where they are equal already."""
        for p, q in zip(a.pieces, b.pieces, strict=False):
            if p.offset != q.offset:
                raise Misaligned(f"pieces start at {p.offset} and {q.offset}")
            if self._shape(p) != self._shape(q):
                self._refine_pair(p, q)
                return True
        if len(a.pieces) != len(b.pieces):
            raise Misaligned("pieces left over")
        return False

    def _shape(self, piece: Piece) -> tuple[tuple[int, Steps], ...]:
        return tuple((self.sizes[d], s) for d, s in piece.dims)

    def _refine_pair(self, p: Piece, q: Piece) -> None:
        """Refine the innermost dim in which two pieces of equal offset differ; runs of unequal length are cut first."""
        if self._cut_run(p, q):
            return
        for depth in range(1, 1 + max(len(p.dims), len(q.dims))):
            if depth > len(p.dims) or depth > len(q.dims):
                longer = p if depth <= len(p.dims) else q
                self.cut(longer.dims[-depth][0], 1)
                return
            (x, s), (y, t) = strided(p)[-depth], strided(q)[-depth]
            m, n = self.sizes[x], self.sizes[y]
            if (s, m) == (t, n):
                continue
            if s > t or (s == t and m < n):
                (x, s, m, p), (y, t, n, q) = (y, t, n, q), (x, s, m, p)
            self._refine_finer(x, s, t, n, next_stride=strided(q)[-depth - 1][1] if depth < len(q.dims) else 0)
            return

    def _cut_run(self, p: Piece, q: Piece) -> bool:
        """Cut the longer of two runs of positions where the shorter ends: what follows need not have its shape."""
        short, long = sorted((p, q), key=self.span)
        length = self.span(short)
        if length == self.span(long) or not all(prod(self.sizes[d] for d, _ in r.dims) == self.span(r) for r in (p, q)):
            return False
        dim, stride = strided(long)[0]
        if length % stride:
            return False
        self.cut(dim, length // stride)
        return True

    def _refine_finer(self, x: int, s: int, t: int, n: int, next_stride: int) -> None:
        """Refine x (the denser or longer dim, stride s) against a dim of size n and stride t."""
        m = self.sizes[x]
        if s == t:
            if m % n == 0 and next_stride == s * n:
                self.factor(x, n)
            else:
                self.cut(x, n)
        elif s * m > t and t % s == 0 and m % (t // s) == 0:
            self.factor(x, t // s)
        else:
            self.cut(x, 1)
