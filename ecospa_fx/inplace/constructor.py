"""Which attributes a module's constructor sets for other widths: found by building the module anew on meta.

Arguments are read off attributes of the same names. A module is built on ``meta`` as it is, which must give the shapes
that it has, and then with the fewest whole numbers changed that give the shapes that it is to have. Whatever attribute
differs between the two follows. So rows and columns of square weights are told apart, and what only happens to be as
large as an axis stays.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, combinations, islice, product
from typing import cast

import torch
from torch import Tensor, nn

from ecospa_fx.inplace.attributes import integers_of

MAX_TRIALS = 1000

TensorShapes = dict[str, tuple[int, ...]]

Attribute = tuple[Hashable, int | None]
"""Name of an attribute that is a number, or of a tuple and a position in it."""

Arguments = dict[str, object]
"""Arguments of a constructor by name."""


@dataclass(frozen=True, slots=True)
class ConstructorEvidence:
    """What a constructor says about one module."""

    attributes: frozenset[Attribute]
    """Those that it sets."""
    changes: Mapping[Attribute, int]
    """New values of those that change with the shapes."""


def constructor_evidence(
    module: nn.Module, new: TensorShapes, fixed: Mapping[Attribute, int] | None = None
) -> ConstructorEvidence | None:
    """What follows tensors of other shapes; None where no class of the module builds it from its attributes.

    new: shape of every tensor in the module by its name there, of which some differ from what they are. fixed: new
    values of attributes that are known already.
    """
    old = shapes_of(module)
    for kind in (k for k in type(module).__mro__ if issubclass(k, nn.Module) and k is not nn.Module):
        arguments = _arguments(kind, module)
        candidates = dict(_proportional_arguments(arguments, _ratios(old, new)))
        fixed_arguments = {slot: value for slot, value in (fixed or {}).items() if slot in candidates}
        for chosen in _with_flags(kind, arguments) if candidates else ():
            before = _built(kind, chosen)
            if before is not None and _has_module_shapes(shapes_of(before), old, new):
                after = _narrower(
                    kind,
                    _changed(chosen, fixed_arguments),
                    new,
                    {s: o for s, o in candidates.items() if s not in fixed_arguments},
                )
                return None if after is None else _compared(module, before, after)
    return None


def shapes_of(module: nn.Module) -> TensorShapes:
    """Shape of every parameter and buffer by its name in a module."""
    return {n: tuple(t.shape) for n, t in chain(module.named_parameters(), module.named_buffers())}


def _has_module_shapes(built: TensorShapes, old: TensorShapes, new: TensorShapes) -> bool:
    """Whether a built module has the tensors that change, and none of other shapes than the module's own."""
    changed = {name for name in new if new[name] != old.get(name)}
    return changed <= built.keys() and all(old.get(name) == shape for name, shape in built.items())


def _ratios(old: TensorShapes, new: TensorShapes) -> set[tuple[int, int]]:
    pairs = ((a, b) for name in old for a, b in zip(old[name], new[name], strict=True))
    return {(a, b) for a, b in pairs if a != b}


# -- building ----------------------------------------------------------------------------------------------------


def _arguments(kind: type, module: nn.Module) -> Arguments:
    """The arguments of a constructor, from attributes of their names; none where one that it needs is unknown."""
    arguments: Arguments = {}
    for parameter in list(inspect.signature(kind.__init__).parameters.values())[1:]:  # type: ignore[misc]
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        value = getattr(module, parameter.name, parameter.empty)
        if isinstance(parameter.default, bool) and (value is None or isinstance(value, Tensor)):
            value = value is not None  # a bias is there or not
        if value is not parameter.empty and not isinstance(value, Tensor | nn.Module | torch.device | torch.dtype):
            arguments[parameter.name] = value
        elif parameter.default is parameter.empty:
            return {}
    return arguments


def _with_flags(kind: type, arguments: Arguments) -> Iterator[Arguments]:
    """The arguments, with flags that no attribute tells as they are by default, then the other way round."""
    signature = inspect.signature(kind.__init__)  # type: ignore[misc]
    flags = [p.name for p in signature.parameters.values() if isinstance(p.default, bool) and p.name not in arguments]
    for count in range(min(len(flags), 3) + 1):
        for chosen in combinations(flags, count):
            yield {**arguments, **{name: not signature.parameters[name].default for name in chosen}}


def _built(kind: type, arguments: Arguments) -> nn.Module | None:
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            module = kind(**arguments)
    except Exception:  # a constructor that wants something else says nothing
        return None
    return module if isinstance(module, nn.Module) else None


def _narrower(
    kind: type, arguments: Arguments, new: TensorShapes, candidates: Mapping[Attribute, list[int]]
) -> nn.Module | None:
    """The module built with the fewest numbers changed that give the new shapes."""
    changes = (
        dict(zip(chosen, values, strict=True))
        for count in range(len(candidates) + 1)
        for chosen in combinations(candidates, count)
        for values in product(*(candidates[argument] for argument in chosen))
    )
    for change in islice(changes, MAX_TRIALS):
        built = _built(kind, _changed(arguments, change))
        if built is not None and all(new.get(name) == shape for name, shape in shapes_of(built).items()):
            return built
    return None


def _proportional_arguments(
    arguments: Arguments, ratios: set[tuple[int, int]]
) -> Iterator[tuple[Attribute, list[int]]]:
    """The whole numbers among the arguments that are in proportion to an axis that changes, and their new values."""
    for name, value in arguments.items():
        entries: Iterable[tuple[int | None, object]] = ((None, value),)
        if isinstance(value, tuple | list) and type(value) in (tuple, list):
            entries = enumerate(value)
        for index, number in entries:
            if type(number) is int and number > 0:
                options = {number * b // a for a, b in ratios if number * b % a == 0} - {number}
                if options:
                    yield (name, index), sorted(options)


def _changed(arguments: Arguments, change: Mapping[Attribute, int]) -> Arguments:
    result = dict(arguments)
    for (name, index), value in change.items():
        argument = cast(str, name)
        if index is None:
            result[argument] = value
        else:
            old = cast(tuple[object, ...], result[argument])
            result[argument] = type(old)([*old[:index], value, *old[index + 1 :]])
    return result


def _compared(module: nn.Module, before: nn.Module, after: nn.Module) -> ConstructorEvidence:
    """Attributes of the module that are as built, with what they are in the module that is built for the new shapes."""
    ours, dense, narrow = (_integers(m) for m in (module, before, after))
    covered = {name for name, value in ours.items() if dense.get(name) == value and name in narrow}
    return ConstructorEvidence(
        frozenset(covered), {name: narrow[name] for name in covered if narrow[name] != dense[name]}
    )


def _integers(module: nn.Module) -> dict[Attribute, int]:
    attributes = (attribute for attribute in integers_of(module, "", (), set()) if not attribute.place.steps)
    return {(attribute.place.name, attribute.place.index): attribute.value for attribute in attributes}
