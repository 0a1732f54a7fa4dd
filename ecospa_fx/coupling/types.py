"""What a coupling is: its members, why it is refused, and what happens to it on its way.

A coupling is a prunable dim with everything that shrinks with it. Its units are numbered per carrier;
carrier ``c`` and unit ``u`` name one removable set of parameter elements, the same in every member.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Role = Literal["producer", "consumer"]
Symmetry = Literal["permutation", "rotary", "linear"]


@dataclass(frozen=True, slots=True)
class Box:
    """Positions ``offset + Σ index · stride`` along one parameter axis.

    carriers, width: (size, stride) pairs, row-major; unit: the stride between neighbouring units.
    """

    offset: int
    carriers: tuple[tuple[int, int], ...]
    unit: int
    width: tuple[tuple[int, int], ...]

    def indices(self, carriers: int, units: int) -> Tensor:
        """LongTensor [carriers, units, width] of positions; carriers absent here are broadcast."""

        def grid(pairs: Iterable[tuple[int, int]]) -> Tensor:
            total = torch.zeros(1, dtype=torch.long)
            for size, stride in pairs:
                total = (total[:, None] + torch.arange(size)[None] * stride).flatten()
            return total

        per_carrier = grid(self.carriers).expand(carriers) if not self.carriers else grid(self.carriers)
        unit = torch.arange(units) * self.unit
        return self.offset + per_carrier[:, None, None] + unit[None, :, None] + grid(self.width)[None, None, :]


@dataclass(frozen=True, slots=True)
class Member:
    """One parameter axis of a coupling.

    parameter: name in ``model.named_parameters()``; axis: its axis; carrier_axis: None, or the axis that is
    the carrier itself (packed experts), and then ``indices[c]`` are positions inside slice ``c`` of that axis.
    """

    parameter: str
    axis: int
    role: Role
    carrier_axis: int | None
    boxes: tuple[Box, ...]
    carriers: int
    units: int

    @property
    def indices(self) -> Tensor:
        """LongTensor [carriers, units, width]: positions along ``axis``, materialised on each call."""
        return torch.cat([box.indices(self.carriers, self.units) for box in self.boxes], dim=2)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a dim cannot be removed.

    message: one sentence, reason and remedy; node, operator: what refused it; source: the user's own line; remedy: the
    part of the message that says what to change, or which option lifts it, or that nothing does.
    """

    message: str
    node: str
    operator: str
    source: str = ""
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class EvidenceStep:
    """One node on the evidence path of a coupling: what the operator does to the dim there."""

    node: str
    operator: str
    action: str
    source: str = ""
    module: str = ""


@dataclass(frozen=True, slots=True)
class Coupling:
    """A prunable dim, or a refusal (``blocked`` is set).

    size: units per carrier; carriers: how many times the choice may differ (every carrier keeps the same
    number of units); parameters: elements that go when the whole dim goes; contains: names of the couplings
    whose elements this one holds as whole blocks (a head holds its head dimensions); inexact: None, or why removing
    units differs from masking them, which the caller of ``detect`` allowed; resized: None, or which input or output
    gets narrower, which was allowed too.
    """

    name: str
    kind: str
    layer: str
    size: int
    carriers: int
    symmetry: Symmetry
    members: tuple[Member, ...]
    parameters: int
    blocked: Refusal | None = None
    inexact: Refusal | None = None
    resized: Refusal | None = None
    contains: tuple[str, ...] = ()
    path: tuple[EvidenceStep, ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class LocatedCoupling:
    """A coupling and the dims behind it, which a rewrite of the same graph needs."""

    coupling: Coupling
    dim: int
    carriers: tuple[int, ...]
