"""The optimal brain surgeon step by step, every update applied to whole matrices when it is due: slow, and plain."""

from __future__ import annotations

import torch
from torch import Tensor

from ecospa_fx.importance.brain_surgeon import Removal
from ecospa_fx.importance.linalg import inverse


def remove_all(hessian: Tensor, weight: Tensor, width: int = 1) -> Removal:
    """What `brain_surgeon.remove_all` returns for G = Wᵀ W; weight: W [carriers, out, units · width]."""
    carriers, size = hessian.shape[:2]
    left, weight, units = inverse(hessian), weight.mT.clone(), size // width
    removed, rows = torch.zeros(carriers, units, dtype=torch.bool), torch.arange(carriers)[:, None]
    order, costs = torch.zeros(carriers, units, dtype=torch.long), hessian.new_zeros(carriers, units)
    for step in range(units):
        blocks = left.view(carriers, units, width, units, width).diagonal(dim1=1, dim2=3).movedim(-1, 1)
        of_units = weight.view(carriers, units, width, -1)
        cost = (inverse(blocks) * (of_units @ of_units.mT)).sum((2, 3)).masked_fill(removed, torch.inf)
        costs[:, step], order[:, step] = cost.min(1)
        best = order[:, step, None]
        columns = (best * width)[..., None].add(torch.arange(width)).flatten(1)
        across, taken = left[rows, columns], weight[rows, columns]
        share = inverse(across.gather(2, columns[:, None].expand(-1, width, -1))) @ across
        weight, left = weight - share.mT @ taken, left - across.mT @ share
        left[rows, columns, columns] = 1.0  # removed units leave the matrix regular
        removed.scatter_(1, best, True)
    return Removal(order, costs)
