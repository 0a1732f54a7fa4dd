"""Positions read in a fixed order: every axis on which an element stands must give it the same unit."""

from __future__ import annotations

from itertools import product
from random import Random

import pytest

from ecospa_fx.axes.axis import Axis, DimKind, FixedContact, Misaligned, distances
from ecospa_fx.axes.dims import Dims
from ecospa_fx.axes.notation import Notation

PARAMETER, STORED, BLANK = DimKind.PARAMETER, DimKind.STORED, DimKind.BLANK
Unit = tuple[tuple[int, int], ...]
"""(dim, index) pairs; () for a position that never goes."""


def units(dims: Dims, axis: Axis) -> list[Unit]:
    """What stands at each position of an axis; every position must be there once."""
    result: dict[int, Unit] = {}
    for piece in dims.resolve(axis).pieces:
        names = [d for d, _ in piece.dims]
        away = [distances(steps, dims.sizes[d]) for d, steps in piece.dims]
        for index in product(*(range(dims.sizes[d]) for d in names)):
            position = piece.offset + sum(here[i] for here, i in zip(away, index, strict=True))
            assert position not in result
            result[position] = tuple(sorted(zip(names, index, strict=True)))
    assert sorted(result) == list(range(axis.size))
    return [result[position] for position in range(axis.size)]


