"""What axes are made of: pieces over dims, where the positions of a dim come from, and how an axis is written down."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise


class DimKind(Enum):
    """Where the positions of a dim come from, which decides what may be tied to it."""

    PARAMETER = "parameter"
    """It indexes elements of a parameter: tying two such dims makes them one."""
    STORED = "stored"
    """An input, a buffer or something computed afresh: never cut, gathered where it meets a parameter's dim."""
    BLANK = "blank"
    """All positions alike (a broadcast, an empty tensor): becomes whatever it is tied to."""


Steps = int | tuple[int, ...]
"""How far the indices of a dim lie from the first position: a stride, or a table with the distance of each index.

The least distance in a table is 0, and a table is never one that a stride says.
"""


@dataclass(frozen=True, slots=True)
class Piece:
    """Positions ``offset + Σ index(dim) · stride``, or ``offset + Σ table[index(dim)]``."""

    offset: int
    """The first position."""
    dims: tuple[tuple[int, Steps], ...]
    """(dim, stride or table), in order of falling stride."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of one tensor."""

    size: int
    """Its positions."""
    pieces: tuple[Piece, ...]
    """The pieces that tile it, each position once."""

    @property
    def dims(self) -> tuple[int, ...]:
        """The distinct dims of its pieces."""
        return tuple(dict.fromkeys(dim for piece in self.pieces for dim, _ in piece.dims))

    def __str__(self) -> str:
        return axis_text(self, "d{}".format, lambda dim: None)


@dataclass(frozen=True, slots=True)
class FixedContact:
    """Where a parameter's dim met a stored one while two axes were unified."""

    dim: int
    """The parameter's dim."""
    stored_first: bool
    """Whether the stored dim lies on the first of the two axes."""


class Misaligned(Exception):
    """Two decompositions have no common refinement in this algebra."""


# -- strides and tables ------------------------------------------------------------------------------------------


def distances(steps: Steps, size: int) -> Sequence[int]:
    """How far each of so many indices lies from the first position.

    >>> list(distances(3, 4)), distances((2, 0, 1), 3)
    ([0, 3, 6, 9], (2, 0, 1))
    """
    if not isinstance(steps, int):
        return steps
    return range(0, size * steps, steps) if steps else (0,) * size


def reach(steps: Steps, size: int) -> int:
    """How far the last position lies from the first one."""
    return (size - 1) * steps if isinstance(steps, int) else max(steps)


def scaled(steps: Steps, factor: int) -> Steps:
    """The same, each distance so many times as long."""
    return steps * factor if isinstance(steps, int) else tuple(step * factor for step in steps)


def divided(steps: Steps, by: int) -> Steps:
    """The same, each distance in units of `by`, of which it is a multiple."""
    return steps // by if isinstance(steps, int) else tuple(step // by for step in steps)


def is_multiple(steps: Steps, of: int) -> bool:
    """Whether every distance is a multiple of a number."""
    return steps % of == 0 if isinstance(steps, int) else all(step % of == 0 for step in steps)


def grain(steps: Steps) -> int:
    """The least distance between two positions."""
    return steps if isinstance(steps, int) else min(b - a for a, b in pairwise(sorted(steps)))


def normalised(positions: Sequence[int]) -> tuple[int, Steps]:
    """The first of at least two positions, and the steps to each of them: a stride where there is one.

    >>> normalised([5, 7, 9]), normalised([9, 5, 7])
    ((5, 2), (5, (4, 0, 2)))
    """
    stride = positions[1] - positions[0]
    if stride > 0 and all(b - a == stride for a, b in pairwise(positions)):
        return positions[0], stride
    first = min(positions)
    return first, tuple(position - first for position in positions)


def has_table(axis: Axis) -> bool:
    """Whether a table stands in the place of some stride of an axis."""
    return any(not isinstance(steps, int) for piece in axis.pieces for _, steps in piece.dims)


