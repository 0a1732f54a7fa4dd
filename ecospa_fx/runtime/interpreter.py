"""Running a captured program on real values, some nodes at a time.

Unlike a call of the module, the caller sees every value on the way, can leave off anywhere, and can go on with other
values in place of those that were computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ecospa_fx.errors import InputError
from ecospa_fx.ir.modes import evaluation_arguments
from ecospa_fx.ir.program import ExportedForm
from ecospa_fx.ir.pytrees import Tree, copied
from ecospa_fx.ir.schema import is_operator, schema_of
from ecospa_fx.runtime.part import Part
from ecospa_fx.runtime.part_calling import Calling, PartCalling
from ecospa_fx.runtime.signature import call_adapter

NodeValues = dict[fx.Node, Any]
"""What nodes have computed."""


class PartialInterpreter:
    """Runs the nodes of one program in evaluation mode, whatever mode it was captured in.

    model, args, kwargs: what the program was captured from. Of a part, calls and what they return are those of the
    whole model, which runs around it.
    """

    def __init__(
        self, program: ExportedForm, model: nn.Module | Part, args: Sequence[object], kwargs: Mapping[str, object]
    ) -> None:
        self.program = program
        nodes = list(program.graph.nodes)
        self.order = [node for node in nodes if node.op == "call_function"]
        """The nodes that compute, in the order of the graph."""
        (self.output,) = (node for node in nodes if node.op == "output")
        self._calling = _calling(program, model, args, kwargs)
        self.overwrites = any(_overwrites(node) for node in self.order)
        """Whether some node changes a value that another one has computed."""
        self.instead: Mapping[fx.Node, Callable[[NodeValues], object]] = {}
        """What is computed in place of a node's operator, from the values that the node reads."""
        self._arguments = {node: evaluation_arguments(node) for node in self.order}
        self._last: dict[fx.Node, int] = {}
        for place, node in enumerate(self.order):
            for read in node.all_input_nodes:
                self._last[read] = place
        written = program.inputs if self.overwrites else ()  # what the graph may write into is read at the end
        for read in (*self.output.all_input_nodes, *written):
            self._last[read] = len(self.order)
        self._place = {node: place for place, node in enumerate(self.order)}

    def start(self, args: Sequence[object], kwargs: Mapping[str, object]) -> NodeValues:
        """The values that a call of the dense model begins with, but for the parameters: arguments and buffers.

        All that the graph may write into is copied, so that a call can be repeated.
        Raises InputError where the graph does not hold for these arguments.
        """
        arguments = copied((tuple(args), dict(kwargs)))
        try:
            leaves = self._calling.flat(*arguments)
        except TypeError as error:
            raise InputError(f"the call of a batch is not that of the example: {error}") from error
        values: NodeValues = dict(zip(self.program.inputs, leaves, strict=True))
        program, lifted = self.program, self.program.exported.graph_signature.inputs_to_lifted_tensor_constants
        for node in program.graph.nodes:
            if node.op != "placeholder" or node in values or node in program.parameters:
                continue
            if node in program.stored:
                buffer = program.buffer(program.stored[node])
                values[node] = buffer.clone() if node in program.state else buffer
            elif node.name in lifted:
                values[node] = program.exported.constants[lifted[node.name]]
            else:
                values[node] = self._added(node)
        return values

    def weights(self) -> NodeValues:
        """The parameters as they are now, without gradients."""
        return {node: self.program.tensor(name).detach() for node, name in self.program.parameters.items()}

    def _added(self, node: fx.Node) -> Tensor:
        """A constant that a pass has added."""
        exported = self.program.exported
        (spec,) = (s for s in exported.graph_signature.input_specs if getattr(s.arg, "name", None) == node.name)
        constant: Tensor = exported.constants[str(spec.target)]
        return constant

    def run(self, nodes: Iterable[fx.Node], values: NodeValues) -> None:
        """Compute nodes, given in the order of the graph, into `values`; what nothing reads any more is dropped."""
        for node in nodes:
            values[node] = self._computed(node, values)
            place = self._place[node]
            for read in {node, *node.all_input_nodes}:
                if self._last.get(read, -1) <= place:
                    values.pop(read, None)

    def _computed(self, node: fx.Node, values: NodeValues) -> object:
        if node in self.instead:
            return self.instead[node](values)
        args, kwargs = fx.node.map_arg(self._arguments[node], values.__getitem__)
        target: Any = node.target
        return target(*args, **kwargs)

    def answer(self, args: Sequence[object], kwargs: Mapping[str, object]) -> Tree:
        """What the module returns for these arguments, which stay as they are."""
        values = {**self.start(args, kwargs), **self.weights()}
        self.run(self.order, values)
        return self.returned(values, args, kwargs)

    def returned(self, values: NodeValues, args: Sequence[object], kwargs: Mapping[str, object]) -> Tree:
        """What the module returns for these arguments, which stay as they are, once all nodes have run."""
        leaves: Any = fx.node.map_arg(self.output.args[0], values.__getitem__)
        arguments = copied((tuple(args), dict(kwargs)))
        if self.overwrites and self._calling.stateful:  # objects among the arguments come back as the graph left them
            for node, leaf in zip(self.program.inputs, self._calling.flat(*arguments), strict=True):
                if isinstance(leaf, Tensor):
                    leaf.detach().copy_(values[node])
        return self._calling.returned(list(leaves), *arguments)


def _calling(
    program: ExportedForm, model: nn.Module | Part, args: Sequence[object], kwargs: Mapping[str, object]
) -> Calling:
    """How a program is called, or the whole model around it."""
    if not isinstance(model, Part):
        return call_adapter(program, model, args, kwargs)
    graph = call_adapter(program, model.module, model.args, model.kwargs)
    return PartCalling(model, graph) if model.path else graph


def _overwrites(node: fx.Node) -> bool:
    return is_operator(node) and schema_of(node).is_mutable


def detached(value: object) -> Any:
    """A value without its history; sizes and other constants as they are."""
    if isinstance(value, list | tuple):
        return type(value)(detached(item) for item in value)
    return value.detach() if isinstance(value, torch.Tensor) else value
