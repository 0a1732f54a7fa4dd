"""Which sizes of the inputs become symbols when a model is exported, and in which order that is tried."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from ecospa_fx.errors import CaptureError
from ecospa_fx.graph.objects import Opened


class Attempt(NamedTuple):
    """Example arguments, which of their sizes become symbols, and whether the batch is twice the user's."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shapes: dict[str, Any] | None
    doubled: bool = False


def attempts(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Attempt]:
    """From most to least that becomes a symbol: every axis, every axis with one symbol for the batch, the batch, none.

    A size of 1 never becomes a symbol, so a batch of one is doubled for the example. Of a model of images alone only
    the batch does: symbolic heights and widths make torch prove divisibility window by window, which takes minutes.
    """
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim()]
    images = bool(tensors) and all(t.dim() > 3 for t in tensors)
    found = []
    if tensors and all(t.shape[0] == 1 for t in tensors):
        more, named = pytree.tree_map(_twice, (args, kwargs))
        kinds = _kinds_of_shapes(model, more, named, tensors)
        found += [Attempt(more, named, shapes, True) for shapes in (kinds[-1:] if images else kinds[:-1])]
    kinds = _kinds_of_shapes(model, args, kwargs, tensors)
    return [
        *found,
        *(Attempt(args, kwargs, shapes) for shapes in (kinds[-1:] if images else kinds)),
        Attempt(args, kwargs, None),
    ]


def _kinds_of_shapes(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: Sequence[Tensor]
) -> list[dict[str, Any]]:
    """Symbols for every axis, the same with one for all batches if there are several, symbols for the batches alone."""
    same = len(tensors) > 1 and len({t.shape[0] for t in tensors}) == 1
    shared = [_dynamic_shapes(model, args, kwargs, None, Dim("batch"))] if same else []
    return [_dynamic_shapes(model, args, kwargs, None), *shared, _dynamic_shapes(model, args, kwargs, 1)]


def takes_one(program: ExportedProgram) -> bool:
    """Whether a program that was made for twice the user's batch of one takes that batch."""
    inputs = set(program.graph_signature.user_inputs)
    values = [n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder" and n.name in inputs]
    batches: list[Any] = [v.shape[0] for v in values if isinstance(v, Tensor) and v.dim()]
    return not any(isinstance(size, int) or size.node.expr.is_number for size in batches)


def _twice(leaf: Any) -> Any:
    return torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) and leaf.dim() else leaf


def _dynamic_shapes(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], leading: int | None, first: Any = Dim.AUTO
) -> dict[str, Any]:
    """The leading axes of every tensor (None: all of them) left to torch to decide. first: what the first ones are."""

    def axes(leaf: Any) -> Any:
        if isinstance(leaf, Opened):
            return [axes(part) for part in leaf.leaves]
        if not isinstance(leaf, Tensor):
            return None
        return {axis: Dim.AUTO if axis else first for axis in range(leaf.dim())[:leading]}

    bound = bound_arguments(model, args, kwargs)
    found: dict[str, Any] = pytree.tree_map(axes, bound, is_leaf=lambda leaf: isinstance(leaf, Opened))
    return found


def bound_arguments(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments by the names that ``forward`` gives them."""
    try:
        return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)
    except TypeError as error:
        raise CaptureError(f"{type(model).__name__} does not take these arguments: {error}") from error
