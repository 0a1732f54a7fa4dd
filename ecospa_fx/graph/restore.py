"""From a graph back to a tree of modules with the names that the user knows."""

from __future__ import annotations

import torch
from torch import nn

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
    exported.graph_module.recompile()
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

