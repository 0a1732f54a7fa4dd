"""Everything that a module holds, noted before a verb looks at it, and put back afterwards.

A call of a model may leave anything behind: hooks, attributes, tables in a dictionary, a class. While a model is traced
all of that is made of tensors without content, and a verb that promises to leave the model alone takes it back whatever
happens. What a module is: the attributes of all its parts and of the objects that these hold, what is in their
containers, their classes and modes, and the marks and places of their tensors. While a model is traced, also what its
classes hold. What others hold too, such as tables of a Python module, of ``functools.lru_cache``, or of a class while
other threads run, only loses what has no content.

Out of reach is what compiled code, iterators and context variables hold, and objects of the standard library and NumPy.
"""

from __future__ import annotations

import functools
import gc
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from operator import is_
from types import FunctionType, MethodType

import torch
from torch import Tensor, nn

from ecospa_fx.holders import (
    ATOMS,
    CLASS,
    DICT,
    Kind,
    Parts,
    assign,
    holders,
    is_empty,
    is_foreign,
    is_foreign_module,
    lends,
    pairs,
)

MOST = 300_000
"""Objects that are looked at, nearest first; what is farther away belongs to somebody else."""
LARGEST = 2**26
"""Bytes up to which what is in a tensor is noted too."""


@contextmanager
def untouched(*models: nn.Module, traced: bool = False) -> Iterator[None]:
    """What happens inside leaves no trace on some models; traced: nor on what they share with others.

    Parameters that are written into are not put back, and then nothing is: they and the attributes that say so belong
    together.
    """
    before = Snapshot(models, traced=traced)
    try:
        yield
    finally:
        before.restore()


_WAITING = (
    "asyncio", "concurrent.futures", "debugpy", "execnet", "ipykernel", "multiprocessing", "pydevd", "queue", "select",
    "selectors", "socket", "ssl", "subprocess", "threading", "torch._inductor.compile_worker", "tornado", "zmq",
)  # fmt: skip
"""Modules whose code waits: a thread in it does nothing until it is told to, as those of notebooks and of bars."""


def others_run() -> bool:
    """Whether other threads are running, which may change what they share with this one; those that wait do not."""
    frames = sys._current_frames()
    others = [thread.ident for thread in threading.enumerate() if thread is not threading.current_thread()]
    running = [frames[ident] for ident in others if ident in frames]
    return not all(_waits(str(frame.f_globals.get("__name__", ""))) for frame in running)


def _waits(module: str) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in _WAITING)


def exchange(model: nn.Module, others: Mapping[int, object]) -> None:
    """Put other things, by the identity of those that they stand for, wherever a model holds these. Nothing is written.

    Closures, methods of helper objects and tuples in containers count; what the model's own code cannot reach does not.
    """
    for kept in Snapshot([model], values=False).kept:
        parts = tuple(_exchanged(part, others) for part in kept.parts)
        if any(a is not b for a, b in zip(parts, kept.parts, strict=True)):
            kept.kind.write(kept.holder, parts)


def _exchanged(part: object, others: Mapping[int, object]) -> object:
    if type(part) is tuple:
        parts = tuple(_exchanged(item, others) for item in part)
        return parts if any(a is not b for a, b in zip(parts, part, strict=True)) else part
    return others.get(id(part), part)


@dataclass(frozen=True, slots=True, eq=False)
class _Kept:
    """One holder of things, what it held, and how that is asked and put back. shared: others hold it too."""

    holder: object
    parts: Parts
    kind: Kind
    shared: bool
    path: str

    def same(self) -> bool:
        now = self.kind.read(self.holder)
        return len(now) == len(self.parts) and all(map(is_, now, self.parts))


