"""One look of calibration data at couplings, to second order: what compression and sparse training decide by.

The couplings are looked at from the linear layers around them, linear ones are turned into bases that suit removal, and
moments of activations and of the loss's gradients are taken in these bases. Who runs the data, and who turns what
besides the program's parameters (an optimizer's state, say), is the caller's business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ecospa_fx.coupling.types import Coupling
from ecospa_fx.importance.compensation import Compensated
from ecospa_fx.importance.curvature import Curvature
from ecospa_fx.importance.linear_views import CouplingViews, views_of
from ecospa_fx.importance.second_order import Watch, unit_scores, without_traffic
from ecospa_fx.ir.linears import LinearUse, linear_uses
from ecospa_fx.ir.program import ExportedForm
from ecospa_fx.passes.lossy.change_basis import Apply, turn_factors, turn_values

Collect = Callable[[CouplingViews, Sequence[LinearUse]], Curvature]
"""Runs the data: moments at the views, and those of the outputs of some linear layers."""

NO_VIEWS = CouplingViews((), (), ())


@dataclass(frozen=True, slots=True, eq=False)
class Measurement:
    """What data says of couplings, in the bases that they were turned into."""

    couplings: Sequence[Coupling]
    """Those that were measured."""
    views: CouplingViews
    """How each of them is looked at."""
    curvature: Curvature
    """Moments at the views."""
    values: Mapping[str, Tensor]
    """Parameters by name, in these bases."""

    @property
    def unreached(self) -> list[str]:
        """Names of the couplings that the data never reached."""
        return without_traffic(self.views, self.curvature)

    def scores(self, damping: float, watch: Watch | None = None) -> dict[str, Tensor]:
        """Per coupling float64 [carriers, units]: see `ecospa_fx.importance.second_order.unit_scores`."""
        return unit_scores(self.views, self.curvature, self.values, damping, watch)

    def compensated(
        self,
        couplings: Sequence[Coupling] | None = None,
        damping: float | None = 0.1,
        gate_damping: float | None = 0.1,
    ) -> Compensated:
        """The weights with units removed, of these couplings or of others that contain them."""
        chosen = self.couplings if couplings is None else couplings
        return Compensated(chosen, self.values, self.views, self.curvature, damping, gate_damping)


def measure(
    program: ExportedForm,
    couplings: Sequence[Coupling],
    collect: Collect,
    *,
    basis: bool = True,
    solves: bool = True,
    apply: Apply | None = None,
) -> Measurement:
    """Turn the couplings' bases in the program, and measure in the new ones.

    basis: whether linear couplings are turned; solves: whether consumers of couplings that scores look at less closely
    are measured too, to be solved by least squares; apply: turns, by default the program's parameters alone.
    """
    views = views_of(couplings, linear_uses(program))
    if not solves:
        views = replace(views, beside=())
    if basis:
        turn_factors(views, lambda sites: collect(NO_VIEWS, sites), program, apply)
    curvature = collect(views, ())
    if basis:
        turn_values(views, curvature, program, apply)
    values = {name: tensor.detach() for name, tensor in program.values.items()}
    return Measurement(couplings, views, curvature, values)
