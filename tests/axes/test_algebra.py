"""The algebra against positions counted one by one."""

from __future__ import annotations

import time
from itertools import product
from math import prod

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ecospa_fx.axes.axis import distances
from ecospa_fx.axes.dims import Axis, DimKind, Dims, Misaligned, Piece

P, S, B = DimKind.PARAMETER, DimKind.STORED, DimKind.BLANK
Label = tuple[tuple[int, int], ...]


def labels(dims: Dims, axis: Axis) -> list[Label]:
    """What every position is: (dim, index) pairs, sorted. Fails unless the pieces tile the axis exactly once."""
    found: dict[int, Label] = {}
    for piece in dims.resolve(axis).pieces:
        sizes = [dims.sizes[d] for d, _ in piece.dims]
        for index in product(*map(range, sizes)):
            at = piece.offset + sum(distances(s, dims.sizes[d])[i] for i, (d, s) in zip(index, piece.dims, strict=True))
            assert at not in found, f"position {at} twice"
            found[at] = tuple(sorted((d, i) for i, (d, _) in zip(index, piece.dims, strict=True)))
    assert sorted(found) == list(range(axis.size))
    return [found[i] for i in range(axis.size)]


@st.composite
def axes(draw: st.DrawFn, dims: Dims, depth: int = 2) -> Axis:
    """An axis made of dims by merging, joining and cutting."""
    kind = draw(st.sampled_from(["dim", "merge", "concat", "take"])) if depth else "dim"
    if kind == "dim":
        return dims.fresh(draw(st.sampled_from([1, 2, 3, 4, 6, 12])), P)
    parts = [draw(axes(dims, depth - 1)) for _ in range(draw(st.integers(1, 2 if kind != "take" else 1)))]
    if kind == "merge":
        return dims.merge(parts)
    if kind == "concat":
        return dims.concat(parts)
    start = draw(st.integers(0, parts[0].size - 1))
    return dims.take(parts[0], start, draw(st.integers(start + 1, parts[0].size)))


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_pieces_tile_the_axis(data: st.DataObject) -> None:
    dims = Dims()
    axis = data.draw(axes(dims))
    assert len(labels(dims, axis)) == axis.size


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_split_then_merge_is_the_same_axis(data: st.DataObject) -> None:
    dims = Dims()
    axis = data.draw(axes(dims))
    outer = data.draw(st.sampled_from([n for n in range(1, axis.size + 1) if axis.size % n == 0]))
    try:
        parts = dims.split(axis, (outer, axis.size // outer))
    except Misaligned:
        assume(False)
    assert [p.size for p in parts] == [outer, axis.size // outer]
    assert labels(dims, dims.merge(parts)) == labels(dims, axis)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([1, 2, 3, 5]), min_size=1, max_size=4), st.data())
def test_merge_then_split_gives_the_parts_back(sizes: list[int], data: st.DataObject) -> None:
    dims = Dims()
    parts = [dims.fresh(n, P) for n in sizes]
    merged = dims.merge(parts)
    assert [labels(dims, a) for a in dims.split(merged, sizes)] == [labels(dims, a) for a in parts]
    order = data.draw(st.permutations(sizes))
    try:
        again = dims.split(merged, order)
    except Misaligned:
        assume(False)
    assert labels(dims, dims.merge(again)) == labels(dims, merged)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_taking_undoes_joining(data: st.DataObject) -> None:
    dims = Dims()
    parts = [data.draw(axes(dims, 1)) for _ in range(3)]
    whole, at = dims.concat(parts), 0
    for part in parts:
        assert labels(dims, dims.take(whole, at, at + part.size)) == labels(dims, part)
        at += part.size


@settings(max_examples=80, deadline=None)
@given(st.data(), st.integers(1, 4))
def test_taking_with_a_step_takes_those_positions(data: st.DataObject, step: int) -> None:
    dims = Dims()
    axis = data.draw(axes(dims))
    start = data.draw(st.integers(0, axis.size - 1))
    stop = data.draw(st.integers(start + 1, axis.size))
    try:
        taken = dims.take(axis, start, stop, step)
    except Misaligned:
        assume(False)
    whole = labels(dims, axis)
    assert labels(dims, taken) == [whole[i] for i in range(start, stop, step)]


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_unified_axes_resolve_alike(data: st.DataObject) -> None:
    dims = Dims()
    a, b = data.draw(axes(dims)), data.draw(axes(dims))
    size = min(a.size, b.size)
    a, b = dims.take(a, 0, size), dims.take(b, 0, size)
    try:
        assert dims.unify(a, b) == []
    except Misaligned:
        assume(False)
    assert dims.resolve(a) == dims.resolve(b)
    assert labels(dims, a) == labels(dims, b)


def test_halves_of_a_rotation_become_one_dim() -> None:
    dims = Dims()
    axis = dims.fresh(8, P)
    turned = dims.concat([dims.take(axis, 4, 8), dims.take(axis, 0, 4)])
    dims.unify(axis, turned)
    first, second = dims.resolve(axis).pieces
    assert (first.offset, second.offset) == (0, 4)
    assert first.dims == second.dims


def test_a_shift_by_one_has_no_refinement_or_one_dim_per_position() -> None:
    dims = Dims()
    axis = dims.fresh(1000, P)
    with pytest.raises(Misaligned):
        dims.unify(dims.take(axis, 0, 999), dims.take(axis, 1, 1000))


@pytest.mark.parametrize(("first", "second", "kept"), [(P, B, P), (B, S, S), (B, P, P), (S, S, S), (P, P, P)])
def test_what_two_dims_become(first: DimKind, second: DimKind, kept: DimKind) -> None:
    dims = Dims()
    a, b = dims.fresh(6, first), dims.fresh(6, second)
    assert dims.unify(a, b) == []
    assert [dims.origins[d] for axis in (a, b) for d in dims.dims_of(axis)] == [kept, kept]


def test_stored_and_parameters_stay_apart() -> None:
    dims = Dims()
    a, b = dims.fresh(6, P), dims.fresh(6, S)
    (meeting,) = dims.unify(a, b)
    assert (meeting.dim, meeting.stored_first) == (dims.dims_of(a)[0], False)
    assert dims.dims_of(a) != dims.dims_of(b)


def test_sizes_that_differ_are_refused() -> None:
    dims = Dims()
    with pytest.raises(Misaligned, match="6 positions against 4"):
        dims.unify(dims.fresh(6, P), dims.fresh(4, P))
    with pytest.raises(Misaligned, match="viewed as"):
        dims.split(dims.fresh(6, P), (4, 2))


def test_the_cost_does_not_grow_with_the_size() -> None:
    start, dims, n = time.perf_counter(), Dims(), 10**9
    axis = dims.fresh(n, P)
    heads, width = dims.split(axis, (n // 100, 100))
    half = dims.concat([dims.take(width, 50, 100), dims.take(width, 0, 50)])
    dims.unify(width, half)
    merged = dims.merge([heads, half])
    dims.unify(axis, merged)
    assert dims.take(axis, 0, n, 2).size == n // 2
    assert prod(dims.sizes[d] for d, _ in dims.resolve(heads).pieces[0].dims) == n // 100
    assert time.perf_counter() - start < 1


def test_an_axis_of_one_position_holds_no_dim() -> None:
    dims = Dims()
    assert dims.fresh(1, P) == Axis(1, (Piece(0, ()),))
    assert dims.fresh(0, P).pieces == ()
    assert dims.take(dims.fresh(5, P), 2, 2).pieces == ()