class Snapshot:
    """What some models are now.

    traced: also what they share with others, as far as the models reach it; values: also what is in small tensors that
    are no parameters. kept: everything that holds something, the nearest first.
    """

    def __init__(self, models: Iterable[nn.Module], *, traced: bool = False, values: bool = True) -> None:
        self.kept: list[_Kept] = []
        self._values, self._traced = values, traced
        self._tensors: list[_Marks] = []
        self._caches: dict[int, tuple[functools._lru_cache_wrapper[object], functools._CacheInfo]] = {}
        self._seen: dict[int, object] = {}
        """What has been looked at, by identity; held, so that identities stay valid."""
        self._classes: dict[type, None] = {}
        self._globals: dict[int, tuple[dict[str, object], str]] = {}
        models = tuple(models)
        buffers = {id(b) for m in models for b in m.buffers()}
        self._buffers, self._swapped = (set(), buffers) if traced or not values else (buffers, set())
        self._parameters = [(p, _version(p)) for p in dict.fromkeys(p for m in models for p in m.parameters())]
        self._walk(deque((model, "") for model in models), shared=False)
        if traced:
            self._look_around()

    # -- looking -----------------------------------------------------------------------------------------------

    def _walk(self, waiting: deque[tuple[object, str]], *, shared: bool) -> None:
        """Note everything that is reached from some things, the nearest first."""
        while waiting and len(self._seen) < MOST:
            thing, path = waiting.popleft()
            if type(thing) in ATOMS or id(thing) in self._seen:
                continue
            self._seen[id(thing)] = thing
            if isinstance(thing, Tensor):
                self._tensors.append(_Marks.of(thing, path, copied=self._is_copied(thing, shared)))
            waiting.extend(self._parts(thing, path, shared))

    def _is_copied(self, tensor: Tensor, shared: bool) -> bool:
        """Whether what is in a tensor is noted; while a model is traced, others stand in for parameters and buffers."""
        if tensor.is_meta or tensor.layout is not torch.strided or type(tensor) not in (Tensor, nn.Buffer):
            return False
        if id(tensor) in self._buffers or not self._values or shared:
            return id(tensor) in self._buffers
        return id(tensor) not in self._swapped and tensor.numel() * tensor.element_size() <= LARGEST

    def _parts(self, thing: object, path: str, shared: bool) -> Iterator[tuple[object, str]]:
        """What a thing holds; its containers are noted on the way."""
        for holder, kind in holders(thing):
            parts = kind.read(holder)
            self.kept.append(_Kept(holder, parts, kind, shared, path))
            yield from _named(parts, kind, path)
        if isinstance(thing, tuple | frozenset):
            yield from ((part, path) for part in thing)
        elif isinstance(thing, MethodType):
            yield from ((thing.__self__, path), (thing.__func__, path))
        elif isinstance(thing, functools.partial):
            yield from ((thing.func, path), (thing.args, path), (thing.keywords, path))
        elif isinstance(thing, FunctionType):
            self._note_globals(thing)
            yield from (
                (c, f"{path}.{n}") for n, c in zip(thing.__code__.co_freevars, thing.__closure__ or (), strict=True)
            )
            yield from ((thing.__defaults__, path), (thing.__kwdefaults__, path))
        elif isinstance(thing, staticmethod | classmethod):
            yield thing.__func__, path
        elif isinstance(thing, property):
            yield thing.fget, path
        elif isinstance(thing, functools._lru_cache_wrapper):
            self._caches[id(thing)] = thing, thing.cache_info()
            yield thing.__wrapped__, path
        elif not isinstance(thing, type) and not is_foreign(type(thing)):
            self._classes.update(dict.fromkeys(type(thing).__mro__))

    def _note_globals(self, function: FunctionType) -> None:
        name = str(function.__globals__.get("__name__", ""))
        if not is_foreign_module(name, lent=False):
            self._globals.setdefault(id(function.__globals__), (function.__globals__, name))

    def _look_around(self) -> None:
        """Note what the classes of all parts hold, and the Python modules of their code, and of what that calls."""
        shared = others_run()
        for kind in [k for k in self._classes if not is_foreign_module(k.__module__, lent=False)]:
            self._share(vars(kind), CLASS, kind, kind.__qualname__, shared=shared)
        for _ in range(2):
            for namespace, name in list(self._globals.values()):
                if id(namespace) not in self._seen:
                    self._seen[id(namespace)] = namespace
                    self._share(namespace, DICT, namespace, name, shared=True)

    def _share(self, parts: Mapping[str, object], kind: Kind, holder: object, name: str, *, shared: bool) -> None:
        self.kept.append(_Kept(holder, kind.read(holder), kind, shared, name))
        namespace = {n: v for n, v in parts.items() if not (n.startswith("__") and n.endswith("__")) or callable(v)}
        self._walk(deque((v, f"{name}.{n}") for n, v in namespace.items() if lends(v)), shared=shared)

    # -- putting back ------------------------------------------------------------------------------------------

    def changes(self) -> list[str]:
        """What is otherwise now, one line each."""
        lines = [f"{kept.path or 'the model'} ({type(kept.holder).__name__})" for kept in self.kept if not kept.same()]
        return lines + [line for marks in self._tensors if (line := marks.change()) is not None]

    def restore(self) -> None:
        """Make everything what it was."""
        if not self._traced and any(_version(p) != version for p, version in self._parameters):
            return
        for kept in self.kept:
            if not kept.same():
                _purge(kept) if kept.shared else kept.kind.write(kept.holder, kept.parts)
        for marks in self._tensors:
            marks.restore()
        for cache, before in self._caches.values():
            if cache.cache_info() != before and any(is_empty(part) for part in gc.get_referents(cache)):
                cache.cache_clear()


