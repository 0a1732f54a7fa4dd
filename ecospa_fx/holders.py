"""Reading and writing what Python objects hold (attributes, items, cells, slots), past the code of their classes."""

from __future__ import annotations

import functools
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import chain
from types import CellType, FunctionType, MappingProxyType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

Parts: TypeAlias = tuple[Any, ...]
"""What a holder holds, in its order: anything at all."""
Pair: TypeAlias = tuple[Any, Any]
"""A key, or a name, and what stands under it."""

ATOMS = frozenset({int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, torch.Size, type})
_LENT = ("collections", "types", "weakref", "functools")
"""Modules of the standard library whose objects hold what their users put into them."""


@dataclass(frozen=True, slots=True)
class Kind:
    """How holders of one kind are read and written."""

    read: Callable[[Any], Parts]
    """From a holder to what it holds, as a flat tuple."""
    write: Callable[[Any, Parts], None]
    """Makes a holder hold such a tuple."""
    keyed: bool = False
    """Whether the parts are keys and values in turn."""


def flat(items: Iterable[Pair]) -> Parts:
    return tuple(chain.from_iterable(items))


def pairs(parts: Parts) -> Iterator[Pair]:
    return zip(parts[::2], parts[1::2], strict=True)


def _read_dict(holder: dict[object, object]) -> Parts:
    return flat(dict.items(holder))


def _write_dict(holder: dict[object, object], parts: Parts) -> None:
    plain: Any = OrderedDict if isinstance(holder, OrderedDict) else dict  # past what subclasses make of it
    plain.clear(holder)
    for key, value in pairs(parts):
        plain.__setitem__(holder, key, value)


def assign(holder: Any, key: Any, *value: object) -> None:
    """Give a class, or a dictionary, one item, or take it away where there is no value."""
    if isinstance(holder, type):
        setattr(holder, key, *value) if value else delattr(holder, key)
    elif value:
        holder[key] = value[0]
    else:
        del holder[key]


def _write_list(holder: list[object], parts: Parts) -> None:
    list.__setitem__(holder, slice(None), parts)


def _write_deque(holder: deque[object], parts: Parts) -> None:
    deque.clear(holder)
    deque.extend(holder, parts)


def _write_set(holder: set[object], parts: Parts) -> None:
    set.clear(holder)
    set.update(holder, parts)


def _read_cell(holder: CellType) -> Parts:
    try:
        return (holder.cell_contents,)
    except ValueError:  # nothing is in it yet
        return ()


def _write_cell(holder: CellType, parts: Parts) -> None:
    if parts:
        holder.cell_contents = parts[0]
    else:
        del holder.cell_contents


_NAMES: WeakKeyDictionary[type, tuple[str, ...]] = WeakKeyDictionary()


def _slots(kind: type) -> tuple[str, ...]:
    cached = _NAMES.get(kind)
    if cached is not None:
        return cached
    names = (k.__dict__.get("__slots__", ()) for k in kind.__mro__)
    slots = (n for declared in names for n in ((declared,) if isinstance(declared, str) else declared))
    return _NAMES.setdefault(kind, tuple(n for n in slots if n not in ("__dict__", "__weakref__")))


def _read_slots(holder: object) -> Parts:
    items = ((n, _attribute(holder, n)) for n in _slots(type(holder)))
    return flat(item for item in items if item[1] is not None)


def _write_slots(holder: object, parts: Parts) -> None:
    items = dict(pairs(parts))
    for name in [name for name, _ in pairs(_read_slots(holder)) if name not in items]:
        object.__delattr__(holder, name)
    for name, value in items.items():
        object.__setattr__(holder, name, value)


def _read_class(holder: object) -> Parts:
    return (type(holder),)


def _write_class(holder: object, parts: Parts) -> None:
    holder.__class__ = parts[0]


def _read_type(holder: type) -> Parts:
    return flat(vars(holder).items())


def _write_type(holder: type, parts: Parts) -> None:
    items = dict(pairs(parts))
    for name in [name for name in vars(holder) if name not in items]:
        delattr(holder, name)
    for name, value in items.items():
        if vars(holder)[name] is not value:
            setattr(holder, name, value)


