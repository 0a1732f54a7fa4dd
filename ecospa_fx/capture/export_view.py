"""A model as torch.export takes it: arguments by name, and objects such as caches as containers of tensors."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import MethodType

from torch import nn

from ecospa_fx.ir.pytrees import Tree, closed, opened, unchanged


def export_view(model: nn.Module, kwargs: Mapping[str, object]) -> nn.Module:
    """A view of the model, on the same parameters, that takes and returns objects in parts.

    Its ``forward`` names what the model's own catches in ``**kwargs``, whose shapes torch.export does not take. Where
    objects are among the arguments it returns (result, states): the parts of each afterwards, None for those that hold
    what they held before.
    """
    view: nn.Module = object.__new__(type(model))  # copying asks the model's own code, which may refuse
    view.__dict__.update(model.__dict__)
    # what it sets on itself while it is traced is set on the view, where the exporter finds it
    forward = model.__dict__.get("forward") or MethodType(type(model).forward, view)
    signature = inspect.signature(model.forward)
    named = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    caught = [name for name in kwargs if name not in signature.parameters]
    if caught and len(named) < len(signature.parameters):
        new = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in caught]
        signature = signature.replace(parameters=[*named, *new])

    def parts(*args: object, **kwargs: object) -> Tree:
        (args, kwargs), arguments = closed((args, kwargs))
        before = [opened(value) for value in arguments]
        result = opened(forward(*args, **kwargs), {id(value): i for i, value in enumerate(arguments)})
        after = [opened(value) for value in arguments]
        if not arguments:
            return result
        return result, [None if unchanged(a, b) else b for a, b in zip(before, after, strict=True)]

    parts.__signature__ = signature  # type: ignore[attr-defined]
    view.__dict__["forward"] = parts
    return view
