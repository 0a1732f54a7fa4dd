"""What a pass works on: a graph, its parameters by name, and how to change both.

Two forms: an exported program, whose parameters are placeholders, and a graph module, whose parameters are attributes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from copy import copy, deepcopy
from itertools import count
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._guards import detect_fake_mode
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

from ecospa_fx.errors import CaptureError
from ecospa_fx.ir.alias import written
from ecospa_fx.ir.concrete_sizes import concrete_sizes
from ecospa_fx.ir.schema import Sizes
from ecospa_fx.ir.slices import TensorSlice


class Program(ABC):
    """A graph whose parameters can be replaced."""

    graph: fx.Graph
    parameters: Mapping[fx.Node, str]
    """By node the first name of the parameter, so that tied parameters are one."""
    shapes: Mapping[str, tuple[int, ...]]
    """Shapes of the parameters by that name."""
    sizes: Sizes
    """Numbers in place of sizes that are symbols."""
    state: Mapping[fx.Node, str]
    """By node the names of buffers that the graph writes into."""
    stored: Mapping[fx.Node, str]
    """By node the names of buffers."""
    inputs: Collection[fx.Node]
    """The nodes that the caller gives."""
    narrowed: dict[fx.Node, TensorSlice]
    """How inputs and outputs were cut."""
    cut_buffers: dict[str, TensorSlice]
    """How buffers were cut, by name."""

    def narrow_input(self, node: fx.Node, cut: TensorSlice, sizes: Sequence[int | None]) -> None:
        """Let an input be narrower. sizes: per axis, None where it stays as it is."""
        old = node.meta["val"]
        self.narrowed[node] = cut
        shape = [size if new is None else new for size, new in zip(old.shape, sizes, strict=True)]
        with detect_fake_mode([old]) or nullcontext():
            node.meta["val"] = torch.empty(shape, dtype=old.dtype, device=old.device)

    @abstractmethod
    def constant(self, node: fx.Node) -> Tensor | None:
        """What a buffer, or a literal of the model's code, holds; None for any other node."""

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """The parameter of a name."""

    @abstractmethod
    def replace_parameter(self, name: str, tensor: Tensor) -> None:
        """Give a parameter new values of another shape, wherever it is used."""

    @abstractmethod
    def drop_parameter(self, name: str) -> None:
        """Take a parameter that nothing reads out of the program."""

    @abstractmethod
    def buffer(self, name: str) -> Tensor:
        """The buffer of a name."""

    @abstractmethod
    def replace_buffer(self, node: fx.Node, name: str, tensor: Tensor) -> None:
        """Give a buffer, which a node stands for, new values of another shape."""

    @abstractmethod
    def add_buffer(self, module: str, tensor: Tensor) -> fx.Node:
        """A node for a new constant that belongs to a module and moves with it."""


