"""What the parameters of a dense program would be with some units gone and what stays making up for them.

Shapes stay: what goes is zero. Consumers are solved for the dense output by damped least squares on the dense inputs'
moments, gates of kept queries and keys rise, both as far as the views know how; everything else is masked. Less than
the recipe does, at a fraction of its price: enough to compare choices.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ecospa_fx.budget import elements
from ecospa_fx.coupling.couplings import Coupling
from ecospa_fx.graph.sites import Site
from ecospa_fx.importance.curvature import Curvature
from ecospa_fx.importance.matrices import damped
from ecospa_fx.importance.surgeon import gate_roots
from ecospa_fx.importance.views import Views

Gone = Mapping[str, Tensor]
"""By coupling BoolTensor [carriers, units], True where a unit goes; a coupling that is not there is whole."""


@dataclass(frozen=True, slots=True, eq=False)
class Compensated:
    """Weights with units gone.

    couplings: those that may lose units; values: dense parameters by name; views, curvature: what makes up for it,
    None for masks alone; damping, gate_damping: as in the recipe.
    """

    couplings: Sequence[Coupling]
    values: Mapping[str, Tensor]
    views: Views | None = None
    curvature: Curvature | None = None
    damping: float = 0.1
    gate_damping: float = 0.1

    def touched(self, coupling: Coupling) -> set[str]:
        """Parameters that change when a coupling loses units."""
        found = {m.parameter for m in coupling.members}
        for view in self.views.inputs if self.views else ():
            if view.coupling.name == coupling.name:
                found |= {site.bias for site in view.positions if site.bias is not None}
        return found

    def weights(self, gone: Gone, names: Iterable[str]) -> dict[str, Tensor]:
        """The named parameters with all these units gone."""
        names = set(names)
        found = {name: self.values[name] for name in names}
        self._rescale(found, gone)
        self._solve(found, gone)
        removals = [(c.members, gone[c.name]) for c in self.couplings if c.name in gone]
        shapes = {name: tuple(value.shape) for name, value in self.values.items()}
        for name, factors in elements.keep_factors(shapes, removals).items():
            if name in names:
                kept = elements.mask(shapes[name], factors, found[name].device)
                found[name] = found[name].masked_fill(~kept, 0)
        return found

    def _rescale(self, found: dict[str, Tensor], gone: Gone) -> None:
        from ecospa_fx.passes.lossy.change_basis import rotated

        for gate in self.views.gates if self.views else ():
            lost = gone.get(gate.coupling.name)
            if lost is None or not lost.any() or found.keys().isdisjoint(m.parameter for m in gate.coupling.members):
                continue
            assert self.curvature is not None  # views come with it
            roots = gate_roots(self.curvature.gates[gate.coupling.name], lost, self.gate_damping)
            for member in gate.coupling.members:
                if member.parameter in found:
                    held = found[member.parameter]
                    found[member.parameter] = rotated(held, member.axis, member.indices, roots)

    def _solve(self, found: dict[str, Tensor], gone: Gone) -> None:
        lost: dict[Site, list[Tensor]] = {}
        for view in self.views.inputs if self.views else ():
            units = gone.get(view.coupling.name)
            for site, positions in view.positions.items() if units is not None and units.any() else ():
                lost.setdefault(site, []).append(positions[units].flatten())
        for site, parts in lost.items():
            if site.parameter in found or site.bias in found:
                matrix, bias = self._solved(site, torch.cat(parts))
                self._put(found, site.parameter, site.matrix(matrix))
                self._put(found, site.bias, bias)

    @staticmethod
    def _put(found: dict[str, Tensor], name: str | None, value: Tensor | None) -> None:
        if name in found and value is not None:
            found[name] = value.to(found[name])

    def _solved(self, site: Site, lost: Tensor) -> tuple[Tensor, Tensor | None]:
        """W_K ← W_K + W_R A_RK (A_KK + λ)⁻¹ over the kept inputs K and those that went, R; and the bias that fits."""
        assert self.curvature is not None  # views come with it
        moments = self.curvature.inputs[site]
        weight = site.matrix(self.values[site.parameter]).to(moments.second)
        stays = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
        stays[lost.to(weight.device)] = False
        second = self.curvature.second(site)
        inside = damped(second[stays][:, stays], self.damping)
        change = torch.linalg.solve(inside, second[stays][:, ~stays] @ weight[:, ~stays].T).T
        result = torch.zeros_like(weight)
        result[:, stays] = weight[:, stays] + change
        if site.bias is None:
            return result, None
        mean = moments.total / max(moments.rows, 1)
        bias = self.values[site.bias].to(mean) + weight[:, ~stays] @ mean[~stays] - change @ mean[stays]
        return result, bias
