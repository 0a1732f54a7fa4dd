"""What the walk knows: the axes of a tensor, and what the rules have said about dims so far."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from ecospa_fx.axes.dims import Axis
from ecospa_fx.axes.reasons import Reason


@dataclass(frozen=True, slots=True)
class Descent:
    """What a tensor was computed from, as far as labels of couplings ask.

    learnt: whether a parameter enters; picked: matrices of a parameter that computed indices picked; combined: made of
    parameters alone, by contracting them; products: numbers of the products of activations that it is a result of, with
    no weight contracted since.
    """

    learnt: bool = False
    picked: bool = False
    combined: bool = False
    products: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Value:
    """The axes of one tensor.

    zero: per axis, whether the positions that masking removes hold exactly 0 in the masked model;
    weights: the parameters it is computed from where nothing else enters; made: the parameters whose products last
    gave it its values; node: the graph node that made it.
    """

    axes: tuple[Axis, ...]
    zero: tuple[bool, ...]
    weights: tuple[str, ...] = ()
    node: Any = None
    made: tuple[str, ...] = ()
    tag: tuple[str, Any] | None = None
    """What its numbers are known to be: ("sorted", node) for what a node sorted, ("counts", node) for how often each
    number occurs there, ("ends", node) for where the run of each number ends."""
    descent: Descent = Descent()
    factors: tuple[Value, ...] = ()
    """The two activations whose elementwise product it is."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        return tuple(axis.size for axis in self.axes)


def several(value: Any) -> list[Value]:
    """The tensors among what a walk holds for one node: a Value, a list of them, or nothing."""
    return [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, Value)]


@dataclass(frozen=True, slots=True)
class Gather:
    """A stored tensor that meets a parameter's dim: where `user` reads it, it must be reduced to the kept positions.

    target: the axes it is aligned with; operand_axis of the operand meets target[target_axis].
    """

    user: Any
    operand: Value
    operand_axis: int
    target: tuple[Axis, ...]
    target_axis: int
    joins: bool = False
    """Whether the operand's own elements become elements of the result, as those of a cache do."""


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
    node: Any
    action: Action


@dataclass(frozen=True, slots=True)
class Product:
    """A contraction of at least two activations.

    contracted: what it sums over; shared: axes that all activations have and the result keeps; single: per activation
    the axes that it alone has; learnt: per activation whether a parameter enters it; sources: per activation the
    products that it is a result of.
    """

    contracted: tuple[Axis, ...]
    shared: tuple[Axis, ...]
    single: tuple[tuple[Axis, ...], ...]
    learnt: tuple[bool, ...]
    sources: tuple[frozenset[int], ...]


@dataclass(frozen=True, slots=True)
class Blocker:
    """A dim that cannot be removed because of a node; shown: the node whose source line says where."""

    dim: int
    node: Any
    reason: Reason
    shown: Any


class Findings:
    """Everything that the walk learns, beyond the axes themselves."""

    def __init__(self, allow: Collection[str] = ()) -> None:
        self.allow = frozenset(allow)
        """What may be offered beyond the default: "renormalise", "cache"; see `detect`."""
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
        self.fixed: list[tuple[int, Any, bool]] = []
        """(dim, node, whether a function is applied) where no other basis may be chosen along a dim."""
        self.opposed: list[tuple[int, tuple[str, ...], tuple[str, ...], bool]] = []
        """(dim, parameters that made one side, and the other, whether these were two dims) of what is contracted."""
        self.mixed: list[tuple[int, int]] = []
        """(dim, other): along `other`, positions of tensors that carry `dim` were mixed; no carrier of it."""
        self.factors: dict[str, set[tuple[str, ...]]] = {}
        """Per parameter that multiplies something else elementwise: what made the other factors, place by place."""
        self.bound: set[str] = set()
        """Parameters that do more than multiply elementwise: they are contracted or added."""
        self.routed: list[tuple[int, Axis, Any]] = []
        """(dim, axis, key): each position of a stored dim belongs to one position of a parameter's axis, as tokens do
        to experts; which one, equal keys answer alike."""
