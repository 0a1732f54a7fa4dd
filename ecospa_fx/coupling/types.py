"""What a coupling is: its members, why it is refused, and what happens to it on its way.

A coupling is a prunable dim with everything that shrinks with it. Its units are numbered per carrier;
carrier ``c`` and unit ``u`` name one removable set of parameter elements, the same in every member.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from typing import Literal

import torch
from torch import Tensor

from ecospa_fx.axes.axis import Steps

Role = Literal["producer", "consumer"]
Symmetry = Literal["permutation", "rotary", "linear"]
RESIDUAL = "residual"
BLOCK = "block"
ASKED_FOR = (RESIDUAL, BLOCK)
"""The kinds that no plan takes by default."""


@dataclass(frozen=True, slots=True)
class Box:
    """Positions ``offset + Σ index · stride`` along one parameter axis.

    In place of a stride may stand a table with the distance of each index, where the order is that of a permutation.
    """

    offset: int
    """The first position."""
    carriers: tuple[tuple[int, Steps], ...]
    """(size, stride) of the carriers on this axis, outer ones first; () where they lie elsewhere or there are none."""
    unit: Steps
    """The stride between neighbouring units."""
    width: tuple[tuple[int, Steps], ...]
    """(size, stride) of what each unit holds on this axis, outer ones first."""

    def indices(self, carriers: int, units: int) -> Tensor:
        """LongTensor [carriers, units, width] of positions; carriers absent here are broadcast."""

        def grid(pairs: Iterable[tuple[int, Steps]]) -> Tensor:
            total = torch.zeros(1, dtype=torch.long)
            for size, steps in pairs:
                apart = torch.arange(size) * steps if isinstance(steps, int) else torch.tensor(steps[:size])
                total = (total[:, None] + apart).flatten()
            return total

        per_carrier = grid(self.carriers).expand(carriers) if not self.carriers else grid(self.carriers)
        unit = grid([(units, self.unit)])
        return self.offset + per_carrier[:, None, None] + unit[None, :, None] + grid(self.width)[None, None, :]


@dataclass(frozen=True, slots=True)
class Member:
    """One parameter axis of a coupling."""

    parameter: str
    """Name in ``model.named_parameters()``."""
    axis: int
    """The parameter's axis."""
    role: Role
    """Whether the parameter makes the units, or reads them."""
    carrier_axis: int | None
    """None, or the axis that is the carrier itself (packed experts): ``indices[c]`` lie in its slice ``c``."""
    boxes: tuple[Box, ...]
    """Where the units lie along the axis: several boxes where it is a concatenation."""
    carriers: int
    """How many times the choice may differ."""
    units: int
    """Units per carrier."""

    @property
    def indices(self) -> Tensor:
        """LongTensor [carriers, units, width]: positions along ``axis``, materialised on each call."""
        return torch.cat([box.indices(self.carriers, self.units) for box in self.boxes], dim=2)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a dim cannot be removed."""

    message: str
    """Reason and remedy in one sentence."""
    node: str
    """The node that refused it."""
    operator: str
    """The operator of that node."""
    source: str = ""
    """The user's own line, or ""."""
    remedy: str = ""
    """The part of the message that says what to change, or which option lifts it, or that nothing does."""


@dataclass(frozen=True, slots=True)
class EvidenceStep:
    """One node on the evidence path of a coupling."""

    node: str
    """The node's name."""
    operator: str
    """Its operator."""
    action: str
    """What the operator does to the dim there: values of `ecospa_fx.axes.findings.Action`, "passes" or "produced"."""
    source: str = ""
    """The user's own line, or ""."""
    module: str = ""
    """The module that the node belongs to, or ""."""


@dataclass(frozen=True, slots=True)
class Coupling:
    """A prunable dim, or a refusal (``blocked`` is set)."""

    name: str
    """Layer and kind, and a number where that is not unique."""
    kind: str
    """One of "qk", "heads", "vo", "ffn", "pair", "residual" or "block"; see `ecospa_fx.coupling.labels`."""
    layer: str
    """The innermost module that holds all members."""
    size: int
    """Units per carrier."""
    carriers: int
    """How many times the choice of units may differ; every carrier keeps the same number."""
    symmetry: Symmetry
    """Which changes of basis along the dim leave the model's function as it is."""
    members: tuple[Member, ...]
    """Every parameter axis on which the units lie."""
    parameters: int
    """Elements that go when the whole dim goes."""
    blocked: Refusal | None = None
    """Why it cannot lose units, or None where it is offered."""
    inexact: Refusal | None = None
    """None, or why removing units differs from masking them, which the caller of ``detect`` allowed."""
    resized: Refusal | None = None
    """None, or which input or output gets narrower, which the caller of ``detect`` allowed."""
    contains: tuple[str, ...] = ()
    """Names of the couplings whose elements this one holds as whole blocks: a head holds its head dimensions."""
    path: tuple[EvidenceStep, ...] = ()
    """The nodes between producers and consumers, in graph order."""

    def __repr__(self) -> str:
        size = f"{self.size:,} units" if self.carriers == 1 else f"{self.size:,} units × {self.carriers:,} carriers"
        members = f"{len(self.members):,} member" + "s" * (len(self.members) != 1)
        state = "" if self.blocked is None else f", blocked by {self.blocked.operator} at {self.blocked.node}"
        return f"Coupling({self.name!r}, {size}, {members}, {self.parameters:,} parameters{state})"

    def _repr_html_(self) -> str:
        from ecospa_fx.coupling.report import explain  # which imports this module

        return f"<pre>{escape(explain(self))}</pre>"


@dataclass(frozen=True, slots=True)
class LocatedCoupling:
    """A coupling and the dims behind it, which a rewrite of the same graph needs."""

    coupling: Coupling
    """The coupling."""
    dim: int
    """Its dim."""
    carriers: tuple[int, ...]
    """The dims that are its carriers, outer ones first."""
