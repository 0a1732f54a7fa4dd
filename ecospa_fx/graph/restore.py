"""From a graph back to a tree of modules with the names that the user knows."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from types import FunctionType
from typing import Any, cast

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from ecospa_fx.graph.calling import Calling, leaf
from ecospa_fx.graph.layer import Code, GraphLayer, Layers, own_copy
from ecospa_fx.graph.memory import written
from ecospa_fx.graph.objects import opened
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
    _complete_stacks(program.graph, {path for path, _ in model.named_modules(remove_duplicate=False)})
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
    return _with_modes(_rooted(program, module, model, args, dict(kwargs or {})), model)


class GraphModel(GraphLayer):
    """The root of a restored model: takes the arguments of the original and returns what it returned."""

    _graph_calling: Calling

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


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    return self._graph_calling.call(self._graph_run, args, kwargs)


def _rooted(
    program: ExportedForm, module: Any, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> nn.Module:
    """An unflattened module as layers that run their own code.

    torch's own wrapper interprets node by node, and shuts the compiler out of its handling of arguments.
    """
    signature: Any = program.exported.module_call_graph[0].signature
    examples = pytree.tree_leaves(opened((tuple(args), kwargs)))
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    cuts = [program.narrowed.get(node, ()) for node in program.inputs]
    changed = written(program.graph)
    writes = [node in changed for node in program.inputs]
    leaves = [leaf(*told) for told in zip(placeholders, examples, cuts, writes, strict=True)]
    (output,) = program.graph.find_nodes(op="output")
    returned = [program.narrowed.get(n, ()) if isinstance(n, fx.Node) else None for n in output.args[0]]
    root: Any = Layers(model).convert(module, base=GraphModel)
    root._graph_calling = Calling(model, args, kwargs, signature, leaves, returned)
    told = inspect.signature(model.forward)
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    # trainers and exporters look for the names of the arguments there
    type(root).forward.__signature__ = told.replace(parameters=[itself, *told.parameters.values()])
    return cast(nn.Module, root)


def _with_modes(module: nn.Module, model: nn.Module) -> nn.Module:
    """Every part in the mode of the part that it came from."""
    module.train(model.training)
    modes = {path: part.training for path, part in model.named_modules(remove_duplicate=False)}
    for path, part in module.named_modules(remove_duplicate=False):
        part.training = modes.get(path.partition("@")[0], part.training)
    return module


def _complete_stacks(graph: fx.Graph, known: set[str]) -> None:
    """Give every node the modules from the root down; traced graph modules come without the outer ones.

    Sizes of the inputs come with a module that does not exist; they are the root's.
    """
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if not stack or next(iter(stack.values()))[0] == "":
            continue
        path, kind = next(reversed(stack.values()))
        if path.partition("@")[0] not in known:
            path, kind = "", "torch.nn.modules.module.Module"
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
