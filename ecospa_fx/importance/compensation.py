"""What the parameters of a dense program become so that kept units make up for removed ones.

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

Keep = Mapping[str, Tensor]
"""By coupling `keep`, BoolTensor [carriers, units], True where a unit is kept; a coupling that is missing is whole."""


@dataclass(frozen=True, slots=True, eq=False)
class Compensated:
    """Weights with units removed."""

    couplings: Sequence[Coupling]
    """Those that may lose units."""
    values: Mapping[str, Tensor]
    """Dense parameters by name."""
    views: CouplingViews | None = None
    """What can be compensated, with `curvature`; None: units are masked and nothing makes up for them."""
    curvature: Curvature | None = None
    """What was measured at the views."""
    damping: float | None = 0.1
    """Of least squares, in means of the diagonal; None: no matrix is solved."""
    gate_damping: float | None = 0.1
    """Of the gates of queries and keys; None: they stay."""

    @property
    def _consumers(self) -> tuple[Inputs, ...]:
        return (*self.views.inputs, *self.views.beside) if self.views else ()

    def touched(self, coupling: Coupling) -> set[str]:
        """Parameters that change when a coupling loses units."""
        names = {m.parameter for m in coupling.members}
        for view in self._consumers:
            if view.coupling.name == coupling.name:
                names |= {site.bias for site in view.positions if site.bias is not None}
        return names

    def weights(self, keep: Keep, names: Iterable[str]) -> dict[str, Tensor]:
        """The named parameters with all removed units zero, and kept ones making up for them."""
        names = set(names)
        result = {name: self.values[name] for name in names}
        result |= dict(self.compensated(keep, names))
        choices = [(c.members, keep[c.name]) for c in self.couplings if c.name in keep]
        shapes = {name: tuple(value.shape) for name, value in self.values.items()}
        for name, factors in unit_elements.keep_factors(shapes, choices).items():
            if name in names:
                mask = unit_elements.mask(shapes[name], factors, result[name].device)
                result[name] = result[name].masked_fill(~mask, 0)
        return result

    def compensated(self, keep: Keep, names: Container[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Parameters, of `names` where given, with the values by which kept units make up for removed ones.

        They come one after the other, with anything where removed units are. One that comes twice counts as it comes
        last.
        """
        changed: dict[str, Tensor] = {}
        for name, value in chain(self._rescaled(keep, names, changed), self._solved(keep, names, changed)):
            changed[name] = value.to(self.values[name]).contiguous()
            yield name, changed[name]

    def _rescaled(
        self, keep: Keep, names: Container[str] | None, changed: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """Both factors multiplied by the square roots of the best gates. changed: the values so far."""
        for gate in self.views.gates if self.views and self.gate_damping is not None else ():
            kept = keep.get(gate.coupling.name)
            members = [m for m in gate.coupling.members if names is None or m.parameter in names]
            if kept is None or kept.all() or not members:
                continue
            assert self.curvature is not None  # views come with it
            assert self.gate_damping is not None
            roots = gate_roots(self.curvature.gates[gate.coupling.name], kept, self.gate_damping)
            for member in members:
                value = changed.get(member.parameter, self.values[member.parameter])
                yield member.parameter, rotated(value, member.axis, member.indices, roots)

    def _solved(
        self, keep: Keep, names: Container[str] | None, changed: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """Every matrix that lost inputs, and its bias, solved for what the dense one makes of all of them."""
        removed: dict[LinearUse, list[Tensor]] = {}
        for view in self._consumers if self.damping is not None else ():
            kept = keep.get(view.coupling.name)
            if kept is None or kept.all():
                continue
            for site, positions in view.positions.items():
                removed.setdefault(site, []).append(positions[~kept].flatten())
        for site, parts in removed.items():
            wanted = [name for name in (site.parameter, site.bias) if name and (names is None or name in names)]
            if wanted:
                matrix, bias = self._solution(site, torch.cat(parts), {**self.values, **changed})
                solution = {site.parameter: site.matrix(matrix), site.bias: bias}
                yield from ((name, value) for name in wanted if (value := solution[name]) is not None)

    def _solution(self, site: LinearUse, removed: Tensor, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """W_K ← W_K + W_R A_RK (A_KK + λ)⁻¹ over the kept inputs K and the removed ones R; and the bias that fits."""
        assert self.curvature is not None  # views come with it
        assert self.damping is not None
        moments = self.curvature.inputs[site]
        weight = site.matrix(values[site.parameter]).to(moments.second)
        keep = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
        keep[removed.to(weight.device)] = False
        second, square = self.curvature.second(site), float(moments.second.diagonal().mean())
        cross = weight[:, ~keep] @ second[~keep][:, keep]
        result = torch.zeros_like(weight)
        change = least_squares(second[keep][:, keep], cross, self.damping, square)
        result[:, keep] = weight[:, keep] + change
        if site.bias is None:
            return result, None
        mean = moments.total / max(moments.rows, 1)
        bias = values[site.bias].to(mean) + weight[:, ~keep] @ mean[~keep] - change @ mean[keep]
        return result, bias
