"""Two oracles for axis rules: removing must equal masking, for whole models and for one operator at a time.

`Case` is a model around one operator with what detection must say about it. `check_exact` shrinks it by random plans
and compares with masking. `check_rule` knows neither couplings nor plans: it walks the graph of a function of
parameters, cuts every dim that is free at random, and compares each node of the cut run with the cut of the dense run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn

import ecospa_fx as eco
from ecospa_fx.axes.call import Value
from ecospa_fx.axes.flow import AxisFlow, analyse
from ecospa_fx.axes.narrowing import DimSelection, Narrowing, slice_of
from ecospa_fx.axes.resize import Resize, Term, find_resize
from ecospa_fx.capture.export import capture
from ecospa_fx.coupling.couplings import Couplings
from ecospa_fx.ir.program import ExportedForm
from ecospa_fx.ir.schema import named_arguments, operator_name
from ecospa_fx.ir.slices import take
from ecospa_fx.verify import masked_error
from tests.support.exported_once import exported_once

EXACT = 1e-9
UNKNOWN = 1_000_003
"""Sizes from here on stand for sizes that the data decides."""
Operation = Callable[..., Any]


class Sandwich(nn.Module):
    """linear → operation → linear over inputs [batch, 3, 6]; parameters of the operation are ``p0``, ``p1``, …"""

    def __init__(self, operation: Operation, shapes: Sequence[tuple[int, ...]] = (), width: int = 8) -> None:
        super().__init__()
        self.up = nn.Linear(6, width)
        self.operation = operation
        self.count = len(shapes)
        for i, shape in enumerate(shapes):
            self.register_parameter(f"p{i}", nn.Parameter(torch.randn(shape)))
        with torch.no_grad():
            out = self.middle(torch.randn(2, 3, 6))
        self.down = nn.Linear(out.shape[-1], 5)

    def middle(self, x: Tensor) -> Tensor:
        result: Tensor = self.operation(self.up(x), *(getattr(self, f"p{i}") for i in range(self.count)))
        return result

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(self.middle(x))
        return result


@dataclass(frozen=True, slots=True)
class Case:
    """A model around one operator.

    operator: it must be in the graph; offers: every offered coupling as "kind size" or "kind size×carriers", sorted,
    joined by commas; blocked: part of the message of some refusal; inputs: shape of the input without the batch.
    """

    operator: str
    build: Callable[[], nn.Module]
    offers: str
    blocked: str = ""
    inputs: tuple[int, ...] = (3, 6)
    label: str = ""

    @property
    def id(self) -> str:
        """How the test is called."""
        return f"{self.operator}{'-' if self.label else ''}{self.label}"


def sandwich(
    operator: str, operation: Operation, offers: str = "ffn 8", blocked: str = "",
    shapes: Sequence[tuple[int, ...]] = (), *, width: int = 8, label: str = "",
) -> Case:  # fmt: skip
    """A case of linear → operation → linear."""
    return Case(operator, lambda: Sandwich(operation, shapes, width), offers, blocked, label=label)


@cache
def prepared(case: Case) -> tuple[nn.Module, tuple[Tensor, ...], Couplings]:
    """The model in float64, an input of batch 2, and what detection finds."""
    torch.manual_seed(0)
    model = case.build().double().eval()
    args = (torch.randn(2, *case.inputs, dtype=torch.float64),)
    return model, args, eco.detect(model, args)


def summary(couplings: Couplings) -> str:
    """Offered couplings in the notation of `Case.offers`."""
    return ", ".join(
        sorted(f"{c.kind} {c.size}" + (f"×{c.carriers}" if c.carriers > 1 else "") for c in couplings.offered)
    )


def operators_of(couplings: Couplings) -> set[str]:
    """Qualified names of the operators in the graph that couplings were detected in."""
    assert couplings.analysis is not None
    graph = next(iter(couplings.analysis.flow.values)).graph
    targets = (node.target for node in graph.nodes)
    return {operator_name(target) for target in targets if isinstance(target, torch._ops.OpOverload)}


def check_literal(case: Case) -> None:
    """Detection says what the case expects."""
    _, _, couplings = prepared(case)
    found = operators_of(couplings)
    assert case.operator in found, f"{case.operator} is not in the graph: {sorted(found)}"
    messages = [c.blocked.message for c in couplings.blocked if c.blocked]
    assert summary(couplings) == case.offers, messages
    assert any(case.blocked in message for message in messages) or not case.blocked, messages
    check_refusals(couplings)


def check_refusals(couplings: Couplings) -> None:
    """Every refusal names operator, node and source line, and ends with what lifts it, or that nothing does."""
    for coupling in couplings.blocked:
        told = coupling.blocked
        assert told is not None
        assert told.operator, told
        assert told.node, told
        assert ".py:" in told.source, told
        assert told.remedy, told
        assert told.message.endswith(f"; {told.remedy}"), told


def check_exact(case: Case, seeds: Sequence[int] = (0,)) -> None:
    """Random plans over everything that is offered give what masking gives, at the example's batch and at twice it."""
    model, args, couplings = prepared(case)
    twice = tuple(torch.cat([a, a.flip(0) * 0.5]) for a in args)
    nothing = eco.Plan((), tuple(couplings.shapes.items()))
    with exported_once():
        for seed in seeds:
            plan = eco.plan(couplings, ratio=0.5, scores="random", seed=seed) if couplings.offered else nothing
            small = eco.shrink(model, plan, args)
            for example in (args, twice):
                error = masked_error(model, small, plan, example)
                assert error <= EXACT, f"seed {seed}: error {error}\n{plan}"
            assert not plan or sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


