"""Modules that run generated code: what a restored model is made of.

They are plain modules to everything that works on modules: per-layer compilation, checkpointing, sharding, hooks,
copying and pickling. Layers whose code and parameters agree share one class, and so one compilation, as the layers of
a model written by hand do. Layers that differ never share, so that no limit on recompilations is met.
"""

from __future__ import annotations

import copy
import importlib
import linecache
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from itertools import count
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn

from ecospa_fx.ir.modes import follow_notes
from ecospa_fx.ir.pytrees import Tree
from ecospa_fx.runtime.devices import ATTRIBUTE, follow_device, moved
from ecospa_fx.runtime.repeated_calls import FIRST_CALL

_NUMBERS = count()

_USUAL: dict[str, object] = dict(fx.Graph().python_code("self").globals)
"""What generated code may name. Functions that name no more live in this scope, because whoever calls a compiled
layer waits until every scope that its functions live in has been checked."""


@dataclass(frozen=True, slots=True, eq=False)
class Code:
    """A function as its source text."""

    source: str
    """The text, as ``fx.Graph.python_code`` writes it."""
    names: Mapping[str, object]
    """What its global names mean."""

    def function(self) -> Callable[..., Tree]:
        """The function, with its source where tracebacks and the compiler look for it."""
        file = f"<graph layer {next(_NUMBERS)}>"
        linecache.cache[file] = (len(self.source), None, self.source.splitlines(keepends=True), file)
        usual = all(name in _USUAL and _is(value, _USUAL[name]) for name, value in self.names.items())
        namespace: dict[str, Callable[..., Tree]] = {}
        exec(compile(self.source, file, "exec"), _USUAL if usual else dict(self.names), namespace)
        return namespace["forward"]

    def __reduce__(self) -> tuple[object, ...]:
        """Modules among the names are pickled by name."""
        plain = {n: _Named(v.__name__) if isinstance(v, ModuleType) else v for n, v in self.names.items()}
        return _code, (self.source, plain)


def _is(value: object, other: object) -> bool:
    """Whether a name means the same; numbers that were pickled are objects of their own."""
    return value is other or (type(value) is type(other) is float and repr(value) == repr(other))


@dataclass(frozen=True, slots=True)
class _Named:
    module: str


def _code(source: str, names: Mapping[str, object]) -> Code:
    meanings = {n: importlib.import_module(v.module) if isinstance(v, _Named) else v for n, v in names.items()}
    return Code(source, meanings)


class Constants(nn.Module):
    """A module that keeps tensors as plain attributes, as the module that it stands for does: they move with it."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        applied: Any = super()._apply
        applied(fn, recurse)
        for name, value in self.__dict__.items():
            if isinstance(value, Tensor):
                self.__dict__[name] = value.to(moved(value.device, fn))
        return self


class GraphLayer(Constants):
    """A module whose ``forward`` is code made from a graph.

    Its own attributes begin with ``_graph_``, because any other name may be that of one of the user's submodules.
    """

    _graph_code: Code
    _graph_key: str
    """Equal where the code and the shapes and types of the parameters are, of this module and of all inside it."""

    _graph_device: torch.device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """What moves parameters moves what the code makes, too."""
        super()._apply(fn, recurse)
        self._graph_device = moved(self._graph_device, fn)
        return self

    def __reduce_ex__(self, protocol: object) -> tuple[object, ...]:
        """Pickled as its source, because its class exists in this process only."""
        return _unpickled, (type(self).__bases__[0], type(self).__name__, self._graph_code), self.__dict__

    def __deepcopy__(self, memo: dict[int, object]) -> GraphLayer:
        """A copy of the same class, which runs the very same code."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return twin

    @classmethod
    def _graph_running(cls, name: str, code: Code) -> type[GraphLayer]:
        """A subclass for some code."""
        return type(name, (cls,), {"forward": code.function(), "_graph_code": code, "__module__": __name__})


def _unpickled(base: type[GraphLayer], name: str, code: Code) -> GraphLayer:
    kind = base._graph_running(name, code)
    return kind.__new__(kind)


def own_copy(function: FunctionType) -> FunctionType:
    """The function with a code object of its own, so that the compiler counts its versions apart from others'."""
    code: CodeType = function.__code__.replace()
    return FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)


