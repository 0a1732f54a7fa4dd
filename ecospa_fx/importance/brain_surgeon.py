"""Optimal brain surgeon (Hassibi and Stork, 1993) over units: the best one, the update that makes up for it, the next.

The output of a linear layer over units with inputs x is y = Σ W_u x_u. With H = E[x xᵀ], taking out the inputs J of a
unit and letting the rest make up for it costs at least tr(W_J (H⁻¹_JJ)⁻¹ W_Jᵀ), with W ← W - W_J (H⁻¹_JJ)⁻¹ H⁻¹_J and
H⁻¹ ← H⁻¹ - H⁻¹_J (H⁻¹_JJ)⁻¹ H⁻¹_Jᵀ. Several independent layers of equal sizes, such as the carriers of a coupling, go
side by side.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ecospa_fx.importance.linalg import damped, inverse

COMPACT = 0.85
"""Where this share of the units is left, the removed ones leave memory too."""

SCALES = 0.25, 4.0
"""Gates of kept units stay within these."""


@dataclass(frozen=True, slots=True, eq=False)
class Removal:
    """The order in which units are removed."""

    order: Tensor
    """LongTensor [carriers, units]."""
    cost: Tensor
    """[carriers, units]: what each one costs when it is removed, in that order."""


def remove_all(hessian: Tensor, weight: Tensor, width: int = 1, at_once: int = 1) -> Removal:
    """Take out unit after unit until none is left.

    hessian: [carriers, units · width, units · width], positive definite, unit by unit; weight: [carriers, out,
    units · width]; at_once: how many go before costs are looked at again, for an order that is nearly as good in a
    fraction of the time.
    """
    state = _State(inverse(hessian), weight.clone(), width)
    carriers, units = hessian.shape[0], hessian.shape[1] // width
    order = torch.zeros(carriers, units, dtype=torch.long, device=hessian.device)
    cost = torch.zeros(carriers, units, dtype=hessian.dtype, device=hessian.device)
    for step in range(0, units, at_once):
        part = slice(step, min(step + at_once, units))
        order[:, part], cost[:, part] = state.remove_best(part.stop - part.start)
    return Removal(order, cost)


class _State:
    """What is left, and where it was.

    inverse: [carriers, n, n]; weight: [carriers, n, out], transposed so that what belongs to a unit lies together;
    units: LongTensor [carriers, n / width], their numbers; keep: BoolTensor like it, False where a unit was removed.
    """

    def __init__(self, inverse: Tensor, weight: Tensor, width: int) -> None:
        self.inverse, self.weight, self.width = inverse, weight.mT.contiguous(), width
        carriers, n = inverse.shape[:2]
        self.rows = torch.arange(carriers, device=inverse.device)[:, None]
        self.units = torch.arange(n // width, device=inverse.device).expand(carriers, -1)
        self.keep = torch.ones_like(self.units, dtype=torch.bool)
        self.left = n // width
        self.inner = self._inner()

    def _inner(self) -> Tensor:
        """W_uᵀ W_u of every unit: [carriers, units, width, width]."""
        blocks = self.weight.view(len(self.rows), -1, self.width, self.weight.shape[2])
        inner: Tensor = blocks @ blocks.mT
        return inner

    def remove_best(self, count: int) -> tuple[Tensor, Tensor]:
        """The units [carriers, count] that cost least in each carrier, and their costs; the rest is updated."""
        if count == 1:
            cost, best = self._costs().min(1, keepdim=True)
        else:
            cost, best = self._costs().topk(count, 1, largest=False)
        unit = self.units.gather(1, best)
        self._update(best)
        self.keep.scatter_(1, best, False)
        self.left -= count
        if 0 < self.left < COMPACT * self.keep.shape[1]:
            self._compact()
        return unit, cost

    def _costs(self) -> Tensor:
        if self.width == 1:
            costs = self.inner[..., 0, 0] / self.inverse.diagonal(dim1=1, dim2=2)
        else:
            units = self.keep.shape[1]
            grid = self.inverse.view(len(self.rows), units, self.width, units, self.width)
            blocks = grid.diagonal(dim1=1, dim2=3).movedim(-1, 1)  # H⁻¹_JJ: [carriers, units, width, width]
            blocks = torch.where(self.keep[..., None, None], blocks, torch.eye(self.width).to(blocks))
            costs = (inverse(blocks) * self.inner).sum((2, 3))
        return torch.where(self.keep, costs, torch.inf)

    def _update(self, best: Tensor) -> None:
        """Spread what the best units did over the rest."""
        columns = (best[..., None] * self.width + torch.arange(self.width, device=best.device)).flatten(1)
        across = self.inverse[self.rows, columns]  # [carriers, columns, n]
        block = across.gather(2, columns[:, None].expand(-1, columns.shape[1], -1))
        share = across / block if columns.shape[1] == 1 else inverse(block) @ across
        taken = self.weight[self.rows, columns]  # [carriers, columns, out]
        if columns.shape[1] == 1:  # rank one: a broadcast product costs less than a matrix product, and norms follow
            met = self.weight @ taken.mT
            self.inner[..., 0, 0] += share[:, 0] * (share[:, 0] * taken.square().sum(2) - 2 * met[..., 0])
            self.weight.addcmul_(share.mT, taken, value=-1)
            self.inverse.addcmul_(across.mT, share, value=-1)
        else:
            self.weight.baddbmm_(share.mT, taken, alpha=-1)
            self.inverse.baddbmm_(across.mT, share, alpha=-1)
            self.inner = self._inner()
            if best.shape[1] > 1:  # rounding must not tie what is gone to what stays
                self.inverse[self.rows, columns] = 0.0
                self.inverse.transpose(1, 2)[self.rows, columns] = 0.0
                self.weight[self.rows, columns] = 0.0
        self.inverse[self.rows, columns, columns] = 1.0  # what is gone stays regular

    def _compact(self) -> None:
        kept = self.keep.nonzero()[:, 1].view(len(self.keep), -1)
        columns = (kept[..., None] * self.width + torch.arange(self.width, device=kept.device)).flatten(1)
        self.weight = self.weight[self.rows, columns]
        self.inverse = self.inverse[self.rows[..., None], columns[:, :, None], columns[:, None]]
        self.units, self.keep = self.units.gather(1, kept), self.keep.gather(1, kept)
        self.inner = self._inner()


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
