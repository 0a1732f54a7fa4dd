"""What axes are made of: pieces over dims, and where the positions of a dim come from; see `algebra`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class DimKind(Enum):
    """Where the positions of a dim come from, which decides what may be tied to it."""

    PARAMETER = "parameter"
    """It indexes elements of a parameter: tying two such dims makes them one."""
    STORED = "stored"
    """An input, a buffer or something computed afresh: never cut, gathered where it meets a parameter's dim."""
    BLANK = "blank"
    """All positions alike (a broadcast, an empty tensor): becomes whatever it is tied to."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Positions ``offset + Σ index(dim) · stride``; dims in order of falling stride."""

    offset: int
    dims: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of one tensor: its size and the pieces that tile it."""

    size: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class FixedContact:
    """Where a parameter's dim met a stored one while two axes were unified; `stored_first`: the first axis has it."""

    dim: int
    stored_first: bool


class Misaligned(Exception):
    """Two decompositions have no common refinement in this algebra."""