class ExportedForm(Program):
    """An exported program, changed in place; the caller's module is not.

    model: what was exported; whole: the model that it is a part of, by default itself, in whose names parameters go.
    """

    def __init__(self, exported: ExportedProgram, model: nn.Module, whole: nn.Module | None = None) -> None:
        self.exported = exported
        self.graph = exported.graph_module.graph
        self.sizes = concrete_sizes(self.graph)
        first = {id(p): name for name, p in (model if whole is None else whole).named_parameters()}
        named = dict(model.named_parameters(remove_duplicate=False))
        self.names = {alias: first[id(p)] for alias, p in named.items()}
        """By every name that a parameter has in the exported module the first one that it has in the whole."""
        inputs = exported.graph_signature.inputs_to_parameters
        placeholders = {n.name: n for n in self.graph.nodes if n.op == "placeholder"}
        self.parameters = {
            placeholders[node]: self.names[target] for node, target in inputs.items() if target in self.names
        }
        self.values: dict[str, nn.Parameter] = {self.names[alias]: p for alias, p in model.named_parameters()}
        self.shapes = {name: tuple(p.shape) for name, p in self.values.items()}
        self.buffers: dict[str, Tensor] = {}
        buffers = exported.graph_signature.inputs_to_buffers
        self.stored = {placeholders[node]: target for node, target in buffers.items()}
        changed = written(self.graph)
        self.state = {node: name for node, name in self.stored.items() if node in changed}
        specs = exported.graph_signature.input_specs
        self.inputs = [placeholders[spec.arg.name] for spec in specs if spec.kind is InputKind.USER_INPUT]
        self.narrowed, self.cut_buffers = {}, {}

    def frozen(self) -> ExportedForm:
        """The program as it is now, whatever becomes of this one; tensors are shared."""
        twin, exported = copy(self), copy(self.exported)
        exported._graph_signature = deepcopy(self.exported.graph_signature)
        exported._state_dict, exported._constants = dict(self.exported.state_dict), dict(self.exported.constants)
        twin.exported, twin.graph = exported, deepcopy(self.graph)
        nodes = dict(zip(self.graph.nodes, twin.graph.nodes, strict=True))
        for node, copied in nodes.items():
            copied.name = node.name  # a copy avoids names of builtins, and the signature goes by names
        exported._graph_module = fx.GraphModule(self.exported.graph_module, twin.graph)
        exported._graph_module.meta.update(self.exported.graph_module.meta)
        twin.parameters = {nodes[node]: name for node, name in self.parameters.items()}
        twin.stored = {nodes[node]: name for node, name in self.stored.items()}
        twin.state = {nodes[node]: name for node, name in self.state.items()}
        twin.inputs = [nodes[node] for node in self.inputs]
        twin.narrowed = {nodes[node]: cut for node, cut in self.narrowed.items()}
        twin.values, twin.buffers, twin.cut_buffers = dict(self.values), dict(self.buffers), dict(self.cut_buffers)
        return twin

    def constant(self, node: fx.Node) -> Tensor | None:
        literals = self.exported.graph_signature.inputs_to_lifted_tensor_constants
        name = self.stored.get(node) or literals.get(node.name)
        return None if name is None or node.op != "placeholder" else self.buffer(name)

    def buffer(self, name: str) -> Tensor:
        tensors = self.exported.state_dict if name in self.exported.state_dict else self.exported.constants
        value: Tensor = tensors[name]
        return value

    def replace_buffer(self, node: fx.Node, name: str, tensor: Tensor) -> None:
        tensors = self.exported.state_dict if name in self.exported.state_dict else self.exported.constants
        tensors[name] = tensor
        node.meta["val"] = _fake_like(node.meta["val"], tensor)

    def tensor(self, name: str) -> Tensor:
        return self.values[name]

    def replace_parameter(self, name: str, tensor: Tensor) -> None:
        self.values[name] = nn.Parameter(tensor, requires_grad=self.values[name].requires_grad)
        for node, stored in self.parameters.items():
            if stored == name:
                node.meta["val"] = _fake_like(node.meta["val"], tensor)

    def drop_parameter(self, name: str) -> None:
        signature = self.exported.graph_signature
        for node in [n for n, first in self.parameters.items() if first == name]:
            (spec,) = [s for s in signature.input_specs if s.arg.name == node.name]
            signature.input_specs.remove(spec)
            self.exported.state_dict.pop(str(spec.target), None)
            self.graph.erase_node(node)
        self.parameters = {n: first for n, first in self.parameters.items() if first != name}
        self.values.pop(name)

    def add_buffer(self, module: str, tensor: Tensor) -> fx.Node:
        taken = {spec.target for spec in self.exported.graph_signature.input_specs}
        names = (".".join(filter(None, [module, f"kept_positions_{i}"])) for i in count())
        target = next(name for name in names if name not in taken)
        first = next(n for n in self.graph.nodes if n.op == "placeholder")
        with self.graph.inserting_before(first):
            node = self.graph.placeholder("b_" + target.replace(".", "_"))
        node.meta["val"] = _fake_like(_any_fake(self.graph), tensor)
        spec = InputSpec(InputKind.BUFFER, TensorArgument(name=node.name), target, persistent=False)
        self.exported.graph_signature.input_specs.insert(0, spec)
        self.exported.constants[target] = tensor.to(self._device())
        self.buffers[target] = tensor
        return node

    def _device(self) -> torch.device:
        return next((p.device for p in self.values.values()), torch.device("cpu"))


