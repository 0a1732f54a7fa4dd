"""What surrounds a trace: one at a time in a process, and silence in its own thread alone."""

from __future__ import annotations

import importlib
import logging
import random
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TextIO, cast
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ecospa_fx.snapshot import others_run

_own = threading.RLock()


def _lock() -> AbstractContextManager[object]:
    """The lock under which torch compiles, so that neither waits for the other; our own where there is none."""
    with _own:  # what torch loads when something is traced first does not bear being loaded by two threads at once
        try:
            lock: AbstractContextManager[object] = importlib.import_module("torch._dynamo.convert_frame").compile_lock
            return lock
        except (ImportError, AttributeError):
            return _own


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Other threads that trace, or compute with what exists only in traces, wait: torch keeps modes per process.

    Also a decorator. Where it compiles, torch waits too.
    """
    with _lock():
        yield


_models: WeakKeyDictionary[nn.Module, AbstractContextManager[object]] = WeakKeyDictionary()


@contextmanager
def model_locked(model: nn.Module) -> Iterator[None]:
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
    thread = threading.get_ident()
    with _own:
        if not _silent:
            _mute()
        _silent.append(thread)
    try:
        yield
    finally:
        with _own:
            _silent.remove(thread)
            if not _silent:
                _unmute()


_silent: list[int] = []
"""The threads that are to be silent, each as often as it said so."""
_LOGGERS = "torch.export", "torch.fx.experimental.symbolic_shapes", "torch._export", "torch._subclasses.fake_tensor"
_before: dict[str, Any] = {}
"""What there was in the places of what keeps threads silent: streams and levels by name, the rules for warnings."""


class _Silent:
    """A pattern that matches every text in silent threads; rules for warnings ask it like a regular expression."""

    def match(self, text: str) -> bool:
        """Whether it is to be swallowed."""
        return threading.get_ident() in _silent


class _Muted:
    """A stream that swallows what silent threads write."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write what other threads do."""
        return len(text) if threading.get_ident() in _silent else self._stream.write(text)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


_RULE: Any = ("ignore", _Silent(), Warning, None, 0)


def _mute() -> None:
    for name in ("stdout", "stderr"):  # torch prints the graph of a failed trace, whatever the log level
        stream = getattr(sys, name)
        _before[name] = stream, _Muted(stream)
        setattr(sys, name, _before[name][1])
    for name in _LOGGERS:
        _before[name] = logging.getLogger(name).level
        logging.getLogger(name).setLevel(logging.CRITICAL)
    _before["rules"] = warnings.filters
    _before["rules"].insert(0, _RULE)


def _unmute() -> None:
    for name in ("stdout", "stderr"):
        stream, muted = _before[name]
        if getattr(sys, name) is muted:
            setattr(sys, name, stream)
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(_before[name])
    for rules in (_before["rules"], cast(list[Any], warnings.filters)):  # others may have put theirs in that place
        if _RULE in rules:
            rules.remove(_RULE)
    _before.clear()


@contextmanager
def random_state_restored() -> Iterator[None]:
    """Random numbers go on outside as if none had been drawn inside: those of Python, NumPy and torch on the CPU.

    Not where other threads are running, which may draw from the same sources.
    """
    numpy = sys.modules.get("numpy")
    before = random.getstate(), numpy.random.get_state() if numpy else None, torch.get_rng_state()
    try:
        yield
    finally:
        if not others_run():
            random.setstate(before[0])
            if numpy:
                numpy.random.set_state(before[1])
            torch.set_rng_state(before[2])
