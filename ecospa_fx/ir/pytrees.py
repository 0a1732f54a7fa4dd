"""Objects among arguments and results, such as caches: taken apart into their tensors, and put together again.

The exporter knows tensors, numbers and containers of them. Of anything else it gets the tensors in the attributes,
however deep; what remains, the skeleton, is part of how the arguments are structured.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ecospa_fx.ir.bare import bare, contents, refill

Tree: TypeAlias = Any
"""Arguments, results, or parts of them: containers, objects, tensors and numbers of the user, nested in any way."""
Arguments: TypeAlias = tuple[Any, ...]
"""Positional arguments of a call of the user's model."""
NamedArguments: TypeAlias = dict[str, Any]
"""Keyword arguments of a call of the user's model."""

Key = TypeVar("Key")

_PLAIN = (int, float, complex, bool, str, bytes, type(None))
_CLOSED = (type, nn.Module, Enum, ModuleType, FunctionType, MethodType, BuiltinFunctionType, partial)
_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of a tensor, or of a size that is a symbol."""

    index: int
    """Which of the leaves stands there."""


@dataclass(frozen=True, slots=True)
class Again:
    """An object that stands in the skeleton already."""

    number: int
    """Which of the shells it is, counted in the order in which they are met."""


@dataclass(frozen=True, slots=True)
class Argument:
    """The very object that an argument was."""

    number: int
    """Which of the objects among the arguments it is."""


@dataclass(frozen=True, slots=True)
class Shell:
    """An object without its tensors."""

    kind: type
    """Its class."""
    attributes: Mapping[str, object]
    """Its attributes by name, with places in place of tensors."""
    items: object = None
    """What it holds as the container that its class derives from; None where it derives from none."""


@dataclass(frozen=True, slots=True)
class Branch:
    """A container inside an object that the exporter knows how to put together."""

    spec: pytree.TreeSpec
    """How the exporter puts it together."""
    parts: list[object]
    """What it is put together from, with places in place of tensors."""


@dataclass(frozen=True, slots=True)
class Skeleton:
    """What remains of an object. Two are equal where the same tensors are in the same places, between equal numbers."""

    root: Shell | Again | Argument
    """The object itself; all others hang from it."""

    @property
    def class_name(self) -> str:
        """The name of the object's class."""
        return self.root.kind.__name__ if isinstance(self.root, Shell) else "object"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Skeleton) and difference(self, other) is None

    def __hash__(self) -> int:
        return hash(type(self.root))


@dataclass(frozen=True, slots=True)
class Opened:
    """An object in parts: a container to the exporter."""

    leaves: list[object]
    """Its tensors, and sizes that are symbols."""
    skeleton: Skeleton
    """What remains of it."""


def _flattened(parts: Opened) -> tuple[list[object], Skeleton]:
    return parts.leaves, parts.skeleton


def _keyed(parts: Opened) -> tuple[list[tuple[pytree.KeyEntry, object]], Skeleton]:
    return [(pytree.SequenceKey(i), leaf) for i, leaf in enumerate(parts.leaves)], parts.skeleton


def _unflattened(leaves: Iterable[object], skeleton: Any) -> Opened:
    return Opened(list(leaves), skeleton)


pytree.register_pytree_node(Opened, _flattened, _unflattened, flatten_with_keys_fn=_keyed)


def is_object(value: object) -> bool:
    """Whether something that is no container to the exporter holds its parts in attributes, or as items of its own."""
    kind = type(value)
    if isinstance(value, (Tensor, *_PLAIN, *_CLOSED)) or kind.__module__ in {"builtins", "torch"}:
        return False
    if hasattr(value, "__dict__") or contents(value) is not None:
        return True
    # slots of the standard library's classes are caches and numbers, as those of paths
    return kind.__module__.partition(".")[0] not in sys.stdlib_module_names and bool(_attributes(value))


def opened(tree: Tree, arguments: Mapping[int, int] | None = None) -> Tree:
    """The tree with every object in parts. arguments: number by identity of those that are only referred to."""
    numbers = arguments or {}

    def open_leaf(leaf: object) -> object:
        if id(leaf) in numbers:
            return Opened([], Skeleton(Argument(numbers[id(leaf)])))
        return _open(leaf, numbers) if is_object(leaf) or _is_delicate(leaf) else leaf

    return pytree.tree_map(open_leaf, tree, is_leaf=_is_delicate)


