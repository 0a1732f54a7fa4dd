"""Finds the fields of a configuration that build one layer of given widths: by building it, on ``meta``.

No field is known by its name. Those that the layer's constructor reads are tried, where they change the shapes that
must change. Of all values that give the right shapes, those come first whose layer has the attributes of the layer at
hand, such as its numbers of heads, and of these the ones that change the fewest fields.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from inspect import BoundArguments
from itertools import combinations, islice, product
from typing import Any, cast

import torch
from torch import nn

from ecospa_fx.inplace.attributes import INTERNAL

MAX_TRIALS = 5000
"""Layers that are built for one layer at most."""

COUNTED = 64
"""Up to this value, a field may get any smaller one, as numbers of heads do; above, only those in proportion."""

Shapes = dict[str, tuple[int, ...]]
Fields = dict[str, int]
TensorAxis = tuple[str, int]
"""A parameter or buffer by name, and one of its axes."""


def tensor_shapes(module: nn.Module) -> Shapes:
    """Shape of every parameter and buffer by its name."""
    return {name: tuple(t.shape) for name, t in (*module.named_parameters(), *module.named_buffers())}


def numbers_of(module: nn.Module) -> dict[tuple[str, str], float]:
    """The numbers among the attributes of a module's parts, by path and name; flags are none."""
    return {
        (path, name): value
        for path, part in module.named_modules()
        for name, value in vars(part).items()
        if name not in INTERNAL and isinstance(value, int | float) and not isinstance(value, bool)
    }


