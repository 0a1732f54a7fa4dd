"""What a user sees and measures of long work: a progress bar of one line on stderr, and the seconds of named steps."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from operator import length_hint
from typing import ParamSpec, TypeVar

T = TypeVar("T")
Arguments = ParamSpec("Arguments")
WIDTH = 24


def progress_bar(items: Iterable[T], label: str) -> Iterator[T]:
    """The same items; a line on stderr counts those that the caller is done with."""
    total, begin = length_hint(items), time.monotonic()
    sys.stderr.write(line(label, 0, total, 0.0))
    try:
        for done, item in enumerate(items, 1):
            yield item
            sys.stderr.write("\r" + line(label, done, total, time.monotonic() - begin))
            sys.stderr.flush()
    finally:
        sys.stderr.write("\n")


def line(label: str, done: int, total: int, seconds: float) -> str:
    """One state of the bar; a total of 0 is unknown.

    >>> line("fisher", 6, 24, 3.0)
    'fisher [######                  ] 6/24, 3 s, 9 s left'
    >>> line("fisher", 6, 0, 3.0)
    'fisher 6 batches, 3 s'
    """
    if not total:
        return f"{label} {done} batches, {seconds:.0f} s"
    bar = "#" * (WIDTH * min(done, total) // total)
    left = f", {seconds / done * max(total - done, 0):.0f} s left" if done else ""
    return f"{label} [{bar:<{WIDTH}}] {done}/{total}, {seconds:.0f} s{left}"


class TimedSteps:
    """Runs steps and records their seconds by name. announce: whether each is printed to stderr before it runs."""

    def __init__(self, *, announce: bool = False) -> None:
        self.seconds: dict[str, float] = {}
        """What each step has taken so far."""
        self._announce = announce

    def __call__(
        self, step: str, function: Callable[Arguments, T], /, *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> T:
        """What a function returns for these arguments."""
        if self._announce:
            sys.stderr.write(f"{step} …\n")
        begin = time.perf_counter()
        result = function(*args, **kwargs)
        self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - begin
        return result
