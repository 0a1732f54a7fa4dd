"""Builds models of transformers whose layers differ in width, from `per_layer_config` in ``config.json``.

The same file stands in every folder that ecospa_fx exports, whatever the architecture. It needs transformers alone and
names none of its models: `auto_map` in ``config.json`` asks this module for a class of transformers by its own name,
and gets a subclass that builds every layer from the configuration of that layer. Nothing else differs.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import transformers
from transformers.modeling_layers import GradientCheckpointingLayer

if not hasattr(transformers.PretrainedConfig, "is_heterogeneous"):
    raise ImportError(
        f"layers of different widths need transformers 5.14 or newer, and {transformers.__version__} is installed: "
        "pip install -U transformers"
    )

_BUILDING = threading.RLock()


@dataclass(frozen=True, slots=True, eq=False)
class BuiltLayer:
    """One layer, as a model's constructor built it."""

    layer: Any
    """The module."""
    index: int
    """Its number, by which `per_layer_config` knows it."""
    call: inspect.BoundArguments
    """The call of its ``__init__``, ``self`` first."""


@contextmanager
def layer_configurations() -> Iterator[list[BuiltLayer]]:
    """Inside, every layer is built from its own part of a configuration; yields the list of those that were.

    A layer is what derives from transformers' class for layers. Its number is its argument `layer_idx`, or how many of
    its class were built before.
    """
    built: list[BuiltLayer] = []
    counts: Counter[type] = Counter()
    with _BUILDING:
        originals = {kind: kind.__dict__["__init__"] for kind in _layer_classes() if "__init__" in kind.__dict__}
        try:
            for kind, original in originals.items():
                kind.__init__ = _building(original, built, counts)
            yield built
        finally:
            for kind, original in originals.items():
                kind.__init__ = original


def _layer_classes() -> list[Any]:
    classes = [GradientCheckpointingLayer]
    for kind in classes:
        classes += kind.__subclasses__()
    return classes[1:]


def _building(original: Any, built: list[BuiltLayer], counts: Counter[type]) -> Any:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def build(self: Any, *args: Any, **kwargs: Any) -> None:
        call = signature.bind(self, *args, **kwargs)
        config = call.arguments.get("config")
        if isinstance(config, transformers.PretrainedConfig) and all(layer.layer is not self for layer in built):
            index = call.arguments.get("layer_idx")
            index = index if isinstance(index, int) else counts[type(self)]
            counts[type(self)] += 1
            built.append(BuiltLayer(self, index, call))
            if config.is_heterogeneous:
                call.arguments["config"] = config.per_layer_config[index]
        original(*call.args, **call.kwargs)

    return build


def __getattr__(name: str) -> Any:
    """The class of transformers of this name, with layers that are built from configurations of their own."""
    stock = None if name.startswith("_") else getattr(transformers, name, None)
    if not (isinstance(stock, type) and issubclass(stock, transformers.PreTrainedModel)):
        raise AttributeError(f"transformers {transformers.__version__} has no model {name!r}: install another version")

    @functools.wraps(stock.__init__)
    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        with layer_configurations():
            stock.__init__(self, config, *args, **kwargs)

    # what a class can be set to, transformers reads from the source of the module that the class is in
    answers = {n: staticmethod(getattr(stock, n)) for n in dir(stock) if n.startswith("_can_set_")}
    entries = {"__init__": __init__, "__module__": __name__, "__doc__": stock.__doc__, **answers}
    globals()[name] = kind = type(name, (stock,), entries)
    return kind
