"""From a graph back to a tree of modules with the names that the user knows."""

from __future__ import annotations

from contextlib import redirect_stdout
from io import StringIO

import torch
from torch import fx, nn

from ecospa_fx.graph.program import ExportedForm


def restore(program: ExportedForm, model: nn.Module) -> nn.Module:
    """The program as a module with the hierarchy, parameter names and mode of `model`.

    Parameters that kept their shape are shared with `model`, not copied; buffers are copied.
    """
    exported = program.exported
    names = {alias: name for name, aliases in _aliases(model).items() for alias in aliases}
    stand_ins = {name: _stand_in(value) for name, value in program.values.items()}
    for name in list(exported.state_dict):
        if name in names:
            exported.state_dict[name] = stand_ins[names[name]]
    _complete_stacks(program.graph)
    exported.graph_module.recompile()
    with redirect_stdout(StringIO()):  # torch 2.13 prints a line per node for some graphs
        module: nn.Module = torch.export.unflatten(exported)
    for alias, name in names.items():
        path, _, attribute = alias.rpartition(".")
        try:
            owner = module.get_submodule(path)
        except AttributeError:
            continue
        if attribute in owner._parameters:
            owner._parameters[attribute] = program.values[name]
    module.train(model.training)
    return module


def _complete_stacks(graph: fx.Graph) -> None:
    """Give every node the modules from the root down; traced graph modules come without the outer ones."""
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if not stack or next(iter(stack.values()))[0] == "":
            continue
        path, kind = next(reversed(stack.values()))
        parts = path.split(".")
        outer = {p: (p, "torch.nn.modules.module.Module") for p in ("", *(".".join(parts[:i]) for i in range(1, len(parts))))}
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