# -- one rule ----------------------------------------------------------------------------------------------------


class OfParameters(nn.Module):
    """A function of parameters alone; buffers come last."""

    def __init__(self, function: Operation, parameters: Sequence[Tensor], buffers: Sequence[Tensor]) -> None:
        super().__init__()
        self.function, self.names = function, [f"p{i}" for i in range(len(parameters))]
        for name, tensor in zip(self.names, parameters, strict=True):
            self.register_parameter(name, nn.Parameter(tensor.double()))
        for i, tensor in enumerate(buffers):
            self.register_buffer(f"b{i}", tensor)
            self.names.append(f"b{i}")

    def forward(self) -> Any:
        return self.function(*(getattr(self, name) for name in self.names))


def tagged(*shape: int) -> Tensor:
    """Every element is its own flat position, from 1."""
    return torch.arange(1.0, 1.0 + torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)


def check_rule(
    function: Operation,
    parameters: Sequence[Tensor],
    buffers: Sequence[Tensor] = (),
    *,
    masked: bool = True,
    seed: int = 0,
) -> int:
    """The rules of the operators in `function` against the operators themselves. Returns how many dims were cut.

    masked: removed elements are 0 in the dense run, and every flag that says "0 there" is checked; without, elements
    must only be moved.
    """
    program, walked = _walked(function, parameters, buffers)
    kept = _free(walked, seed)
    dense = {name: program.tensor(name).detach() for name in program.shapes}
    small = {name: take(tensor, slice_of(kept, walked.parameters[name].axes)) for name, tensor in dense.items()}
    if masked:
        dense = {name: _masked(tensor, kept, walked.parameters[name]) for name, tensor in dense.items()}
    whole, cut = _run(program, walked, dense, None), _run(program, walked, small, kept)
    for node, value in walked.values.items():
        for one, want, got in zip(_several(value), _several(whole.get(node)), _several(cut.get(node)), strict=True):
            _compare(node, one, want, got, kept, flags=masked)
    return len(kept.choices)


def _walked(
    function: Operation, parameters: Sequence[Tensor], buffers: Sequence[Tensor]
) -> tuple[ExportedForm, AxisFlow]:
    """The graph of a function and its axes, which further seeds of the same function share."""
    key = function, len(parameters), *((t.dtype, t.shape, *t.flatten().tolist()) for t in (*parameters, *buffers))
    if key not in _LAST:
        with torch.no_grad():
            program = capture(OfParameters(function, parameters, buffers), (), None, dynamic=False)
        _LAST.clear()
        _LAST[key] = program, analyse(program)
    return _LAST[key]


_LAST: dict[object, tuple[ExportedForm, AxisFlow]] = {}
"""The last function that was walked."""


