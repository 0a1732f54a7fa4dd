"""What batches say at a shrink, to second order: which units go, in which bases, and what makes up for them.

Training itself shows gradients summed over tokens. What one removal costs once the others have made up for it needs
more: moments of what consumers read, and of the loss's gradients there (`ecospa_fx.importance.curvature`), from a pass
forward and backward over a few batches, at the shrinks alone. Linear couplings are turned first, so that few of their
units carry most of what they do; parameters, gradients, copies and optimizers' states turn with them.

Several processes bring batches of their own. Moments are sums over batches, so they are added up over the processes,
and all turn and judge by the same ones. Where parameters are sharded, each process holds all of them meanwhile.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ecospa_fx.coupling.types import Coupling
from ecospa_fx.errors import EcospaError, TrainingError
from ecospa_fx.importance.compensation import Keep
from ecospa_fx.importance.curvature import Collector, Curvature
from ecospa_fx.importance.linear_views import CouplingViews
from ecospa_fx.importance.output_distance import needs_scales
from ecospa_fx.importance.samples import samples_of
from ecospa_fx.importance.score import Batch, Loss
from ecospa_fx.importance.second_order import SECOND_ORDER
from ecospa_fx.ir.linears import LinearUse
from ecospa_fx.passes.lossy.change_basis import ChangeBasis, balanced
from ecospa_fx.passes.lossy.measurement import Measurement, measure
from ecospa_fx.runtime.interpreter import PartialInterpreter
from ecospa_fx.training.distributed import add_up, fail_together, of_first
from ecospa_fx.training.tracked_model import TrackedModel

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class SecondOrder:
    """Measures couplings at a shrink. Samples of the batches count, see `ecospa_fx.importance.samples`."""

    batches: Sequence[Batch]
    """As `eco.score` takes them, of this process."""
    loss: Loss
    """As `eco.score` takes it."""
    group: ProcessGroup | None
    """The processes that measure together; None: all."""
    solves: bool
    """Whether consumers of couplings that scores look at less closely are measured too, to be solved."""
    damping: float = 0.01
    """Of the optimal brain surgeon's matrices, in means of their diagonals."""
    _samples: list[Batch] = field(default_factory=list, init=False)

    def measured(
        self, evaluator: PartialInterpreter, couplings: Sequence[Coupling], model: TrackedModel
    ) -> Measurement:
        """Of couplings as they are now. model: turns when a basis changes.

        A coupling stays in its basis where an optimizer keeps what cannot be turned.
        """
        program = evaluator.program
        self._read(evaluator)

        def turn(change: ChangeBasis) -> ChangeBasis:
            reason = model.basis_refusal(side.member.parameter for side in (*change.first, *change.second))
            if reason is not None:
                log.warning("linear couplings stay in their bases because %s, and how that turns is not known", reason)
                eye = torch.eye(change.basis.shape[1]).to(change.basis)
                return replace(change, basis=eye.expand_as(change.basis))
            change = balanced(change, program)
            change = replace(change, basis=of_first(change.basis, self.group))
            change.run(program)
            model.change_basis((change.first, change.second), change.basis)
            return change

        return measure(program, couplings, partial(self._curvature, evaluator), solves=self.solves, apply=turn)

    def scores(self, measurement: Measurement) -> dict[str, Tensor]:
        """Per coupling [carriers, units]; zero throughout where the batches never reach it."""
        result = measurement.scores(self.damping)
        for name in measurement.unreached:
            result[name].zero_()
        return result

    def changes(self, measurement: Measurement, keep: Keep) -> dict[str, Tensor]:
        """What to add to parameters, by name, so that kept units make up for the others: see `Compensated`."""
        compensated = dict(measurement.compensated().compensated(keep))
        values = measurement.values
        return {name: of_first(value - values[name], self.group) for name, value in compensated.items()}

    def _read(self, evaluator: PartialInterpreter) -> None:
        """Take the batches apart into samples, once: what a shrink removes does not change which there are."""
        error = None
        try:
            self._samples.extend(() if self._samples else samples_of(self.batches, evaluator, self.loss))
        except EcospaError as failure:
            error = failure
        fail_together(error, next(iter(evaluator.program.values.values())).device, self.group)

    def _curvature(
        self, evaluator: PartialInterpreter, views: CouplingViews, results: Sequence[LinearUse]
    ) -> Curvature:
        collector, error = Collector(evaluator, views, results), None
        try:
            collector.watch(self._samples, self.loss)
        except EcospaError as failure:
            error = failure
        device = next(iter(evaluator.program.values.values())).device
        fail_together(error, device, self.group)
        return collector.result(partial(add_up, group=self.group))


def second_order(
    batches: Sequence[Batch], loss: Loss | None, group: ProcessGroup | None, *, solves: bool
) -> SecondOrder:
    """Raises TrainingError for no data to measure on, no loss, or a distance in place of one."""
    if not batches or loss is None:
        raise TrainingError(f"scores={SECOND_ORDER!r} needs data: give batches= and loss=, as eco.score takes them")
    if needs_scales(loss):
        raise TrainingError("training has a loss, which loss= is to be too, and not a distance to a model that changes")
    return SecondOrder(batches, loss, group, solves)
