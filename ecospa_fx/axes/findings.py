"""What the walk knows: the axes of a tensor, and what the rules have said about dims so far."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum, StrEnum
from typing import Literal, TypeVar

import torch
from torch import fx

from ecospa_fx.axes.dims import Axis, Dims
from ecospa_fx.axes.reasons import Reason


@dataclass(frozen=True, slots=True)
class Descent:
    """What a tensor was computed from, as far as labels of couplings ask."""

    learnt: bool = False
    """Whether a parameter enters."""
    picked: bool = False
    """Whether it is matrices of a parameter that computed indices picked."""
    combined: bool = False
    """Whether it is made of parameters alone, by contracting them."""
    products: frozenset[int] = frozenset()
    """Numbers of the products of activations that it is a result of, with no weight contracted since."""


class Order(Enum):
    """What is known of the order of a tensor's numbers."""

    SORTED = "sorted"
    """They ascend."""
    COUNTS = "counts"
    """How often each number occurs among sorted ones."""
    ENDS = "ends"
    """Where the run of each number ends among sorted ones."""


@dataclass(frozen=True, slots=True)
class Sorting:
    """What a tensor's numbers have to do with those that a node sorted."""

    order: Order
    """What they are."""
    node: fx.Node
    """The node that sorted."""


RouteKey = tuple[Literal["node", "runs"], fx.Node | None]
"""What says to which position each row belongs: a node's numbers, or the runs of those that it sorted."""


@dataclass(frozen=True, slots=True)
class Value:
    """One tensor of a graph, as the walk knows it."""

    axes: tuple[Axis, ...]
    """Its axes."""
    zero: tuple[bool, ...]
    """Per axis, whether the positions that masking removes hold exactly 0 in the masked model."""
    weights: tuple[str, ...] = ()
    """The parameters that it is computed from, where nothing else enters."""
    node: fx.Node | None = None
    """The node that made it; None inside a fused operator."""
    makers: tuple[str, ...] = ()
    """The parameters whose products last gave it its values."""
    sorting: Sorting | None = None
    """What is known of the order of its numbers."""
    descent: Descent = Descent()
    """What it was computed from."""
    reads: tuple[int, tuple[int, ...]] | None = None
    """(axis, positions) of the tensor that it is read from, where it is read in a fixed order."""
    factors: tuple[Value, ...] = ()
    """The two activations whose elementwise product it is."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        return tuple(axis.size for axis in self.axes)


NodeValue = Value | list[Value] | None
"""What a node gives: a tensor, several, or nothing that has axes."""


def several(value: NodeValue) -> list[Value]:
    """The tensors that a node gives."""
    return [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, Value)]


@dataclass(frozen=True, slots=True)
class Gather:
    """A stored tensor that meets a parameter's dim, where it must be reduced to the positions that stay."""

    user: fx.Node
    """The node that reads it there."""
    operand: Value
    """The stored tensor."""
    operand_axis: int
    """Which of its axes meets the dim."""
    target: tuple[Axis, ...]
    """The axes that it is aligned with."""
    target_axis: int
    """Which of them the operand's axis meets."""
    joins: bool = False
    """Whether the operand's own elements become elements of the result, as those of a cache do."""

    @property
    def source(self) -> fx.Node:
        """The node that gives the stored tensor."""
        assert self.operand.node is not None  # `Call.gathered` blocks what has none
        return self.operand.node


class Action(StrEnum):
    """What may happen to a dim at a node; the kind and the symmetry of its coupling follow from that."""

    CONTRACTS_PARAMETER = "contracts parameter"
    """Summed over, against a parameter."""
    CONTRACTS_ACTIVATIONS = "contracts activations"
    """Summed over, two activations against one another."""
    CONTRACTS_ONES = "contracts ones"
    """Summed over alone."""
    MULTIPLIED = "multiplied"
    """Multiplied elementwise with something that is no activation."""
    MULTIPLIED_ACTIVATIONS = "multiplied activations"
    """Multiplied elementwise with another activation, as under a gate."""
    BATCHED = "batched"
    """A product of activations is computed for each of its positions."""
    AVERAGED = "averaged"
    """Only one side of a product of activations has it, and the result keeps it."""
    PAIRED = "paired"
    """Its positions go in pairs with those of another axis, as in rotations and complex numbers."""
    NONLINEAR = "nonlinear"
    """A function is applied to each of its positions."""


