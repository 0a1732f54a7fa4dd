"""How couplings look from the linear layers around them.

Three ways, by a coupling's evidence alone: its units are *inputs* of matrices that consume them (FFN-out, W_O); or rows
of two factors that are multiplied with each other, so that only a *gate* on the product can be thought of (Q with K);
or neither (*others*, such as packed experts).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ecospa_fx.coupling.types import Coupling, Member
from ecospa_fx.ir.linears import LinearUse


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """The units of a coupling as inputs of linear layers."""

    coupling: Coupling
    """Whose units these are."""
    positions: Mapping[LinearUse, Tensor]
    """Per linear layer LongTensor [carriers, units, width], positions of its input."""


@dataclass(frozen=True, slots=True, eq=False)
class Gate:
    """The units of a coupling as rows of linear outputs that a gate would multiply."""

    coupling: Coupling
    """Whose units these are."""
    sides: tuple[Mapping[LinearUse, Tensor], ...]
    """The factors of the product, a single one where they cannot be told apart; each per linear layer LongTensor
    [carriers, units, width], positions of its output."""

    @property
    def sites(self) -> list[LinearUse]:
        """Each once."""
        return list(dict.fromkeys(site for side in self.sides for site in side))


@dataclass(frozen=True, slots=True, eq=False)
class Side:
    """Positions [carriers, units, width] along one axis of one parameter."""

    member: Member
    """The parameter and its axis."""
    positions: Tensor
    """LongTensor [carriers, units, width]."""


@dataclass(frozen=True, slots=True, eq=False)
class CouplingViews:
    """How each coupling is looked at: in one of the first three ways."""

    inputs: tuple[Inputs, ...]
    """Couplings whose units are inputs of the matrices that consume them."""
    gates: tuple[Gate, ...]
    """Couplings whose units are rows of two factors that are multiplied with each other."""
    others: tuple[Coupling, ...]
    """All other couplings."""
    beside: tuple[Inputs, ...] = ()
    """Linear layers that consume units of `others`, which scores do not look at."""

    @property
    def sites(self) -> list[LinearUse]:
        """The sites whose inputs are units, each once."""
        return list(dict.fromkeys(site for view in self.inputs for site in view.positions))


def views_of(couplings: Sequence[Coupling], sites: Sequence[LinearUse]) -> CouplingViews:
    """Look at each coupling in the most informed way that its members allow."""
    by_name = {site.parameter: site for site in sites}
    inputs, gates, others, beside = [], [], [], []
    for coupling in couplings:
        consumed = {s: m.indices for m in coupling.members if (s := _met(by_name, m, inside=True)) is not None}
        produced = _rows(by_name, coupling)
        outside = [m for m in coupling.members if m.role == "consumer" and _met(by_name, m, inside=True) is None]
        if consumed and not outside:
            inputs.append(Inputs(coupling, consumed))
        elif not consumed and produced and coupling.symmetry != "permutation":
            gates.append(Gate(coupling, _factors(by_name, coupling) or (produced,)))
        else:
            others.append(coupling)
            if consumed:
                beside.append(Inputs(coupling, consumed))
    return CouplingViews(tuple(inputs), tuple(gates), tuple(others), tuple(beside))


def _met(sites: Mapping[str, LinearUse], member: Member, *, inside: bool) -> LinearUse | None:
    """The site whose input (inside) or output a member's axis is."""
    site = sites.get(member.parameter)
    if site is None or member.carrier_axis is not None or (member.axis == site.in_axis) != inside:
        return None
    return site


def _rows(sites: Mapping[str, LinearUse], coupling: Coupling) -> dict[LinearUse, Tensor]:
    """Positions in the outputs of the sites that make the units; empty where something else makes them too."""
    rows: dict[LinearUse, Tensor] = {}
    biases = {site.bias for site in sites.values()}
    for member in coupling.members:
        site = _met(sites, member, inside=False)
        if site is not None:
            rows[site] = member.indices
        elif member.parameter not in biases:
            return {}
    return rows


def sides_of(coupling: Coupling) -> tuple[tuple[Side, ...], tuple[Side, ...]] | None:
    """The two factors of a product: by role, or by halves of a fused matrix; None where neither tells them apart."""
    if any(m.carrier_axis is not None for m in coupling.members):
        return None
    whole = [Side(m, m.indices) for m in coupling.members]
    if len({m.role for m in coupling.members}) == 2:
        return tuple(s for s in whole if s.member.role == "producer"), tuple(
            s for s in whole if s.member.role == "consumer"
        )
    if any(len(m.boxes) != 2 for m in coupling.members):
        return None
    halves = [tuple(Side(m, m.boxes[i].indices(m.carriers, m.units)) for m in coupling.members) for i in (0, 1)]
    return halves[0], halves[1]


def _factors(sites: Mapping[str, LinearUse], coupling: Coupling) -> tuple[Mapping[LinearUse, Tensor], ...] | None:
    """The outputs of each factor's matrices; None where a factor is not told apart or has none."""
    halves = sides_of(coupling) or ()
    factors = tuple(
        {site: side.positions for side in half if (site := _met(sites, side.member, inside=False)) is not None}
        for half in halves
    )
    return factors if factors and all(factors) else None
