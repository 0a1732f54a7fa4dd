"""Optimal brain surgeon (Hassibi and Stork, 1993) over units: the best one, the update that makes up for it, the next.

The output of a linear layer over units with inputs x is y = Σ W_u x_u. With H = E[x xᵀ] and G = Wᵀ W, taking out the
inputs J of a unit and letting the rest make up for it costs at least tr((H⁻¹_JJ)⁻¹ G_JJ). Both matrices change by low
rank: with L Lᵀ = H⁻¹_JJ, R = L⁻¹ H⁻¹_J, S = L⁻ᵀ R and P = L⁻¹ (2 G_J - G_JJ S),

    H⁻¹ ← H⁻¹ - Rᵀ R,    2 G ← 2 G - Rᵀ P - Pᵀ R.

A step reads the rows J of both and the blocks on their diagonals, and no more: updates wait (`lazy_updates`). Layers of
equal sizes, which are independent, go side by side, and no step waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ecospa_fx.importance.lazy_updates import LazyPair
from ecospa_fx.importance.linalg import damped, inverse

PENDING = 128
"""Rows of factors that wait at most, unless a single unit brings more."""

COMPACT = 0.85
"""Where this share of the units is left, the removed ones leave memory too."""

HOST_ROOM = 2**28
"""Bytes for layers that go side by side, where a device does not say what is free."""
DEVICE_SHARE = 0.5
"""Share of a device's free memory for them."""

SCALES = 0.25, 4.0
"""Gates of kept units stay within these."""


@dataclass(frozen=True, slots=True, eq=False)
class Removal:
    """The order in which units are removed."""

    order: Tensor
    """LongTensor [carriers, units]."""
    cost: Tensor
    """[carriers, units]: what each one costs when it is removed, in that order."""


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """A linear layer that is to lose units."""

    carriers: int
    """Parts that are independent of each other."""
    units: int
    """Of each carrier."""
    width: int
    """Inputs of a unit; they lie together."""
    dtype: torch.dtype
    """Of the matrices."""
    device: torch.device
    """Where they are."""
    matrices: Callable[[], tuple[Tensor, Tensor]]
    """H, positive definite, and G, each [carriers, units · width, units · width], when it is the layer's turn."""
    parts: int = 1
    """Into so many runs of equal length a carrier's units fall, which lose one each before any loses the next."""

    @property
    def size(self) -> int:
        """Inputs of a carrier."""
        return self.units * self.width

    @property
    def bytes(self) -> int:
        """What its removal holds on to."""
        return LazyPair.bytes(self.carriers, self.size, max(PENDING, self.width), self.dtype)