PRODUCTS = frozenset({Action.CONTRACTS_ACTIVATIONS, Action.AVERAGED, Action.BATCHED})
"""What happens to the dims of tensors that are contracted with others that depend on the input."""


@dataclass(frozen=True, slots=True)
class Effect:
    """What one node does to one dim."""

    dim: int
    """The dim."""
    node: fx.Node
    """The node."""
    action: Action
    """What it does."""


@dataclass(frozen=True, slots=True)
class Product:
    """A contraction of at least two activations."""

    contracted: tuple[Axis, ...]
    """What it sums over."""
    shared: tuple[Axis, ...]
    """Axes that all activations have and the result keeps."""
    single: tuple[tuple[Axis, ...], ...]
    """Per activation the axes that it alone has."""
    learnt: tuple[bool, ...]
    """Per activation whether a parameter enters it."""
    sources: tuple[frozenset[int], ...]
    """Per activation the products that it is a result of."""


@dataclass(frozen=True, slots=True)
class Blocker:
    """A dim that cannot be removed because of a node."""

    dim: int
    """The dim."""
    node: fx.Node
    """The node."""
    reason: Reason
    """Why, and what would lift it."""
    shown: fx.Node
    """The node whose source line says where."""


@dataclass(frozen=True, slots=True)
class FixedBasis:
    """No other basis may be chosen along a dim: something is added there, or a function applied."""

    dim: int
    """The dim."""
    node: fx.Node
    """The node that adds or applies."""
    nonlinear: bool
    """Whether a function is applied."""


@dataclass(frozen=True, slots=True)
class Contraction:
    """Two operands that are contracted over a dim: what turns one side must turn the other back."""

    dim: int
    """The dim."""
    first: tuple[str, ...]
    """Parameters that made the first operand."""
    second: tuple[str, ...]
    """Parameters that made the second operand."""
    apart: bool
    """Whether the two sides were different dims before."""


@dataclass(frozen=True, slots=True)
class Route:
    """Each position of a stored dim belongs to one position of a parameter's axis, as tokens do to experts."""

    dim: int
    """The stored dim."""
    axis: Axis
    """The parameter's axis."""
    key: RouteKey
    """Which position it is: equal keys answer alike."""


@dataclass(frozen=True, slots=True)
class Addition:
    """A sum of which one term is 0 where some parameters are, so that the other one is left."""

    node: fx.Node
    """The sum."""
    stays: fx.Node
    """The term that is left."""
    branch: fx.Node
    """The term that is 0 then."""
    parameters: tuple[str, ...]
    """The parameters that made the branch and hold its last axis, before that meets the other term."""
    axis: Axis
    """That axis; once the walk is over it is the other term's, too."""


ROUNDED = "rounded"
"""In `Findings.allow`: sums in a shorter type than the weights have may be those of fewer numbers.

A plan that was made for a model is applied to copies of it in more precise types too, to prove it there.
"""


