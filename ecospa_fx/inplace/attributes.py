"""The integers that a module's code may read: its attributes, and those of the objects that these refer to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from ecospa_fx.inplace.edits import Edits
from ecospa_fx.ir.pytrees import is_object

INTERNAL = frozenset(vars(nn.Module()))
LOOKUP = "__getattribute__"


@dataclass(frozen=True, slots=True)
class Place:
    """Where an integer is, in every copy of a model.

    module: path of the module that refers to it; steps: attributes and keys from there to what holds it; name: the
    attribute or key; index: position in a tuple or list, None where the attribute is the integer itself.
    """

    module: str
    steps: tuple[Any, ...]
    name: Any
    index: int | None = None

    def owner(self, model: nn.Module) -> Any:
        """What holds the attribute: a module, an object or a dictionary."""
        held: Any = model.get_submodule(self.module)
        for step in self.steps:
            held = (held if isinstance(held, dict) else vars(held))[step]
        return held

    def value(self, model: nn.Module) -> int:
        """The integer."""
        held = _held(self.owner(model))[self.name]
        found: int = held if self.index is None else held[self.index]
        return found

    def write(self, model: nn.Module, value: int, edits: Edits) -> None:
        """Put another integer there."""
        owner, new = self.owner(model), value
        if self.index is not None:
            old = _held(owner)[self.name]
            new = type(old)((*old[: self.index], value, *old[self.index + 1 :]))
        edits.attribute(owner, self.name, new)

    def __str__(self) -> str:
        path = ".".join(str(part) for part in (self.module, *self.steps, self.name) if part != "")
        return path if self.index is None else f"{path}[{self.index}]"


def _held(owner: Any) -> dict[Any, Any]:
    return owner if isinstance(owner, dict) else getattr(owner, "__dict__", {})  # slots alone hold no integers of ours


@dataclass(frozen=True, slots=True)
class IntegerAttribute:
    """An integer of a model: its place, what holds it, and whether that is a module."""

    place: Place
    owner: Any
    value: int


def integers(model: nn.Module, paths: set[str]) -> list[IntegerAttribute]:
    """The integers of the modules at some paths, and of the objects that these refer to, each once."""
    found: list[IntegerAttribute] = []
    seen: set[int] = set()
    for path, module in model.named_modules():
        if path in paths:
            found += integers_of(module, path, (), seen)
    return found


def integers_of(owner: Any, path: str, steps: tuple[Any, ...], seen: set[int]) -> Iterator[IntegerAttribute]:
    """The integers of a module, object or dictionary, and of the objects that it refers to, each once."""
    if id(owner) in seen:
        return
    seen.add(id(owner))
    for name, value in list(_held(owner).items()):
        if name in INTERNAL and isinstance(owner, nn.Module):
            continue
        if _is_integer(value):
            yield IntegerAttribute(Place(path, steps, name), owner, value)
        elif isinstance(value, tuple | list) and type(value) in (tuple, list):
            for index, entry in enumerate(value):
                if _is_integer(entry):
                    yield IntegerAttribute(Place(path, steps, name, index), owner, entry)
        elif type(value) is dict or is_object(value):
            yield from integers_of(value, path, (*steps, name), seen)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@contextmanager
def reading(owners: list[Any]) -> Iterator[set[tuple[int, Any]]]:
    """Notes which attributes of which owners are read inside, as (identity, name).

    Dictionaries and classes that cannot be watched count as read.
    """
    read: set[tuple[int, Any]] = set()
    watched: list[type] = []
    try:
        for kind in {type(owner): None for owner in owners}:
            try:
                _watch(kind, read)
                watched.append(kind)
            except TypeError:
                read |= {(id(o), name) for o in owners if type(o) is kind for name in _held(o)}
        yield read
    finally:
        for kind in watched:
            delattr(kind, LOOKUP)  # the class has it from its bases again


def _watch(kind: type, read: set[tuple[int, Any]]) -> None:
    if LOOKUP in vars(kind):
        raise TypeError(f"{kind.__name__} looks attributes up in its own way")
    original: Any = getattr(kind, LOOKUP)

    def looked_up(self: Any, name: str) -> Any:
        value = original(self, name)
        own = object.__getattribute__(self, "__dict__")
        if name in own:
            read.add((id(self), name))
        elif _is_integer(value):  # another name of an attribute, or computed from one
            read.update((id(self), other) for other, held in own.items() if held is value or held == value)
        return value

    setattr(kind, LOOKUP, looked_up)
