"""Proof by numbers: a smaller model against the dense one with masked parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ecospa_fx.graph.objects import copied, objects, opened
from ecospa_fx.plan import Plan


@contextmanager
def masked(model: nn.Module, plan: Plan) -> Iterator[nn.Module]:
    """The model with every parameter multiplied by its mask inside, and as it was outside.

    Raises PlanError where the plan was made for another model.
    """
    parameters = dict(model.named_parameters())
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


def masked_error(
    model: nn.Module, small: nn.Module, plan: Plan, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None
) -> float:
    """Largest difference between ``small`` and the masked ``model``, relative to the largest output.

    Both run in the type they have: below 1e-9 in float64 is what exact means. Infinite where shapes or the places of
    infinities and NaN differ.
    """
    kwargs = dict(kwargs or {})
    with torch.no_grad():
        got = _floats(_called(small, args, kwargs))
        with masked(model, plan):
            want = _floats(_called(model, args, kwargs))
    if len(got) != len(want):
        return float("inf")
    return max((_difference(a, b) for a, b in zip(got, want, strict=True)), default=0.0)


def _called(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What the model returns for copies of the arguments, and these afterwards: what was written into caches counts."""
    own_args, own_kwargs = copied((tuple(args), dict(kwargs)))
    result = model(*own_args, **own_kwargs)
    return result, [opened(one) for one in objects((own_args, own_kwargs))]


def _floats(output: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves(opened(output))
    return [t for t in leaves if isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex())]


def _difference(got: Tensor, want: Tensor) -> float:
    if got.shape != want.shape:
        return float("inf")
    finite = torch.isfinite(want)
    if not torch.equal(finite, torch.isfinite(got)):
        return float("inf")
    if not finite.any():
        return 0.0
    scale = max(want[finite].abs().max().item(), 1e-12)
    return float((got[finite] - want[finite]).abs().max().item() / scale)
