"""Smaller parts put back into a copy of the whole model, where they pass for the modules that they stand in for."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn

from ecospa_fx.errors import CaptureError
from ecospa_fx.runtime.layer import Code, GraphLayer
from ecospa_fx.runtime.part import Part

Memo: TypeAlias = dict[int, Any]
"""What stands for objects in copies, by their identity."""


def put_back(parts: Sequence[tuple[Part, nn.Module]]) -> nn.Module:
    """A copy of the whole model with smaller modules in the places of its parts.

    Parameters that lost nothing are shared with the whole, buffers are copied. What else is in the model refers to the
    smaller modules wherever it referred to the parts or to a module inside them. What stands for the whole itself is
    returned as it is. Raises CaptureError for a model that cannot be copied.
    """
    if not parts[0][0].path:
        return parts[0][1]
    whole = parts[0][0].whole
    memo: Memo = {id(p): p for p in whole.parameters()}
    for part, small in parts:
        narrower = dict(small.named_parameters(remove_duplicate=False))
        memo |= {id(p): narrower.get(n, p) for n, p in part.module.named_parameters(remove_duplicate=False)}
    try:
        for part, small in parts:
            stand_in(small, part.module, memo)
        result: nn.Module = copy.deepcopy(whole, memo)
    except Exception as error:  # whatever the model's own code raises
        raise CaptureError(
            f"{type(whole).__name__} cannot be copied, so that no smaller part can be put into a copy: {error}"
        ) from error
    return result


def stand_in(small: nn.Module, original: nn.Module, memo: Memo) -> None:
    """Let a restored graph pass for the module that it was made from: what it is an instance of, attributes, methods.

    Modules inside the original that the graph does not run, such as an embedding that others call, are copied into it.
    memo: by identity what stands for parameters in copies; takes the modules.
    """
    layers = {path: _layer(small, path) for path, _ in original.named_modules(remove_duplicate=False)}
    for path, module in original.named_modules(remove_duplicate=False):
        if layers[path] is not None:
            memo.setdefault(id(module), layers[path])
    for path, module in original.named_modules(remove_duplicate=False):
        layer = layers[path]
        for name, child in module._modules.items() if layer is not None else ():
            inner = f"{path}.{name}" if path else name
            if layers[inner] is None:
                assert layer is not None
                layer._modules[name] = _completed(child, small, inner, memo)
    attributes = {n: value for n, value in vars(original).items() if n not in vars(small)}
    small.__dict__.update(copy.deepcopy(attributes, memo))
    small.__class__ = _passing_for(type(small), type(original))


def _layer(small: nn.Module, path: str) -> GraphLayer | None:
    """The layer at a path, where the graph runs one."""
    try:
        layer = small.get_submodule(path)
    except AttributeError:
        return None
    return layer if isinstance(layer, GraphLayer) else None


def _completed(child: nn.Module | None, small: nn.Module, path: str, memo: Memo) -> nn.Module | None:
    """A copy of a module that the graph does not run, with what the graph keeps in its place."""
    twin: nn.Module | None = copy.deepcopy(child, memo)
    for inner, module in twin.named_modules(remove_duplicate=False) if twin is not None else ():
        try:
            bare = small.get_submodule(f"{path}.{inner}" if inner else path)
        except AttributeError:
            continue
        if bare is not module and not isinstance(module, GraphLayer):
            module._parameters.update(bare._parameters)
            module._buffers.update(bare._buffers)
            module._non_persistent_buffers_set |= bare._non_persistent_buffers_set
            module.__dict__.update({n: value for n, value in vars(bare).items() if isinstance(value, Tensor)})
    return twin


# -- classes -----------------------------------------------------------------------------------------------------


def _passing_for(layer: type[nn.Module], original: type[nn.Module]) -> type[nn.Module]:
    """A class that runs the graph of one and is the other one for the rest."""
    return type(original.__name__, (layer, original), {"__module__": __name__, "__reduce_ex__": _reduced})


def _reduced(self: Any, protocol: object) -> tuple[object, ...]:
    """Pickled as source and the name of the original class, because its own class exists in this process only."""
    bases: tuple[Any, ...] = type(self).__bases__
    layer, original = bases
    return _unpickled, (layer.__bases__[0], layer.__name__, layer._graph_code, original), self.__dict__


def _unpickled(base: type[GraphLayer], name: str, code: Code, original: type[nn.Module]) -> nn.Module:
    kind = _passing_for(base._graph_running(name, code), original)
    return kind.__new__(kind)
