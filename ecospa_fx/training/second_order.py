"""Second-order scores at a shrink, measured on batches: which units go, and in which bases.

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
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ecospa_fx.coupling.couplings import Coupling
from ecospa_fx.errors import EcospaError, TrainingError
from ecospa_fx.graph.evaluate import Evaluator
from ecospa_fx.graph.sites import Site, find_sites
from ecospa_fx.importance.curvature import Collector, Curvature
from ecospa_fx.importance.score import Batch, Loss
from ecospa_fx.importance.second_order import unit_scores, without_traffic
from ecospa_fx.importance.views import Views, views_of
from ecospa_fx.training.distributed import add_up, fail_together, of_first
from ecospa_fx.training.held import Held
from ecospa_fx.training.settings import SECOND_ORDER

log = logging.getLogger(__name__)

LOOKS = 128
"""How often costs of a coupling are looked at while its units are put in order."""


@dataclass(frozen=True, slots=True, eq=False)
class SecondOrder:
    """batches, loss: as `eco.score` takes them; group: the processes that measure together; damping: of the surgeon's
    matrices, in means of their diagonals."""

    batches: Sequence[Batch]
    loss: Loss
    group: Any = None
    damping: float = 0.01

    def scores(self, evaluator: Evaluator, couplings: Sequence[Coupling], held: Held) -> dict[str, Tensor]:
        """Per coupling [carriers, units] as they are now. held: who turns when a basis changes.

        A coupling stays in its basis where an optimizer keeps what cannot be turned. A coupling that the batches never
        reach scores zero throughout.
        """
        from ecospa_fx.passes.lossy.change_basis import ChangeBasis, balanced, turn_factors, turn_values

        program = evaluator.program

        def made(change: ChangeBasis) -> ChangeBasis:
            reason = held.turnable(side.member.parameter for side in (*change.first, *change.second))
            if reason is not None:
                log.warning("linear couplings stay in their bases because %s, and how that turns is not known", reason)
                eye = torch.eye(change.basis.shape[1]).to(change.basis)
                return replace(change, basis=eye.expand_as(change.basis))
            change = balanced(change, program)
            change = replace(change, basis=of_first(change.basis, self.group))
            change.run(program)
            held.turn((change.first, change.second), change.basis)
            return change

        views = replace(views_of(couplings, find_sites(program)), beside=())
        turn_factors(views, lambda sites: self._measured(evaluator, Views((), (), ()), sites), program, made)
        curvature = self._measured(evaluator, views)
        turn_values(views, curvature, program, made)
        weights = {name: tensor.detach() for name, tensor in program.values.items()}
        found = unit_scores(views, curvature, weights, self.damping, LOOKS)
        for name in without_traffic(views, curvature):
            found[name].zero_()
        return found

    def _measured(self, evaluator: Evaluator, views: Views, results: Sequence[Site] = ()) -> Curvature:
        collector, error = Collector(evaluator, views, results), None
        try:
            collector.watch(self.batches, self.loss)
        except EcospaError as found:
            error = found
        device = next(iter(evaluator.program.values.values())).device
        fail_together(error, device, self.group)
        return collector.result(partial(add_up, group=self.group))


def second_order(batches: Sequence[Batch], loss: Loss | None, group: Any = None) -> SecondOrder:
    """Raises TrainingError for no data to measure on, or no loss."""
    if not batches or loss is None:
        raise TrainingError(f"scores={SECOND_ORDER!r} needs data: give batches= and loss=, as eco.score takes them")
    return SecondOrder(batches, loss, group)
