"""Which sizes of the inputs become symbols when a model is exported, and in which order that is tried."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ecospa_fx.errors import CaptureError
from ecospa_fx.ir.pytrees import Arguments, NamedArguments, Opened, Tree, is_of_user

Shapes: TypeAlias = dict[str, Tree]
"""What ``torch.export`` takes as ``dynamic_shapes``: by argument a tree with {axis: Dim} in place of every tensor."""


class Attempt(NamedTuple):
    """One way to export a model."""

    args: Arguments
    """The example arguments."""
    kwargs: NamedArguments
    """The example arguments by name."""
    shapes: Shapes | None
    """Which of their sizes become symbols; None for none."""
    doubled: bool = False
    """Whether the batch is twice the user's."""


class TooSlow(Exception):
    """An attempt took more time than it is worth."""


class TimeLimit(TorchFunctionMode):
    """Ends a trace in this thread that is too slow for the number of its calls of torch, at the next one.

    What symbols cost shows in the time per call, whatever the size of the model: it is 2 ms where all goes well, and
    much more where torch has to prove something of every window of an image. Only seconds of this thread's own work
    count. first: seconds that every trace may take; each: seconds that every call adds to it.
    """

    def __init__(self, first: float = 20.0, each: float = 0.01) -> None:
        super().__init__()
        self._first, self._each = first, each
        self._calls, self._begin = 0, time.thread_time()

    def __torch_function__(
        self, func: Callable[..., object], types: object, args: Arguments = (), kwargs: NamedArguments | None = None
    ) -> object:
        """Let a call pass. Raises TooSlow where too much time went."""
        self._calls += 1
        spent = time.thread_time() - self._begin
        if spent > self._first + self._each * self._calls:
            raise TooSlow(f"{spent:.0f} seconds for {self._calls} calls")
        return func(*args, **(kwargs or {}))


def attempts(model: nn.Module, args: Arguments, kwargs: NamedArguments) -> list[Attempt]:
    """From most to least that becomes a symbol: every axis, every axis with one symbol for the batch, the batch, none.

    A size of 1 never becomes a symbol, so a batch of one is doubled for the example. Of images only the batch does:
    symbolic heights and widths make torch prove divisibility window by window, which takes minutes.
    """
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim()]
    result = []
    if tensors and all(t.shape[0] == 1 for t in tensors):
        more, named = pytree.tree_map(_twice, (args, kwargs))
        wide, batches = _kinds_of_shapes(model, more, named)
        result += [Attempt(more, named, shapes, True) for shapes in (wide or [batches])]
    wide, batches = _kinds_of_shapes(model, args, kwargs)
    return [*result, *(Attempt(args, kwargs, shapes) for shapes in (*wide, batches)), Attempt(args, kwargs, None)]


def _kinds_of_shapes(model: nn.Module, args: Arguments, kwargs: NamedArguments) -> tuple[list[Shapes], Shapes]:
    """Symbols for every axis, the same with one for all batches if there are several; symbols for the batches alone."""
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim()]
    fixed = _image_axes(tensors)
    batches = _dynamic_shapes(model, args, kwargs, {id(t): t.dim() - 1 for t in tensors})
    if all(t.dim() - 1 == fixed.get(id(t)) for t in tensors):
        return [], batches
    same = len(tensors) > 1 and len({t.shape[0] for t in tensors}) == 1
    shared = [_dynamic_shapes(model, args, kwargs, fixed, Dim("batch"))] if same else []
    return [_dynamic_shapes(model, args, kwargs, fixed), *shared], batches


def _image_axes(tensors: Sequence[Tensor]) -> dict[int, int]:
    """By id of a tensor, how many of its last axes are those of an image, whose sizes stay as they are.

    Tensors of more than three axes are images where there is nothing else, or where another one of three axes says
    something of each of their pixels, as a mask does; otherwise they may well be what a model keeps of a sequence.
    """
    large = [t for t in tensors if t.dim() > 3]
    if len(large) == len(tensors):
        return {id(t): t.dim() - 1 for t in tensors}
    pixels = {tuple(t.shape[-2:]) for t in large}
    masks = [t for t in tensors if t.dim() == 3 and tuple(t.shape[-2:]) in pixels]
    masked = {tuple(t.shape[-2:]) for t in masks}
    images = [t for t in large if tuple(t.shape[-2:]) in masked]
    return {**{id(t): t.dim() - 1 for t in images}, **{id(t): 2 for t in masks}}


def takes_one(program: ExportedProgram) -> bool:
    """Whether a program that was made for twice the user's batch of one takes that batch."""
    inputs = set(program.graph_signature.user_inputs)
    values = [n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder" and n.name in inputs]
    batches: list[int | torch.SymInt] = [v.shape[0] for v in values if isinstance(v, Tensor) and v.dim()]
    return not any(isinstance(size, int) or size.node.expr.is_number for size in batches)


def _twice(leaf: object) -> object:
    return torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) and leaf.dim() else leaf


def _dynamic_shapes(
    model: nn.Module,
    args: Arguments,
    kwargs: NamedArguments,
    fixed: Mapping[int, int],
    first: object = Dim.AUTO,
) -> Shapes:
    """Axes left to torch to decide. fixed: by id of a tensor how many of its last ones are not; first: the first."""

    def axes(leaf: object) -> object:
        if isinstance(leaf, Opened):
            return [axes(part) for part in leaf.leaves]
        if is_of_user(leaf):  # put together anew, its class might refuse what stands for a tensor
            return [axes(part) for part in pytree.tree_flatten(leaf, is_leaf=lambda inner: inner is not leaf)[0]]
        if not pytree.tree_structure(leaf).is_leaf():
            return pytree.tree_map(axes, leaf, is_leaf=apart)
        if not isinstance(leaf, Tensor):
            return None
        return {axis: Dim.AUTO if axis else first for axis in range(leaf.dim() - fixed.get(id(leaf), 0))}

    def apart(leaf: object) -> bool:
        return isinstance(leaf, Opened) or is_of_user(leaf)

    bound = bound_arguments(model, args, kwargs)
    shapes: Shapes = pytree.tree_map(axes, bound, is_leaf=apart)
    return shapes


def bound_arguments(model: nn.Module, args: Arguments, kwargs: NamedArguments) -> NamedArguments:
    """The arguments by the names that ``forward`` gives them."""
    try:
        return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)
    except TypeError as error:
        raise CaptureError(f"{type(model).__name__} does not take these arguments: {error}") from None