class Shadow:
    """Axes beside lists of their elements, which torch would index as the algebra does."""

    def __init__(self, seed: int) -> None:
        self.random, self.dims, self.count = Random(seed), Dims(), 0
        self.axes: list[tuple[Axis, list[int]]] = []
        self.same: list[tuple[int, int]] = []

    def fresh(self, size: int, kind: DimKind = PARAMETER) -> tuple[Axis, list[int]]:
        self.count += size
        return self._add(self.dims.fresh(size, kind), list(range(self.count - size, self.count)))

    def _add(self, axis: Axis, elements: list[int]) -> tuple[Axis, list[int]]:
        self.axes.append((axis, elements))
        return axis, elements

    def step(self) -> None:
        """One random operation on a random axis."""
        axis, elements = self.random.choice(self.axes)
        size = len(elements)
        match self.random.randrange(7):
            case 0:
                order = self.random.sample(range(size), size)
                self._add(self.dims.pick(axis, order), [elements[i] for i in order])
            case 1:
                order = [self.random.randrange(size) for _ in range(self.random.randint(2, 8))]
                self._add(self.dims.pick(axis, order), [elements[i] for i in order])
            case 2:
                other, more = self.random.choice(self.axes)
                if size + len(more) <= 24:
                    self._add(self.dims.concat([axis, other]), [*elements, *more])
            case 3:
                start, step = self.random.randrange(size), self.random.randint(1, 3)
                self._add(self.dims.take(axis, start, size, step), elements[start::step])
            case 4:
                inner = self.random.choice([n for n in range(1, size + 1) if size % n == 0])
                outer, within = self.dims.split(axis, (size // inner, inner))
                self._add(self.dims.merge([outer, within]), elements)
            case 5:
                inner = self.random.choice([n for n in range(1, size + 1) if size % n == 0])
                order = self.random.sample(range(inner), inner)
                outer, within = self.dims.split(axis, (size // inner, inner))
                picked = self.dims.merge([outer, self.dims.pick(within, order)])
                self._add(picked, [elements[row + i] for row in range(0, size, inner) for i in order])
            case 6:
                alike = [(a, e) for a, e in self.axes if len(e) == size and a is not axis] or [self.fresh(size)]
                other, more = self.random.choice(alike)
                if not self.dims.unify(axis, other):
                    self.same += zip(elements, more, strict=True)

    def check(self) -> None:
        """Elements have the same unit wherever they stand, and so have elements that met."""
        unit: dict[int, Unit] = {}
        for axis, elements in self.axes:
            for element, here in zip(elements, units(self.dims, axis), strict=True):
                cut = tuple((dim, index) for dim, index in here if self.dims.origins[dim] is PARAMETER)
                assert unit.setdefault(element, cut) == cut
        assert all(unit[a] == unit[b] for a, b in self.same)


@pytest.mark.parametrize("first", range(0, 400, 200))
def test_elements_keep_their_units(first: int) -> None:
    """Random permutations, selections, repeats, slices, views and meetings of axes."""
    tables = 0
    for seed in range(first, first + 200):
        shadow = Shadow(seed)
        for size in (8, 6, 4):
            shadow.fresh(size)
        for _ in range(8):
            try:
                shadow.step()
            except Misaligned:
                break
            shadow.check()
        tables += any("[" in str(shadow.dims.resolve(axis)) for axis, _ in shadow.axes)
    assert tables > 60  # not everything has fallen apart into single positions


def picked(*orders: list[int], size: int = 8) -> tuple[Dims, Axis, Axis]:
    dims = Dims()
    whole = axis = dims.fresh(size, PARAMETER)
    for order in orders:
        axis = dims.pick(axis, order)
    return dims, whole, axis


def text(dims: Dims, *axes: Axis) -> list[str]:
    names = Notation(dims.sizes, dims.origins)
    return [names.axis(dims.resolve(axis)) for axis in axes]


def test_a_permutation_is_one_dim() -> None:
    """All units are free, and the result says where each stands."""
    dims, whole, axis = picked([2, 0, 3, 1], size=4)
    assert text(dims, whole, axis) == ["a", "{a[1 3 0 2]}"]
    assert units(dims, axis) == [((dims.dims_of(whole)[0], index),) for index in (2, 0, 3, 1)]


def test_permutations_compose() -> None:
    """A permutation and its inverse leave what was there, a stride and no table."""
    dims, whole, axis = picked([2, 0, 3, 1], [1, 3, 0, 2], size=4)
    assert dims.resolve(axis) == dims.resolve(whole)


def test_what_is_read_twice_is_a_dim_that_lies_there_twice() -> None:
    """Read once, twice and never are three dims."""
    dims, whole, axis = picked([6, 1, 4, 6, 5, 4])
    assert text(dims, axis, whole) == ["{a[2 0] | 3·b+1 | a[2 0]+3}", "{c[0 2 3 7] | 4·b+1 | 2·a+4}"]


def test_a_permutation_that_meets_itself_ties_its_cycles() -> None:
    """(0 1)(2 5 3)(4)(6 7): pairs are units of two, the cycle of three and the fixed point units of their own."""
    dims, whole, axis = picked([1, 0, 5, 2, 4, 3, 7, 6])
    assert dims.unify(whole, axis) == []
    here = units(dims, whole)
    assert here[0] == here[1] != here[6] == here[7] != ()
    assert here[2] == here[5] == here[3]
    assert len({here[0][0][0], here[6][0][0]}) == 1  # one dim of two units


def test_blocks_are_permuted_as_blocks() -> None:
    """Whole heads in another order, and the same order within every head, leave heads and their dimensions apart."""
    dims = Dims()
    heads, width = dims.fresh(4, PARAMETER), dims.fresh(2, PARAMETER)
    flat = dims.merge([heads, width])
    assert text(dims, dims.pick(flat, [6, 7, 0, 1, 4, 5, 2, 3])) == ["{a[2 6 4 0]+b}"]
    assert text(dims, dims.pick(flat, [1, 0, 3, 2, 5, 4, 7, 6])) == ["{2·a+b[1 0]}"]
    assert dims.dims_of(flat) == (*dims.dims_of(heads), *dims.dims_of(width))


def test_rows_and_columns_of_a_permutation_come_apart() -> None:
    """Interleaved positions viewed in rows are a transposition of two dims, in either order."""
    for rows, columns in ((2, 4), (4, 2)):
        dims = Dims()
        whole = dims.fresh(8, PARAMETER)
        order = [column * rows + row for row in range(rows) for column in range(columns)]
        outer, inner = dims.split(dims.pick(whole, order), (rows, columns))
        assert (outer.size, inner.size) == (rows, columns)
        assert text(dims, whole, outer, inner) == ["(a b)", "b", "a"]


def test_rows_of_an_irregular_permutation_become_one() -> None:
    """Where no row is like another, the positions of all rows are one unit."""
    dims, whole, axis = picked([5, 0, 7, 2, 1, 6, 3, 4])
    outer, inner = dims.split(axis, (2, 4))
    here = units(dims, whole)
    assert [here[i] for i in (5, 0, 7, 2)] == [here[i] for i in (1, 6, 3, 4)]
    assert text(dims, outer, inner) == ["(1 + 1)", "{a[1 3 0 2]}"]


def test_factors_do_not_part_from_a_table() -> None:
    """A dim that stands somewhere in an irregular order is split into runs, which the table takes, not into factors."""
    dims, whole, axis = picked([5, 0, 7, 2, 1, 6, 3, 4])
    dims.split(whole, (2, 4))
    here = units(dims, whole)
    assert here[:4] == here[4:]
    assert units(dims, axis) == [here[i] for i in (5, 0, 7, 2, 1, 6, 3, 4)]


def test_stored_positions_are_met_and_not_tied() -> None:
    """What is stored stays apart, on either side, and blank positions become what they meet."""
    dims, _, axis = picked([2, 0, 3, 1], size=4)
    (dim,) = dims.dims_of(axis)
    half = dims.concat([dims.fresh(2, STORED), dims.fresh(2, PARAMETER)])
    met = dims.unify(axis, half)
    assert {contact.stored_first for contact in met} == {False}
    assert {contact.dim for contact in met} <= set(dims.root_dims(dim))
    assert {c.stored_first for c in dims.unify(half, axis)} == {True}
    blank = dims.fresh(4, BLANK)
    assert FixedContact not in map(type, dims.unify(blank, axis))
    assert dims.resolve(blank) == dims.resolve(axis)


def test_too_irregular() -> None:
    """More rows than can be told apart are misaligned, and nothing is wrong afterwards."""
    order = list(range(600))
    Random(0).shuffle(order)
    dims, whole, axis = picked(order, size=600)
    with pytest.raises(Misaligned, match="no regular order viewed as 300·2"):
        dims.split(axis, (300, 2))
    assert dims.dims_of(whole) == dims.dims_of(axis)