def strided(piece: Piece) -> tuple[tuple[int, int], ...]:
    """(dim, stride) of a piece. Raises Misaligned for one that has tables."""
    pairs = tuple((dim, steps) for dim, steps in piece.dims if isinstance(steps, int))
    if len(pairs) < len(piece.dims):
        raise Misaligned("its positions are in no regular order")
    return pairs


# -- text --------------------------------------------------------------------------------------------------------

SHOWN = 8
"""How many numbers of a table are written down."""

NameOf = Callable[[int], str]
"""The name of a dim."""
SizeOf = Callable[[int], int | None]
"""The size of a dim; None where it is not known and follows from the strides."""


def axis_text(axis: Axis, name: NameOf, size_of: SizeOf) -> str:
    """An axis as a sum of products, ``(a b + c)``; see `ecospa_fx.axes.notation`."""
    pieces = sorted(axis.pieces, key=lambda piece: piece.offset)
    terms = _terms(pieces, axis.size, name, size_of)
    if terms is None:
        return "{" + " | ".join(_formula(piece, name) for piece in pieces) + "}"
    text = " + ".join(terms)
    return f"({text})" if " " in text else text


def _terms(pieces: Sequence[Piece], size: int, name: NameOf, size_of: SizeOf) -> list[str] | None:
    """The summands of pieces that tile `size` positions row by row; None where they do not."""
    if not pieces:
        return ["0"] if size == 0 else None
    if len(pieces) == 1 and not pieces[0].dims:
        return ["1"] if size == 1 and pieces[0].offset == 0 else None
    blocks = _blocks(pieces, size, size_of)
    if len(blocks) > 1:
        summands: list[str] = []
        for block, length in blocks:
            terms = _terms(block, length, name, size_of)
            if terms is None:
                return None
            summands += terms
        return summands
    outer = {piece.dims[0] if piece.dims else (-1, 0) for piece in pieces}
    dim, stride = outer.pop()
    if (
        outer
        or not isinstance(stride, int)
        or stride < 1
        or size % stride
        or size_of(dim) not in {None, size // stride}
    ):
        return None
    label = name(dim)
    rest = _terms([Piece(piece.offset, piece.dims[1:]) for piece in pieces], stride, name, size_of)
    if rest is None or rest == ["1"]:
        return None if rest is None else [label]
    return [f"{label} {rest[0]}" if len(rest) == 1 else f"{label} ({' + '.join(rest)})"]


def _blocks(pieces: Sequence[Piece], size: int, size_of: SizeOf) -> list[tuple[list[Piece], int]]:
    """Runs of pieces that overlap no other run, each counted from its own offset, with their lengths."""
    runs: list[list[Piece]] = []
    end = 0
    for piece in pieces:
        if not runs or piece.offset >= end:
            runs.append([])
        runs[-1].append(piece)
        end = max(end, piece.offset + 1 + sum(reach(steps, size_of(dim) or 2) for dim, steps in piece.dims))
    starts = [run[0].offset for run in runs]
    starts[0] = 0
    lengths = [stop - start for start, stop in zip(starts, [*starts[1:], size], strict=True)]
    moved = [[Piece(p.offset - start, p.dims) for p in run] for start, run in zip(starts, runs, strict=True)]
    return list(zip(moved, lengths, strict=True))


def _formula(piece: Piece, name: NameOf) -> str:
    terms = [_term(name(dim), steps) for dim, steps in piece.dims]
    return "+".join([*terms, *([str(piece.offset)] if piece.offset or not terms else [])])


def _term(name: str, steps: Steps) -> str:
    """A dim with its stride; with its table in brackets, of which the first numbers are enough."""
    if isinstance(steps, int):
        return name if steps == 1 else f"{steps}·{name}"
    return f"{name}[{' '.join(map(str, steps[:SHOWN]))}{' …' if len(steps) > SHOWN else ''}]"