class Layers:
    """Turns modules that hold a graph into layers; equal ones get one class."""

    def __init__(self, original: nn.Module) -> None:
        self.original = original
        self.device = next((p.device for p in original.parameters()), torch.get_default_device())
        self.classes: dict[str, type[GraphLayer]] = {}
        self.made: dict[int, nn.Module] = {}

    def convert(self, module: nn.Module, path: str = "", base: type[GraphLayer] = GraphLayer) -> nn.Module:
        """The module and all within it as layers: the same parameters, buffers and names."""
        converted = self.made.get(id(module))
        if converted is not None or isinstance(module, fx.GraphModule):
            return converted if converted is not None else module
        prefix = f"{path}." if path else ""
        inside = {n: self.convert(m, prefix + n) for n, m in module._modules.items() if m is not None}
        # further calls of one module, which are no children: see `share_repeated`
        beside = {n: self.convert(m, prefix + n) for n, m in module.__dict__.items() if _is_beside(n, m)}
        graph = module.__dict__.get("graph")
        if isinstance(graph, fx.Graph) and any(n.op == "output" for n in graph.nodes):
            layer: nn.Module = self._class(module, graph, {**inside, **beside}, base)()
            layer.__dict__[ATTRIBUTE] = self.device
        else:
            layer = self._container(path, inside, any(_is_constant(value) for value in module.__dict__.values()))
        layer._parameters, layer._buffers, layer._modules = module._parameters, module._buffers, dict(inside)
        layer.__dict__.update(beside)
        layer._non_persistent_buffers_set = module._non_persistent_buffers_set
        layer.__dict__.update({n: value for n, value in module.__dict__.items() if _is_constant(value)})
        for node in graph.nodes if isinstance(graph, fx.Graph) else ():
            if node.op == "get_attr" and str(node.target) in module.__dict__:  # constants that are no tensors
                layer.__dict__[str(node.target)] = module.__dict__[str(node.target)]
        self.made[id(module)] = layer
        return layer

    def _class(
        self, module: nn.Module, graph: fx.Graph, inside: Mapping[str, nn.Module], base: type[GraphLayer]
    ) -> type[GraphLayer]:
        renamed, of = _renamed(graph), FIRST_CALL if FIRST_CALL in module.__dict__ else ""
        follow_notes(renamed, of)
        follow_device(renamed, self.device, of)
        code = renamed.python_code("self")
        tensors = {**module._parameters, **module._buffers}
        shapes = tuple(
            (n, tuple(t.shape), t.dtype, t.requires_grad) for n, t in tensors.items() if isinstance(t, Tensor)
        )
        parts = [(n, getattr(m, "_graph_key", type(m).__name__)) for n, m in inside.items()]
        key = sha256(repr((base.__name__, code.src, shapes, parts)).encode()).hexdigest()
        if key not in self.classes:
            name = str(module.__dict__.get("_ty") or base.__name__).rpartition(".")[2]
            self.classes[key] = base._graph_running(name, Code(code.src, code.globals))
            self.classes[key]._graph_key = key
        return self.classes[key]

    def _container(self, path: str, inside: Mapping[str, nn.Module], constants: bool) -> nn.Module:
        """What is never called keeps the type that lets people walk over it. constants: whether it keeps tensors."""
        try:
            kind = type(self.original.get_submodule(path))
        except AttributeError:
            return Constants() if constants else nn.Module()
        in_order = list(inside) == [str(i) for i in range(len(inside))]
        if kind is nn.ModuleList and in_order:
            return nn.ModuleList()
        if kind is nn.ModuleDict:
            return nn.ModuleDict()
        return Constants() if constants else nn.Module()


def _is_beside(name: str, value: object) -> bool:
    return isinstance(value, nn.Module) and ("@" in name or name == FIRST_CALL)


def _is_constant(value: object) -> bool:
    """Whether an attribute is a tensor, or an object of a class that torch's operators know."""
    return isinstance(value, (Tensor, torch.ScriptObject))


def _renamed(graph: fx.Graph) -> fx.Graph:
    """The same graph with names that depend on nothing outside it, so that equal layers have equal code."""
    fresh = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), copies.__getitem__)
        if node.op == "placeholder":
            copies[node] = fresh.placeholder(f"input_{len(copies) + 1}")
        else:
            name = f"from_{node.target}" if node.op == "call_module" else None  # a module may well be called self
            copies[node] = fresh.create_node(node.op, node.target, args, kwargs, name)
        copies[node].meta = dict(node.meta)
    return fresh