def remove_all(hessian: Tensor, gram: Tensor, width: int = 1, parts: int = 1) -> Removal:
    """Take out unit after unit until none is left.

    hessian: H [carriers, units · width, units · width], positive definite, unit by unit; gram: G = Wᵀ W, or Wᵀ M W
    where squares of outputs count by M, of the same shape; parts: as in `Layer`.
    """
    carriers, size = hessian.shape[:2]
    layer = Layer(carriers, size // width, width, hessian.dtype, hessian.device, lambda: (hessian, gram), parts)
    ((_, removal),) = removals([layer])
    return removal


def removals(layers: Sequence[Layer]) -> Iterator[tuple[int, Removal]]:
    """`remove_all` of each, with its number, in any order: as many of equal sizes side by side as fit into memory."""
    alike: dict[object, list[int]] = {}
    for number, layer in enumerate(layers):
        alike.setdefault((layer.units, layer.width, layer.parts, layer.dtype, layer.device), []).append(number)
    for numbers in alike.values():
        while numbers:
            count = _fitting([layers[number].bytes for number in numbers], _room(layers[numbers[0]].device))
            yield from _side_by_side(layers, numbers[:count])
            del numbers[:count]


def _room(device: torch.device) -> float:
    """Bytes for layers that go side by side."""
    if device.type != "cuda":
        return HOST_ROOM
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return DEVICE_SHARE * (torch.cuda.mem_get_info(device)[0] + unused)


def _fitting(sizes: Sequence[int], room: float) -> int:
    """How many of the first, at least one, go into the room together."""
    return max(1, sum(total <= room for total in accumulate(sizes)))


def _side_by_side(layers: Sequence[Layer], numbers: Sequence[int]) -> Iterator[tuple[int, Removal]]:
    """`remove_all` of the numbered layers, which are of equal sizes."""
    removal = _State([layers[number] for number in numbers]).remove_all()
    parts = [layers[number].carriers for number in numbers]
    yield from zip(
        numbers, map(Removal, removal.order.split_with_sizes(parts), removal.cost.split_with_sizes(parts)), strict=True
    )


class _State:
    """What is left of layers of equal sizes; their carriers count as those of one layer.

    pair: H⁻¹ and 2 G; least: [carriers, n], 1 / H's diagonal, below which that of H⁻¹ never falls; blocks: [carriers,
    2, units, width, width], the diagonals of H⁻¹ and G with all updates, and the identity and an infinite diagonal
    where a unit was removed; numbers: LongTensor [carriers, units], which unit is where; step: how many were removed;
    order: these, from `since` on by where they are; cost: as in `Removal`; waiting: BoolTensor [carriers, parts], True
    for parts that lost a unit that not all others have lost yet.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.width, self.units = layers[0].width, layers[0].units
        carriers, dtype, device = sum(layer.carriers for layer in layers), layers[0].dtype, layers[0].device
        self.pair = LazyPair(carriers, layers[0].size, max(PENDING, self.width), dtype, device)
        self.least = torch.empty(carriers, layers[0].size, dtype=dtype, device=device)
        self._fill(layers)
        self.blocks = self._diagonals()
        eye = torch.eye(self.width, dtype=dtype, device=device)
        self.absent = torch.stack([eye, eye.masked_fill(eye > 0, torch.inf)])[None, :, None]
        self.numbers = torch.arange(self.units, device=device).expand(carriers, -1)
        self.within = torch.arange(self.width, device=device)
        self.order = torch.zeros(carriers, self.units, dtype=torch.long, device=device)
        self.cost = torch.zeros(carriers, self.units, dtype=dtype, device=device)
        self.parts = layers[0].parts
        self.waiting = torch.zeros(carriers, self.parts, dtype=torch.bool, device=device)
        self.step = self.since = 0

    def _fill(self, layers: Sequence[Layer]) -> None:
        """Layer by layer, so that no more than what one needs on the way is needed beside the result."""
        start = 0
        for layer in layers:
            part = slice(start, start := start + layer.carriers)
            hessian, gram = layer.matrices()
            self.least[part] = 1 / hessian.diagonal(dim1=1, dim2=2)
            torch.add(gram, gram, out=self.pair.matrices[1, part])
            del gram
            self.pair.matrices[0, part] = inverse(hessian)

    def _diagonals(self) -> Tensor:
        """The blocks, of the matrices as they are without updates that wait."""
        units = self.pair.matrices.shape[-1] // self.width
        grid = self.pair.matrices.view(2, -1, units, self.width, units, self.width)
        of_inverse, of_gram = grid.diagonal(dim1=2, dim2=4).movedim(-1, 2).unbind()
        return torch.stack([of_inverse, of_gram / 2], 1)

    def remove_all(self) -> Removal:
        """Take out unit after unit until none is left."""
        for _ in range(self.units):
            self.remove_best()
        self._number()
        return Removal(self.order, self.cost)

    def remove_best(self) -> None:
        """Take out the unit that costs least in each carrier."""
        if self.pair.waiting + self.width > self.pair.most:
            self._apply()
        cost, best = self.cost[:, self.step, None], self.order[:, self.step, None]
        torch.min(self._in_turn(self._costs()), 1, keepdim=True, out=(cost, best))
        self._wait(best)
        if self.width == 1:
            self._remove_input(best, cost)
        else:
            self._remove_block(best)
        self.blocks.scatter_(2, self._index(best), self.absent.expand(len(best), -1, -1, -1, -1))
        self.step += 1

    def _index(self, units: Tensor) -> Tensor:
        """Of the blocks of units [carriers, m]: [carriers, 2, m, width, width]."""
        return units[:, None, :, None, None].expand(-1, 2, -1, self.width, self.width)

    def _columns(self, units: Tensor) -> Tensor:
        return (units[..., None] * self.width + self.within).flatten(1)

    def _costs(self) -> Tensor:
        """[carriers, units]: infinite where a unit was removed."""
        if self.width == 1:
            return self.blocks[:, 1, :, 0, 0] / self.blocks[:, 0, :, 0, 0]
        factor = _factor(self.blocks[:, 0], self.least.view(len(self.least), -1, self.width))
        costs: Tensor = (torch.cholesky_inverse(factor) * self.blocks[:, 1]).sum((2, 3))
        return costs

    def _part_of(self, units: Tensor) -> Tensor:
        return units.div(self.units // self.parts, rounding_mode="floor")

    def _in_turn(self, costs: Tensor) -> Tensor:
        """The costs [carriers, units], infinite in parts that wait."""
        if self.parts == 1:
            return costs
        return costs.masked_fill(self.waiting.gather(1, self._part_of(self.numbers)), torch.inf)

    def _wait(self, best: Tensor) -> None:
        """The parts of the best units [carriers, 1] wait until all others have lost as many."""
        if self.parts == 1:
            return
        if (self.step + 1) % self.parts:
            self.waiting.scatter_(1, self._part_of(self.numbers.gather(1, best)), True)
        else:
            self.waiting.zero_()

    def _remove_input(self, best: Tensor, cost: Tensor) -> None:
        """The formulas above for units of one input: L is a root of `blocks`, and G_JJ S is `cost` times H⁻¹_J."""
        rows = self.pair.rows(best)[:, :, 0]
        blocks = self.blocks[..., 0, 0]
        root = blocks[:, 0].gather(1, best).sqrt()
        rows[:, 1].addcmul_(cost, rows[:, 0], value=-1)
        change = self.pair.more(1)[:, 0]
        torch.div(rows, root[:, None], out=change)
        blocks.addcmul_(change, change[:, :1], value=-1)
        torch.maximum(blocks[:, 0], self.least, out=blocks[:, 0])

    def _remove_block(self, best: Tensor) -> None:
        """The formulas above."""
        columns = self._columns(best)
        across, twice = self.pair.rows(columns).unbind(1)
        index = columns[:, None].expand(-1, self.width, -1)
        factor = _factor(across.gather(2, index), self.least.gather(1, columns))
        share = torch.linalg.solve_triangular(factor, across, upper=False)
        solved = torch.linalg.solve_triangular(factor.mT, share, upper=True)
        rest = twice - 0.5 * twice.gather(2, index) @ solved
        change = self.pair.more(self.width)
        change[:, :, 0] = share
        change[:, :, 1] = torch.linalg.solve_triangular(factor, rest, upper=False)
        first, second = change.view(len(change), self.width, 2, -1, self.width).permute(2, 0, 3, 1, 4).unbind()
        self.blocks[:, 0] -= first.mT @ first
        product = first.mT @ second
        self.blocks[:, 1] -= 0.5 * (product + product.mT)

    def _apply(self) -> None:
        """What waits; removed units are dropped before where there are many."""
        if self.units - self.step < COMPACT * self.numbers.shape[1]:
            self._compact()
        self.pair.apply()
        self.blocks = torch.where(self.blocks[:, 1:, :, :1, :1].isinf(), self.blocks, self._diagonals())

    def _compact(self) -> None:
        self._number()
        removed = self.blocks[:, 1, :, 0, 0].isinf()
        kept = removed.byte().argsort(dim=1, stable=True)[:, : self.units - self.step]
        self.blocks = self.blocks.gather(2, self._index(kept))
        self.numbers = self.numbers.gather(1, kept)
        columns = self._columns(kept)
        self.least = self.least.gather(1, columns)
        self.pair.narrow(columns)

    def _number(self) -> None:
        """Say of the removed units which they are, rather than where."""
        part = slice(self.since, self.step)
        self.order[:, part] = self.numbers.gather(1, self.order[:, part])
        self.since = self.step


def _factor(blocks: Tensor, least: Tensor) -> Tensor:
    """Cholesky's L of blocks [..., n, n]; where rounding left none, that of the diagonal, at least `least` [..., n].

    Whether there is one is not asked: that would wait for the device.
    """
    factor, failed = torch.linalg.cholesky_ex(blocks)
    alone = blocks.diagonal(dim1=-2, dim2=-1).maximum(least).sqrt().diag_embed()
    return torch.where((failed > 0)[..., None, None], alone, factor)


def order_scores(removal: Removal) -> Tensor:
    """One number per unit that sorts as the order of removal: the dearest cost so far, strictly ascending."""
    risen = removal.cost.double().clamp(min=0).cummax(1).values
    step = risen[:, -1:].clamp(min=1e-300) * 1e-12
    risen = risen + step * torch.arange(1, risen.shape[1] + 1, device=risen.device)
    return torch.zeros_like(risen).scatter(1, removal.order, risen)


def kept_gates(matrix: Tensor, keep: Tensor) -> Tensor:
    """Gates [carriers, units] that make up for those that are closed: 0 where a unit goes, near 1 where it stays.

    matrix: [carriers, units, units], positive definite, of the quadratic cost of moving gates away from 1; keep:
    BoolTensor [carriers, units], the same number in every carrier.
    """
    result = torch.zeros(keep.shape, dtype=matrix.dtype, device=matrix.device)
    for row, kept in enumerate(keep):
        open_gates, closed = kept.nonzero()[:, 0], (~kept).nonzero()[:, 0]
        pushed = matrix[row][open_gates][:, closed].sum(1)
        result[row, open_gates] = 1 + inverse(matrix[row][open_gates][:, open_gates]) @ pushed
    return result


def gate_roots(matrix: Tensor, keep: Tensor, damping: float) -> Tensor:
    """Diagonal matrices [carriers, units, units] by which each of two factors is multiplied for the best gates.

    matrix, damping: of the cost of moving gates; keep: BoolTensor [carriers, units], True where a unit is kept.
    """
    scale = kept_gates(damped(matrix, damping), keep.to(matrix.device))
    return torch.diag_embed(scale.clamp(*SCALES).sqrt())