class Findings:
    """Everything that the walk learns, beyond the axes themselves."""

    def __init__(self, allow: Collection[str] = (), precision: torch.dtype | None = None) -> None:
        self.allow = frozenset(allow)
        """What may be offered beyond the default: "renormalise", "cache"; see `detect`."""
        self.precision = precision
        """The most precise floating type of a parameter, None where there is none."""
        self.inexact: list[Blocker] = []
        """Like blocks, of what was allowed."""
        self.resized: list[Blocker] = []
        """Where the caller holds a tensor that gets narrower, which was allowed."""
        self.tensors: dict[tuple[Axis, ...], None] = {}
        """Axes of every tensor, those inside fused operators included."""
        self.gathers: list[Gather] = []
        self.events: list[Effect] = []
        self.blocks: list[Blocker] = []
        self.products: list[Product] = []
        self.windows: list[int] = []
        """Dims of taps of kernels that are weights: blocked, and not worth a line unless something else reads them."""
        self.consumed: list[tuple[str, int]] = []
        """(parameter, dim) that an activation is contracted with."""
        self.summed: list[tuple[str, int]] = []
        """(parameter, dim) that the parameter itself is summed over."""
        self.fixed: list[FixedBasis] = []
        self.contractions: list[Contraction] = []
        self.mixed: list[tuple[int, int]] = []
        """(dim, other): along `other`, positions of tensors that carry `dim` were mixed; no carrier of it."""
        self.factors: dict[str, set[tuple[str, ...]]] = {}
        """Per parameter that multiplies something else elementwise: what made the other factors, place by place."""
        self.bound: set[str] = set()
        """Parameters that do more than multiply elementwise: they are contracted or added."""
        self.routed: list[Route] = []
        self.parameters: Mapping[str, Value] = {}
        """The parameters of the graph, by their first names."""
        self.additions: list[Addition] = []

    def resolved(self, dims: Dims) -> Findings:
        """The same in terms of unreplaced dims, for when no dim is refined any more."""
        roots, result = dims.root_dims, Findings(self.allow, self.precision)
        result.inexact, result.resized = _spread(self.inexact, dims), _spread(self.resized, dims)
        result.blocks, result.events = _spread(self.blocks, dims), _spread(self.events, dims)
        result.fixed, result.contractions = _spread(self.fixed, dims), _spread(self.contractions, dims)
        result.tensors = {resolved_axes(axes, dims): None for axes in self.tensors}
        result.gathers = [
            replace(g, operand=resolved(g.operand, dims), target=resolved_axes(g.target, dims)) for g in self.gathers
        ]
        result.products = [_resolved_product(product, dims) for product in self.products]
        result.windows = [root for dim in self.windows for root in roots(dim)]
        result.consumed = [(name, root) for name, dim in self.consumed for root in roots(dim)]
        result.summed = [(name, root) for name, dim in self.summed for root in roots(dim)]
        result.mixed = [(a, b) for dim, other in self.mixed for a in roots(dim) for b in roots(other)]
        result.factors, result.bound = self.factors, self.bound
        result.additions = [replace(a, axis=dims.resolve(a.axis)) for a in self.additions]
        result.routed = [replace(route, axis=dims.resolve(route.axis)) for route in _spread(self.routed, dims)]
        return result


Noted = TypeVar("Noted", Blocker, Contraction, Effect, FixedBasis, Route)


def _spread(notes: Iterable[Noted], dims: Dims) -> list[Noted]:
    """What is noted of a dim, noted of every unreplaced dim that it stands for."""
    result: list[Noted] = []
    for note in notes:
        roots = dims.root_dims(note.dim)
        result += [note] if roots == (note.dim,) else [replace(note, dim=root) for root in roots]
    return result


def resolved_axes(axes: Iterable[Axis], dims: Dims) -> tuple[Axis, ...]:
    """Axes over unreplaced dims."""
    return tuple(map(dims.resolve, axes))


def resolved(value: Value, dims: Dims) -> Value:
    """A tensor with axes over unreplaced dims."""
    axes = resolved_axes(value.axes, dims)
    return value if axes == value.axes and not value.factors else replace(value, axes=axes, factors=())


def _resolved_product(product: Product, dims: Dims) -> Product:
    return replace(
        product,
        contracted=resolved_axes(product.contracted, dims),
        shared=resolved_axes(product.shared, dims),
        single=tuple(resolved_axes(axes, dims) for axes in product.single),
    )
