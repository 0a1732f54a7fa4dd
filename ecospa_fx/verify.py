"""Proof by numbers: a smaller model against the dense one with masked parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ecospa_fx.axes.kept import take
from ecospa_fx.graph.objects import copied, objects, opened
from ecospa_fx.graph.owned import owned
from ecospa_fx.graph.wrappers import unwrapped
from ecospa_fx.plan import Plan


@contextmanager
def masked(model: nn.Module, plan: Plan) -> Iterator[nn.Module]:
    """The model with every parameter multiplied by its mask inside, and as it was outside.

    Raises PlanError where the plan was made for another model.
    """
    parameters = dict(unwrapped(model).named_parameters())
    masks = plan.masks(model)
    saved = {name: parameters[name].detach().clone() for name in masks}
    try:
        with torch.no_grad():
            for name, mask in masks.items():
                parameters[name].masked_fill_(~mask, 0)
        yield model
    finally:
        with torch.no_grad():
            for name, values in saved.items():
                parameters[name].copy_(values)


@contextmanager
def without_fast_path() -> Iterator[None]:
    """As layers of attention are traced: what they run in inference alone writes zeros where padding is."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def masked_error(
    model: nn.Module, small: nn.Module, plan: Plan, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None
) -> float:
    """Largest difference between ``small`` and the masked ``model``, relative to the largest output.

    Both run in the type they have: below 1e-9 in float64 is what exact means. Infinite where shapes or the places of
    infinities and NaN differ, and where there is nothing else in the outputs, which would prove nothing.
    """
    model, args, kwargs = owned(model, args, kwargs)
    calling = getattr(unwrapped(small), "_graph_calling", None)
    with torch.no_grad():
        got = _called(small, *narrowed(small, args, kwargs))
        with masked(model, plan):
            want = _called(model, args, kwargs)
    if calling is not None and len(want) == len(cuts := calling.cuts_of_results()):
        want = [take(leaf, cut) if cut else leaf for leaf, cut in zip(want, cuts, strict=True)]
    got, want = _floats(got), _floats(want)
    if len(got) != len(want) or (want and not any(torch.isfinite(leaf).any() for leaf in want)):
        return float("inf")
    return max((_difference(a, b) for a, b in zip(got, want, strict=True)), default=0.0)


def narrowed(
    small: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the dense model as the smaller one takes them: (args, kwargs), caches cut to the kept units.

    Where nothing gets narrower, they are the arguments themselves. What a masked dense model has in its caches, the
    smaller one has in the cut ones.

    >>> args, kwargs = narrowed(small, (ids,), {"past_key_values": cache})  # doctest: +SKIP
    """
    calling = getattr(unwrapped(small), "_graph_calling", None)
    if calling is None or not any(leaf.cut for leaf in calling.leaves):
        return tuple(args), dict(kwargs or {})
    found: tuple[tuple[Any, ...], dict[str, Any]] = calling.narrowed(tuple(args), dict(kwargs or {}))
    return found


def _called(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The leaves of what the model returns for copies of the arguments, and of the objects among these afterwards."""
    own_args, own_kwargs = copied((tuple(args), dict(kwargs)))
    with without_fast_path():
        result = model(*own_args, **own_kwargs)
    return pytree.tree_leaves(opened((result, objects((own_args, own_kwargs)))))


def _floats(leaves: Sequence[Any]) -> list[Tensor]:
    return [t for t in leaves if isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex())]


def _difference(got: Tensor, want: Tensor) -> float:
    if got.shape != want.shape:
        return float("inf")
    finite = torch.isfinite(want)
    if not torch.equal(finite, torch.isfinite(got)):
        return float("inf")
    if not finite.any():
        return 0.0
    # picking the finite ones by index would take eight bytes per axis of each, and logits are large
    scale = max(torch.where(finite, want, 0).abs().max().item(), 1e-12)
    return float(torch.where(finite, got - want, 0).abs().max().item() / scale)
