"""What scoring returns: one number per unit and carrier of every coupling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """How much each unit matters; allocation removes the least score per parameter first.

    method: the name it was computed by; values: coupling name to float64 CPU tensor [carriers, units]. Scores of
    different couplings are compared with each other, so they must be in one currency.
    """

    method: str
    values: Mapping[str, Tensor]

    def __getitem__(self, coupling: str) -> Tensor:
        return self.values[coupling]
