"""From a graph back to a tree of modules with the names that the user knows."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils._pytree import tree_leaves

from ecospa_fx.errors import InputError
from ecospa_fx.graph.program import ExportedForm
from ecospa_fx.graph.repeated import share_repeated


def restore(
    program: ExportedForm, model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> nn.Module:
    """The program as a module with the hierarchy, parameter names and mode of `model`.

    It is called like `model`: constants of the example arguments may be left out, and any argument may be given by
    position or by name. Parameters that kept their shape are shared with `model`, not copied; buffers are copied.
    """
    exported = program.exported
    names = {alias: name for name, aliases in _aliases(model).items() for alias in aliases}
    stand_ins = {name: _stand_in(value) for name, value in program.values.items()}
    for name in list(exported.state_dict):
        if name in names:
            exported.state_dict[name] = stand_ins[names[name]]
    _complete_stacks(program.graph)
    exported.graph_module.recompile()
    with redirect_stdout(StringIO()), warnings.catch_warnings():  # torch 2.13 prints a line per node for some graphs
        warnings.simplefilter("ignore", FutureWarning)
        module: nn.Module = torch.export.unflatten(exported)
    for alias, name in names.items():
        path, _, attribute = alias.rpartition(".")
        try:
            owner = module.get_submodule(path)
        except AttributeError:
            continue
        if attribute in owner._parameters:
            owner._parameters[attribute] = program.values[name]
    share_repeated(module)
    shapes = _input_shapes(exported)
    _forget_examples(module)
    calling = _Calling(model, tuple(args), dict(kwargs or {}), shapes)
    module.register_forward_pre_hook(calling, with_kwargs=True)
    module.train(model.training)
    return module


def _input_shapes(exported: ExportedProgram) -> tuple[tuple[int | None, ...] | None, ...]:
    """Per leaf of the arguments its sizes, those that may vary as None; None for what is no tensor."""
    values = {n.name: n.meta.get("val") for n in exported.graph.nodes if n.op == "placeholder"}
    given = [values.get(s.arg.name) for s in exported.graph_signature.input_specs if s.kind is InputKind.USER_INPUT]
    return tuple(
        tuple(n if isinstance(n, int) else n.node.maybe_as_int() for n in value.shape)
        if isinstance(value, Tensor)
        else None
        for value in given
    )


def _forget_examples(module: nn.Module) -> None:
    """Drop example values, which cannot be copied or pickled; nothing reads them any more."""
    for part in module.modules():
        graph = getattr(part, "graph", None)
        for node in graph.nodes if isinstance(graph, fx.Graph) else ():
            node.meta.pop("val", None)
            node.meta.pop("tensor_meta", None)


class _Calling:
    """Brings the arguments of a call into the form of the example's, and refuses sizes that the graph does not take."""

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        shapes: tuple[tuple[int | None, ...] | None, ...],
    ) -> None:
        self.shapes = shapes
        self.signature = inspect.signature(model.forward)
        self.positional, self.keywords = len(args), tuple(kwargs)
        self.plain = not any(p.kind is p.VAR_POSITIONAL for p in self.signature.parameters.values())
        parameters = self.signature.parameters.values()
        self.extra = next((p.name for p in parameters if p.kind is p.VAR_KEYWORD), "")
        bound = self._flat(self.signature.bind(*args, **kwargs).arguments)
        self.constants = {n: v for n, v in bound.items() if not any(isinstance(x, Tensor) for x in tree_leaves(v))}

    def _flat(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments by name, those caught by ``**kwargs`` included."""
        return {**{n: v for n, v in arguments.items() if n != self.extra}, **arguments.get(self.extra, {})}

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = self._arranged(args, kwargs)
        leaves = tree_leaves((args, kwargs))
        if len(leaves) == len(self.shapes):
            for leaf, shape in zip(leaves, self.shapes, strict=True):
                self._check(leaf, shape)
        return args, kwargs

    @staticmethod
    def _check(leaf: Any, shape: tuple[int | None, ...] | None) -> None:
        if shape is None or not isinstance(leaf, Tensor):
            return
        fits = len(leaf.shape) == len(shape) and all(b in (None, a) for a, b in zip(leaf.shape, shape, strict=True))
        if not fits:
            wanted = ", ".join("any" if n is None else str(n) for n in shape)
            raise InputError(
                f"the smaller model takes an input of shape [{wanted}], not {list(leaf.shape)}: the original's code or "
                "torch.export fixes these sizes, so shrink it again with example inputs of the new shape"
            )

    def _arranged(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.plain or (len(args) == self.positional and tuple(kwargs) == self.keywords):
            return args, kwargs
        try:
            given = {**self.constants, **self._flat(self.signature.bind_partial(*args, **kwargs).arguments)}
        except TypeError:
            return args, kwargs  # the graph's own check says what is wrong
        names = list(self.signature.parameters)[: self.positional]
        if not all(n in given for n in (*names, *self.keywords)):
            return args, kwargs
        rest = {n: given[n] for n in given if n not in names and n not in self.keywords}
        return tuple(given[n] for n in names), {**{n: given[n] for n in self.keywords}, **rest}


def _complete_stacks(graph: fx.Graph) -> None:
    """Give every node the modules from the root down; traced graph modules come without the outer ones."""
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if not stack or next(iter(stack.values()))[0] == "":
            continue
        path, kind = next(reversed(stack.values()))
        parts = path.split(".")
        outer = {
            p: (p, "torch.nn.modules.module.Module") for p in ("", *(".".join(parts[:i]) for i in range(1, len(parts))))
        }
        node.meta["nn_module_stack"] = {**outer, path: (path, kind)}


def _stand_in(value: nn.Parameter) -> nn.Parameter:
    """No memory, the same shape: unflattening copies what it is given."""
    return nn.Parameter(torch.empty_like(value, device="meta"), requires_grad=value.requires_grad)


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """All names of every parameter by its first one."""
    first: dict[int, str] = {}
    result: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        result.setdefault(first.setdefault(id(parameter), name), []).append(name)
    return result
