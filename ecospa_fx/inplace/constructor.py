"""What a module's constructor sets for other widths: attributes that follow tensors, told by building the module anew.

Arguments are read off attributes of the same names. A module is built on ``meta`` as it is, which must give the shapes
that it has, and then with the fewest whole numbers changed that give the shapes that it is to have. Whatever attribute
differs between the two follows. So rows and columns of square weights are told apart, and what only happens to be as
large as an axis stays.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, combinations, islice, product
from typing import Any

import torch
from torch import Tensor, nn

from ecospa_fx.inplace.attributes import integers_of

TRIALS = 1000

BuiltShapes = dict[str, tuple[int, ...]]

Attribute = tuple[Any, int | None]
"""Name of an attribute that is a number, or of a tuple and a position in it."""


@dataclass(frozen=True, slots=True)
class Constructed:
    """What a constructor says about one module. known: attributes that it sets; values: those that follow, and how."""

    known: frozenset[Attribute]
    values: Mapping[Attribute, int]


def constructed(
    module: nn.Module, new: BuiltShapes, fixed: Mapping[Attribute, int] | None = None
) -> Constructed | None:
    """What follows tensors of other shapes; None where no class of the module builds it from its attributes.

    new: shape of every tensor in the module by its name there, of which some differ from what they are. fixed: new
    values of attributes that are known already.
    """
    old = shapes_of(module)
    for kind in (k for k in type(module).__mro__ if issubclass(k, nn.Module) and k is not nn.Module):
        given = _arguments(kind, module)
        slots = dict(_slots(given, _ratios(old, new)))
        sure = {slot: value for slot, value in (fixed or {}).items() if slot in slots}
        for chosen in _with_flags(kind, given) if slots else ():
            before = _built(kind, chosen)
            if before is not None and _describes(shapes_of(before), old, new):
                after = _narrower(kind, _changed(chosen, sure), new, {s: o for s, o in slots.items() if s not in sure})
                return None if after is None else _compared(module, before, after)
    return None


def shapes_of(module: nn.Module) -> BuiltShapes:
    """Shape of every parameter and buffer by its name in a module."""
    return {n: tuple(t.shape) for n, t in chain(module.named_parameters(), module.named_buffers())}


def _describes(built: BuiltShapes, old: BuiltShapes, new: BuiltShapes) -> bool:
    """Whether a built module has the tensors that change, and none of other shapes than the module's own."""
    changed = {name for name in new if new[name] != old.get(name)}
    return changed <= built.keys() and all(old.get(name) == shape for name, shape in built.items())


def _ratios(old: BuiltShapes, new: BuiltShapes) -> set[tuple[int, int]]:
    pairs = ((a, b) for name in old for a, b in zip(old[name], new[name], strict=True))
    return {(a, b) for a, b in pairs if a != b}


# -- building ----------------------------------------------------------------------------------------------------


def _arguments(kind: type, module: nn.Module) -> dict[str, Any]:
    """The arguments of a constructor, from attributes of their names; none where one that it needs is unknown."""
    given: dict[str, Any] = {}
    for one in list(inspect.signature(kind.__init__).parameters.values())[1:]:  # type: ignore[misc]
        if one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD):
            continue
        value = getattr(module, one.name, one.empty)
        if isinstance(one.default, bool) and (value is None or isinstance(value, Tensor)):
            value = value is not None  # a bias is there or not
        if value is not one.empty and not isinstance(value, Tensor | nn.Module | torch.device | torch.dtype):
            given[one.name] = value
        elif one.default is one.empty:
            return {}
    return given


def _with_flags(kind: type, given: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The arguments, with flags that no attribute tells as they are by default, then the other way round."""
    signature = inspect.signature(kind.__init__)  # type: ignore[misc]
    flags = [p.name for p in signature.parameters.values() if isinstance(p.default, bool) and p.name not in given]
    for count in range(min(len(flags), 3) + 1):
        for chosen in combinations(flags, count):
            yield {**given, **{name: not signature.parameters[name].default for name in chosen}}


def _built(kind: type, given: Mapping[str, Any]) -> nn.Module | None:
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            found = kind(**given)
    except Exception:  # a constructor that wants something else says nothing
        return None
    return found if isinstance(found, nn.Module) else None


def _narrower(
    kind: type, given: dict[str, Any], new: BuiltShapes, slots: Mapping[Attribute, list[int]]
) -> nn.Module | None:
    """The module built with the fewest numbers changed that give the new shapes."""
    changes = (
        dict(zip(chosen, values, strict=True))
        for count in range(len(slots) + 1)
        for chosen in combinations(slots, count)
        for values in product(*(slots[slot] for slot in chosen))
    )
    for change in islice(changes, TRIALS):
        built = _built(kind, _changed(given, change))
        if built is not None and all(new.get(name) == shape for name, shape in shapes_of(built).items()):
            return built
    return None


def _slots(given: Mapping[str, Any], ratios: set[tuple[int, int]]) -> Iterator[tuple[Attribute, list[int]]]:
    """The whole numbers among the arguments that are in proportion to an axis that changes, and their new values."""
    for name, value in given.items():
        entries = enumerate(value) if type(value) in (tuple, list) else ((None, value),)
        for index, number in entries:
            if type(number) is int and number > 0:
                options = {number * b // a for a, b in ratios if number * b % a == 0} - {number}
                if options:
                    yield (name, index), sorted(options)


def _changed(given: Mapping[str, Any], change: Mapping[Attribute, int]) -> dict[str, Any]:
    result = dict(given)
    for (name, index), value in change.items():
        old = result[name]
        result[name] = value if index is None else type(old)([*old[:index], value, *old[index + 1 :]])
    return result


def _compared(module: nn.Module, before: nn.Module, after: nn.Module) -> Constructed:
    """Attributes of the module that are as built, with what they are in the module that is built for the new shapes."""
    ours, dense, narrow = (_integers(m) for m in (module, before, after))
    known = {name for name, value in ours.items() if dense.get(name) == value and name in narrow}
    return Constructed(frozenset(known), {name: narrow[name] for name in known if narrow[name] != dense[name]})


def _integers(module: nn.Module) -> dict[Attribute, int]:
    found = (one for one in integers_of(module, "", (), set()) if not one.place.steps)
    return {(one.place.name, one.place.index): one.value for one in found}