class LayerSearch:
    """The search for one layer.

    layer: as it is to be. call: how the model's constructor builds it, ``self`` first and the configuration as
    "config". missed: after `solutions`, the axes to which no field gives the sizes that they are to have.
    """

    def __init__(self, layer: nn.Module, call: BoundArguments) -> None:
        self.layer, self.call = layer, call
        self.missed: set[TensorAxis] = set()

    def built(self, fields: Mapping[str, int]) -> nn.Module | None:
        """The layer by the configuration with some fields replaced; None where its constructor refuses them."""
        config = copy.copy(self.call.arguments["config"])
        return self._built_from(config, fields)

    def _built_from(self, config: Any, fields: Mapping[str, int]) -> nn.Module | None:
        call = copy.copy(self.call)
        call.arguments = {**self.call.arguments, "config": config}
        try:
            for name, value in fields.items():
                setattr(config, name, value)
            with torch.random.fork_rng(devices=[]), torch.device("meta"):
                module: nn.Module = type(self.layer)(*call.args[1:], **call.kwargs)
        except Exception:  # the constructor refuses, in whatever way
            return None
        return module

    def shapes(self, fields: Mapping[str, int]) -> Shapes:
        """The shapes of the layer that some fields build; none where they build none."""
        module = self.built(fields)
        return {} if module is None else tensor_shapes(module)

    @cached_property
    def wanted(self) -> Shapes:
        """The shapes to be built."""
        return tensor_shapes(self.layer)

    @cached_property
    def differing(self) -> set[TensorAxis]:
        """The axes that the configuration as it is gives other sizes."""
        return changed_axes(self.shapes(self.pinned), self.wanted)

    @cached_property
    def read(self) -> dict[str, int | None]:
        """The whole numbers that the constructor asks the configuration for, and None where there is none."""
        config = copy.copy(self.call.arguments["config"])
        asked: list[str] = []
        config.__class__ = _watching(type(config), asked)
        self._built_from(config, {})
        values = {name: getattr(self.call.arguments["config"], name, None) for name in dict.fromkeys(asked)}
        return {n: v for n, v in values.items() if v is None or (isinstance(v, int) and not isinstance(v, bool))}

    @cached_property
    def pinned(self) -> Fields:
        """Values of fields that are not set, which say what the constructor computes in their place."""
        plain = self.built({})
        if plain is None:
            return {}
        shapes, result = tensor_shapes(plain), dict[str, int]()
        options = sorted({v for v in numbers_of(plain).values() if isinstance(v, int) and v > 0} | _sizes(shapes))
        for name in (name for name, value in self.read.items() if value is None):
            equal = [value for value in options if self.shapes({name: value}) == shapes]
            if len(equal) == 1:
                result[name] = equal[0]
        return result

    def solutions(self) -> list[Fields]:
        """The fields to change, with their values: the likeliest first; none where nothing gives the shapes."""
        parts: list[list[Fields]] = []
        self.missed = set(self.differing)
        for names, axes in self._components():
            fitting = list(self._fitting(names, axes))
            self.missed -= axes if fitting else set()
            parts.append(sorted(fitting, key=lambda fields: (self._strange(fields), len(fields)))[:8])
        results: list[Fields] = []
        for chosen in islice(product(*parts), 64):
            fields = self._without_needless({**self.pinned, **{n: v for part in chosen for n, v in part.items()}})
            if fields not in results and self.shapes(fields) == self.wanted:
                results.append(fields)
        return results

    def _components(self) -> list[tuple[list[str], set[TensorAxis]]]:
        """Fields that give sizes to the same axes, with these axes, where any of them differs."""
        components: list[tuple[list[str], set[TensorAxis]]] = []
        for name, axes in self._driven().items():
            touching = [part for part in components if part[1] & axes]
            components = [part for part in components if not part[1] & axes]
            names = [other for part in touching for other in part[0]]
            components.append(([*names, name], axes.union(*(part[1] for part in touching))))
        return [part for part in components if part[1] & self.differing]

    def _driven(self) -> dict[str, set[TensorAxis]]:
        """The axes that each field gives sizes to; fields that would change what must stay are left out."""
        base, result = self.shapes(self.pinned), dict[str, set[TensorAxis]]()
        for name, value in self._current.items():
            for other in (2 * value, value // 2, value + 1):
                axes = changed_axes(base, self.shapes({**self.pinned, name: other})) if other else set()
                if axes:
                    result[name] = axes
                    break
        stay = set(_axes(base)) - self.differing
        return {n: axes for n, axes in result.items() if axes & self.differing and (n in self.pinned or axes - stay)}

    @cached_property
    def _current(self) -> Fields:
        return {**{name: value for name, value in self.read.items() if value and value > 0}, **self.pinned}

    def _fitting(self, names: Sequence[str], axes: set[TensorAxis]) -> Iterator[Fields]:
        """All values of some fields that give some axes the sizes that they are to have."""
        base, sizes = self.shapes(self.pinned), _at(self.wanted, axes)
        options = {name: self._options(self._current[name], base, axes) for name in names}
        for fields in islice(_changes(options), MAX_TRIALS):
            if _at(self.shapes({**self.pinned, **fields}), axes) == sizes:
                yield fields

    def _options(self, value: int, base: Shapes, axes: Iterable[TensorAxis]) -> list[int]:
        ratios = {(base[name][axis], self.wanted[name][axis]) for name, axis in axes}
        proportional = {value * new // old for old, new in ratios if old and value * new % old == 0}
        counted = range(1, value + 1) if value <= COUNTED else ()
        return [other for other in dict.fromkeys([*sorted(proportional), *counted]) if other not in (0, value)]

    def _strange(self, fields: Fields) -> int:
        """How many numbers among the attributes of the layer that some fields build are not the layer's."""
        module = self.built({**self.pinned, **fields})
        return 0 if module is None else len(differing_numbers(self.layer, module))

    def _without_needless(self, fields: Fields) -> Fields:
        """Without pinned fields that say what is computed anyway."""
        shapes = self.shapes(fields)
        for name in self.pinned:
            fewer = {other: value for other, value in fields.items() if other != name}
            if fields[name] == self.pinned[name] and self.shapes(fewer) == shapes:
                fields = fewer
        return fields


def differing_numbers(layer: nn.Module, built: nn.Module) -> dict[tuple[str, str], float]:
    """Every number of a layer, by path and name, that is another one in a layer that was built."""
    theirs = numbers_of(built)
    return {place: value for place, value in numbers_of(layer).items() if theirs.get(place, value) != value}


def changed_axes(before: Shapes, after: Shapes) -> set[TensorAxis]:
    """The axes of tensors of equal name and rank that have other sizes."""
    pairs = ((n, shape, after[n]) for n, shape in before.items() if len(after.get(n, ())) == len(shape))
    return {(n, axis) for n, old, new in pairs for axis in range(len(old)) if old[axis] != new[axis]}


def _axes(shapes: Shapes) -> Iterator[TensorAxis]:
    return ((name, axis) for name, shape in shapes.items() for axis in range(len(shape)))


def _at(shapes: Shapes, axes: Iterable[TensorAxis]) -> dict[TensorAxis, int] | None:
    try:
        return {(name, axis): shapes[name][axis] for name, axis in axes}
    except (KeyError, IndexError):
        return None


def _sizes(shapes: Shapes) -> set[int]:
    return {size for shape in shapes.values() for size in shape if size}


def _changes(options: Mapping[str, Sequence[int]]) -> Iterator[Fields]:
    """Every choice of new values, those of the fewest fields first."""
    for count in range(1, len(options) + 1):
        for names in combinations(options, count):
            for values in product(*(options[name] for name in names)):
                yield dict(zip(names, values, strict=True))


def _watching(kind: type, asked: list[str]) -> Any:
    """A subclass of a configuration's class that notes what it is asked for."""
    original = cast(Callable[[object, str], object], kind.__getattribute__)

    def looked_up(self: object, name: str) -> object:
        if not name.startswith("_"):
            asked.append(name)
        return original(self, name)

    return type(kind.__name__, (kind,), {"__getattribute__": looked_up})
