"""Integers of modules without tensors, such as norms without weights: they follow what the modules are given.

An integer that in every call is as large as one axis of what reaches its module, in the dense model, is as large as
that axis afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ecospa_fx.inplace.attributes import Found, Place, integers_of
from ecospa_fx.inplace.follow import Values, edited
from ecospa_fx.inplace.proof import Bench
from ecospa_fx.plan import Plan

Sizes = dict[tuple[int, ...], int]
"""Sizes of the axes of a module's inputs, by number of the call, tensor and axis."""


def following_inputs(bench: Bench, plan: Plan, values: Values) -> dict[Place, int]:
    """What follows in modules without tensors. values: what follows in others for certain."""
    model = bench.model
    places: dict[nn.Module, list[Found]] = {}
    for path, module in model.named_modules():
        if not any(True for _ in [*module.parameters(), *module.buffers()]) and not module._modules:
            own = [one for one in integers_of(module, path, (), set()) if not one.place.steps]
            places.update({module: own} if own else {})
    if not places:
        return {}
    dense = _reached(bench, list(places))
    with edited(model, plan, values, bench.reference(plan).buffers):
        narrow = _reached(bench, list(places))
    following: dict[Place, int] = {}
    for module, own in places.items():
        for one in own:
            new = _new_size(one.value, dense.get(module, {}), narrow.get(module, {}))
            following.update({one.place: new} if new not in (None, one.value) else {})
    return following


def _new_size(value: int, before: Mapping[Any, int], after: Mapping[Any, int]) -> int | None:
    """What an integer becomes that is as large as an axis in all calls; None where no axis, or several, say so."""
    axes: dict[Any, list[tuple[int, int]]] = {}
    for (call, *axis), size in before.items():
        axes.setdefault(tuple(axis), []).append((size, after.get((call, *axis), size)))
    told = {tuple(sorted({new for _, new in pairs})) for pairs in axes.values() if {old for old, _ in pairs} == {value}}
    sizes = told.pop() if len(told) == 1 else ()
    return sizes[0] if len(sizes) == 1 else None


def _reached(bench: Bench, modules: Sequence[nn.Module]) -> dict[nn.Module, Sizes]:
    """What reaches modules in the strict calls of the bench."""
    found: dict[nn.Module, Sizes] = {}
    with _watched(modules, found) as begin:
        for number, call in enumerate(c for c in bench.calls if c.strict):
            begin(number)
            bench.attempt(call)
    return found


@contextmanager
def _watched(modules: Sequence[nn.Module], found: dict[nn.Module, Sizes]) -> Iterator[Any]:
    number = 0

    def begin(call: int) -> None:
        nonlocal number
        number = call

    def reached(module: nn.Module, args: Any, kwargs: Any) -> None:
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        sizes = {(number, i, axis): size for i, t in enumerate(tensors) for axis, size in enumerate(t.shape)}
        found.setdefault(module, {}).update(sizes)

    handles = [module.register_forward_pre_hook(reached, with_kwargs=True) for module in modules]
    try:
        yield begin
    finally:
        for handle in handles:
            handle.remove()
