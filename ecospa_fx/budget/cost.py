"""What a budget is spent in: parameters, FLOPs of the example call, or seconds that it takes on this machine.

Parameters are counted exactly, each once however many couplings hold it. FLOPs and seconds are those of the calls that
couplings narrow (`graph_cost`): each call has a price at a grid of widths, and is interpolated in between. FLOPs need
no more than the ends of that grid, because a product does as many as the sizes of its axes multiplied.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import torch
from torch import Tensor, fx

from ecospa_fx.budget.graph_cost import NarrowedOps, Operation, Widths, flops
from ecospa_fx.coupling.couplings import Couplings
from ecospa_fx.coupling.types import Coupling
from ecospa_fx.coupling.unit_elements import Shapes, UnitChoice, Weights, coupled_elements, removed_elements


class CostModel(ABC):
    """One unit of cost."""

    unit: str
    """What a share is a share of, for people."""

    smooth = True
    """Whether each unit of a coupling frees about as much as the next one, whatever other couplings keep."""

    def ready(self, couplings: Sequence[Coupling]) -> None:  # noqa: B027  # most units need nothing
        """Find out what these couplings cost, before anything else is asked."""

    @abstractmethod
    def freed(self, coupling: Coupling, kept: Sequence[int]) -> Tensor:
        """float64 [widths]: what a coupling frees at some numbers of kept units, everything else being whole."""

    def together(self, couplings: Sequence[Coupling]) -> list[list[Coupling]]:
        """The couplings in groups, each of which costs what it costs whatever the others keep."""
        return [[c] for c in couplings]

    def priced(self, coupling: Coupling, kept: Sequence[int]) -> Sequence[int]:
        """Those of some widths at which it is known what a coupling costs together with the others of its group."""
        return kept

    def freed_together(self, couplings: Sequence[Coupling], kept: Sequence[Sequence[int]]) -> list[float]:
        """What the couplings of a group free at some combinations of widths."""
        each = [self.freed(c, [widths[i] for widths in kept]) for i, c in enumerate(couplings)]
        freed: list[float] = torch.stack(each).sum(0).tolist()
        return freed

    @abstractmethod
    def removed(self, choices: Mapping[str, UnitChoice], kept: Widths) -> float:
        """What is removed altogether. choices: per coupling its members and kept units; kept: how many these are."""

    @abstractmethod
    def total(self, couplings: Sequence[Coupling]) -> float:
        """What a budget for these couplings is a share of."""


@dataclass(frozen=True, slots=True)
class Parameters(CostModel):
    """Elements of parameters."""

    shapes: Shapes
    """Of the parameters, by name."""
    unit = "the couplings' parameters"

    def freed(self, coupling: Coupling, kept: Sequence[int]) -> Tensor:
        removed = torch.tensor([coupling.size - k for k in kept], dtype=torch.float64)
        return removed * (coupling.parameters / coupling.size)

    def removed(self, choices: Mapping[str, UnitChoice], kept: Widths) -> float:
        return removed_elements(self.shapes, choices.values())

    def total(self, couplings: Sequence[Coupling]) -> float:
        return coupled_elements(self.shapes, (c.members for c in couplings))


@dataclass(frozen=True, slots=True)
class Bytes(CostModel):
    """Bytes of parameters, which may be of several types."""

    shapes: Shapes
    """Of the parameters, by name."""
    weights: Weights
    """Bytes of one element of each, by name."""
    unit = "the couplings' bytes"

    def freed(self, coupling: Coupling, kept: Sequence[int]) -> Tensor:
        removed = torch.tensor([coupling.size - k for k in kept], dtype=torch.float64)
        return removed * (self.total([coupling]) / coupling.size)

    def removed(self, choices: Mapping[str, UnitChoice], kept: Widths) -> float:
        return removed_elements(self.shapes, choices.values(), self.weights)

    def total(self, couplings: Sequence[Coupling]) -> float:
        return coupled_elements(self.shapes, (c.members for c in couplings), self.weights)


class GraphCost(CostModel):
    """What the calls of a graph cost, by the price of each operation at a grid of widths."""

    def __init__(self, narrowed: NarrowedOps) -> None:
        self.narrowed = narrowed
        self._grids: dict[fx.Node, dict[str, list[int]]] = {}
        self._prices: dict[fx.Node, dict[tuple[int, ...], float]] = {}
        self._nodes: dict[str, list[fx.Node]] = {}
        for node, names in narrowed.calls.items():
            for name in names:
                self._nodes.setdefault(name, []).append(node)

    @abstractmethod
    def grid(self, size: int, couplings: int) -> list[int]:
        """Ascending widths from the least to `size` at which a call is priced that so many couplings narrow."""

    @abstractmethod
    def prices(self, operations: Sequence[Operation]) -> list[float]:
        """What each operation costs."""

    smooth = False

    def together(self, couplings: Sequence[Coupling]) -> list[list[Coupling]]:
        """Couplings that narrow one call have a price only together: its kernel depends on all widths."""
        if self.smooth:
            return super().together(couplings)
        groups = {c.name: [c] for c in couplings}
        for names in self.narrowed.calls.values():
            first, *others = list({id(groups[n]): groups[n] for n in names if n in groups}.values()) or [[]]
            for other in others:
                first.extend(other)
                groups.update({c.name: first for c in other})
        return list({id(group): group for group in groups.values()}.values())

    def priced(self, coupling: Coupling, kept: Sequence[int]) -> Sequence[int]:
        nodes = [n for n in self._nodes.get(coupling.name, ()) if len(self._grids[n]) > 1]
        grids = [self._grids[node][coupling.name] for node in nodes if not self.smooth]
        return [k for k in kept if all(k in grid for grid in grids)]

    def freed_together(self, couplings: Sequence[Coupling], kept: Sequence[Sequence[int]]) -> list[float]:
        nodes = dict.fromkeys(node for c in couplings for node in self._nodes.get(c.name, ()))
        whole, names = sum(self.price(node, {}) for node in nodes), [c.name for c in couplings]
        return [whole - sum(self.price(n, dict(zip(names, k, strict=True))) for n in nodes) for k in kept]

    def ready(self, couplings: Sequence[Coupling]) -> None:
        """Price every call that these couplings narrow, at all widths of its grid that they may have."""
        names = {c.name for c in couplings}
        nodes = dict.fromkeys(node for c in couplings for node in self._nodes.get(c.name, ()))
        wanted: list[tuple[fx.Node, tuple[int, ...], Operation]] = []
        for node in nodes:
            narrowing, free = self.narrowed.calls[node], names.intersection(self.narrowed.calls[node])
            grids = self._grids[node] = {n: self.grid(self.narrowed.size(n), len(free)) for n in free}
            axes = [grids.get(n, [self.narrowed.size(n)]) for n in narrowing]
            for point in product(*axes):
                wanted.append((node, point, self.narrowed.operation(node, dict(zip(narrowing, point, strict=True)))))
        distinct = list(dict.fromkeys(operation for _, _, operation in wanted))
        prices = dict(zip(distinct, self.prices(distinct), strict=True))
        for node, point, operation in wanted:
            self._prices.setdefault(node, {})[point] = prices[operation]

    def price(self, node: fx.Node, kept: Widths) -> float:
        """Of one call at any widths: interpolated along each coupling that narrows it."""
        corners: list[tuple[tuple[int, ...], float]] = [((), 1.0)]
        for name in self.narrowed.calls[node]:
            size = self.narrowed.size(name)
            ends = _between(self._grids[node].get(name, [size]), kept.get(name, size))
            corners = [((*point, width), share * part) for point, share in corners for width, part in ends]
        prices = self._prices[node]
        return sum(prices[point] * share for point, share in corners)

    def freed(self, coupling: Coupling, kept: Sequence[int]) -> Tensor:
        name, nodes = coupling.name, self._nodes.get(coupling.name, ())
        points = sorted({1, coupling.size}.union(*(self._grids[node][name] for node in nodes)))
        spent = [sum(self.price(node, {name: point}) for node in nodes) for point in points]
        return spent[-1] - _interpolated(points, spent, kept)

    def removed(self, choices: Mapping[str, UnitChoice], kept: Widths) -> float:
        nodes = dict.fromkeys(node for name in kept for node in self._nodes.get(name, ()))
        return sum(self.price(node, {}) - self.price(node, kept) for node in nodes)

    def total(self, couplings: Sequence[Coupling]) -> float:
        nodes = dict.fromkeys(node for c in couplings for node in self._nodes.get(c.name, ()))
        return sum(self.price(node, {}) for node in nodes)


def _between(grid: Sequence[int], width: int) -> list[tuple[int, float]]:
    """Points of a grid and how much of each lies at a width; below the first one, the line through the first two."""
    if width in grid:
        return [(width, 1.0)]
    low, high = next((low, high) for low, high in pairwise(grid) if width < high)
    share = (width - low) / (high - low)
    return [(low, 1 - share), (high, share)]


def _interpolated(points: Sequence[int], values: Sequence[float], widths: Sequence[int]) -> Tensor:
    """float64 [widths]: values given at ascending points, at widths between the first and the last of them."""
    x, y = (torch.tensor(numbers, dtype=torch.float64) for numbers in (points, values))
    wanted = torch.tensor(widths, dtype=torch.float64)
    high = torch.searchsorted(x, wanted).clamp(min=1)
    share = (wanted - x[high - 1]) / (x[high] - x[high - 1])
    return y[high - 1] + share * (y[high] - y[high - 1])


class Flops(GraphCost):
    """Floating-point operations of the example call, as torch counts them."""

    unit, smooth = "the FLOPs of the products that the couplings narrow", True

    @classmethod
    def of(cls, couplings: Couplings) -> Flops:
        """Of the call that the couplings were detected with. Raises PlanError where no graph is known."""
        return cls(NarrowedOps.of(couplings, "flops"))

    def grid(self, size: int, couplings: int) -> list[int]:
        return [(size + 1) // 2, size]  # two points of a straight line; a width of 1 may have a kernel of its own

    def prices(self, operations: Sequence[Operation]) -> list[float]:
        return [float(flops(operation)) for operation in operations]
