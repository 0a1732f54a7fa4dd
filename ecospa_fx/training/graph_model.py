"""The model in training as an FX graph: captured once, and rewritten for one pruning plan after another.

Every shrink applies the whole plan to a fresh copy of the captured graph, so that rewrites never pile up, and puts the
result into the modules that are there: whoever holds a submodule, a parameter or a compiled layer goes on holding it.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.nn.modules.batchnorm import _NormBase

from ecospa_fx.capture.export import capture, captures
from ecospa_fx.coupling.couplings import Couplings, parameter_shapes
from ecospa_fx.coupling.detection import detected
from ecospa_fx.coupling.types import Coupling
from ecospa_fx.errors import CaptureError, PlanError
from ecospa_fx.ir.passes import run_passes
from ecospa_fx.ir.program import ExportedForm
from ecospa_fx.ir.slices import TensorSlice, take_more
from ecospa_fx.module_modes import copy_modes, modes_restored
from ecospa_fx.passes import TRAINING_CLEANUP
from ecospa_fx.passes.shrink.shrink_couplings import shrink_program
from ecospa_fx.plan import Plan
from ecospa_fx.planning import plan as make_plan
from ecospa_fx.rewrite import fitted
from ecospa_fx.runtime.interpreter import PartialInterpreter
from ecospa_fx.runtime.restore import restore
from ecospa_fx.training.module_tree import (
    TwoModes,
    add_eval_mode,
    adopt_graphs,
    by_path,
    modules_by_path,
    record_paths,
    share_tensors,
    tensors_by_path,
)
from ecospa_fx.verify import masked_error

log = logging.getLogger(__name__)


class ShrinkableGraph:
    """A captured model, its couplings, and the module that computes it.

    module: the model in graph form, sharing its parameters; couplings: what `detect` finds in the dense model, of which
    those in `chosen` will be shrunk, as `choose` says. allow: see `detect`. Raises what these and `shrink` raise.
    """

    def __init__(
        self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], allow: str | Iterable[str] = (),
        choose: Callable[[Couplings], list[Coupling]] = lambda couplings: list(couplings.offered),
    ) -> None:  # fmt: skip
        self._model, self._args, self._kwargs = model, tuple(args), dict(kwargs)
        self.shapes = parameter_shapes(model)
        self.parameters = dict(model.named_parameters())
        self.names = frozenset(tensors_by_path(model))  # a view of keys would keep the tensors alive
        training = True  # where probabilities of dropout are known
        try:
            self.couplings = self._detected(allow, training)
        except CaptureError as error:
            training = False
            self.couplings = self._detected(allow, training)
            log.warning("the model is trained as it computes in eval mode, without dropout, because %s", error)
        self.chosen = choose(self.couplings)
        names = {c.name for c in self.chosen}
        self._trial = make_plan(self.couplings.select(predicate=lambda c: c.name in names), 0.5, "random")
        self._exported, self._cut = [self._captured(training)], dict[str, TensorSlice]()
        self.module = self._restored(_cleaned(self._program(self._exported[0])))
        copy_modes(modules_by_path(model), self.module)
        if self._eval_difference() > self._rounding:
            self._add_eval()

    @property
    def sizes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters as they are now."""
        return {name: tuple(parameter.shape) for name, parameter in self.parameters.items()}

    def rewrite(self, plan: Plan) -> list[ExportedForm]:
        """The captured graphs with a plan applied, cleaned up, for `adopt`. Nothing else changes; raises PlanError."""

        programs = [self._program(exported) for exported in self._exported]
        device = next(iter(self.parameters.values())).device
        for program in programs:
            shrink_program(program, plan, fold=False)
            for name, positions in program.buffers.items():
                program.exported.constants[name] = positions.to(device)
            _cleaned(program)
        return programs

    def evaluator(self, plan: Plan, values: Mapping[str, Tensor]) -> PartialInterpreter:
        """What computes the model in eval mode with a plan applied, on values of the plan's shapes."""
        program = self.rewrite(plan)[-1]
        program.values = {name: nn.Parameter(value.detach(), False) for name, value in values.items()}
        return PartialInterpreter(program, self._model, self._args, self._kwargs)

    def adopt(self, programs: Sequence[ExportedForm], copies: Iterable[nn.Module] = ()) -> int:
        """Let `module`, and copies of it, compute rewritten graphs. Returns how many of its modules changed.

        The parameters must have been cut to the plan's shapes.
        """
        changed = 0
        copies = tuple(copies)
        for tree in (self.module, *copies):
            self._cut_buffers(tree, programs[0])
        self._cut = dict(programs[0].cut_buffers)
        for index, program in enumerate(programs):
            fresh = self._restored(program)
            for tree in copies:
                adopt_graphs(fresh, tree.in_eval if index and isinstance(tree, TwoModes) else tree, program.buffers)
            tree_of_mode = self.module.in_eval if index and isinstance(self.module, TwoModes) else self.module
            changed += adopt_graphs(fresh, tree_of_mode, program.buffers)
        return changed

    def rebuilt(self, programs: Sequence[ExportedForm]) -> nn.Module:
        """A new tree of a rewritten graph, whose parameters have the new shapes and no memory."""
        (program,) = programs
        tree = self._restored(program, dict(program.values))
        copy_modes(modules_by_path(self.module), tree)
        share_tensors(self.module, tree, "_buffers")
        self._cut_buffers(tree, program)
        self._cut = dict(program.cut_buffers)
        return tree

    def _cut_buffers(self, tree: nn.Module, program: ExportedForm) -> None:
        """Cut what a tree has in buffers that the graph writes into, as they are now."""
        for name, cut in program.cut_buffers.items():
            path, _, attribute = name.rpartition(".")
            owner = by_path(tree)[path]
            dense = self._model.get_buffer(name).shape
            owner._buffers[attribute] = take_more(owner.get_buffer(attribute), self._cut.get(name, ()), cut, dense)
        if isinstance(tree, TwoModes):
            share_tensors(tree, tree.in_eval, "_buffers")

    def forget(self) -> None:
        """Let go of the memory of the parameters from before sharding: only their names and shapes are needed."""
        self._model.to("meta")
        for exported in self._exported:
            for name, tensor in exported.state_dict.items():
                if isinstance(tensor, nn.Parameter):
                    exported.state_dict[name] = nn.Parameter(torch.empty_like(tensor, device="meta"))

    # -- eval mode ---------------------------------------------------------------------------------------------

    @property
    def _rounding(self) -> float:
        """Largest relative difference that rounding may make between two ways to compute the same."""
        half = any(p.dtype in (torch.float16, torch.bfloat16) for p in self.parameters.values())
        return 0.05 if half else 1e-3

    def _eval_difference(self) -> float:
        """How far the graph, traced in training mode, is from the model in eval mode."""
        if any(p.is_meta for p in self.parameters.values()):
            return 0.0
        # What is traced in training mode writes statistics.
        statistics = [(b, b.clone()) for b in self.module.buffers() if not b.is_meta]
        try:
            with modes_restored(self._model, self.module):
                trees = self._model.eval(), self.module.eval()
                return masked_error(*trees, Plan((), tuple(self.shapes.items())), self._args, self._kwargs)
        finally:
            for buffer, before in statistics:
                buffer.copy_(before)

    def _add_eval(self) -> None:
        """Trace the model in eval mode too, where its own code asks for the mode; say so where that does not help."""
        with suppress(PlanError):
            self._exported.append(self._captured(training=False, both_modes=False))
            add_eval_mode(self.module, self._restored(_cleaned(self._program(self._exported[-1]))))
        difference = self._eval_difference()
        if difference > self._rounding:
            log.warning(
                "the model that is trained computes something else in eval mode than the one it was made from "
                "(relative difference %.1e): evaluate with care",
                difference,
            )

    # -- programs ----------------------------------------------------------------------------------------------

    def _detected(self, allow: str | Iterable[str], training: bool) -> Couplings:
        """What `detect` finds in a mode."""
        with self._mode(training):
            return detected(capture(self._model, self._args, self._kwargs, dynamic=False), self._model, allow)

    def _captured(self, training: bool, both_modes: bool = True) -> ExportedProgram:
        """The model traced in a mode, with as many symbolic sizes as the couplings allow. Raises PlanError."""
        traced: dict[ExportedForm, ExportedProgram] = {}

        def copies() -> Iterator[ExportedForm]:
            for form in captures(self._model, self._args, self._kwargs, dynamic=True, both_modes=both_modes):
                copied = self._program(form.exported)
                traced[copied] = form.exported
                yield copied

        with self._mode(training):
            return traced[fitted(copies(), self._trial)]

    @contextmanager
    def _mode(self, training: bool) -> Iterator[None]:
        frozen = [m for m in self._model.modules() if isinstance(m, _NormBase) and not m.training]
        with modes_restored(self._model):
            freezes = training and self._model.training
            self._model.train(training)
            for module in frozen if freezes else ():  # the user froze its statistics
                module.eval()
            yield

    def _program(self, old: ExportedProgram) -> ExportedForm:
        """A copy of a captured program, whose parameters are dense and hold no memory."""
        new = copy.copy(old)
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

    def _restored(self, program: ExportedForm, values: dict[str, nn.Parameter] | None = None) -> nn.Module:
        program.values = dict(self.parameters) if values is None else values
        return record_paths(restore(program, self._model, self._args, self._kwargs))


def _cleaned(program: ExportedForm) -> ExportedForm:
    """The program, with what capture and shrinking left in the way of fast kernels cleaned up in place."""

    run_passes(program.exported.graph_module, TRAINING_CLEANUP)
    return program
