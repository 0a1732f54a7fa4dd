"""Couplings that have to keep equal shares, because one integer of a module's code counts the units of them all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ecospa_fx.coupling.types import Coupling


@dataclass(frozen=True, slots=True, eq=False)
class Tie:
    """Couplings that keep the same share of their units, a multiple of `step` in the smallest.

    number: equal for ties of other layers that are like it; same: those that rotate keep the same pairs, all of them.
    """

    couplings: tuple[Coupling, ...]
    number: int
    step: int
    same: bool = False

    @property
    def base(self) -> Coupling:
        """The one with the fewest units; the others have multiples of them."""
        return min(self.couplings, key=lambda c: c.size)


@dataclass(frozen=True, slots=True, eq=False)
class Carried:
    """What can be carried: the ties, and which numbers of units of a tie's base are fine."""

    ties: tuple[Tie, ...]
    fine: Callable[[Tie, int], bool]

    @property
    def couplings(self) -> list[Coupling]:
        """The couplings of all ties, in order."""
        return [c for tie in self.ties for c in tie.couplings]
