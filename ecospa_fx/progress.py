"""What a user sees and measures of long work: bars on stderr, a log line per stage, and the seconds of named steps."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from operator import length_hint
from typing import ParamSpec, TextIO, TypeVar

import torch
from tqdm.auto import tqdm
from tqdm.std import tqdm as plain_tqdm

try:
    import resource
except ImportError:  # on Windows
    resource = None  # type: ignore[assignment]

T = TypeVar("T")
Arguments = ParamSpec("Arguments")
LINE_EVERY = 10.0
"""Seconds between two lines of a bar that goes to a file."""
REDRAW_EVERY = 0.1
"""Seconds between two states of a bar that is drawn over and over."""

log = logging.getLogger(__name__)


def progress_bar(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """The same items; a bar on stderr counts those that the caller is done with.

    A terminal has one line that is drawn over and over, a notebook a widget, and a file a line every ten seconds.
    total: how many items there are, by default what they say themselves.
    """
    lines = not sys.stderr.isatty() and tqdm.status_printer is plain_tqdm.status_printer
    yield from _Bar(
        items,
        label,
        total or length_hint(items) or None,
        file=_Lines(sys.stderr) if lines else sys.stderr,
        mininterval=LINE_EVERY if lines else REDRAW_EVERY,
        miniters=1,
    )


class _Bar(tqdm):  # type: ignore[type-arg, misc, unused-ignore]  # tqdm has types in stubs of its own only
    """Without the thread in which tqdm watches over bars that stand still."""

    monitor_interval = 0


class _Lines:
    """A stream in which every state of a bar has a line."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        if text.strip():
            self._stream.write(text.strip() + "\n")

    def flush(self) -> None:
        self._stream.flush()


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Log what is done inside, once it is done: its seconds, and the most memory that was in use up to then.

    Lines have the level INFO and come from the logger ``ecospa_fx.progress``: ``logging.basicConfig(level="INFO")``
    shows them. Memory is that of torch's tensors on the GPU where there have been any, otherwise that of the process,
    where the system says so. Nothing is logged of what ends by an error.
    """
    begin = time.perf_counter()
    yield
    peak = peak_memory()
    memory = "" if peak is None else f", at most {peak / 2**30:.2f} GiB in use so far"
    log.info("%s: %.1f s%s", name, time.perf_counter() - begin, memory)


def peak_memory() -> int | None:
    """Bytes, of the process or, where there were tensors on the GPU, of those; None where the system does not say."""
    on_gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0  # type: ignore[no-untyped-call]
    if on_gpu:  # models on the CPU leave a GPU empty that something else has started
        return on_gpu
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 2**10
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


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
