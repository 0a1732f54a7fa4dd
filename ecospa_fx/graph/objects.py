"""Objects among arguments and results, such as caches: taken apart into the tensors that they hold, and put together.

The exporter knows tensors, numbers and containers of them. Of anything else it gets the tensors in the attributes,
however deep; what remains, the skeleton, is part of how the arguments are structured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

_PLAIN = (int, float, complex, bool, str, bytes, type(None))
_CLOSED = (type, nn.Module, Enum, ModuleType, FunctionType, MethodType, BuiltinFunctionType, partial)


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of a tensor, or of a size that is a symbol."""

    index: int


@dataclass(frozen=True, slots=True)
class Again:
    """An object that the skeleton has already, by its number."""

    number: int


@dataclass(frozen=True, slots=True)
class Argument:
    """The very object that an argument was, by its number."""

    number: int


@dataclass(frozen=True, slots=True)
class Shell:
    """An object without its tensors."""

    kind: type
    attributes: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Skeleton:
    """What remains of an object. Two are equal where the same tensors are in the same places, between equal numbers."""

    root: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Skeleton) and difference(self, other) is None

    def __hash__(self) -> int:
        return hash(type(self.root))


@dataclass(frozen=True, slots=True)
class Opened:
    """An object in parts: a container to the exporter."""

    leaves: list[Any]
    skeleton: Skeleton


def _flattened(one: Opened) -> tuple[list[Any], Skeleton]:
    return one.leaves, one.skeleton


def _keyed(one: Opened) -> tuple[list[tuple[Any, Any]], Skeleton]:
    return [(pytree.SequenceKey(i), leaf) for i, leaf in enumerate(one.leaves)], one.skeleton


def _unflattened(leaves: Any, skeleton: Any) -> Opened:
    return Opened(list(leaves), skeleton)


pytree.register_pytree_node(Opened, _flattened, _unflattened, flatten_with_keys_fn=_keyed)


def is_object(value: Any) -> bool:
    """Whether something that is no container holds its parts in attributes."""
    if isinstance(value, (Tensor, *_PLAIN, *_CLOSED)) or type(value).__module__ in {"builtins", "torch"}:
        return False
    return hasattr(value, "__dict__")


def opened(tree: Any, arguments: Mapping[int, int] | None = None) -> Any:
    """The tree with every object in parts. arguments: number by identity of those that are only referred to."""
    known = arguments or {}

    def one(leaf: Any) -> Any:
        if id(leaf) in known:
            return Opened([], Skeleton(Argument(known[id(leaf)])))
        return _open(leaf) if is_object(leaf) else leaf

    return pytree.tree_map(one, tree)


def closed(tree: Any, arguments: Sequence[Any] = (), given: Sequence[Any] | None = None) -> tuple[Any, list[Any]]:
    """The tree with new objects out of their parts, and these in order.

    arguments: what `Argument` refers to; given: objects, in order, to put there instead of new ones.
    """
    made: list[Any] = []

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, Opened):
            return leaf
        root = leaf.skeleton.root
        if given is not None:
            made.append(given[len(made)])
        else:
            made.append(arguments[root.number] if isinstance(root, Argument) else _close(leaf))
        return made[-1]

    return pytree.tree_map(one, tree, is_leaf=_is_opened), made


def containers(tree: Any) -> list[Opened]:
    """The objects in parts in a tree, in order."""
    return [leaf for leaf in pytree.tree_leaves(tree, is_leaf=_is_opened) if _is_opened(leaf)]


def _is_opened(value: Any) -> bool:
    return isinstance(value, Opened)


def objects(tree: Any) -> list[Any]:
    """The objects in a tree, in order."""
    return [leaf for leaf in pytree.tree_leaves(tree) if is_object(leaf)]


def skeletons(spec: Any) -> list[Skeleton]:
    """The skeletons in the structure of a tree that was opened, in order."""
    found = [spec.context] if spec.type is Opened else []
    return [*found, *(one for child in spec.children() for one in skeletons(child))]


def copied(tree: Any) -> Any:
    """The tree with objects of its own and copies of all tensors: what a call changes in place stays in the copy."""
    parts = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, opened(tree))
    return closed(parts)[0]


def unchanged(before: Opened, after: Opened) -> bool:
    """Whether an object holds the very same tensors and equal numbers."""
    same = len(before.leaves) == len(after.leaves) and all(map(_is, before.leaves, after.leaves))
    return same and before.skeleton == after.skeleton


