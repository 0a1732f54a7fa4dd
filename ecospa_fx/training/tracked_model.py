"""Keeps optimizer states, averaged copies and wrappers (DDP) consistent with the model when its parameters are cut."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ecospa_fx.errors import TrainingError
from ecospa_fx.importance.linalg import regular_inverse, rotated
from ecospa_fx.importance.linear_views import Side
from ecospa_fx.ir.program import ExportedForm
from ecospa_fx.origin import Origin, remember
from ecospa_fx.training.graph_model import ShrinkableGraph
from ecospa_fx.training.module_tree import TwoModes, tensors_by_path
from ecospa_fx.training.optimizer_basis import change_basis_of_states, unsupported_state
from ecospa_fx.training.optimizer_surgery import check_optimizers, check_states, cut_all
from ecospa_fx.training.sharded import (
    assign,
    drop_parameters_of_code,
    full_tensor,
    is_sharded,
    load_cut_parameters,
    replace_in_optimizers,
)
from ecospa_fx.training.tensor_cuts import TensorCut

Wrap = Callable[[nn.Module], nn.Module]


class TrackedModel:
    """A model in graph form, with everything else that refers to its parameters.

    model: what the loop calls; optimizers: whose states are cut; backwards: passes seen since it was last set to 0.
    """

    def __init__(self, form: ShrinkableGraph, wrap: Wrap | None) -> None:
        self.form, self._wrap = form, wrap
        self.optimizers: tuple[Optimizer, ...] = ()
        self._copies: list[Mapping[str, Tensor]] = []
        self._trees: list[nn.Module] = []
        self.backwards = 0
        self.model = self._wrapped()
        self.sharded = is_sharded(form.module.parameters())
        if self.sharded:
            self._begin_sharded()

    # -- who takes part ----------------------------------------------------------------------------------------

    def attach(self, optimizers: Sequence[Optimizer]) -> None:
        """Name the optimizers. Raises TrainingError for parameters of another model."""
        copies = [tensor for copy in self._copies for tensor in copy.values()]
        check_optimizers(optimizers, [*self.form.parameters.values(), *copies])
        self.optimizers = tuple(optimizers)

    def follow(self, copy: nn.Module | Mapping[str, Tensor]) -> None:
        """Name a copy of the parameters. Raises TrainingError for other names, or other shapes, than they have."""
        if self.sharded:
            raise TrainingError("copies cannot follow where parameters are sharded: make them after the last shrink")
        copy = self._inner(copy) if isinstance(copy, nn.Module) else copy
        named = tensors_by_path(copy) if isinstance(copy, nn.Module) else dict(copy)
        strange = sorted(named.keys() - self.form.names - tensors_by_path(self.form.module).keys())
        if strange or not named:
            reason = f"{strange[0]!r} is not the name of one" if strange else "there is nothing in it"
            raise TrainingError(
                f"this is no copy of the model's parameters because {reason}: give tensors by their names"
            )
        tensors = {name: tensor for name, tensor in named.items() if name in self.form.parameters}
        for name, tensor in tensors.items():
            if tensor.shape != self.form.parameters[name].shape:
                raise TrainingError(
                    f"the copy of parameter {name!r} has shape {tuple(tensor.shape)} instead of "
                    f"{tuple(self.form.parameters[name].shape)}: make it from the model as it is now"
                )
        self._copies.append(tensors)
        if isinstance(copy, type(self.form.module)):
            self._trees.append(copy)

    def remember(self, origin: Origin) -> None:
        """Note on the model and its copies where they come from, for `save`: of two graphs, that of eval mode."""
        if isinstance(self.form.module, TwoModes):
            origin = replace(origin, training=False)
        for tree in (self.form.module, *self._trees):
            remember(tree, origin)

    def _inner(self, copy: nn.Module) -> nn.Module:
        """The copy inside of what is around it, such as `AveragedModel`; itself where there is none."""
        names = self.form.parameters.keys()
        return next((m for m in copy.modules() if names <= tensors_by_path(m).keys()), copy)

    def count_backwards(self, names: Sequence[str]) -> None:
        """Notice every backward pass that reaches one of these parameters; gradients are not looked at."""

        def reached(_: Tensor) -> None:
            self.backwards += 1

        for name in names if not self.sharded else ():
            self.form.parameters[name].register_post_accumulate_grad_hook(reached)  # type: ignore[no-untyped-call]

    # -- cutting -----------------------------------------------------------------------------------------------

    def cut(self, programs: Sequence[ExportedForm], cuts: Mapping[str, TensorCut]) -> int:
        """Cut everything, and let the model compute rewritten graphs. Returns how many of its modules changed.

        Everything that can be refused is refused before anything changes.
        """
        sets: list[Mapping[str, Tensor]] = [self.form.parameters, *self._copies]
        for tensors in sets:
            check_states(self.optimizers, tensors, {n: c for n, c in cuts.items() if n in tensors})
        if self.sharded:
            return self._cut_sharded(programs, cuts)
        self._unwrap()
        for tensors in sets:
            cut_all(self.optimizers, tensors, {n: c for n, c in cuts.items() if n in tensors})
        changed = self.form.adopt(programs, self._trees)
        self.model = self._wrapped()
        return changed

    @torch.no_grad()
    def add(self, changes: Mapping[str, Tensor]) -> None:
        """Add to parameters, and to all copies of them, by name."""
        for tensors in (self.form.parameters, *self._copies):
            for name in (n for n in changes if n in tensors):  # in one order in all processes
                values = full_tensor(tensors[name])
                assign(tensors[name], values + changes[name].to(values))

    def basis_refusal(self, names: Iterable[str]) -> str | None:
        """Why a change of basis of these parameters cannot be followed, or None."""
        sets = (self.form.parameters, *self._copies)
        listed = list(names)
        parameters = (tensors[name] for tensors in sets for name in listed if name in tensors)
        reasons = (unsupported_state(self.optimizers, parameter) for parameter in parameters)
        return next((reason for reason in reasons if reason is not None), None)

    @torch.no_grad()
    def change_basis(self, sides: tuple[Sequence[Side], Sequence[Side]], basis: Tensor) -> None:
        """Change the basis of parameters and of copies of them, with their gradients and optimizer states.

        The first sides are multiplied by `basis` [carriers, units, units], the second by its inverse transposed.
        """

        inverse = regular_inverse(basis).mT
        for members, matrix, other in ((sides[0], basis, inverse), (sides[1], inverse, basis)):
            for side in members:
                name, axis = side.member.parameter, side.member.axis
                for tensors in (self.form.parameters, *self._copies):
                    if name in tensors:
                        assign(tensors[name], rotated(full_tensor(tensors[name]), axis, side.positions, matrix))
                        change_basis_of_states(self.optimizers, tensors[name], axis, side.positions, other)

    def _cut_sharded(self, programs: Sequence[ExportedForm], cuts: Mapping[str, TensorCut]) -> int:
        old, before = self.form.parameters, self.form.module
        self.form.module = self.form.rebuilt(programs)
        self.model = self._wrapped()
        with torch.no_grad():
            load_cut_parameters(self.form.module, old, cuts)
        self.form.parameters = dict(self.form.module.named_parameters())
        with torch.no_grad():
            replace_in_optimizers(self.optimizers, old, self.form.parameters, cuts)
        self._count_forwards()
        return sum(1 for _ in before.modules())

    def _begin_sharded(self) -> None:
        if isinstance(self.form.module, TwoModes):
            raise TrainingError(
                "a model whose own code asks for its mode cannot be sharded here: its eval graph would not be"
            )
        parameters = dict(self.form.module.named_parameters())
        if parameters.keys() != self.form.parameters.keys():
            strange = min(parameters.keys() ^ self.form.parameters.keys())
            raise TrainingError(
                f"wrap= gives sharded parameters other names ({strange!r}): shard the layers themselves, and put "
                "nothing else around them"
            )
        self.form.parameters = parameters
        self.form.forget()
        drop_parameters_of_code(self.form.module)
        self._count_forwards()

    def _count_forwards(self) -> None:
        """Gradients of sharded parameters come without hooks, so passes forward are counted instead."""

        def called(*_: object) -> None:
            self.backwards += torch.is_grad_enabled()

        self.form.module.register_forward_pre_hook(called)

    # -- what is around the model ------------------------------------------------------------------------------

    def _wrapped(self) -> nn.Module:
        return self.form.module if self._wrap is None else self._wrap(self.form.module)

    def _unwrap(self) -> None:
        """Let go of what is around the model: it may have hooks on the parameters, which must be gone before the next.

        Raises TrainingError where somebody else holds it.
        """
        if self.model is self.form.module:
            return
        reference, self.model = weakref.ref(self.model), self.form.module
        gc.collect()
        left = reference()
        if left is not None:
            self.model = left
            raise TrainingError(
                f"the {type(left).__name__} around the model cannot be made anew, and nothing was removed, because "
                "the loop holds it: use sparse.model each time instead of a variable of its own"
            )
