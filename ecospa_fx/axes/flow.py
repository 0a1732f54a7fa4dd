"""The walk: one pass over a graph, a rule per operator, and what all of them learnt together.

This file knows no operator. A node whose operator has no rule blocks every dim that reaches it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from operator import getitem
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ecospa_fx.axes import registry
from ecospa_fx.axes.call import Call
from ecospa_fx.axes.dims import Axis, DimKind, Dims, Misaligned
from ecospa_fx.axes.findings import PRODUCTS, Blocker, Findings, NodeValue, RouteKey, Value, resolved, several
from ecospa_fx.axes.notation import Notation, flow_text
from ecospa_fx.axes.reasons import CACHE, RETURNED, Reason
from ecospa_fx.ir.alias import shares, written, written_by
from ecospa_fx.ir.fixed_numbers import FixedNumbers
from ecospa_fx.ir.program import Program
from ecospa_fx.ir.schema import is_operator, named_arguments, operator_name


@dataclass(frozen=True, slots=True, eq=False)
class AxisFlow:
    """The axes of every tensor of a graph, over dims that are refined no more."""

    sizes: tuple[int, ...]
    """The size of each dim."""
    origins: tuple[DimKind, ...]
    """Where the positions of each dim come from."""
    record: Findings
    """What the rules said about dims."""
    values: dict[fx.Node, NodeValue]
    """What each node gives."""
    parameters: dict[str, Value]
    """Each parameter, by its first name."""

    @property
    def notation(self) -> Notation:
        """Names for the dims, those of parameters first, in their order; see `ecospa_fx.axes.notation`."""
        tensors = [*self.parameters.values(), *(tensor for value in self.values.values() for tensor in several(value))]
        return Notation(self.sizes, self.origins, (axis for tensor in tensors for axis in tensor.axes))

    def __str__(self) -> str:
        return flow_text(self.values, self.parameters, self.record, self.notation)


def analyse(program: Program, allow: Collection[str] = ()) -> AxisFlow:
    """The axes of every tensor of a program.

    allow: see `detect`; with "cache" the inputs that hold one are cut like the buffers that the graph writes into.
    """
    registry.load()
    result = _walked(program, allow)
    caches = _caches(result, program.inputs, written(program.graph)) if "cache" in allow else set()
    return _walked(program, allow, caches) if caches else result


def _walked(program: Program, allow: Collection[str], caches: Collection[fx.Node] = ()) -> AxisFlow:
    """Walk a program, and once more where parameters turn out to be shared. caches: inputs that are cut."""
    first = _Walk(program, allow, caches).run(program.graph, caches)
    shared = _shared(first)
    return _Walk(program, allow, caches, shared).run(program.graph, caches) if shared else first


def _caches(walked: AxisFlow, inputs: Iterable[fx.Node], changed: Collection[fx.Node]) -> set[fx.Node]:
    """Inputs that hold what the model keeps from call to call, where `detect` allows that it gets narrower.

    Their elements become elements of something that activations are multiplied with, and that is returned, or written
    into one of them. changed: nodes into whose memory the graph writes.
    """
    resized = {blocker.dim for blocker in walked.record.resized}
    met = _met(walked.record)
    caches = set()
    for node in inputs:
        dims = {dim for tensor in several(walked.values.get(node)) for axis in tensor.axes for dim in axis.dims}
        wanted = met if node in changed else met & resized
        for gather in walked.record.gathers if dims else ():
            target = gather.target[gather.target_axis].dims
            if gather.joins and dims.intersection(gather.operand.axes[gather.operand_axis].dims):
                caches |= {node} if wanted.intersection(target) else set()
    return caches


def _met(record: Findings) -> set[int]:
    """Dims of tensors that are contracted with others that depend on the input."""
    return {effect.dim for effect in record.events if effect.action in PRODUCTS}


def _shared(walked: AxisFlow) -> frozenset[str]:
    """Parameters that belong to no coupling alone, such as a learnt table of rotations that every layer reads.

    They only ever multiply elementwise, and do so with what different weights made. They are read like something
    stored: kept whole and gathered in each place, so that the places stay apart. Only where something could be cut.
    """
    record = walked.record
    factors = {name for name, places in record.factors.items() if len(places) > 1 and name not in record.bound}
    if not factors:
        return frozenset()
    blocked = {blocker.dim for blocker in record.blocks}
    free = (n for n in factors if any(d not in blocked for axis in walked.parameters[n].axes for d in axis.dims))
    return frozenset(free)


def apply_rule(call: Call) -> Value | list[Value]:
    """What the rule of an operator, or its refusal, makes of a call."""
    rule = registry.find(call.operator)
    refusal = registry.refusal(call.operator)
    result = rule(call) if rule is not None else call.block_all(refusal.why, refusal.remedy)
    if not registry.is_linear(call.operator):
        call.fixes((axis for value in several(result) for axis in value.axes), nonlinear=True)
    return result


def _precision(program: Program) -> torch.dtype | None:
    """The most precise floating type of a parameter."""
    types = {getattr(node.meta.get("val"), "dtype", None) for node in program.parameters}
    floating = [dtype for dtype in types if dtype is not None and dtype.is_floating_point]
    return min(floating, key=lambda dtype: torch.finfo(dtype).eps, default=None)


class _Walk:
    def __init__(
        self,
        program: Program,
        allow: Collection[str],
        caches: Collection[fx.Node],
        shared: Collection[str] = (),
    ) -> None:
        self.shared = shared
        self.state = {*program.state, *caches}
        self.dims, self.record, self.sizes = Dims(), Findings(allow, _precision(program)), program.sizes
        self.names = program.parameters
        self.numbers = FixedNumbers(program.constant)
        self.outputs: list[fx.Node] = []
        self.values: dict[fx.Node, NodeValue] = {}
        self.parameters = {name: self._parameter(name, shape) for name, shape in program.shapes.items()}
        self.record.parameters = self.parameters
        self.aliases: dict[fx.Node, set[fx.Node]] = {}
        self.views: dict[fx.Node, list[fx.Node]] = {}

    def _parameter(self, name: str, shape: tuple[int, ...]) -> Value:
        if name in self.shared:
            axes = tuple(self.dims.fresh(size, DimKind.STORED) for size in shape)
            return Value(axes, (False,) * len(axes))
        axes = tuple(self.dims.fresh(size, DimKind.PARAMETER) for size in shape)
        return Value(axes, (True,) * len(axes), (name,), None, (name,))

    def run(self, graph: fx.Graph, inputs: Collection[fx.Node]) -> AxisFlow:
        for node in graph.nodes:
            if node.op == "output":
                self.outputs.append(node)
            elif node in self.names:
                self.values[node] = replace(self.parameters[self.names[node]], node=node)
            elif node.op == "call_function":
                self._call(node)
            else:
                self.values[node] = self._given(node)
        self._tie_routes()
        for node in self.outputs:
            self._returned(node)
        for node in inputs:
            narrower = Reason("an input gets narrower", "")
            self.record.resized += [Blocker(dim, node, narrower, node) for dim in self._cuttable(node)]
        return self._resolved()

    def _resolved(self) -> AxisFlow:
        """What the walk has learnt, once no dim is refined any more."""
        values = {
            node: [resolved(v, self.dims) for v in value]
            if isinstance(value, list)
            else value and resolved(value, self.dims)
            for node, value in self.values.items()
        }
        parameters = {name: resolved(value, self.dims) for name, value in self.parameters.items()}
        findings = self.record.resolved(self.dims)
        return AxisFlow(tuple(self.dims.sizes), tuple(self.dims.origins), findings, values, parameters)

    def _tie_routes(self) -> None:
        """Axes that the same rows belong to, by the same key, are the same index set."""
        axes: dict[tuple[tuple[int, ...], RouteKey], Axis] = {}
        for route in self.record.routed:
            first = axes.setdefault((self.dims.root_dims(route.dim), route.key), route.axis)
            if first.size == route.axis.size:
                with suppress(Misaligned):
                    self.dims.unify(first, route.axis)

    # -- nodes -----------------------------------------------------------------------------------------------

    def _given(self, node: fx.Node) -> NodeValue:
        """An input, a buffer, a constant."""
        shapes = self._shapes(node)
        if not isinstance(node.meta.get("val"), torch.Tensor):
            return None
        origin = DimKind.BLANK if node in self.state else DimKind.STORED
        axes = tuple(self.dims.fresh(size, origin) for size in shapes[0])
        return Value(axes, (False,) * len(axes), (), node)

    def _shapes(self, node: fx.Node) -> list[tuple[int, ...]]:
        result = node.meta.get("val")
        tensors = result if isinstance(result, list | tuple) else [result]
        return [tuple(self.sizes(s) for s in t.shape) for t in tensors if isinstance(t, torch.Tensor)]

    def _call(self, node: fx.Node) -> None:
        if not is_operator(node):
            self._python(node)
            return
        arguments = {name: self._value(a) for name, a in named_arguments(node).items()}
        before = len(self.record.gathers)
        call = self._apply(node, operator_name(node.target), arguments)
        self._block_twice_read(node, call, before)
        self._alias(node, call, before)

    def _apply(self, node: fx.Node, operator: str, arguments: dict[str, Any]) -> Call:
        """Let the operator's rule speak, or its refusal, and keep what comes out."""
        call = Call(node, operator, arguments, self._shapes(node), self.dims, self.record, self.numbers)
        result: NodeValue = apply_rule(call)
        listed = isinstance(node.meta.get("val"), list | tuple)
        if isinstance(result, list) and not listed:
            result = result[0] if result else None
        elif listed and isinstance(result, Value):
            result = [result]
        self.values[node] = result
        return call

    def _python(self, node: fx.Node) -> None:
        """Picking one of several outputs, arithmetic on sizes, or something that is no operator."""
        source, position = node.args[:2] if len(node.args) > 1 else (None, None)
        listed = isinstance(source, fx.Node) and isinstance(self.values.get(source), list)
        if node.target is getitem and isinstance(source, fx.Node) and isinstance(position, int) and listed:
            picked = self._tensors_of(source)[position]
            self.values[node] = picked if picked is None else replace(picked, node=node)
            self._follow_views(node)
            return
        if any(isinstance(self.values.get(n), Value | list) for n in node.all_input_nodes):
            operator = str(getattr(node.target, "__name__", node.target))
            arguments = {str(i): self._value(a) for i, a in enumerate((*node.args, *node.kwargs.values()))}
            self._apply(node, operator, arguments)
        else:
            self.values[node] = None

    def _tensors_of(self, node: fx.Node) -> list[Value | None]:
        """The outputs of a node in their places; a place that holds no tensor is None."""
        values = iter(several(self.values[node]))
        return [next(values) if isinstance(t, torch.Tensor) else None for t in node.meta["val"]]

    def _value(self, argument: object) -> Any:
        if isinstance(argument, fx.Node):
            value = self.values.get(argument)
            if value is not None:
                return value
            size = argument.meta.get("val")
            return self.sizes(size) if isinstance(size, int | torch.SymInt) else size
        if isinstance(argument, list | tuple):
            return [self._value(a) for a in argument]
        return argument

    def _block_twice_read(self, node: fx.Node, call: Call, before: int) -> None:
        """A stored tensor that one call reads in several places is reduced for all of them alike, or not at all."""
        gathers = self.record.gathers[before:]
        for source in dict.fromkeys(g.operand.node for g in gathers):
            places = sum(a is source for a in pytree.tree_leaves((node.args, node.kwargs)))
            wanted = Counter((g.operand_axis, self.dims.resolve(g.target[g.target_axis])) for g in gathers
                             if g.operand.node is source)  # fmt: skip
            if places > 1 and any(count != places for count in wanted.values()):
                for _, axis in wanted:
                    why = "it meets a stored tensor that is read here in another place too"
                    call.block(axis, why, "pass a clone of that tensor in one of the places")

    # -- memory ----------------------------------------------------------------------------------------------

    def _alias(self, node: fx.Node, call: Call, gathers: int) -> None:
        """Follow views, and let what is written in place be known to every view of the same memory."""
        self._follow_views(node)
        for argument in written_by(node):
            if argument is not node.args[0]:
                why = f"{argument.name} is written into, which is not the operator's first argument"
                call.block_all(why, "write into the first argument, or into a new tensor")
            self._written(node, argument, call, gathers)

    def _follow_views(self, node: fx.Node) -> None:
        sources = shares(node)
        if sources:
            self.aliases[node] = set().union(*(self._bases(source) for source in sources))
            for base in self.aliases[node]:
                self.views.setdefault(base, [base]).append(node)

    def _bases(self, node: fx.Node) -> set[fx.Node]:
        return self.aliases.get(node, {node})

    def _written(self, node: fx.Node, argument: fx.Node, call: Call, gathers: int) -> None:
        memory = self._bases(argument)
        for gather in self.record.gathers[gathers:]:
            source = gather.source
            if source is argument or not self.aliases.get(source, set()).isdisjoint(memory):
                remedy = "write into a registered buffer, which is cut along, or into a new tensor"
                call.block(gather.target[gather.target_axis], "it is written into a tensor that is not cut", remedy)
        new = self.values[node]
        first = argument is node.args[0]
        for view in dict.fromkeys(view for base in memory for view in self.views.get(base, [base])):
            old = self.values.get(view)
            if not isinstance(old, Value) or view is node:
                continue
            same = new if isinstance(new, Value) and first and view is argument else None
            zero = same.zero if same is not None else (False,) * len(old.axes)
            self.values[view] = replace(old, zero=zero, weights=(), sorting=None)

    def _returned(self, node: fx.Node) -> None:
        """What the caller gets is not cut, but for caches where that is allowed."""
        allowed = "cache" in self.record.allow
        met = {
            root
            for effect in self.record.events
            if effect.action in PRODUCTS
            for root in self.dims.root_dims(effect.dim)
        }
        for source in dict.fromkeys(node.all_input_nodes):
            for dim in self._cuttable(source):
                if dim in met and allowed:
                    self.record.resized.append(Blocker(dim, node, Reason("an output gets narrower", ""), source))
                else:
                    reason = Reason("it is part of the model's output", CACHE if dim in met else RETURNED)
                    self.record.blocks.append(Blocker(dim, node, reason, source))

    def _cuttable(self, node: fx.Node) -> list[int]:
        """The dims of a node's tensors that are not stored."""
        dims = (d for value in several(self.values.get(node)) for axis in value.axes for d in self.dims.dims_of(axis))
        return [d for d in dims if self.dims.origins[d] is not DimKind.STORED]