def _free(walked: AxisFlow, seed: int) -> Narrowing:
    """Half of every parameter's dim that nothing blocks; being the output is no obstacle here."""
    source = torch.Generator().manual_seed(seed)
    blocked = {blocker.dim for blocker in walked.record.blocks if blocker.node.op != "output"}
    found = {d: None for v in walked.parameters.values() for axis in v.axes for d in axis.dims}
    choices = {}
    for dim in found:
        size = walked.sizes[dim]
        if dim not in blocked and size > 1:
            keep = torch.zeros(size, dtype=torch.bool)
            keep[torch.randperm(size, generator=source)[: (size + 1) // 2]] = True
            choices[dim] = DimSelection((), keep)
    return Narrowing(walked.sizes, choices)


def _masked(tensor: Tensor, kept: Narrowing, value: Value) -> Tensor:
    result = tensor.clone()
    for i in range(len(value.axes)):
        result.index_fill_(i, (~kept.mask(value.axes, i)[0]).nonzero().flatten(), 0)
    return result


def _run(
    program: ExportedForm, walked: AxisFlow, tensors: dict[str, Tensor], kept: Narrowing | None
) -> dict[fx.Node, Any]:
    """Interpret the graph; with `kept`, arguments are resized and stored operands gathered."""
    buffers = program.exported.graph_signature.inputs_to_buffers
    constants = {**dict(program.exported.named_buffers()), **program.exported.constants}
    lifted = program.exported.graph_signature.inputs_to_lifted_tensor_constants
    env: dict[fx.Node, Any] = {}
    for node in program.graph.nodes:
        if node in program.parameters:
            env[node] = tensors[program.parameters[node]]
        elif node.op == "placeholder":
            env[node] = constants[buffers.get(node.name) or lifted[node.name]]
        elif node.op == "call_function":
            env[node] = _call(node, walked, env, kept)
    return env


def _call(node: fx.Node, walked: AxisFlow, env: dict[fx.Node, Any], kept: Narrowing | None) -> Any:
    local = dict(env)
    for gather in walked.record.gathers if kept is not None else ():
        if gather.user is node and kept is not None:
            rows = kept.mask(gather.target, gather.target_axis)[0].nonzero().flatten()
            local[gather.source] = local[gather.source].index_select(gather.operand_axis, rows)
    if kept is not None and isinstance(node.target, torch._ops.OpOverload):
        return _resized(node, walked, kept, local)
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: local[n])
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _resized(node: fx.Node, walked: AxisFlow, kept: Narrowing, env: dict[fx.Node, Any]) -> Any:
    """What the operator gives, or what its resize rule computes instead."""
    arguments, name = named_arguments(node), operator_name(node.target)
    rule, target = find_resize(name), node.target
    nodes = [a for v in arguments.values() for a in _flat(v) if isinstance(a, fx.Node)]
    inputs = [v for n in nodes for v in _several(walked.values.get(n)) if isinstance(v, Value)]
    outputs = [v for v in _several(walked.values[node]) if isinstance(v, Value)]
    resize = Resize(node, name, arguments, (inputs, outputs), kept, _scaled)
    if rule is not None:
        rule(resize)
    if resize.replacement is not None:
        return _computed(resize.replacement, env)
    if resize.results:
        results = [_computed(term, env) for term in resize.results]
        return results if isinstance(node.meta["val"], list | tuple) else results[0]
    assert callable(target)
    return target(**{name: _computed(value, env) for name, value in {**arguments, **resize.edits}.items()})


def _computed(argument: Any, env: dict[fx.Node, Any]) -> Any:
    """A number, a tensor, the value of a node, or what a term computes."""
    if isinstance(argument, fx.Node):
        return env[argument]
    if isinstance(argument, list | tuple):
        return type(argument)(_computed(item, env) for item in argument)
    if not isinstance(argument, Term):
        return argument
    args = [_computed(item, env) for item in argument.arguments]
    return argument.target(*args, **{name: _computed(value, env) for name, value in argument.options.items()})


def _scaled(size: Any, old: int, new: int) -> Any:
    return size // old * new


def _flat(argument: Any) -> Iterator[Any]:
    yield from argument if isinstance(argument, list | tuple) else [argument]


def _several(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _compare(node: fx.Node, value: Any, want: Any, got: Any, kept: Narrowing, *, flags: bool) -> None:
    if not isinstance(value, Value) or not isinstance(want, Tensor) or any(n >= UNKNOWN for n in value.shape):
        return
    assert value.shape == tuple(want.shape), f"{node.name}: the rule says {value.shape}, torch {tuple(want.shape)}"
    expected = take(want, slice_of(kept, value.axes))
    assert expected.shape == got.shape, f"{node.name}: {tuple(got.shape)} where {tuple(expected.shape)} was predicted"
    assert torch.allclose(expected, got, rtol=EXACT, atol=EXACT, equal_nan=True), f"{node.name} differs"
    for i, zero in enumerate(value.zero if flags else ()):
        gone = (~kept.mask(value.axes, i)[0]).nonzero().flatten()
        assert not zero or not want.index_select(i, gone).count_nonzero(), f"{node.name}: axis {i} is not 0 where cut"
