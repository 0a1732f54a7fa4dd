"""The integers that a module's forward may read, such as `num_heads`: its attributes and those of its configuration."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeGuard, cast

from torch import nn

from ecospa_fx.inplace.edits import Edits
from ecospa_fx.ir.pytrees import is_object

INTERNAL = frozenset(vars(nn.Module()))
LOOKUP = "__getattribute__"

AttributeRead = tuple[int, Hashable]
"""The identity of an attribute's owner, and its name."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where an integer is, in every copy of a model."""

    module: str
    """Path of the module that refers to it."""
    steps: tuple[Hashable, ...]
    """Attributes and keys from the module to the object or dictionary that holds it."""
    name: Hashable
    """The attribute or key."""
    index: int | None = None
    """Position in a tuple or list; None where the attribute is the integer itself."""

    def owner(self, model: nn.Module) -> object:
        """What holds the attribute: a module, an object or a dictionary."""
        owner: object = model.get_submodule(self.module)
        for step in self.steps:
            owner = (owner if isinstance(owner, dict) else cast(dict[Hashable, object], vars(owner)))[step]
        return owner

    def value(self, model: nn.Module) -> int:
        """The integer."""
        entry = _attributes_of(self.owner(model))[self.name]
        return cast(int, entry if self.index is None else cast(Sequence[object], entry)[self.index])

    def write(self, model: nn.Module, value: int, edits: Edits) -> None:
        """Put another integer there."""
        owner = self.owner(model)
        new: object = value
        if self.index is not None:
            old = cast(tuple[object, ...], _attributes_of(owner)[self.name])
            new = type(old)((*old[: self.index], value, *old[self.index + 1 :]))
        edits.attribute(owner, self.name, new)

    def __str__(self) -> str:
        path = ".".join(str(part) for part in (self.module, *self.steps, self.name) if part != "")
        return path if self.index is None else f"{path}[{self.index}]"


def _attributes_of(owner: object) -> dict[Hashable, object]:
    return owner if isinstance(owner, dict) else getattr(owner, "__dict__", {})  # slots alone hold no integers of ours


@dataclass(frozen=True, slots=True)
class IntegerAttribute:
    """An integer of a model."""

    place: Place
    """Where it is."""
    owner: object
    """What holds it: a module, an object or a dictionary."""
    value: int
    """The integer."""


def integers(model: nn.Module, paths: set[str]) -> list[IntegerAttribute]:
    """The integers of the modules at some paths, and of the objects that these refer to, each once."""
    result: list[IntegerAttribute] = []
    seen: set[int] = set()
    for path, module in model.named_modules():
        if path in paths:
            result += integers_of(module, path, (), seen)
    return result


def integers_of(owner: object, path: str, steps: tuple[Hashable, ...], seen: set[int]) -> Iterator[IntegerAttribute]:
    """The integers of a module, object or dictionary, and of the objects that it refers to, each once."""
    if id(owner) in seen:
        return
    seen.add(id(owner))
    for name, value in list(_attributes_of(owner).items()):
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


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


@contextmanager
def recording_reads(owners: Sequence[object]) -> Iterator[set[AttributeRead]]:
    """Record which attributes of which owners are read inside, as (identity, name).

    Dictionaries and classes that cannot be watched count as read.
    """
    reads: set[AttributeRead] = set()
    watched: list[type] = []
    try:
        for kind in {type(owner): None for owner in owners}:
            try:
                _watch(kind, reads)
                watched.append(kind)
            except TypeError:
                reads |= {(id(o), name) for o in owners if type(o) is kind for name in _attributes_of(o)}
        yield reads
    finally:
        for kind in watched:
            delattr(kind, LOOKUP)  # the class has it from its bases again


def _watch(kind: type, reads: set[AttributeRead]) -> None:
    if LOOKUP in vars(kind):
        raise TypeError(f"{kind.__name__} looks attributes up in its own way")
    original: Callable[[object, str], object] = getattr(kind, LOOKUP)

    def looked_up(self: object, name: str) -> object:
        value = original(self, name)
        attributes: dict[str, object] = object.__getattribute__(self, "__dict__")
        if name in attributes:
            reads.add((id(self), name))
        elif _is_integer(value):  # another name of an attribute, or computed from one
            reads.update((id(self), other) for other, entry in attributes.items() if entry is value or entry == value)
        return value

    setattr(kind, LOOKUP, looked_up)
