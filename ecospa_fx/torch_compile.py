"""A backend for torch.compile: the module keeps its dense weights, and what is compiled reads their kept part."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._guards import detect_fake_mode
from torch.export.graph_signature import InputKind

from ecospa_fx.errors import PlanError
from ecospa_fx.inplace.edits import cut
from ecospa_fx.ir.program import ExportedForm
from ecospa_fx.ir.pytrees import Tree
from ecospa_fx.plan import Plan, check_plan
from ecospa_fx.rewrite import shrunk
from ecospa_fx.runtime.lift_parameters import lift_parameters
from ecospa_fx.wrappers import unwrapped

Compiled = Callable[..., Tree]


def backend(
    plan: Plan, *, compiler: str | Compiled = "inductor", model: nn.Module | None = None
) -> Callable[[fx.GraphModule, Sequence[Tree]], Compiled]:
    """A backend for ``torch.compile`` that shrinks what it is given and hands it on to another one.

    plan: of the model that is compiled; compiler: the backend that compiles the smaller graph; model: that model, for
    parameters that have several names or graphs of parts of it. The compiled model equals the masked one. Its
    parameters stay dense: gradients reach what is kept and are 0 elsewhere, and what an optimizer changes is seen;
    while no gradients are taken, the kept parts are copied once. Raises PlanError, which ``torch.compile`` wraps in an
    error of its own, where a graph holds a part of a coupling, or parameters that the plan does not know.

    Examples:
        >>> import torch, ecospa_fx as eco
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 8))
        >>> x = torch.randn(2, 8)
        >>> plan = eco.plan(eco.detect(mlp, (x,)), ratio=0.5, scores="magnitude")
        >>> torch.compile(mlp, backend=eco.backend(plan, compiler="eager"))(x).shape
        torch.Size([2, 8])
    """

    check_plan(plan)
    if not isinstance(compiler, str) and not callable(compiler):
        raise PlanError(f"compiler={compiler!r:.60} is no backend: give the name of one, such as 'inductor'")
    if model is not None and not isinstance(model, nn.Module):
        raise PlanError(f"model={model!r:.60} is not an nn.Module: pass the model that is compiled, or leave it out")
    whole = None if model is None else unwrapped(model)

    def compile_graph(graph: fx.GraphModule, inputs: Sequence[Tree]) -> Compiled:
        twin = fx.GraphModule(graph, copy.deepcopy(graph.graph))  # the tracer calls what it made by the graph it made
        part = _within(plan, _names(graph, twin, inputs, whole), inputs)
        if not part.selections:
            compiled: Compiled = torch._dynamo.lookup_backend(compiler)(graph, list(inputs))
            return compiled
        return _Smaller.of(twin, inputs, part, compiler)

    return compile_graph


# -- what the graph reads ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Input:
    """A parameter that a graph takes as an argument."""

    position: int
    """Where among the arguments."""
    argument: str
    """The name of the argument."""
    parameter: str
    """The name of the parameter in the model."""


def _names(
    graph: fx.GraphModule, twin: fx.GraphModule, inputs: Sequence[object], model: nn.Module | None
) -> list[Input]:
    names = {id(p): name for name, p in reversed(list(model.named_parameters()))} if model is not None else None
    placeholders = graph.graph.find_nodes(op="placeholder")
    result = []
    for i, (node, argument, value) in enumerate(zip(placeholders, _arguments(twin), inputs, strict=True)):
        if isinstance(value, nn.Parameter):
            name = names.get(id(value)) if names is not None else _parameter_name(node)
            result.append(Input(i, argument, name or argument))
    return result


def _arguments(graph: fx.GraphModule) -> list[str]:
    return list(inspect.signature(graph.forward).parameters)


def _parameter_name(node: fx.Node) -> str | None:
    """The name of a parameter by the way on which the tracer found it, from the module that is compiled."""
    name: Any = getattr(getattr(node, "_dynamo_source", None), "name", "")  # a method before torch 2.12
    parts = re.findall(r"\._(?:modules|parameters)\['([^']+)'\]", name() if callable(name) else name)
    return ".".join(parts) or None


def _within(plan: Plan, names: Sequence[Input], inputs: Sequence[Tree]) -> Plan:
    """The part of a plan that a graph holds, by the names of the graph's arguments."""
    shapes, here = dict(plan.shapes), {entry.parameter: entry.argument for entry in names}
    for entry in names:
        shape = tuple(inputs[entry.position].shape)
        if shapes.get(entry.parameter) != shape:
            raise PlanError(
                f"the compiled graph reads a parameter {entry.parameter!r} of shape {shape}, which the plan does not "
                "have: make the plan for the model that is compiled, and give that as model="
            )
    selections = []
    for selection in plan:
        present = [m.parameter in here for m in selection.members]
        if any(present) and not all(present):
            raise PlanError(
                f"the compiled graph has only a part of coupling {selection.name!r}: let torch.compile capture the "
                "model whole, with fullgraph=True"
            )
        if all(present):
            members = tuple(replace(m, parameter=here[m.parameter]) for m in selection.members)
            selections.append(replace(selection, members=members))
    return Plan(tuple(selections), tuple((entry.argument, shapes[entry.parameter]) for entry in names))


