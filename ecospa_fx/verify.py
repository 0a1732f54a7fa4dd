"""Checks by numbers that a smaller model equals the dense one with masked parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ecospa_fx.errors import warn_caller
from ecospa_fx.ir.pytrees import Arguments, NamedArguments, Tree, copied, objects, opened
from ecospa_fx.ir.slices import take
from ecospa_fx.ir.tracing import random_state_restored
from ecospa_fx.plan import Plan
from ecospa_fx.relative_error import RelativeError, relative_error
from ecospa_fx.runtime.guards import leaves_untouched
from ecospa_fx.runtime.lift_parameters import lift_parameters
from ecospa_fx.snapshot import exchange
from ecospa_fx.wrappers import unwrapped

HOOKS = "_backward_hooks", "_post_accumulate_grad_hooks"
"""Where torch keeps what is called with the gradients of a parameter."""


@contextmanager
def masked(model: nn.Module, plan: Plan) -> Iterator[nn.Module]:
    """The model with every parameter multiplied by its mask inside, and as it was outside.

    Inside, masked copies stand in the places of its parameters, which are not written into. Gradients that are there
    go on accumulating in the copies, and what these have afterwards is the parameters' own. Raises PlanError where the
    plan was made for another model.
    """
    parameters = dict(unwrapped(model).named_parameters())
    masks = {name: mask for name, mask in plan.masks(model).items() if not mask.all()}
    copies = [(parameters[name], _masked(parameters[name], mask)) for name, mask in masks.items()]
    try:
        exchange(model, {id(parameter): copied for parameter, copied in copies})
        yield model
    finally:
        exchange(model, {id(copied): parameter for parameter, copied in copies})
        for parameter, copied in copies:
            if copied.grad is not parameter.grad:
                parameter.grad = copied.grad


def _masked(parameter: nn.Parameter, mask: Tensor) -> nn.Parameter:
    with torch.inference_mode(False), torch.no_grad():  # a tensor made in inference mode takes no gradient
        copied = nn.Parameter(parameter.detach().masked_fill(~mask, 0), parameter.requires_grad)
    vars(copied).update(vars(parameter))
    copied.grad = parameter.grad
    for name in HOOKS:
        if hooks := getattr(parameter, name):
            setattr(copied, name, hooks)
    return copied


@contextmanager
def unwritten(model: nn.Module) -> Iterator[None]:
    """Buffers and random numbers to come as they were afterwards, whatever the model writes and draws."""
    places = [(module._buffers, name, value) for module in model.modules() for name, value in module._buffers.items()]
    saved = [None if value is None else value.clone() for _, _, value in places]
    try:
        with random_state_restored():
            yield
    finally:
        with torch.no_grad():
            for (buffers, name, value), values in zip(places, saved, strict=True):
                buffers[name] = value
                if value is not None and values is not None and not torch.equal(value, values):
                    value.copy_(values)


@contextmanager
def without_fast_path() -> Iterator[None]:
    """As layers of attention are traced: what they run in inference alone writes zeros where padding is."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@leaves_untouched(calls=True)
def masked_error(
    model: nn.Module, small: nn.Module, plan: Plan, args: Sequence[object], kwargs: Mapping[str, object] | None = None
) -> RelativeError:
    """Largest error of ``small`` against the masked ``model``, relative to what numbers in each output usually are.

    Both run in the type they have: below 1e-9 in float64 is what exact means. A float, whose ``left_out`` says what it
    does not cover: where the dense model gives NaN there is nothing to compare, and a warning says so. What is filled
    into masked places, and infinities, hide nothing beside them; see `ecospa_fx.relative_error`. Infinite where shapes
    or the places of infinities differ, where ``small`` gives NaN and ``model`` does not, and where there is nothing
    to compare.
    """
    model, args, kwargs = lift_parameters(model, args, kwargs)
    calling = getattr(unwrapped(small), "_graph_calling", None)
    with torch.no_grad():
        got = _called(small, *narrowed(small, args, kwargs))
        with masked(model, plan):
            want = _called(model, args, kwargs)
    if calling is not None and len(want) == len(cuts := calling.cuts_of_results()):
        want = [take(leaf, cut) if cut else leaf for leaf, cut in zip(want, cuts, strict=True)]
    error = relative_error(got, want)
    for sentence in error.left_out:
        warn_caller(sentence)
    return error


def narrowed(
    small: nn.Module, args: Sequence[object], kwargs: Mapping[str, object] | None = None
) -> tuple[Arguments, NamedArguments]:
    """Arguments of the dense model as the smaller one takes them: (args, kwargs), caches cut to the kept units.

    Where nothing gets narrower, they are the arguments themselves. What a masked dense model has in its caches, the
    smaller one has in the cut ones.

    >>> args, kwargs = narrowed(small, (ids,), {"past_key_values": cache})  # doctest: +SKIP
    """
    calling = getattr(unwrapped(small), "_graph_calling", None)
    if calling is None or not any(leaf.cut for leaf in calling.leaves):
        return tuple(args), dict(kwargs or {})
    call: tuple[Arguments, NamedArguments] = calling.narrowed(tuple(args), dict(kwargs or {}))
    return call


def _called(model: nn.Module, args: Sequence[object], kwargs: Mapping[str, object]) -> list[Tree]:
    """The leaves of what the model returns for copies of the arguments, and of the objects among these afterwards."""
    own_args, own_kwargs = copied((tuple(args), dict(kwargs)))
    with without_fast_path():
        result = model(*own_args, **own_kwargs)
    return pytree.tree_leaves(opened((result, objects((own_args, own_kwargs)))))