def _any_fake(graph: fx.Graph) -> Tensor:
    example: Tensor = next(n.meta["val"] for n in graph.nodes if isinstance(n.meta.get("val"), Tensor))
    return example


def _fake_like(value: Tensor, tensor: Tensor) -> Tensor:
    """A fake tensor of the mode and device of `value` and the shape and type of `tensor`."""
    mode = detect_fake_mode([value])
    if mode is None:
        return tensor
    with mode:
        fake: Tensor = torch.empty(tuple(tensor.shape), dtype=tensor.dtype, device=value.device)
    return fake


class AttributeForm(Program):
    """A graph module whose parameters are attributes, changed in place."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module, self.graph, self.sizes = module, module.graph, concrete_sizes(module.graph)
        first = {id(p): name for name, p in reversed(list(module.named_parameters()))}
        self.parameters = {}
        stored: dict[fx.Node, str] = {}
        self.stored = stored
        for node in self.graph.nodes:
            if node.op == "call_module" and node.users:
                raise CaptureError(
                    f"node {node.name} calls module {node.target!r}: "
                    "trace it with torch.export, or use ecospa_fx.shrink"
                )
            if node.op == "get_attr":
                value = _attribute(module, str(node.target))
                node.meta.setdefault("val", value)
                if isinstance(value, nn.Parameter):
                    self.parameters[node] = first[id(value)]
                elif isinstance(value, Tensor):
                    stored[node] = str(node.target)
            elif node.op == "call_function" and "val" not in node.meta:
                raise CaptureError(f"node {node.name} has no example value in meta['val']: trace it with torch.export")
        self.shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
        changed = written(self.graph)
        self.state = {node: name for node, name in stored.items() if node in changed}
        self.inputs = [node for node in self.graph.nodes if node.op == "placeholder"]
        self.narrowed, self.cut_buffers = {}, {}

    def constant(self, node: fx.Node) -> Tensor | None:
        name = self.stored.get(node)
        value = None if name is None else _attribute(self.module, name)
        return value if isinstance(value, Tensor) else None

    def buffer(self, name: str) -> Tensor:
        return self.module.get_buffer(name)

    def replace_buffer(self, node: fx.Node, name: str, tensor: Tensor) -> None:
        path, _, attribute = name.rpartition(".")
        setattr(self.module.get_submodule(path), attribute, tensor)
        node.meta["val"] = _fake_like(_any_fake(self.graph), tensor)

    def tensor(self, name: str) -> Tensor:
        return self.module.get_parameter(name)

    def replace_parameter(self, name: str, tensor: Tensor) -> None:
        old = self.module.get_parameter(name)
        new = nn.Parameter(tensor, requires_grad=old.requires_grad)
        for owner in self.module.modules():
            for attribute, value in list(owner._parameters.items()):
                if value is old:
                    owner._parameters[attribute] = new
        for node, stored in self.parameters.items():
            if stored == name:
                node.meta["val"] = _fake_like(_any_fake(self.graph), new)

    def drop_parameter(self, name: str) -> None:
        old = self.module.get_parameter(name)
        for owner in self.module.modules():
            for attribute in [a for a, value in owner._parameters.items() if value is old]:
                del owner._parameters[attribute]
        for node in [n for n, first in self.parameters.items() if first == name]:
            self.graph.erase_node(node)
        self.parameters = {n: first for n, first in self.parameters.items() if first != name}

    def add_buffer(self, module: str, tensor: Tensor) -> fx.Node:
        target = f"kept_positions_{sum(n.startswith('kept_positions_') for n, _ in self.module.named_buffers())}"
        self.module.register_buffer(target, tensor.to(_any_fake(self.graph).device), persistent=False)
        with self.graph.inserting_before(next(iter(self.graph.nodes))):
            node = self.graph.get_attr(target)
        node.meta["val"] = _fake_like(_any_fake(self.graph), tensor)
        return node


def _attribute(module: nn.Module, path: str) -> Any:
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value
