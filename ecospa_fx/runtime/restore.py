"""From a graph back to a module, with the submodules and parameter names of the original."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from types import FunctionType
from typing import Any, cast

import torch
from torch import nn

from ecospa_fx.ir.module_stacks import arrange_stacks
from ecospa_fx.ir.program import ExportedForm
from ecospa_fx.ir.pytrees import Tree
from ecospa_fx.ir.tracing import one_at_a_time, quiet
from ecospa_fx.module_modes import copy_modes
from ecospa_fx.runtime.layer import Code, GraphLayer, Layers, own_copy
from ecospa_fx.runtime.repeated_calls import calls_compared_in_depth, share_repeated
from ecospa_fx.runtime.signature import CallAdapter, call_adapter


@one_at_a_time()
def restore(
    program: ExportedForm, model: nn.Module, args: Sequence[object] = (), kwargs: Mapping[str, object] | None = None
) -> nn.Module:
    """The program as a module with the hierarchy, parameter names and mode of `model`.

    It is called like `model`: constants of the example arguments may be left out, and any argument may be given by
    position or by name. Parameters that kept their shape are shared with `model`, not copied; buffers are copied.
    """
    exported = program.exported
    names = program.names
    stand_ins = {name: _stand_in(value) for name, value in program.values.items()}
    for name in list(exported.state_dict):
        if name in names:
            exported.state_dict[name] = stand_ins[names[name]]
    arrange_stacks(program.graph, {path for path, _ in model.named_modules(remove_duplicate=False)})
    exported.graph_module.recompile()
    with calls_compared_in_depth(), quiet():  # torch 2.13 prints a line per node for some graphs
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
    root = _rooted(program, module, model, args, dict(kwargs or {}))
    copy_modes(dict(model.named_modules(remove_duplicate=False)), root)
    return root


class GraphModel(GraphLayer):
    """The root of a restored model: takes the arguments of the original and returns what it returned."""

    _graph_calling: CallAdapter

    @classmethod
    def _graph_running(cls, name: str, code: Code) -> type[GraphLayer]:
        """A subclass for some code, which becomes ``_graph_run``; ``forward`` goes around it."""
        methods = {
            "_graph_run": code.function(),
            "forward": own_copy(cast(FunctionType, _forward)),
            "_graph_code": code,
            "__module__": __name__,
        }
        return type(name, (cls,), methods)


def _forward(self: Any, *args: object, **kwargs: object) -> Tree:
    return self._graph_calling.call(self._graph_run, args, kwargs)


def _rooted(
    program: ExportedForm, module: nn.Module, model: nn.Module, args: Sequence[object], kwargs: Mapping[str, object]
) -> nn.Module:
    """An unflattened module as layers that run their own code.

    torch's own wrapper interprets node by node, and shuts the compiler out of its handling of arguments.
    """
    root: Any = Layers(model).convert(module, base=GraphModel)
    root._graph_calling = call_adapter(program, model, args, kwargs)
    signature = inspect.signature(model.forward)
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    # trainers and exporters look for the names of the arguments there
    type(root).forward.__signature__ = signature.replace(parameters=[itself, *signature.parameters.values()])
    return cast(nn.Module, root)


def _stand_in(value: nn.Parameter) -> nn.Parameter:
    """No memory, the same shape: unflattening copies what it is given."""
    return nn.Parameter(torch.empty_like(value, device="meta"), requires_grad=value.requires_grad)