def is_of_user(value: object) -> bool:
    """Whether something is a container whose class was made known to the exporter by code outside torch."""
    kind = type(value)
    registered = kind in pytree.SUPPORTED_NODES and kind is not Opened
    return registered and kind.__module__.partition(".")[0] not in {"torch", *sys.stdlib_module_names}


def _is_delicate(value: object) -> bool:
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


def closed(
    tree: Tree, arguments: Sequence[object] = (), instead: Sequence[object] | None = None
) -> tuple[Tree, list[object]]:
    """The tree with new objects out of their parts, and these in order.

    arguments: what `Argument` refers to; instead: objects, in order, to put there instead of new ones.
    """
    closed_objects: list[object] = []

    def close_leaf(leaf: object) -> object:
        if not isinstance(leaf, Opened):
            return leaf
        root = leaf.skeleton.root
        if instead is not None:
            closed_objects.append(instead[len(closed_objects)])
        else:
            closed_objects.append(arguments[root.number] if isinstance(root, Argument) else _close(leaf, arguments))
        return closed_objects[-1]

    return pytree.tree_map(close_leaf, tree, is_leaf=_is_opened), closed_objects


def containers(tree: Tree) -> list[Opened]:
    """The objects in parts in a tree, in order."""
    return [leaf for leaf in pytree.tree_leaves(tree, is_leaf=_is_opened) if _is_opened(leaf)]


def _is_opened(value: object) -> bool:
    return isinstance(value, Opened)


def objects(tree: Tree) -> list[object]:
    """The objects in a tree, in order."""
    leaves = pytree.tree_leaves(tree, is_leaf=_is_delicate)
    return [leaf for leaf in leaves if is_object(leaf) or _is_delicate(leaf)]


def put_together(spec: pytree.TreeSpec, leaves: Sequence[object]) -> Tree:
    """A tree of lists and of objects in parts, in the structure of `spec`: nothing of the user's is made for it."""
    remaining = iter(leaves)

    def build(spec: pytree.TreeSpec) -> object:
        if spec.is_leaf():
            return next(remaining)
        children = [build(child) for child in spec.children()]
        return Opened(children, spec.context) if spec.type is Opened else children

    return build(spec)


def skeletons(spec: pytree.TreeSpec) -> list[Skeleton]:
    """The skeletons in the structure of a tree that was opened, in order."""
    first = [spec.context] if spec.type is Opened else []
    return [*first, *(skeleton for child in spec.children() for skeleton in skeletons(child))]


def copied(tree: Tree) -> Tree:
    """The tree with objects of its own and copies of all tensors: what a call changes in place stays in the copy."""
    parts = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, opened(tree))
    return closed(parts)[0]


def unchanged(before: Opened, after: Opened) -> bool:
    """Whether an object holds the very same tensors and equal numbers."""
    same = len(before.leaves) == len(after.leaves) and all(map(_is, before.leaves, after.leaves))
    return same and before.skeleton == after.skeleton


def _is(a: object, b: object) -> bool:
    return a is b


def update(target: object, state: Opened) -> None:
    """Give an object the attributes that its parts say."""
    _close(state, into=target)


# -- one object --------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Opening:
    """What is known while an object is taken apart."""

    arguments: Mapping[int, int]
    """Number by identity of the objects that are only referred to."""
    leaves: list[object] = field(default_factory=list)
    slots: dict[int, int] = field(default_factory=dict)
    """Which leaf a tensor is, by identity."""
    shells: dict[int, int] = field(default_factory=dict)
    """Which shell an object has, by identity."""
    alive: list[object] = field(default_factory=list)
    """Keeps identities valid."""

    def part(self, value: Tree) -> object:
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
        return self.shell(value) if not spec.is_leaf() or is_object(value) else value

    def shell(self, value: object) -> Shell | Again | Argument:
        if id(value) in self.arguments:
            return Argument(self.arguments[id(value)])
        if id(value) in self.shells:
            return Again(self.shells[id(value)])
        self.shells[id(value)] = len(self.shells)
        self.alive.append(value)
        attributes = {name: self.part(v) for name, v in _attributes(value).items()}
        return Shell(type(value), attributes, self.part(contents(value)))


