"""What a graph's operators do at other widths: each call with the shapes that its operands would have.

The axes of every tensor say how its shape follows from the widths of the couplings, and the resize rules say how
arguments follow, so that nothing here knows an operator. Products are the calls of which torch counts FLOPs; what is
inside of higher-order operators is not looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from ecospa_fx.axes.dims import Axis
from ecospa_fx.axes.findings import Value, several
from ecospa_fx.axes.narrowing import DimSelection, Narrowing
from ecospa_fx.axes.resize import Resize, find_resize
from ecospa_fx.coupling.couplings import Analysis, Couplings
from ecospa_fx.errors import PlanError
from ecospa_fx.ir.schema import call_arguments, is_operator, named_arguments, operator_name, tensor_arguments

META = torch.device("meta")

Widths = Mapping[str, int]
"""Units that couplings keep per carrier, by name; a coupling that is not there is whole."""


@dataclass(frozen=True, slots=True)
class Blank:
    """A tensor without its values."""

    shape: tuple[int, ...]
    """Sizes of its axes."""
    dtype: torch.dtype
    """Type of its elements."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One call of an operator on tensors without values; equal operations cost the same."""

    operator: Any
    """An operator of ``torch.ops``."""
    arguments: tuple[tuple[str, object], ...]
    """(name in the schema, value) pairs; lists are tuples, tensors are blanks."""

    @property
    def operands(self) -> list[Blank]:
        """The tensors among the arguments, those in lists included."""
        flat = [item for _, value in self.arguments for item in (value if isinstance(value, tuple) else (value,))]
        return [item for item in flat if isinstance(item, Blank)]

    def filled(self, device: torch.device) -> list[Tensor]:
        """The operands with real values on a device, in order."""
        return [_random(blank, device) for blank in self.operands]

    def on(self, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments with real values on a device: normal ones, ones, or on ``meta`` none at all."""
        return call_arguments(self.operator, {name: _filled(value, device) for name, value in self.arguments})

    def __str__(self) -> str:
        arguments = ", ".join(f"{name}={_shown(value)}" for name, value in self.arguments)
        return f"{self.operator}({arguments})"


def _filled(value: object, device: torch.device) -> object:
    """An argument with real values in place of blanks."""
    if isinstance(value, tuple):
        return [_filled(item, device) for item in value]
    return _random(value, device) if isinstance(value, Blank) else value


def _random(blank: Blank, device: torch.device) -> Tensor:
    if blank.dtype.is_floating_point or blank.dtype.is_complex:
        return torch.randn(blank.shape, dtype=torch.float32, device=device).to(blank.dtype)
    return torch.ones(blank.shape, dtype=blank.dtype, device=device)


def _shown(value: object) -> str:
    if isinstance(value, Blank):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return f"[{', '.join(map(_shown, value))}]" if isinstance(value, tuple) else str(value)


@lru_cache(maxsize=65536)
def flops(operation: Operation) -> int:
    """FLOPs of one call as torch counts them; 0 for what is no product."""
    args, kwargs = operation.on(META)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        try:
            operation.operator(*args, **kwargs)
        except (RuntimeError, IndexError) as error:
            raise PlanError(f"the FLOPs of {operation} cannot be counted: {error}; use budget='parameters'") from error
    return int(counter.get_total_flops())


def _may_be_product(operator: OpOverload) -> bool:
    """Whether torch counts FLOPs of an operator, or of what it is made of."""
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    return operator.overloadpacket in flop_registry or operator.has_kernel_for_dispatch_key(composite)


_CACHE: WeakKeyDictionary[Analysis, NarrowedOps] = WeakKeyDictionary()
"""What was computed for some couplings serves every plan that is made for them."""


class NarrowedOps:
    """The calls of one graph that couplings narrow; nothing is computed before it is asked for."""

    @classmethod
    def of(cls, couplings: Couplings, budget: str) -> NarrowedOps:
        """The calls of the graph that couplings were detected in. Raises PlanError, naming the budget, for none."""
        analysis = couplings.analysis
        if analysis is None:
            raise PlanError(f"budget={budget!r} needs the graph: pass the couplings that detect() returned")
        if analysis not in _CACHE:
            _CACHE[analysis] = cls(analysis)
        return _CACHE[analysis]

    def __init__(self, analysis: Analysis) -> None:
        self._flow, self._sizes = analysis.flow, analysis.sizes
        self._gathered: dict[tuple[fx.Node, fx.Node], list[tuple[int, Axis]]] = {}
        for g in self._flow.record.gathers:
            axis = (g.operand_axis, g.target[g.target_axis])
            self._gathered.setdefault((g.user, g.source), []).append(axis)
        self._located = {x.coupling.name: x for x in analysis.located if x.coupling.blocked is None}
        self._names = {x.dim: name for name, x in self._located.items()}
        self._calls: dict[fx.Node, tuple[str, ...]] | None = None
        self._narrowings: dict[tuple[tuple[str, int], ...], Narrowing] = {}

    @property
    def calls(self) -> Mapping[fx.Node, tuple[str, ...]]:
        """The products that couplings narrow, with the names of these."""
        if self._calls is None:
            narrowed = {n: names for n in self._flow.values if (names := self._narrowing(n))}
            self._calls = {n: names for n, names in narrowed.items() if flops(self.operation(n, {}))}
        return self._calls

    @cached_property
    def flops(self) -> int:
        """Of all products of the graph, whether couplings narrow them or not."""
        products = [
            n
            for n in self._flow.values
            if is_operator(n) and isinstance(n.target, OpOverload) and _may_be_product(n.target)
        ]
        return sum(flops(self.operation(n, {})) for n in products)

    def _narrowing(self, node: fx.Node) -> tuple[str, ...]:
        if not is_operator(node):
            return ()
        operands = [v for n in _tensors(node) for v in several(self._flow.values.get(n))]
        if len(operands) < 2:
            return ()
        values = [*operands, *several(self._flow.values[node])]
        dims = dict.fromkeys(d for v in values for axis in v.axes for d in axis.dims)
        return tuple(self._names[d] for d in dims if d in self._names)

    def size(self, name: str) -> int:
        """Units of a coupling per carrier."""
        return self._located[name].coupling.size

    def operation(self, node: fx.Node, widths: Widths) -> Operation:
        """A call at other widths."""
        kept = self._kept(tuple(sorted((name, width) for name, width in widths.items() if width < self.size(name))))
        arguments = {**named_arguments(node), **self._edits(node, kept)}
        return Operation(
            node.target, tuple((name, self._blank(node, value, kept)) for name, value in arguments.items())
        )

    def _kept(self, widths: tuple[tuple[str, int], ...]) -> Narrowing:
        if widths not in self._narrowings:
            self._narrowings[widths] = Narrowing(self._flow.sizes, self._choices(widths))
        return self._narrowings[widths]

    def _choices(self, widths: Iterable[tuple[str, int]]) -> dict[int, DimSelection]:
        sizes_of, choices = self._flow.sizes, {}
        for name, width in widths:
            entry = self._located[name]
            sizes = [sizes_of[c] for c in entry.carriers]
            keep = torch.arange(sizes_of[entry.dim]) < width  # which ones does not matter to sizes
            choices[entry.dim] = DimSelection(entry.carriers, keep.expand(*sizes, -1))
        return choices

    def _edits(self, node: fx.Node, kept: Narrowing) -> dict[str, Any]:
        """How arguments other than tensors follow."""
        rule = find_resize(operator_name(node.target))
        if rule is None:
            return {}
        inputs = [v for n in _tensors(node) for v in several(self._flow.values.get(n))]
        outputs = several(self._flow.values[node])
        resize = Resize(node, operator_name(node.target), named_arguments(node), (inputs, outputs), kept, _scaled)
        rule(resize)
        return resize.edits

    def _blank(self, user: fx.Node, value: object, kept: Narrowing) -> object:
        """An argument of a call, tensors without their values."""
        if isinstance(value, list | tuple):
            return tuple(self._blank(user, item, kept) for item in value)
        example = value.meta.get("val") if isinstance(value, fx.Node) else value
        if isinstance(example, torch.SymInt):
            return self._sizes(example)
        if not isinstance(value, fx.Node) or not isinstance(example, Tensor):
            return example
        sizes, flow = [self._sizes(size) for size in example.shape], self._flow.values.get(value)
        axes = list(enumerate(flow.axes)) if isinstance(flow, Value) else []
        for i, axis in [*axes, *self._gathered.get((user, value), ())]:
            if kept.changed(axis):
                sizes[i] = kept.count(axis)
        return Blank(tuple(sizes), example.dtype)


def _scaled(size: Any, old: int, new: int) -> int:
    return int(size) * new // old


def _tensors(node: fx.Node) -> list[fx.Node]:
    return [operand for operand in tensor_arguments(node) if isinstance(operand.meta.get("val"), Tensor)]
