"""Positions read in a fixed order: permutations, selections and repeats of the positions of an axis, by tables.

What is read once becomes dims of what is read once, what is read twice dims that lie twice on the result, what is never
read dims of its own. Where the result meets another axis, elements in the same positions become one unit, whatever
order they stand in: a permutation that meets itself ties the positions of each of its cycles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import gcd
from typing import TYPE_CHECKING

from ecospa_fx.axes.axis import Axis, DimKind, FixedContact, Misaligned, Piece, has_table, is_multiple, reach

if TYPE_CHECKING:
    from ecospa_fx.axes.dims import Dims

Element = tuple[int, int] | None
"""(dim, index); None for a position that belongs to no dim."""


# -- reading -----------------------------------------------------------------------------------------------------


def picked(dims: Dims, axis: Axis, positions: Sequence[int]) -> Axis:
    """The axis whose i-th position is the positions[i]-th of another. Raises Misaligned where no dims say so."""
    block = _block(dims.resolve(axis))
    if block is not None:
        pattern = _in_blocks(positions, block) if block else None
        if pattern is not None:
            outer, inner = dims.split(axis, (axis.size // block, block))
            return dims.merge([picked(dims, outer, pattern[0]), picked(dims, inner, pattern[1])])
        _flatten(dims, axis)
    standing = _elements(dims, dims.resolve(axis))
    reads: dict[int, dict[int, list[int]]] = {d: {} for d in dims.dims_of(axis)}
    result = [Piece(place, ()) for place, position in enumerate(positions) if standing[position] is None]
    for place, position in enumerate(positions):
        element = standing[position]
        if element is not None:
            reads[element[0]].setdefault(element[1], []).append(place)
    for dim, places in reads.items():
        result += _read_pieces(dims, dim, places)
    return Axis(len(positions), tuple(sorted(result, key=lambda piece: piece.offset)))


def _read_pieces(dims: Dims, dim: int, places: Mapping[int, Sequence[int]]) -> list[Piece]:
    """The pieces of a result on which the indices of a dim stand in some places each; those read alike are one dim."""
    alike: dict[int, list[int]] = {}
    for index in range(dims.sizes[dim]):
        alike.setdefault(len(places.get(index, ())), []).append(index)
    parts = list(alike.values())
    new = dims.partition(dim, parts) if len(parts) > 1 else [dim]
    return [
        dims.laid(-1 if d is None else d, [places[index][time] for index in part])
        for d, (times, part) in zip(new, alike.items(), strict=True)
        for time in range(times)
    ]


def _in_blocks(positions: Sequence[int], block: int) -> tuple[list[int], list[int]] | None:
    """Which blocks are read, and which positions of each, where that is the same in all of them."""
    first = positions[0] // block if positions else 0
    length = next((i for i, position in enumerate(positions) if position // block != first), len(positions))
    if not length or len(positions) % length:
        return None
    outer = [position // block for position in positions[::length]]
    inner = [position % block for position in positions[:length]]
    whole = [o * block + i for o in outer for i in inner]
    return (outer, inner) if whole == list(positions) else None


def _elements(dims: Dims, axis: Axis) -> list[Element]:
    """What stands at each position of an axis whose pieces have one dim at most."""
    result: list[Element] = [None] * axis.size
    for piece in axis.pieces:
        for index, position in enumerate(dims.places(piece)):
            result[position] = (piece.dims[0][0], index) if piece.dims else None
    return result


def _block(axis: Axis) -> int | None:
    """How far the outermost index of a product goes each time; None where no piece is a product."""
    outer = [piece.dims[0][1] for piece in axis.pieces if len(piece.dims) > 1]
    blocks = (steps if isinstance(steps, int) else gcd(*steps) for steps in outer)
    return next((block for block in blocks if block > 1 and axis.size % block == 0), 0) if outer else None


def _flatten(dims: Dims, axis: Axis) -> None:
    """Take products apart, index by index of their outer dims."""
    for _ in range(dims.REFINEMENTS):
        dim = next((p.dims[0][0] for p in dims.resolve(axis).pieces if len(p.dims) > 1), None)
        if dim is None:
            return
        dims.partition(dim, [[index] for index in range(dims.sizes[dim])])
    raise Misaligned(f"positions of {axis.size} in no regular order")


# -- viewing -----------------------------------------------------------------------------------------------------


def by_rows(dims: Dims, axis: Axis, inner: int) -> tuple[Axis, Axis] | None:
    """An axis with tables, viewed as rows of `inner` positions, all of which become one; None where it has whole rows.

    It has where each dim, or one that it is split into, says which row it is, or which position of the row.
    """
    for piece in dims.resolve(axis).pieces:
        for dim, steps in piece.dims:
            if not isinstance(steps, int) and dims.root_dims(dim) == (dim,):
                _factor_by_rows(dims, dim, [piece.offset + step for step in steps], inner)
    tables = (p for p in dims.resolve(axis).pieces if not all(isinstance(steps, int) for _, steps in p.dims))
    if all(_is_rows(dims, piece, inner) for piece in tables):
        return None
    count = axis.size // inner
    if count > dims.REFINEMENTS:
        raise Misaligned(f"{axis.size} positions in no regular order viewed as {count}·{inner}")
    rows = [picked(dims, axis, range(first, first + inner)) for first in range(0, axis.size, inner)]
    for row in rows[1:]:
        if dims.unify(rows[0], row):
            raise Misaligned(f"rows of {inner} positions, of which some are stored and others are not")
    return Axis(count, tuple(Piece(row, ()) for row in range(count))), rows[0]


def _factor_by_rows(dims: Dims, dim: int, places: Sequence[int], inner: int) -> None:
    """Split a dim into rows and positions of rows, where all rows hold its indices alike."""
    rows, columns = [place // inner for place in places], [place % inner for place in places]
    for outside, inside in ((rows, columns), (columns, rows)):
        run = next((i for i, part in enumerate(outside) if part != outside[0]), len(places))
        if 1 < run < len(places) and len(places) % run == 0:
            whole = all(part == outside[i - i % run] for i, part in enumerate(outside))
            if whole and all(part == inside[i % run] for i, part in enumerate(inside)):
                dims.factor(dim, run)
                return


def _is_rows(dims: Dims, piece: Piece, inner: int) -> bool:
    """Whether every dim of a piece goes from row to row, or stays in one."""
    inside = [(d, steps) for d, steps in piece.dims if not is_multiple(steps, inner)]
    return piece.offset % inner + sum(reach(steps, dims.sizes[d]) for d, steps in inside) < inner


# -- meeting -----------------------------------------------------------------------------------------------------


def unify_tables(dims: Dims, a: Axis, b: Axis) -> list[FixedContact]:
    """What `Dims.unify` does, for axes of which some has tables."""
    left, right = dims.resolve(a), dims.resolve(b)
    if left == right:
        return []
    if not (has_table(left) or has_table(right)):
        return dims.unify(left, right)
    blocks = [block for axis in (left, right) if (block := _block(axis)) is not None]
    if blocks:
        if not max(blocks):
            raise Misaligned("positions in no regular order")
        inner = max(blocks)
        sides = [dims.split(axis, (a.size // inner, inner)) for axis in (a, b)]
        return [contact for x, y in zip(*sides, strict=True) for contact in dims.unify(x, y)]
    return _Meeting(dims, _elements(dims, left), _elements(dims, right)).tied()


class _Meeting:
    """Elements that meet position by position: what meets directly or by way of others is one unit."""

    def __init__(self, dims: Dims, left: Sequence[Element], right: Sequence[Element]) -> None:
        self.dims = dims
        self.contacts: dict[FixedContact, None] = {}
        self.parent: dict[Element, Element] = {None: None}
        for dim in dict.fromkeys(element[0] for element in (*left, *right) if element is not None):
            self.parent |= {(dim, index): (dim, index) for index in range(dims.sizes[dim])}
        for x, y in zip(left, right, strict=True):
            self._meet(x, y)

    def _meet(self, x: Element, y: Element) -> None:
        kinds = [None if element is None else self.dims.origins[element[0]] for element in (x, y)]
        if x is not None and y is not None and set(kinds) == {DimKind.PARAMETER, DimKind.STORED}:
            stored_first = kinds[0] is DimKind.STORED
            self.contacts[FixedContact(y[0] if stored_first else x[0], stored_first)] = None
        else:
            self.parent[self._find(y)] = self._find(x)

    def _find(self, element: Element) -> Element:
        while self.parent[element] != element:
            self.parent[element] = element = self.parent[self.parent[element]]
        return element

    def tied(self) -> list[FixedContact]:
        """Replace the dims by those of the units. Raises Misaligned, with nothing replaced, where that cannot be."""
        units: dict[Element, list[tuple[int, int]]] = {}
        fixed = self._find(None)
        for element in sorted(e for e in self.parent if e is not None):
            units.setdefault(self._find(element), []).append(element)
        alike: dict[tuple[int, ...], list[list[tuple[int, int]]]] = {}
        for root, unit in units.items():
            alike.setdefault(() if root == fixed else tuple(dim for dim, _ in unit), []).append(unit)
        kinds = {frozenset(self.dims.origins[dim] for dim in signature) for signature in alike}
        if any({DimKind.PARAMETER, DimKind.STORED} <= kind for kind in kinds):
            raise Misaligned("positions, of which some are stored and others are not")
        pieces: dict[int, list[Piece]] = {}
        for unit in alike.pop((), ()):
            for dim, index in unit:
                pieces.setdefault(dim, []).append(Piece(index, ()))
        for signature, group in alike.items():
            self._lay(signature, group, pieces)
        for dim, parts in pieces.items():
            if parts != [Piece(0, ((dim, 1),))]:
                self.dims.replace(dim, tuple(parts))
        return [contact for contact in self.contacts if not self._is_new(contact.dim)] + self._renamed()

    def _lay(
        self, signature: tuple[int, ...], group: Sequence[Sequence[tuple[int, int]]], pieces: dict[int, list[Piece]]
    ) -> None:
        """Add the pieces of all units that hold elements of the same dims, which are one dim from now on."""
        dims = self.dims
        whole = [d for d in signature if signature.count(d) == 1 and dims.sizes[d] == len(group)]
        kept = min(whole, key=dims.rank, default=None)
        if kept is not None:
            place = signature.index(kept)
            group = sorted(group, key=lambda unit: unit[place][1])
        elif len(group) > 1:
            kept = dims.new(len(group), dims.origins[min(signature, key=dims.rank)])
        for slot, dim in enumerate(signature):
            indices = [unit[slot][1] for unit in group]
            pieces.setdefault(dim, []).append(dims.laid(-1 if kept is None else kept, indices))

    def _is_new(self, dim: int) -> bool:
        return self.dims.root_dims(dim) != (dim,)

    def _renamed(self) -> list[FixedContact]:
        """Contacts of dims that have been replaced meanwhile."""
        return [
            FixedContact(root, contact.stored_first)
            for contact in self.contacts if self._is_new(contact.dim)
            for root in self.dims.root_dims(contact.dim)
        ]  # fmt: skip
