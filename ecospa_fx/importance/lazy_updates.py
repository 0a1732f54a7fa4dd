"""Two symmetric matrices whose updates of low rank wait as factors, until one matrix product applies many of them.

A row that is asked for has what waits for it subtracted, so that a loop which reads a few rows per step and changes
both matrices by rank one costs as much as matrix products do, not as much as reading the matrices at each step. GPTQ
(Frantar et al., 2023) does this with the updates of weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOVED_ELEMENTS = 2**22
"""How many are copied at a time when matrices lose rows, unless a single matrix has more."""


class LazyPair:
    """Symmetric A and B [carriers, n, n], from which Rᵀ R and Rᵀ P + Pᵀ R are subtracted, with R and P of a few rows.

    Nothing here waits for the device. matrices: [2, carriers, n, n], A and B to be written by the caller before
    anything else, later without the updates that wait; waiting: how many rows of R and P do, at most `most`.
    """

    def __init__(self, carriers: int, size: int, most: int, dtype: torch.dtype, device: torch.device) -> None:
        self._storage = torch.empty(2 * carriers * size**2, dtype=dtype, device=device)
        self.matrices = self._storage.view(2, carriers, size, size)
        self.waiting, self.most = 0, most
        # [carriers, 1 + 2 · most, n]: zeros, then R and P of each row in turn.
        self._factors = torch.zeros(carriers, 1 + 2 * most, size, dtype=dtype, device=device)
        self._carrier = torch.arange(carriers, device=device)[:, None, None]
        self._which = torch.arange(2, device=device)[None, :, None]
        # Row j of Rᵀ R is Σ R_ij R_i, and that of Rᵀ P + Pᵀ R is Σ P_ij R_i + R_ij P_i: where these coefficients are.
        place = torch.arange(1, 1 + 2 * most, 2, device=device)
        of_first, of_second = torch.stack([place, torch.zeros_like(place)], 1), torch.stack([place + 1, place], 1)
        self._coefficients = torch.stack([of_first.flatten(), of_second.flatten()])[None, :, None]

    @staticmethod
    def bytes(carriers: int, size: int, most: int, dtype: torch.dtype) -> int:
        """What a pair takes."""
        return carriers * size * (2 * size + 2 * most + 1) * dtype.itemsize

    def rows(self, columns: Tensor) -> Tensor:
        """Rows of both, up to date: [carriers, 2, p, n] of `columns`, LongTensor [carriers, p]."""
        rows: Tensor = self.matrices[self._which, self._carrier, columns[:, None]]
        if self.waiting:
            end = 2 * self.waiting
            places = self._coefficients[..., :end]
            by = self._factors[self._carrier[..., None], places, columns[:, None, :, None]]
            flat = torch.baddbmm(rows.flatten(1, 2), by.flatten(1, 2), self._factors[:, 1 : 1 + end], alpha=-1)
            rows = flat.view(rows.shape)
        return rows

    def more(self, count: int) -> Tensor:
        """Room [carriers, count, 2, n] for further rows of R and P, which the caller writes."""
        begin = 1 + 2 * self.waiting
        self.waiting += count
        return self._factors[:, begin : 1 + 2 * self.waiting].view(len(self._factors), count, 2, -1)

    def apply(self) -> None:
        """Subtract all that waits."""
        both = self._factors[:, 1 : 1 + 2 * self.waiting]
        pairs = both.view(len(both), self.waiting, 2, -1)
        self.matrices[0].baddbmm_(pairs[:, :, 0].mT, pairs[:, :, 0], alpha=-1)
        self.matrices[1].baddbmm_(pairs.flip(2).flatten(1, 2).mT, both, alpha=-1)
        self.waiting = 0

    def narrow(self, columns: Tensor) -> None:
        """Keep these rows and columns alone: LongTensor [carriers, m], ascending. They stay where the others were."""
        (carriers, less), size = columns.shape, self.matrices.shape[-1]
        index = columns[:, None].expand(-1, self._factors.shape[1], -1)
        self._factors = self._factors.gather(2, index)
        dense, chosen = self.matrices.flatten(0, 1), columns.repeat(2, 1)
        narrow = self._storage[: 2 * carriers * less**2].view(2 * carriers, less, less)
        at_once = max(1, MOVED_ELEMENTS // size**2)
        for start in range(0, 2 * carriers, at_once):  # what is written lies no further back than what is read next
            part = slice(start, start + at_once)
            number = torch.arange(2 * carriers, device=columns.device)[part, None, None]
            narrow[part] = dense[number, chosen[part, :, None], chosen[part, None]]
        self.matrices = narrow.view(2, carriers, less, less)
