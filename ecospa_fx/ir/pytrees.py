"""Objects among arguments and results, such as caches: taken apart into the tensors that they hold, and put together.

The exporter knows tensors, numbers and containers of them. Of anything else it gets the tensors in the attributes,
however deep; what remains, the skeleton, is part of how the arguments are structured.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ecospa_fx.ir.bare import bare, contents, refill

_PLAIN = (int, float, complex, bool, str, bytes, type(None))
_CLOSED = (type, nn.Module, Enum, ModuleType, FunctionType, MethodType, BuiltinFunctionType, partial)
_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)


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
    """An object without its tensors. items: what it holds as the container that its class derives from, if any."""

    kind: type
    attributes: Mapping[str, Any]
    items: Any = None


@dataclass(frozen=True, slots=True)
class Branch:
    """A container inside an object that the exporter knows how to put together."""

    spec: Any
    parts: list[Any]


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
    """Whether something that is no container to the exporter holds its parts in attributes, or as items of its own."""
    kind = type(value)
    if isinstance(value, (Tensor, *_PLAIN, *_CLOSED)) or kind.__module__ in {"builtins", "torch"}:
        return False
    if hasattr(value, "__dict__") or contents(value) is not None:
        return True
    # slots of the standard library's classes are caches and numbers, as those of paths
    return kind.__module__.partition(".")[0] not in sys.stdlib_module_names and bool(_attributes(value))


def opened(tree: Any, arguments: Mapping[int, int] | None = None) -> Any:
    """The tree with every object in parts. arguments: number by identity of those that are only referred to."""
    known = arguments or {}

    def one(leaf: Any) -> Any:
        if id(leaf) in known:
            return Opened([], Skeleton(Argument(known[id(leaf)])))
        return _open(leaf, known) if is_object(leaf) or _is_delicate(leaf) else leaf

    return pytree.tree_map(one, tree, is_leaf=_is_delicate)


def is_of_user(value: Any) -> bool:
    """Whether something is a container whose class was made known to the exporter by code outside torch."""
    kind = type(value)
    known = kind in pytree.SUPPORTED_NODES and kind is not Opened
    return known and kind.__module__.partition(".")[0] not in {"torch", *sys.stdlib_module_names}


def _is_delicate(value: Any) -> bool:
    """Whether a container is better treated as an object: it holds objects, or its class refuses what it holds."""
    if not is_of_user(value):
        return False
    leaves, spec = pytree.tree_flatten(value)
    if any(map(is_object, leaves)):
        return True
    try:
        pytree.tree_unflatten(leaves, spec)
    except Exception:  # whatever the class of the user raises
        return True
    return False


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
            made.append(arguments[root.number] if isinstance(root, Argument) else _close(leaf, arguments))
        return made[-1]

    return pytree.tree_map(one, tree, is_leaf=_is_opened), made


def containers(tree: Any) -> list[Opened]:
    """The objects in parts in a tree, in order."""
    return [leaf for leaf in pytree.tree_leaves(tree, is_leaf=_is_opened) if _is_opened(leaf)]


def _is_opened(value: Any) -> bool:
    return isinstance(value, Opened)


def objects(tree: Any) -> list[Any]:
    """The objects in a tree, in order."""
    leaves = pytree.tree_leaves(tree, is_leaf=_is_delicate)
    return [leaf for leaf in leaves if is_object(leaf) or _is_delicate(leaf)]


def put_together(spec: Any, leaves: Sequence[Any]) -> Any:
    """A tree of lists and of objects in parts, in the structure of `spec`: nothing of the user's is made for it."""
    remaining = iter(leaves)

    def build(spec: Any) -> Any:
        if spec.is_leaf():
            return next(remaining)
        children = [build(child) for child in spec.children()]
        return Opened(children, spec.context) if spec.type is Opened else children

    return build(spec)


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
    _close(state, into=target)


