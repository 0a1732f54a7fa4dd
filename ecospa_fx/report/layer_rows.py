"""Which layer of a model a module belongs to, by the numbers in its path."""

from __future__ import annotations

from itertools import takewhile

ROOT = "(root)"


def row_of(path: str) -> str:
    """The layer that a module belongs to: its path up to the first number, else the whole path.

    >>> row_of("model.layers.3.mlp.experts.7"), row_of("lm_head"), row_of("")
    ('model.layers.3', 'lm_head', '(root)')
    """
    parts = path.split(".")
    before = list(takewhile(lambda part: not part.isdecimal(), parts))
    return ".".join(parts[: len(before) + 1]) or ROOT


def folded(rows: list[str]) -> str:
    """Several layers in one name: consecutive ones as a range, else the first and how many more.

    >>> folded(["h.0", "h.1", "h.2"]), folded(["h.0", "h.2"]), folded(["head"])
    ('h.{0..2}', 'h.0 and 1 more', 'head')
    """
    first, last = rows[0], rows[-1]
    stem, _, number = first.rpartition(".")
    if len(rows) > 1 and number.isdecimal():
        names = [f"{stem}.{n}".lstrip(".") for n in range(int(number), int(number) + len(rows))]
        if names == rows:
            return f"{stem}.{{{number}..{last.rpartition('.')[2]}}}".lstrip(".")
    return first if len(rows) == 1 else f"{first} and {len(rows) - 1:,} more"