def _open(value: object, arguments: Mapping[int, int]) -> Opened:
    opening = _Opening(arguments)
    root = opening.shell(value)
    return Opened(opening.leaves, Skeleton(root))


def _attributes(value: object) -> dict[str, object]:
    slots = [_mangled(kind, n) for kind in type(value).__mro__ for n in _names(kind.__dict__.get("__slots__", ()))]
    in_slots = {n: getattr(value, n) for n in slots if n not in {"__dict__", "__weakref__"} and hasattr(value, n)}
    return {**in_slots, **getattr(value, "__dict__", {})}


def _names(slots: str | Iterable[str]) -> Iterator[str]:
    yield from (slots,) if isinstance(slots, str) else slots


def _mangled(kind: type, name: str) -> str:
    private = name.startswith("__") and not name.endswith("__")
    return f"_{kind.__name__.lstrip('_')}{name}" if private else name


def _close(parts: Opened, arguments: Sequence[object] = (), *, into: object = None) -> object:
    """The object of some parts: a new one, or `into` with their attributes. arguments: what `Argument` refers to."""
    shells: list[object] = []

    def part(value: Tree) -> object:
        if isinstance(value, Slot):
            return parts.leaves[value.index]
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

    def shell(value: Shell) -> object:
        number = len(shells)
        shells.append(into if into is not None and not number else None)
        if shells[number] is None:
            shells[number] = bare(value.kind, part(value.items) if issubclass(value.kind, (tuple, frozenset)) else None)
        instance = shells[number]
        for name, inner in value.attributes.items():
            _set(instance, name, part(inner))
        if value.items is not None:
            refill(instance, part(value.items))
        return instance

    return part(parts.skeleton.root)


def _set(target: object, name: str, value: object) -> None:
    """Give an object an attribute, past whatever its class does when one is set."""
    if isinstance(getattr(type(target), name, None), property):
        target.__dict__[name] = value
    else:
        object.__setattr__(target, name, value)


# -- comparing ---------------------------------------------------------------------------------------------------


def difference(actual: Skeleton, expected: Skeleton) -> str | None:
    """Where two skeletons differ, as ".layers[0].length is 3 instead of 2"; None where they do not."""
    return _difference(actual.root, expected.root, "")


def _difference(actual: object, expected: object, path: str) -> str | None:
    if isinstance(actual, Shell) and isinstance(expected, Shell) and actual.kind is expected.kind:
        inner = _between(actual.attributes, expected.attributes, path, lambda key: f".{key}")
        return _difference(actual.items, expected.items, path) if inner is None else inner
    if isinstance(actual, Branch) and isinstance(expected, Branch) and actual.spec == expected.spec:
        return _difference(actual.parts, expected.parts, path)
    if isinstance(actual, list | tuple) and isinstance(expected, list | tuple) and type(actual) is type(expected):
        return _between(dict(enumerate(actual)), dict(enumerate(expected)), path, lambda key: f"[{key}]")
    if isinstance(actual, dict) and isinstance(expected, dict) and type(actual) is type(expected) is dict:
        return _between(actual, expected, path, lambda key: f"[{key!r}]")
    plain = (*_PLAIN, Slot, Again, Argument, Branch)
    if type(actual) is type(expected) and (actual == expected or not isinstance(actual, plain)):
        return None
    return f"{path} is {_in_words(actual)} instead of {_in_words(expected)}".strip()


def _between(
    actual: Mapping[Key, object], expected: Mapping[Key, object], path: str, step: Callable[[Key], str]
) -> str | None:
    for key in {**expected, **actual}:
        if key not in actual or key not in expected:
            return f"{path}{step(key)} is there in one of them only"
        inner = _difference(actual[key], expected[key], path + step(key))
        if inner is not None:
            return inner
    return None


def _in_words(value: object) -> str:
    if isinstance(value, Slot):
        return "a tensor"
    if isinstance(value, Branch):
        return f"a {value.spec.type.__name__} of {len(value.parts)}"
    return f"a {value.kind.__name__}" if isinstance(value, Shell) else f"{value!r:.60}"
