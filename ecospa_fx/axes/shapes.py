"""Arithmetic of shapes that knows no dims."""

from __future__ import annotations

from collections.abc import Iterable


def broadcast_size(sizes: Iterable[int]) -> int:
    """The size of an axis whose operands have these sizes."""
    return next((size for size in sizes if size != 1), 1)


def regrouped(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Smallest runs of adjacent axes of both shapes that hold the same number of elements."""
    result: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        inside: list[int] = []
        sizes: list[int] = []
        m = n = 1
        while True:
            if i < len(old) and (m < n or (m == n and not inside)):
                m, inside, i = m * old[i], [*inside, i], i + 1
            elif j < len(new) and (n < m or (m == n and not sizes)):
                n, sizes, j = n * new[j], [*sizes, new[j]], j + 1
            else:
                break
        result.append((inside, sizes))
    return result
