"""Couplings that have to keep equal shares, because one integer of a module's code counts the units of them all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ecospa_fx.coupling.types import Coupling


@dataclass(frozen=True, slots=True, eq=False)
class Tie:
    """Couplings that keep the same share of their units."""

    couplings: tuple[Coupling, ...]
    """All that one integer counts."""
    number: int
    """Equal for ties of other layers that are like it."""
    step: int
    """What the smallest coupling keeps is a multiple of this."""
    same: bool = False
    """Whether the couplings that rotate keep the same pairs, all of them."""

    @property
    def base(self) -> Coupling:
        """The one with the fewest units; the others have multiples of them."""
        return min(self.couplings, key=lambda c: c.size)


@dataclass(frozen=True, slots=True, eq=False)
class Carried:
    """What the code of a module can carry."""

    ties: tuple[Tie, ...]
    """Of all layers."""
    fine: Callable[[Tie, int], bool]
    """Whether the base of a tie may keep so many units."""

    @property
    def couplings(self) -> list[Coupling]:
        """The couplings of all ties, in order."""
        return [c for tie in self.ties for c in tie.couplings]
