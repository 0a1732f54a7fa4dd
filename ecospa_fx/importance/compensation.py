"""What the parameters of a dense program become so that what stays makes up for the units that go.

Consumers are solved for the dense output by damped least squares on the dense inputs' moments, and gates of kept
queries and keys rise, both as far as the views know how. Shapes stay. All that is needed was measured for the scores,
so that it costs no pass over the data: enough to compare choices, and what the chosen one begins with.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from ecospa_fx.coupling import unit_elements
from ecospa_fx.coupling.types import Coupling
from ecospa_fx.importance.brain_surgeon import gate_roots
from ecospa_fx.importance.curvature import Curvature
from ecospa_fx.importance.linalg import least_squares, rotated
from ecospa_fx.importance.linear_views import CouplingViews, Inputs
from ecospa_fx.ir.linears import LinearUse

Removed = Mapping[str, Tensor]
"""By coupling BoolTensor [carriers, units], True where a unit goes; a coupling that is not there is whole."""


@dataclass(frozen=True, slots=True, eq=False)
class Compensated:
    """Weights with units gone.

    couplings: those that may lose units; values: dense parameters by name; views, curvature: what makes up for it,
    None for masks alone; damping: of least squares, gate_damping: of gates, as in the recipe, None for none of it.
    """

    couplings: Sequence[Coupling]
    values: Mapping[str, Tensor]
    views: CouplingViews | None = None
    curvature: Curvature | None = None
    damping: float | None = 0.1
    gate_damping: float | None = 0.1

    @property
    def _consumers(self) -> tuple[Inputs, ...]:
        return (*self.views.inputs, *self.views.beside) if self.views else ()

    def touched(self, coupling: Coupling) -> set[str]:
        """Parameters that change when a coupling loses units."""
        found = {m.parameter for m in coupling.members}
        for view in self._consumers:
            if view.coupling.name == coupling.name:
                found |= {site.bias for site in view.positions if site.bias is not None}
        return found

    def weights(self, gone: Removed, names: Iterable[str]) -> dict[str, Tensor]:
        """The named parameters with all these units zero, and the rest making up for them."""
        names = set(names)
        found = {name: self.values[name] for name in names}
        found |= dict(self.made_up(gone, names))
        removals = [(c.members, gone[c.name]) for c in self.couplings if c.name in gone]
        shapes = {name: tuple(value.shape) for name, value in self.values.items()}
        for name, factors in unit_elements.keep_factors(shapes, removals).items():
            if name in names:
                kept = unit_elements.mask(shapes[name], factors, found[name].device)
                found[name] = found[name].masked_fill(~kept, 0)
        return found

    def made_up(self, gone: Removed, names: Container[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Parameters, of `names` where given, and what they are for the rest to make up for units that go.

        One after the other, with anything where the units are that go. One that comes twice counts as it comes last.
        """
        held: dict[str, Tensor] = {}
        for name, value in chain(self._rescaled(gone, names, held), self._solved(gone, names, held)):
            held[name] = value.to(self.values[name]).contiguous()
            yield name, held[name]

    def _rescaled(
        self, gone: Removed, names: Container[str] | None, held: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """Both factors multiplied by the square roots of the best gates. held: what has changed already."""

        for gate in self.views.gates if self.views and self.gate_damping is not None else ():
            lost = gone.get(gate.coupling.name)
            members = [m for m in gate.coupling.members if names is None or m.parameter in names]
            if lost is None or not lost.any() or not members:
                continue
            assert self.curvature is not None  # views come with it
            assert self.gate_damping is not None
            roots = gate_roots(self.curvature.gates[gate.coupling.name], lost, self.gate_damping)
            for member in members:
                value = held.get(member.parameter, self.values[member.parameter])
                yield member.parameter, rotated(value, member.axis, member.indices, roots)

    def _solved(
        self, gone: Removed, names: Container[str] | None, held: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        lost: dict[LinearUse, list[Tensor]] = {}
        for view in self._consumers if self.damping is not None else ():
            units = gone.get(view.coupling.name)
            for site, positions in view.positions.items() if units is not None and units.any() else ():
                lost.setdefault(site, []).append(positions[units].flatten())
        for site, parts in lost.items():
            wanted = [name for name in (site.parameter, site.bias) if name and (names is None or name in names)]
            if wanted:
                matrix, bias = self._solution(site, torch.cat(parts), {**self.values, **held})
                made = {site.parameter: site.matrix(matrix), site.bias: bias}
                yield from ((name, value) for name in wanted if (value := made[name]) is not None)

    def _solution(self, site: LinearUse, lost: Tensor, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """W_K ← W_K + W_R A_RK (A_KK + λ)⁻¹ over the kept inputs K and those that went, R; and the bias that fits."""
        assert self.curvature is not None  # views come with it
        assert self.damping is not None
        moments = self.curvature.inputs[site]
        weight = site.matrix(values[site.parameter]).to(moments.second)
        stays = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
        stays[lost.to(weight.device)] = False
        second, square = self.curvature.second(site), float(moments.second.diagonal().mean())
        cross = weight[:, ~stays] @ second[~stays][:, stays]
        result = torch.zeros_like(weight)
        change = least_squares(second[stays][:, stays], cross, self.damping, square)
        result[:, stays] = weight[:, stays] + change
        if site.bias is None:
            return result, None
        mean = moments.total / max(moments.rows, 1)
        bias = values[site.bias].to(mean) + weight[:, ~stays] @ mean[~stays] - change @ mean[stays]
        return result, bias
