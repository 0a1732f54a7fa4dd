"""What each dim has been replaced by: the substitution table under the algebra of dims (`ecospa_fx.axes.dims`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

from ecospa_fx.axes.axis import Axis, DimKind, Piece, Steps, distances, grain, normalised, reach, scaled


class Substitution:
    """Dims, their sizes, and the pieces that have taken the place of some of them."""

    REFINEMENTS = 256
    """Steps of one unification before it is given up: shifted self-overlaps would refine down to single positions."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.origins: list[DimKind] = []
        self._replaced: list[tuple[Piece, ...] | None] = []
        self.generation = 0
        """Grows with every substitution; a resolved axis is valid while it stands still."""
        self._resolved: dict[Axis, tuple[int, Axis]] = {}
        self._tables: dict[int, dict[tuple[int, ...], None]] = {}
        """Per dim the tables that stand with it on some axis: what splits the dim into factors must split them too."""

    # -- making ------------------------------------------------------------------------------------------------

    def new(self, size: int, origin: DimKind) -> int:
        """A fresh dim."""
        self.sizes.append(size)
        self.origins.append(origin)
        self._replaced.append(None)
        return len(self.sizes) - 1

    def fresh(self, size: int, origin: DimKind) -> Axis:
        """An axis of one fresh dim; an axis of size 1 holds no dim."""
        return Axis(size, (self._piece_of(size, origin),) if size else ())

    def _piece_of(self, size: int, origin: DimKind) -> Piece:
        return Piece(0, ((self.new(size, origin), 1),) if size > 1 else ())

    def laid(self, dim: int, positions: Sequence[int]) -> Piece:
        """The piece whose index i stands at the i-th of some positions."""
        if len(positions) == 1:
            return Piece(positions[0], ())
        offset, steps = normalised(positions)
        self._note_table(dim, steps)
        return Piece(offset, ((dim, steps),))

    def _note_table(self, dim: int, steps: Steps) -> None:
        if not isinstance(steps, int):
            self._tables.setdefault(dim, {})[steps] = None

    # -- looking up --------------------------------------------------------------------------------------------

    def roots(self, dim: int) -> tuple[Piece, ...]:
        """The pieces over unreplaced dims that `dim` stands for, with path compression."""
        replaced = self._replaced[dim]
        if replaced is None:
            return (Piece(0, ((dim, 1),)),)
        if all(self._replaced[d] is None for piece in replaced for d, _ in piece.dims):
            return replaced
        result = tuple(new for piece in replaced for new in self._expand(piece))
        self._replaced[dim] = result
        return result

    def _expand(self, piece: Piece) -> Iterator[Piece]:
        """`piece` over unreplaced dims, in no particular order."""
        partial = [Piece(piece.offset, ())]
        for dim, steps in piece.dims:
            if self._replaced[dim] is None:
                partial = [Piece(p.offset, (*p.dims, (dim, steps))) for p in partial]
                continue
            parts = [self._stepped(sub, steps) for sub in self.roots(dim)]
            partial = [Piece(p.offset + part.offset, (*p.dims, *part.dims)) for p in partial for part in parts]
        for p in partial:
            yield Piece(p.offset, tuple(sorted(p.dims, key=lambda entry: -grain(entry[1]))))

    def _stepped(self, piece: Piece, steps: Steps) -> Piece:
        """Where a piece of a dim's indices stands on an axis on which the dim has these steps."""
        if isinstance(steps, int):
            return Piece(piece.offset * steps, tuple((d, scaled(s, steps)) for d, s in piece.dims))
        away = [(d, distances(s, self.sizes[d])) for d, s in piece.dims]
        corner = piece.offset + sum(here[0] for _, here in away)
        offset, entries = steps[corner], list[tuple[int, Steps]]()
        for d, here in away:  # `factor` has made sure that distances along one dim do not depend on others
            first, new = normalised([steps[corner - here[0] + x] - steps[corner] for x in here])
            offset += first
            entries.append((d, new))
        return Piece(offset, tuple(entries))

    def resolve(self, axis: Axis) -> Axis:
        """The same axis over unreplaced dims, pieces ordered by offset."""
        cached = self._resolved.get(axis)
        if cached is not None and cached[0] == self.generation:
            return cached[1]
        if all(self._replaced[d] is None for p in axis.pieces for d, _ in p.dims):
            result = axis
        else:
            pieces = [new for piece in axis.pieces for new in self._expand(piece)]
            result = Axis(axis.size, tuple(sorted(pieces, key=lambda p: (p.offset, [d for d, _ in p.dims]))))
        self._resolved[axis] = (self.generation, result)
        return result

    def dims_of(self, axis: Axis) -> tuple[int, ...]:
        """The distinct unreplaced dims of an axis."""
        return self.resolve(axis).dims

    def root_dims(self, dim: int) -> tuple[int, ...]:
        """The distinct unreplaced dims that `dim` stands for."""
        if self._replaced[dim] is None:
            return (dim,)
        return tuple(dict.fromkeys(root for piece in self.roots(dim) for root, _ in piece.dims))

    def cuttable(self, axis: Axis) -> bool:
        """Whether some dim of the axis indexes a parameter."""
        return any(self.origins[d] is DimKind.PARAMETER for d in self.dims_of(axis))

    def span(self, piece: Piece) -> int:
        """One past the last position of the piece, from its offset."""
        return 1 + sum(reach(steps, self.sizes[d]) for d, steps in piece.dims)

    def places(self, piece: Piece) -> list[int]:
        """All positions of a piece, by the indices of its dims, the last one running fastest."""
        each = [distances(steps, self.sizes[d]) for d, steps in piece.dims]
        return [piece.offset + sum(away) for away in product(*each)]

    # -- refining ----------------------------------------------------------------------------------------------

    def replace(self, dim: int, pieces: tuple[Piece, ...]) -> None:
        """Let `dim` stand for `pieces` from now on, everywhere."""
        self._replaced[dim] = pieces
        self.generation += 1
        self._resolved.clear()
        for piece in pieces:
            for new, steps in piece.dims:
                self._note_table(new, steps)
            for table in self._tables.get(dim, ()):
                for new, steps in self._stepped(piece, table).dims:
                    self._note_table(new, steps)

    def factor(self, dim: int, inner: int) -> None:
        """Split a dim into outer · inner, row-major; into runs of `inner` where a table would not split with it."""
        size, origin = self.sizes[dim], self.origins[dim]
        if not all(_separable(table, inner) for table in self._tables.get(dim, ())):
            self.partition(dim, [range(first, first + inner) for first in range(0, size, inner)])
            return
        parts = [(size // inner, inner), (inner, 1)]
        self.replace(dim, (Piece(0, tuple((self.new(n, origin), s) for n, s in parts if n > 1)),))

    def cut(self, dim: int, edge: int) -> None:
        """Split a dim into [0, edge) ‖ [edge, size)."""
        size, origin = self.sizes[dim], self.origins[dim]
        first, second = self._piece_of(edge, origin), self._piece_of(size - edge, origin)
        self.replace(dim, (first, Piece(edge, second.dims)))

    def partition(self, dim: int, parts: Sequence[Sequence[int]]) -> list[int | None]:
        """Split a dim into parts, each a dim of its own that holds these indices; None for one of a single index."""
        origin = self.origins[dim]
        new = [self.new(len(part), origin) if len(part) > 1 else None for part in parts]
        pieces = (self.laid(-1 if d is None else d, part) for d, part in zip(new, parts, strict=True))
        self.replace(dim, tuple(pieces))
        return new

    def tie(self, a: int, b: int) -> None:
        """Make two unreplaced dims of equal size the same index set."""
        if a == b:
            return
        keep, replaced = sorted((a, b), key=self.rank)
        self.replace(replaced, (Piece(0, ((keep, 1),)),))

    def rank(self, dim: int) -> tuple[int, int]:
        """Of dims that become one the one of least rank stays."""
        return (DimKind.PARAMETER, DimKind.STORED, DimKind.BLANK).index(self.origins[dim]), dim


def _separable(table: tuple[int, ...], inner: int) -> bool:
    """Whether the distances of a dim of outer · inner indices are sums of one for the outer and one for the inner."""
    return all(away == table[i - i % inner] + table[i % inner] - table[0] for i, away in enumerate(table))