def _is(a: Any, b: Any) -> bool:
    return a is b


def update(target: Any, state: Opened) -> None:
    """Give an object the attributes that its parts say."""
    _close(state, target)


# -- one object --------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Opening:
    """What is known while an object is taken apart. held: keeps identities valid."""

    leaves: list[Any] = field(default_factory=list)
    slots: dict[int, int] = field(default_factory=dict)
    shells: dict[int, int] = field(default_factory=dict)
    held: list[Any] = field(default_factory=list)

    def part(self, value: Any) -> Any:
        if isinstance(value, Tensor | torch.SymInt):
            if id(value) not in self.slots:
                self.slots[id(value)] = len(self.leaves)
                self.leaves.append(value)
            return Slot(self.slots[id(value)])
        if type(value) in (list, tuple, set):
            return type(value)(self.part(v) for v in value)
        if type(value) is dict:
            return {key: self.part(v) for key, v in value.items()}
        return self._shell(value) if is_object(value) else value

    def _shell(self, value: Any) -> Shell | Again:
        if id(value) in self.shells:
            return Again(self.shells[id(value)])
        self.shells[id(value)] = len(self.shells)
        self.held.append(value)
        return Shell(type(value), {name: self.part(v) for name, v in _attributes(value).items()})


def _open(value: Any) -> Opened:
    opening = _Opening()
    root = opening.part(value)
    return Opened(opening.leaves, Skeleton(root))


def _attributes(value: Any) -> dict[str, Any]:
    slots = (name for kind in type(value).__mro__ for name in _names(kind.__dict__.get("__slots__", ())))
    return {**{n: getattr(value, n) for n in slots if n != "__dict__" and hasattr(value, n)}, **vars(value)}


def _names(slots: Any) -> Iterator[str]:
    yield from (slots,) if isinstance(slots, str) else slots


def _close(one: Opened, into: Any = None) -> Any:
    """The object of some parts: a new one, or `into` with their attributes."""
    shells: list[Any] = []

    def part(value: Any) -> Any:
        if isinstance(value, Slot):
            return one.leaves[value.index]
        if isinstance(value, Again):
            return shells[value.number]
        if type(value) in (list, tuple, set):
            return type(value)(part(v) for v in value)
        if type(value) is dict:
            return {key: part(v) for key, v in value.items()}
        return shell(value) if isinstance(value, Shell) else value

    def shell(value: Shell) -> Any:
        made: Any = object.__new__(value.kind) if shells or into is None else into
        shells.append(made)
        for name, inner in value.attributes.items():
            object.__setattr__(made, name, part(inner))
        return made

    return part(one.skeleton.root)


# -- comparing ---------------------------------------------------------------------------------------------------


def difference(found: Skeleton, wanted: Skeleton) -> str | None:
    """Where two skeletons differ, as ".layers[0].length is 3 instead of 2"; None where they do not."""
    return _difference(found.root, wanted.root, "")


def _difference(found: Any, wanted: Any, path: str) -> str | None:
    if isinstance(found, Shell) and isinstance(wanted, Shell) and found.kind is wanted.kind:
        return _between(found.attributes, wanted.attributes, path, lambda key: f".{key}")
    if type(found) is type(wanted) and isinstance(found, list | tuple):
        return _between(dict(enumerate(found)), dict(enumerate(wanted)), path, lambda key: f"[{key}]")
    if type(found) is type(wanted) is dict:
        return _between(found, wanted, path, lambda key: f"[{key!r}]")
    plain = (*_PLAIN, Slot, Again, Argument)
    if type(found) is type(wanted) and (found == wanted or not isinstance(found, plain)):
        return None
    return f"{path} is {_told(found)} instead of {_told(wanted)}".strip()


def _between(found: Mapping[Any, Any], wanted: Mapping[Any, Any], path: str, told: Callable[[Any], str]) -> str | None:
    for key in {**wanted, **found}:
        if key not in found or key not in wanted:
            return f"{path}{told(key)} is there in one of them only"
        inner = _difference(found[key], wanted[key], path + told(key))
        if inner is not None:
            return inner
    return None


def _told(value: Any) -> str:
    if isinstance(value, Slot):
        return "a tensor"
    return f"a {value.kind.__name__}" if isinstance(value, Shell) else f"{value!r:.60}"
