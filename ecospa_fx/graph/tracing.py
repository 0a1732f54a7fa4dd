"""What is the whole process's while a model is traced: one trace at a time, and silence for its thread alone."""

from __future__ import annotations

import logging
import random
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast
from weakref import WeakKeyDictionary

import torch
from torch import nn

_own = threading.RLock()


def _lock() -> Any:
    """The lock under which torch compiles, so that neither waits for the other; our own where there is none."""
    try:
        from torch._dynamo.convert_frame import compile_lock
    except ImportError:
        return _own
    return compile_lock


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Other threads that come here wait: torch.export keeps its modes, and the weights that it swaps, process-wide."""
    with _lock():
        yield


_models: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


@contextmanager
def alone_with(model: nn.Module) -> Iterator[None]:
    """Other threads that look at the same model wait: while it is traced, its weights have no content."""
    with _own:
        lock = _models.setdefault(model, threading.RLock())
    with lock:
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Without what torch warns of, logs and prints in this thread, which the user cannot change.

    Other threads print and warn as they did: nothing of theirs is swallowed, whoever enters or leaves first.
    """
    names = ("torch.export", "torch.fx.experimental.symbolic_shapes", "torch._export", "torch._subclasses.fake_tensor")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    here = _Here()
    rule: Any = ("ignore", here, Warning, None, 0)
    rules = cast(list[Any], warnings.filters)
    rules.insert(0, rule)
    # torch prints the graph of a failed trace, whatever the log level
    streams = [(name, getattr(sys, name), _Muted(getattr(sys, name), here)) for name in ("stdout", "stderr")]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    for name, _, muted in streams:
        setattr(sys, name, muted)
    try:
        yield
    finally:
        here.over = True
        for name, stream, muted in streams:
            if getattr(sys, name) is muted:
                setattr(sys, name, stream)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for held in (rules, cast(list[Any], warnings.filters)):
            if rule in held:
                held.remove(rule)


class _Here:
    """A pattern that matches every text in the thread that made it, until it is over."""

    def __init__(self) -> None:
        self.thread, self.over = threading.get_ident(), False

    def match(self, text: str) -> bool:
        """Whether it is this thread's, as a regular expression of a warnings filter is asked."""
        return not self.over and threading.get_ident() == self.thread


class _Muted:
    """A stream that swallows what one thread writes."""

    def __init__(self, stream: TextIO, here: _Here) -> None:
        self._stream, self._here = stream, here

    def write(self, text: str) -> int:
        """Write what other threads do."""
        return len(text) if self._here.match(text) else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def same_chance() -> Iterator[None]:
    """Random numbers go on outside as if none had been drawn inside: those of Python, NumPy and torch on the CPU.

    Not where other threads are running, which may draw from the same sources.
    """
    numpy = sys.modules.get("numpy")
    before = random.getstate(), numpy.random.get_state() if numpy else None, torch.get_rng_state()
    try:
        yield
    finally:
        others = [t for t in threading.enumerate() if t is not threading.current_thread()]
        if all(type(thread).__module__.startswith("tqdm.") for thread in others):  # they watch bars
            random.setstate(before[0])
            if numpy:
                numpy.random.set_state(before[1])
            torch.set_rng_state(before[2])
