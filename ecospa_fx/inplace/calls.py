"""Test inputs made from the example call: other sizes, random values, and each boolean flag flipped.

Inputs that share a size, such as tokens and the mask beside them, vary together first, and then apart, because the
sizes may be equal by chance. Whether a model takes such a call is for the model to say.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, SupportsInt, TypeGuard

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ecospa_fx.ir.program import ExportedForm
from ecospa_fx.ir.pytrees import closed, opened


@dataclass(frozen=True, slots=True)
class TrialCall:
    """Arguments of one call of a model."""

    args: tuple[Any, ...]
    """By position."""
    kwargs: dict[str, Any]
    """By name."""
    strict: bool = True
    """Whether everything in the result must agree: where not, only what has the same shape."""


class SizeExpression(Protocol):
    """A size of a traced tensor as an expression in symbols, as sympy has it."""

    free_symbols: Collection[object]

    def subs(self, sizes: Mapping[object, int]) -> SupportsInt: ...


Shape = Sequence[int | SizeExpression]
"""Sizes of a traced tensor."""

Symbols = Mapping[object, int]
"""A number per symbol."""


# -- other sizes -------------------------------------------------------------------------------------------------


def resized_calls(program: ExportedForm, example: TrialCall) -> list[TrialCall]:
    """The example with other numbers for the sizes that a graph keeps open.

    Sizes that are equal change alike: each alone, all of them by different numbers, all of them by the same, as sizes
    that are sums of others want. Then each size of each input by itself.
    """
    leaves, spec = pytree.tree_flatten(opened((example.args, example.kwargs)))
    shapes = [_size_expressions(node, leaf) for node, leaf in zip(program.inputs, leaves, strict=True)]
    calls = []
    for sizes in _other_sizes(_symbols(shapes, leaves)):
        resized = [_resized(leaf, shape, sizes) for leaf, shape in zip(leaves, shapes, strict=True)]
        args, kwargs = closed(pytree.tree_unflatten(resized, spec))[0]
        calls.append(TrialCall(args, kwargs))
    return calls


def _symbols(shapes: Sequence[Shape], leaves: Sequence[object]) -> Symbols:
    """The symbols that are the size of some axis, with their numbers in the example."""
    sizes: dict[object, int] = {}
    for shape, leaf in zip(shapes, leaves, strict=True):
        if isinstance(leaf, Tensor):
            sizes.update({s: leaf.shape[axis] for axis, s in enumerate(shape) if getattr(s, "is_Symbol", False)})
    return dict(sorted(sizes.items(), key=lambda item: str(item[0])))


def _other_sizes(sizes: Symbols) -> Iterator[Symbols]:
    """Other numbers for the symbols, each combination once."""
    numbers = sorted(set(sizes.values()))
    more = [{n: 1 + i} for i, n in enumerate(numbers)]
    more += [{n: 1 + i for i, n in enumerate(numbers)}, dict.fromkeys(numbers, 1)] if len(numbers) > 1 else []
    together = [{s: n + by.get(n, 0) for s, n in sizes.items()} for by in more]
    apart = [{**sizes, s: n + 1 + i} for i, (s, n) in enumerate(sizes.items())]
    tried: list[Symbols] = []
    for combination in together + apart * (len(numbers) < len(sizes)):
        if combination not in tried:
            tried.append(combination)
            yield combination


def _size_expressions(node: fx.Node, leaf: object) -> Shape:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not isinstance(leaf, Tensor):
        return []
    return [size.node.expr if isinstance(size, torch.SymInt) else size for size in value.shape]


def _resized(leaf: object, shape: Shape, sizes: Symbols) -> object:
    for axis, size in enumerate(shape):
        if isinstance(leaf, Tensor) and not isinstance(size, int) and size.free_symbols:
            wanted = int(size.subs(sizes))
            positions = torch.arange(wanted, device=leaf.device) % leaf.shape[axis]
            leaf = leaf.index_select(axis, positions)
    return leaf


# -- other numbers -----------------------------------------------------------------------------------------------


def has_varied_tensor(call: TrialCall) -> bool:
    """Whether any tensor of numbers in a call holds different ones: positions that are all equal tell no attention."""
    return any(_is_number_tensor(t) and _varies(t) for t in pytree.tree_leaves((call.args, call.kwargs)))


def has_constant_tensor(call: TrialCall) -> bool:
    """Whether any tensor of numbers in a call holds the same one everywhere."""
    return any(_is_number_tensor(t) and not _varies(t) for t in pytree.tree_leaves((call.args, call.kwargs)))


def _is_number_tensor(leaf: object) -> TypeGuard[Tensor]:
    return isinstance(leaf, Tensor) and leaf.dtype is not torch.bool and leaf.numel() > 1


def _varies(tensor: Tensor) -> bool:
    return bool((tensor != tensor.flatten()[0]).any())


def randomised_calls(call: TrialCall) -> Iterator[TrialCall]:
    """A call with other numbers in all tensors that hold the same everywhere, then in one of them at a time.

    Whole numbers become 0 or 1, on the CPU alone: elsewhere an index that is out of range ends the process.
    """
    leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
    source = torch.Generator().manual_seed(0)
    new = {i: _randomised(t, source) for i, t in enumerate(leaves) if _is_number_tensor(t) and not _varies(t)}
    other = {i: t for i, t in new.items() if t is not None}
    for chosen in (list(other), *([i] for i in other if len(other) > 1)):
        changed = [other[i] if i in chosen else leaf for i, leaf in enumerate(leaves)]
        args, kwargs = pytree.tree_unflatten(changed, spec)
        if chosen:
            yield TrialCall(args, kwargs, call.strict)


def _randomised(tensor: Tensor, source: torch.Generator) -> Tensor | None:
    if tensor.is_floating_point():
        return tensor + torch.randn(tensor.shape, generator=source, dtype=torch.float32).to(tensor)
    if tensor.is_complex() or tensor.device.type != "cpu":
        return None
    return torch.randint(0, 2, tensor.shape, generator=source).to(tensor)


def flag_flipped_calls(example: TrialCall) -> list[TrialCall]:
    """The example with each of its flags the other way round: use_cache, for one."""
    flags = [name for name, value in example.kwargs.items() if isinstance(value, bool)]
    return [TrialCall(example.args, {**example.kwargs, name: not example.kwargs[name]}, strict=False) for name in flags]