def _named(parts: tuple[object, ...], kind: Kind, path: str) -> Iterator[tuple[object, str]]:
    if not kind.keyed:
        yield from ((part, path) for part in parts if type(part) not in ATOMS)
        return
    for key, value in zip(parts[::2], parts[1::2], strict=True):
        if type(value) not in ATOMS:
            yield value, f"{path}.{key}" if type(key) is str else path
        if type(key) not in ATOMS:
            yield key, path


def _purge(kept: _Kept) -> None:
    """Let a holder that others have too keep what it holds, but for what has no content: that is what it was, or goes.

    Item by item, because others may be reading it.
    """
    now = kept.kind.read(kept.holder)
    if not kept.kind.keyed:
        if any(is_empty(part) for part in now):
            kept.kind.write(kept.holder, tuple(part for part in now if not is_empty(part)))
        return
    before = dict(pairs(kept.parts))
    for key, value in pairs(now):
        if is_empty(key) or (value is not before.get(key, kept) and is_empty(value)):
            assign(kept.holder, key, *([before[key]] if key in before else []))


# -- tensors -----------------------------------------------------------------------------------------------------


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() or type(tensor) not in (Tensor, nn.Parameter, nn.Buffer) else tensor._version


@dataclass(frozen=True, slots=True, eq=False)
class _Marks:
    """A tensor, its marks, and what is in it where that is noted."""

    tensor: Tensor
    path: str
    requires_grad: bool
    grad: Tensor | None
    version: int
    values: Tensor | None

    @classmethod
    def of(cls, tensor: Tensor, path: str, *, copied: bool) -> _Marks:
        values = tensor.detach().clone() if copied else None
        grad = tensor.grad if tensor.is_leaf and not tensor.is_inference() else None
        return cls(tensor, path, tensor.requires_grad, grad, _version(tensor), values)

    def _written(self) -> bool:
        # Versions do not tell: batch norms write their statistics without counting.
        return self.values is not None and not torch.equal(self.tensor, self.values)

    def change(self) -> str | None:
        """What is otherwise now, in words."""
        tensor = self.tensor
        if tensor.requires_grad != self.requires_grad:
            return f"{self.path}.requires_grad"
        if tensor.is_leaf and not tensor.is_inference() and tensor.grad is not self.grad:
            return f"{self.path}.grad"
        written = self.version != _version(tensor) if self.values is None else not torch.equal(tensor, self.values)
        return f"what is in {self.path}" if written else None

    def restore(self) -> None:
        """Put the marks back, and what was in it."""
        tensor = self.tensor
        if tensor.requires_grad != self.requires_grad and tensor.is_leaf:
            tensor.requires_grad_(self.requires_grad)
        if tensor.is_leaf and not tensor.is_inference() and tensor.grad is not self.grad:
            tensor.grad = self.grad
        if self._written():
            assert self.values is not None
            with torch.no_grad():
                tensor.data.copy_(self.values)