# -- one object --------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Opening:
    """What is known while an object is taken apart.

    arguments: number by identity of the objects that are only referred to; held: keeps identities valid.
    """

    arguments: Mapping[int, int]
    leaves: list[Any] = field(default_factory=list)
    slots: dict[int, int] = field(default_factory=dict)
    shells: dict[int, int] = field(default_factory=dict)
    held: list[Any] = field(default_factory=list)

    def part(self, value: Any) -> Any:
        if isinstance(value, (Tensor, *_SYMBOLS)):
            if id(value) not in self.slots:
                self.slots[id(value)] = len(self.leaves)
                self.leaves.append(value)
            return Slot(self.slots[id(value)])
        if isinstance(value, _PLAIN):
            return value
        if type(value) in (list, tuple, set, frozenset):
            return type(value)(self.part(v) for v in value)
        if type(value) is dict:
            return {key: self.part(v) for key, v in value.items()}
        children, spec = pytree.tree_flatten(value, is_leaf=lambda inner: inner is not value)
        if not spec.is_leaf() and not _is_delicate(value):
            return Branch(spec, [self.part(child) for child in children])
        return self._shell(value) if not spec.is_leaf() or is_object(value) else value

    def _shell(self, value: Any) -> Shell | Again | Argument:
        if id(value) in self.arguments:
            return Argument(self.arguments[id(value)])
        if id(value) in self.shells:
            return Again(self.shells[id(value)])
        self.shells[id(value)] = len(self.shells)
        self.held.append(value)
        attributes = {name: self.part(v) for name, v in _attributes(value).items()}
        return Shell(type(value), attributes, self.part(contents(value)))


def _open(value: Any, arguments: Mapping[int, int]) -> Opened:
    opening = _Opening(arguments)
    root = opening._shell(value)
    return Opened(opening.leaves, Skeleton(root))


def _attributes(value: Any) -> dict[str, Any]:
    slots = [_mangled(kind, n) for kind in type(value).__mro__ for n in _names(kind.__dict__.get("__slots__", ()))]
    found = {n: getattr(value, n) for n in slots if n not in {"__dict__", "__weakref__"} and hasattr(value, n)}
    return {**found, **getattr(value, "__dict__", {})}


def _names(slots: Any) -> Iterator[str]:
    yield from (slots,) if isinstance(slots, str) else slots


def _mangled(kind: type, name: str) -> str:
    private = name.startswith("__") and not name.endswith("__")
    return f"_{kind.__name__.lstrip('_')}{name}" if private else name


def _close(one: Opened, arguments: Sequence[Any] = (), *, into: Any = None) -> Any:
    """The object of some parts: a new one, or `into` with their attributes. arguments: what `Argument` refers to."""
    shells: list[Any] = []

    def part(value: Any) -> Any:
        if isinstance(value, Slot):
            return one.leaves[value.index]
        if isinstance(value, Again):
            return shells[value.number]
        if isinstance(value, Argument):
            return arguments[value.number]
        if type(value) in (list, tuple, set, frozenset):
            return type(value)(part(v) for v in value)
        if type(value) is dict:
            return {key: part(v) for key, v in value.items()}
        if isinstance(value, Branch):
            return pytree.tree_unflatten([part(v) for v in value.parts], value.spec)
        return shell(value) if isinstance(value, Shell) else value

    def shell(value: Shell) -> Any:
        number = len(shells)
        shells.append(into if into is not None and not number else None)
        if shells[number] is None:
            shells[number] = bare(value.kind, part(value.items) if issubclass(value.kind, (tuple, frozenset)) else None)
        made = shells[number]
        for name, inner in value.attributes.items():
            _set(made, name, part(inner))
        if value.items is not None:
            refill(made, part(value.items))
        return made

    return part(one.skeleton.root)


def _set(made: Any, name: str, value: Any) -> None:
    """Give an object an attribute, past whatever its class does when one is set."""
    if isinstance(getattr(type(made), name, None), property):
        made.__dict__[name] = value
    else:
        object.__setattr__(made, name, value)


# -- comparing ---------------------------------------------------------------------------------------------------


def difference(found: Skeleton, wanted: Skeleton) -> str | None:
    """Where two skeletons differ, as ".layers[0].length is 3 instead of 2"; None where they do not."""
    return _difference(found.root, wanted.root, "")


def _difference(found: Any, wanted: Any, path: str) -> str | None:
    if isinstance(found, Shell) and isinstance(wanted, Shell) and found.kind is wanted.kind:
        inner = _between(found.attributes, wanted.attributes, path, lambda key: f".{key}")
        return _difference(found.items, wanted.items, path) if inner is None else inner
    if isinstance(found, Branch) and isinstance(wanted, Branch) and found.spec == wanted.spec:
        return _difference(found.parts, wanted.parts, path)
    if type(found) is type(wanted) and isinstance(found, list | tuple):
        return _between(dict(enumerate(found)), dict(enumerate(wanted)), path, lambda key: f"[{key}]")
    if type(found) is type(wanted) is dict:
        return _between(found, wanted, path, lambda key: f"[{key!r}]")
    plain = (*_PLAIN, Slot, Again, Argument, Branch)
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
    if isinstance(value, Branch):
        return f"a {value.spec.type.__name__} of {len(value.parts)}"
    return f"a {value.kind.__name__}" if isinstance(value, Shell) else f"{value!r:.60}"
