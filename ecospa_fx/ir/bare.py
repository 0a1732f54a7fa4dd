"""Objects made without the code of their classes, and what those hold that derive from Python's own containers."""

from __future__ import annotations

from collections import deque
from typing import Any

_HEAP = 1 << 9
"""The flag of classes that Python code has made (Py_TPFLAGS_HEAPTYPE)."""


def bare(kind: type, items: object = None) -> object:
    """An object of a class whose own code has not run. items: what a tuple or a frozen set holds."""
    arguments = () if items is None else (items,)
    native: Any = _native(kind)
    try:
        instance: object = native.__new__(kind, *arguments)
    except TypeError:  # a class written in C, which only its own constructor can make
        instance = kind.__new__(kind, *arguments)
    return instance


def contents(value: object) -> dict[object, object] | list[object] | None:
    """The items of an instance of a class derived from a container, as a dict or a list; None for any other."""
    native: Any = _native(type(value))
    if isinstance(value, dict):
        return dict(native.items(value))
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return list(native.__iter__(value))
    return None


def refill(instance: object, items: Any) -> None:
    """Give an instance of a class derived from a container other items; one that is fixed keeps its own."""
    native: Any = _native(type(instance))
    if isinstance(instance, (tuple, frozenset)):
        return
    native.clear(instance)
    if isinstance(instance, dict):
        for key, value in items.items():
            native.__setitem__(instance, key, value)
    elif isinstance(instance, set):
        native.update(instance, items)
    else:
        native.extend(instance, items)


def _native(kind: type) -> type:
    """The first class in the order of inheritance that is not written in Python."""
    if issubclass(kind, deque):
        return deque  # which newer versions of Python make as if it were written in Python
    return next(base for base in kind.__mro__ if not base.__flags__ & _HEAP)
