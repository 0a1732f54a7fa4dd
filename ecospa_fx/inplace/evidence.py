"""What shapes say about integers: of the tensors that a module holds, and of those that it is given.

What a constructor says is in `ecospa_fx.inplace.constructor`. A module without tensors, such as a norm without weights,
is as large as what reaches it: an integer that in every call is the size of one axis of its inputs, in the dense model,
is the size of that axis afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ecospa_fx.inplace.attributes import IntegerAttribute, Place, integers_of
from ecospa_fx.inplace.buffers import BufferSlice, Spot
from ecospa_fx.inplace.constructor import BuiltShapes, Constructed, constructed, shapes_of
from ecospa_fx.inplace.equivalence import EquivalenceCheck
from ecospa_fx.inplace.groups import narrowed_axes, role_of
from ecospa_fx.inplace.trial import IntegerEdits, edited
from ecospa_fx.plan import Plan

ROUNDS = 8
"""How often a model is run to see what reaches modules behind one that refused what reached it."""

SizesByAxis = dict[tuple[int, ...], int]
"""Sizes of the axes of a module's inputs, by number of the call, tensor and axis."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """New integers by place: as constructors say, and as inputs of modules without tensors say.

    known: all that the constructors know, whether it follows or not.
    """

    constructed: dict[Spot, int]
    given: dict[Spot, int]
    known: set[Place]


def evidence(bench: EquivalenceCheck, plan: Plan, values: IntegerEdits) -> Evidence:
    """What shapes say after a plan. values: what follows for certain, buffers among it."""
    following, known = _constructed(bench.model, narrowed_axes(plan, bench.model), values)
    return Evidence(following, _given(bench, plan, {**following, **values}), known)


# -- tensors of its own ------------------------------------------------------------------------------------------


def _constructed(
    model: nn.Module, axes: Mapping[tuple[str, int], tuple[int, int]], values: IntegerEdits
) -> tuple[dict[Spot, int], set[Place]]:
    """What follows by what constructors say of the modules that hold something narrower, and all that they know."""
    new = _shapes_after(model, axes, values)
    answers: dict[str, Constructed | None] = {}
    following: dict[Spot, int] = {}
    known: set[Place] = set()
    for path, module in model.named_modules():
        old = shapes_of(module)
        wanted = {name: new.get(f"{path}.{name}" if path else name, shape) for name, shape in old.items()}
        if wanted == old:
            continue
        fixed = {(p.name, p.index): n for p, n in values.items() if isinstance(p, Place) and p.module == path}
        numbers = sorted((n, v) for n, v in vars(module).items() if isinstance(v, int | str))
        key = f"{type(module).__module__}.{type(module).__qualname__} {numbers} {fixed} {old} {wanted}"
        answer = answers.get(key) if key in answers else constructed(module, wanted, fixed)
        answers[key] = answer
        if answer is not None:
            known |= {Place(path, (), *name) for name in answer.known}
            following.update({Place(path, (), *name): value for name, value in answer.values.items()})
    return following, known


def _shapes_after(
    model: nn.Module, axes: Mapping[tuple[str, int], tuple[int, int]], values: IntegerEdits
) -> BuiltShapes:
    """The new shapes of the parameters and buffers that get narrower, by all their names."""
    narrow: dict[tuple[str, int], int] = {at: new for at, (_, new) in axes.items()}
    narrow.update(
        {
            (f"{c.module}.{c.name}" if c.module else c.name, c.axis): n
            for c, n in values.items()
            if isinstance(c, BufferSlice)
        }
    )
    result: BuiltShapes = {}
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in tensors:
        result[name] = tuple(narrow.get((name, axis), size) for axis, size in enumerate(tensor.shape))
    return result


# -- tensors that reach it ---------------------------------------------------------------------------------------


def _given(bench: EquivalenceCheck, plan: Plan, values: IntegerEdits) -> dict[Spot, int]:
    """What follows in modules without tensors. A module that refuses what reaches it hides what is behind it."""
    places = _without_tensors(bench.model)
    following: dict[Spot, int] = {}
    if not places:
        return following
    dense, buffers = _reached(bench, list(places)), bench.reference(plan).buffers
    for _ in range(ROUNDS):
        with edited(bench.model, plan, {**values, **following}, buffers):
            narrow = _reached(bench, list(places))
        new = dict(following)
        for module, own in places.items():
            for one in own:
                size = _new_size(one.value, dense.get(module, {}), narrow.get(module, {}))
                new.update({one.place: size} if size not in (None, one.value) else {})
        new.update(_alike(bench.model, places, new))
        if new == following:
            break
        following = new
    return following


def _without_tensors(model: nn.Module) -> dict[nn.Module, list[IntegerAttribute]]:
    """The integers of modules that hold no tensor and no other module."""
    places: dict[nn.Module, list[IntegerAttribute]] = {}
    for path, module in model.named_modules():
        if not module._modules and not shapes_of(module):
            own = [one for one in integers_of(module, path, (), set()) if not one.place.steps]
            places.update({module: own} if own else {})
    return places


def _alike(
    model: nn.Module, places: Mapping[nn.Module, Sequence[IntegerAttribute]], new: Mapping[Spot, int]
) -> dict[Spot, int]:
    """The same for modules that are alike and as large, which may not have been reached."""
    told = {_key(model, one): new[one.place] for own in places.values() for one in own if one.place in new}
    everything = [one for own in places.values() for one in own]
    return {one.place: told[_key(model, one)] for one in everything if _key(model, one) in told}


def _key(model: nn.Module, one: IntegerAttribute) -> tuple[Any, ...]:
    return role_of(one.place.module, model), one.place.name, one.place.index, one.value


def _new_size(value: int, before: Mapping[Any, int], after: Mapping[Any, int]) -> int | None:
    """What an integer becomes that is as large as an axis in all calls; None where no axis, or several, say so."""
    axes: dict[Any, list[tuple[int, int]]] = {}
    for (call, *axis), size in before.items():
        axes.setdefault(tuple(axis), []).append((size, after.get((call, *axis), size)))
    told = {tuple(sorted({new for _, new in pairs})) for pairs in axes.values() if {old for old, _ in pairs} == {value}}
    sizes = told.pop() if len(told) == 1 else ()
    return sizes[0] if len(sizes) == 1 else None


def _reached(bench: EquivalenceCheck, modules: Sequence[nn.Module]) -> dict[nn.Module, SizesByAxis]:
    """What reaches modules in the strict calls of the bench."""
    found: dict[nn.Module, SizesByAxis] = {}
    with _watched(modules, found) as begin:
        for number, call in enumerate(c for c in bench.calls if c.strict):
            begin(number)
            bench.attempt(call)
    return found


@contextmanager
def _watched(modules: Sequence[nn.Module], found: dict[nn.Module, SizesByAxis]) -> Iterator[Any]:
    number = 0

    def begin(call: int) -> None:
        nonlocal number
        number = call

    def reached(module: nn.Module, args: Any, kwargs: Any) -> None:
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        sizes: SizesByAxis = {
            (number, i, axis): size for i, t in enumerate(tensors) for axis, size in enumerate(t.shape)
        }
        found.setdefault(module, {}).update(sizes)

    handles = [module.register_forward_pre_hook(reached, with_kwargs=True) for module in modules]
    try:
        yield begin
    finally:
        for handle in handles:
            handle.remove()