DICT = Kind(_read_dict, _write_dict, keyed=True)
_CONTAINERS: tuple[tuple[type, Kind], ...] = (
    (dict, DICT), (list, Kind(tuple, _write_list)), (set, Kind(tuple, _write_set)),
    (deque, Kind(tuple, _write_deque)), (CellType, Kind(_read_cell, _write_cell)),
)  # fmt: skip
_BARE = frozenset({int, float, dict, list, tuple, set, frozenset, deque, OrderedDict, defaultdict, Counter, CellType})
_SLOTS, CLASS_OF = Kind(_read_slots, _write_slots, keyed=True), Kind(_read_class, _write_class)
CLASS = Kind(_read_type, _write_type, keyed=True)


class _Holding(NamedTuple):
    """What the objects of a class hold things in."""

    containers: tuple[Kind, ...]
    attributes: bool
    """Whether what is in ``__dict__`` counts."""
    others: tuple[Kind, ...]
    """The class, and slots."""


_HOLDING: WeakKeyDictionary[type, _Holding] = WeakKeyDictionary()


def _holding(kind: type) -> _Holding:
    containers = tuple(container for base, container in _CONTAINERS if issubclass(kind, base))
    is_code = issubclass(kind, Tensor | FunctionType)
    if kind in _BARE or (is_foreign(kind) and not is_code):
        return _HOLDING.setdefault(kind, _Holding(containers, False, ()))
    slots = (_SLOTS,) if _slots(kind) else ()
    return _HOLDING.setdefault(kind, _Holding(containers, True, () if is_code else (CLASS_OF, *slots)))


def holders(thing: object) -> Iterator[tuple[object, Kind]]:
    """Everything about a thing that can hold something else later, and how."""
    kind = type(thing)
    holding = _HOLDING.get(kind) or _holding(kind)
    for container in holding.containers:
        yield thing, container
    if holding.attributes:
        attributes = _attribute(thing, "__dict__")
        if type(attributes) is dict:
            yield attributes, DICT
        for other in holding.others:
            yield thing, other


def _attribute(thing: object, name: str) -> Any:
    """An attribute past ``__getattr__`` of the class, None where there is none."""
    try:
        return object.__getattribute__(thing, name)
    except AttributeError:
        return None


_FOREIGN: WeakKeyDictionary[type, bool] = WeakKeyDictionary()


def is_foreign(kind: type) -> bool:
    """Whether what objects of a class hold is nobody's business here."""
    cached = _FOREIGN.get(kind)
    if cached is None:
        closed = issubclass(kind, type | ModuleType | Enum | Tensor | MappingProxyType)
        lent = not is_foreign_module(kind.__module__) or issubclass(kind, nn.Module | SimpleNamespace)
        cached = _FOREIGN[kind] = closed or not lent
    return cached


def is_foreign_module(module: str, *, lent: bool = True) -> bool:
    """Whether a Python module is none of the user's.

    lent: modules of the standard library whose objects hold what their users put there count as the user's.
    """
    root = module.partition(".")[0]
    if root in sys.stdlib_module_names:
        return not (lent and root in _LENT)
    return root in ("torch", "numpy", "sympy", "ecospa_fx", "")


_LENDERS: tuple[type, ...] = (
    FunctionType, staticmethod, classmethod, property, functools.partial, functools._lru_cache_wrapper,
    dict, list, set, deque,
)  # fmt: skip


def lends(value: object) -> bool:
    """Whether something that a class or a Python module holds may be a table, or code that has one."""
    return isinstance(value, _LENDERS) or not is_foreign(type(value))


# -- what has no content -----------------------------------------------------------------------------------------

_EMPTY = (FakeTensor, FunctionalTensor, torch.SymInt, torch.SymFloat, torch.SymBool, fx.Proxy)


def is_empty(value: object, depth: int = 4) -> bool:
    """Whether a value, or something in it, exists only while a model is traced."""
    if isinstance(value, _EMPTY):
        return True
    if isinstance(value, Tensor):
        return torch._is_functional_tensor(value) or torch._C._functorch.is_functorch_wrapped_tensor(value)
    if depth == 0 or type(value) in ATOMS:
        return False
    if isinstance(value, tuple | frozenset):
        return any(is_empty(part, depth - 1) for part in value)
    items = (part for holder, kind in holders(value) if kind is not CLASS_OF for part in kind.read(holder))
    return any(is_empty(part, depth - 1) for part in items)
