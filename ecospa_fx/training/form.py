"""The model as a graph that is captured once and rewritten for one plan after another.

Every shrink applies the whole plan to a fresh copy of the captured graph, so that rewrites never pile up, and puts the
result into the modules that are there: whoever holds a submodule, a parameter or a compiled layer goes on holding it.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from ecospa_fx.axes.flow import flow
from ecospa_fx.coupling.couplings import Couplings, parameter_shapes
from ecospa_fx.coupling.find import find_couplings
from ecospa_fx.errors import CaptureError
from ecospa_fx.graph.capture import capture
from ecospa_fx.graph.modes import follow_modes
from ecospa_fx.graph.program import ExportedForm
from ecospa_fx.graph.restore import restore
from ecospa_fx.plan import Plan
from ecospa_fx.verify import masked_error

log = logging.getLogger(__name__)

_SAME = {torch.float16: 0.05, torch.bfloat16: 0.05}
"""Largest relative difference that rounding may make between two ways to compute the same; 1e-3 in other types."""

_OWN = ("_modules", "_parameters", "_buffers", "training", "_compiled_call_impl")
"""What a module keeps when it gets another graph, besides its hooks."""


class GraphForm:
    """A captured model, its couplings, and the module that computes it.

    module: the model in graph form, sharing its parameters; couplings: of the dense model.
    """

    def __init__(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self._model, self._args, self._kwargs = model, tuple(args), dict(kwargs)
        self._exported = _captured(model, self._args, self._kwargs)
        self.shapes = parameter_shapes(model)
        self.parameters = dict(model.named_parameters())
        program = self._program()
        walked = flow(program.graph, program.parameters, program.shapes, program.sizes)
        self.couplings = Couplings((f.coupling for f in find_couplings(walked, self.shapes)), model)
        self.module = self._restored(program)
        _copy_modes(model, self.module)
        self._check_eval()

    def rewrite(self, plan: Plan) -> ExportedForm:
        """The captured graph with a plan applied, for `adopt`. Nothing else changes; raises PlanError."""
        from ecospa_fx.passes.shrink_couplings import shrink_program

        program = self._program()
        shrink_program(program, plan)
        device = next(iter(self.parameters.values())).device
        for name, positions in program.buffers.items():
            program.exported.constants[name] = positions.to(device)
        return program

    def adopt(self, program: ExportedForm, copies: Iterable[nn.Module] = ()) -> int:
        """Let `module`, and copies of it, compute a rewritten graph. Returns how many of its modules changed.

        The parameters must have been cut to the plan's shapes.
        """
        fresh = self._restored(program)
        for tree in copies:
            _transplant(fresh, tree, program.buffers)
        return _transplant(fresh, self.module, program.buffers)

    def _check_eval(self) -> None:
        """Say so where the graph, traced in training mode, is another function than the model in eval mode."""
        if any(p.is_meta for p in self.parameters.values()):
            return
        modes = [(m, m.training) for tree in (self._model, self.module) for m in tree.modules()]
        try:
            trees = self._model.eval(), self.module.eval()
            error = masked_error(*trees, Plan((), tuple(self.shapes.items())), self._args, self._kwargs)
        finally:
            for module, training in modes:
                module.training = training
        if not error < max(_SAME.get(p.dtype, 1e-3) for p in self.parameters.values()):
            log.warning(
                "the model computes something else in eval mode by its own code (relative difference %.1e), and the "
                "model that is trained computes there what it does in training, without dropout: evaluate with care",
                error,
            )

    def _program(self) -> ExportedForm:
        """A copy of the captured program, whose parameters are dense and hold no memory."""
        old, new = self._exported, copy.copy(self._exported)
        new._graph_module = fx.GraphModule(old.graph_module, copy.deepcopy(old.graph))
        for copied, node in zip(new.graph.nodes, old.graph.nodes, strict=True):
            copied.name = node.name  # copying renames what is called like a builtin, and the signature goes by names
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch copies what it has deprecated itself
            new._graph_signature = copy.deepcopy(old.graph_signature)
        new._state_dict, new._constants = dict(old.state_dict), dict(old.constants)
        program = ExportedForm(new, self._model)
        program.shapes = self.shapes
        program.values = {
            name: nn.Parameter(torch.empty(self.shapes[name], dtype=p.dtype, device="meta"), p.requires_grad)
            for name, p in self.parameters.items()
        }
        return program

    def _restored(self, program: ExportedForm) -> nn.Module:
        program.values = dict(self.parameters)
        module = restore(program, self._model, self._args, self._kwargs)
        follow_modes(module)
        return module


def _captured(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedProgram:
    """The model traced in training mode, where probabilities of dropout are known, if that can be traced."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.train()
        return capture(model, args, kwargs, dynamic=True).exported
    except CaptureError as error:
        model.eval()
        program = capture(model, args, kwargs, dynamic=True).exported
        log.warning("the model is trained as it computes in eval mode, without dropout, because %s", error)
        return program
    finally:
        for module, training in modes.items():
            module.training = training


def _copy_modes(model: nn.Module, tree: nn.Module) -> None:
    """Give every module of a tree the mode of its namesake, or of the nearest one above."""
    modes = {path: module.training for path, module in model.named_modules()}
    for path, module in tree.named_modules():
        known = path
        while known not in modes:
            known = known.rpartition(".")[0]
        module.training = modes[known]


def _transplant(fresh: nn.Module, tree: nn.Module, made: Mapping[str, Tensor]) -> int:
    """Give the modules of a tree the graphs of a fresh one. made: buffers that came with these graphs, by name."""
    modules, changed = dict(tree.named_modules()), 0
    for path, new in fresh.named_modules():
        old = modules.get(path)
        if old is None:
            parent, _, name = path.rpartition(".")
            tree.get_submodule(parent).add_module(name, new)
            continue
        prefix = f"{path}." if path else ""
        for name in [n for n in old._buffers if n.startswith("kept_positions_")]:
            del old._buffers[name]
        for name, buffer in new._buffers.items():
            if prefix + name in made:
                old.register_buffer(name, buffer, persistent=False)
        if _code(old) != _code(new):
            _take_over(old, new)
            changed += 1
    return changed


def _take_over(old: nn.Module, new: nn.Module) -> None:
    for key, value in new.__dict__.items():
        if key not in _OWN and not key.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
            old.__dict__[key] = value
    graph = old.__dict__.get("graph")
    if isinstance(graph, fx.Graph):
        graph.owning_module = old  # type: ignore[assignment]  # a module that is no GraphModule, as in unflattening


def _code(module: nn.Module) -> str | None:
    code = getattr(module.__dict__.get("graph_module"), "code", None)
    calls = getattr(module, "_call_modules", None)
    return "\n".join(str(_code(m)) for m in calls) if calls else code