# -- the smaller graph -------------------------------------------------------------------------------------------


class _Smaller:
    """Calls a compiled smaller graph with the kept parts of the dense parameters.

    order: per input of the smaller graph the position of the original's, or a tensor of its own; masks: by position.
    """

    def __init__(self, order: Sequence[int | Tensor], masks: Mapping[int, Tensor]) -> None:
        self.order, self.masks = order, masks
        self.copies: dict[int, tuple[tuple[int, int], Tensor]] = {}
        self.run: Compiled

    @classmethod
    def of(cls, graph: fx.GraphModule, inputs: Sequence[object], plan: Plan, compiler: str | Compiled) -> _Smaller:
        """Shrink and compile a graph. plan: by the names of its arguments."""
        sizes = _read_sizes(graph)
        left = [i for i in range(len(inputs)) if i not in sizes]
        with torch._guards.tracing(None):  # what exporting requires of its example is no guard of the caller's graph
            model, args, kwargs = lift_parameters(graph, [_without_marks(inputs[i]) for i in left], None)
            program = shrunk(model, plan, args, kwargs)
        positions = {name: i for i, name in zip(left, _arguments(graph), strict=True)}
        instance = cls(_order(program, positions, [i for i in left if not isinstance(inputs[i], nn.Parameter)]),
                   {positions[name]: mask for name, mask in plan.masks(model).items()})  # fmt: skip
        small = fx.GraphModule(program.exported.graph_module, program.graph)
        instance.run = torch._dynamo.lookup_backend(compiler)(small, instance.example(inputs))
        return instance

    def __call__(self, *inputs: object) -> Tree:
        return self.run(*self.inputs(inputs))

    def inputs(self, arguments: Sequence[object]) -> list[Tree]:
        """The inputs of the smaller graph."""
        return [self._kept(o, arguments[o]) if isinstance(o, int) else o for o in self.order]

    def example(self, arguments: Sequence[object]) -> list[Tree]:
        """The inputs for a compiler: sizes of weights are numbers, those of other inputs what the tracer made them."""
        mode, inputs = detect_fake_mode(), self.inputs(arguments)
        if mode is None:
            return inputs
        new_flags = [not isinstance(o, int) or o in self.masks for o in self.order]
        return [mode.from_tensor(t, static_shapes=True) if new else t for t, new in zip(inputs, new_flags, strict=True)]

    def _kept(self, position: int, value: Tree) -> Tree:
        mask = self.masks.get(position)
        if mask is None:
            return value
        if torch.is_grad_enabled() and value.requires_grad:
            return _selected(value, mask)
        state = (value.data_ptr(), value._version)
        if position not in self.copies or self.copies[position][0] != state:
            self.copies[position] = (state, cut(value.detach(), mask))
        return self.copies[position][1]


def _order(program: ExportedForm, positions: Mapping[str, int], rest: Sequence[int]) -> list[int | Tensor]:
    """Where each input of a program comes from. positions: of parameters by name; rest: of the other inputs."""
    stored = {**program.exported.constants, **program.exported.state_dict}
    others, order = iter(rest), list[int | Tensor]()
    for spec in program.exported.graph_signature.input_specs:
        name = str(spec.target)
        if spec.kind is InputKind.USER_INPUT:
            order.append(next(others))
        else:
            order.append(positions[name] if spec.kind is InputKind.PARAMETER else stored[name])
    return order


def _without_marks(value: Tree) -> Tree:
    """A parameter as it is, a copy of any other tensor: exporting marks its inputs, which the tracer guards."""
    plain = isinstance(value, Tensor) and not isinstance(value, nn.Parameter)
    return value.detach().clone() if plain else value


def _selected(value: Tensor, mask: Tensor) -> Tensor:
    """What a mask keeps, with gradients."""
    shape = [int(mask.sum(axis).max()) for axis in range(mask.dim())]
    return value[mask].view(shape)


def _read_sizes(graph: fx.GraphModule) -> set[int]:
    """Let a graph read the sizes that it takes as numbers off its tensors. Returns their positions."""
    placeholders = graph.graph.find_nodes(op="placeholder")
    values = [node.meta.get("example_value") for node in placeholders]
    removed = set()
    for i, (node, value) in enumerate(zip(placeholders, values, strict=True)):
        if not isinstance(value, torch.SymInt):
            continue
        for other, tensor in zip(placeholders, values, strict=True):
            axes = [a for a, n in enumerate(tensor.shape) if str(n) == str(value)] if isinstance(tensor, Tensor) else []
            if axes:
                last = placeholders[-1]
                with graph.graph.inserting_after(last):
                    read = graph.graph.call_method("size", (other, axes[0]))
                node.replace_all_uses_with(read)
                graph.graph.erase_node(node)
                removed.add(i)
                break
    graph.recompile()
    return removed
