"""Where a generator's choices come from: a seed, or hypothesis."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from hypothesis import strategies as st

T = TypeVar("T")


class Source(Protocol):
    """A stream of choices."""

    def integer(self, low: int, high: int) -> int:
        """A number from low to high, both included."""
        ...


class Seeded:
    """Choices that a seed decides."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def integer(self, low: int, high: int) -> int:
        return self._random.randint(low, high)


class Drawn:
    """Choices that hypothesis makes, and shrinks."""

    def __init__(self, draw: Callable[[st.SearchStrategy[Any]], Any]) -> None:
        self._draw = draw

    def integer(self, low: int, high: int) -> int:
        return int(self._draw(st.integers(low, high)))


def choose(source: Source, options: Sequence[T]) -> T:
    """One of several, each as likely."""
    return options[source.integer(0, len(options) - 1)]


def weighted(source: Source, options: Sequence[tuple[int, T]]) -> T:
    """One of several with integer weights."""
    at = source.integer(1, sum(weight for weight, _ in options))
    for weight, option in options:
        at -= weight
        if at <= 0:
            return option
    raise AssertionError("weights are positive")


def chance(source: Source, percent: int) -> bool:
    """True so often."""
    return source.integer(1, 100) <= percent


def shuffled(source: Source, items: Sequence[T]) -> list[T]:
    """The items in some order."""
    left, result = list(items), []
    while left:
        result.append(left.pop(source.integer(0, len(left) - 1)))
    return result
