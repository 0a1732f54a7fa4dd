"""Allocation by measured sensitivity: from a plan by scores to one that held-out data likes better.

Couplings do not add up: what one of them costs depends on what the others have lost. So each is tried around the plan
so far, the others at its widths, and the knapsack is solved again; the plan that loses least on the held-out data is
taken, the first one included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Unpack

from ecospa_fx.budget.settings import AllPlanOptions
from ecospa_fx.coupling.couplings import Couplings
from ecospa_fx.importance.compensation import Compensated
from ecospa_fx.importance.score import Batch, Loss
from ecospa_fx.importance.scores import Scores
from ecospa_fx.importance.sensitivity import Trial, TrialLosses, Watcher, measured_curves
from ecospa_fx.plan import Plan
from ecospa_fx.planning import plan as make_plan
from ecospa_fx.runtime.interpreter import PartialInterpreter

STEPS = (0.5, 1.0, 1.5, 2.0)
"""Where a coupling is tried, in multiples of the share of its units that the plan so far removes."""

MOST = 0.95
"""The largest share of a coupling's units that is tried."""


@dataclass(frozen=True, slots=True, eq=False)
class Sensitivity:
    """``Sensitivity(…).plan(couplings, ratio, scores)``: plans by measured curves, around the plan by scores."""

    evaluator: PartialInterpreter
    """Runs the dense program."""
    weights: Compensated
    """What its parameters become with units removed."""
    batches: Sequence[Batch]
    """Held out from the scores."""
    loss: Loss
    """(output, args, kwargs) to a scalar."""
    rounds: int = 2
    """How often the curves are measured, each time around the plan before."""
    watch: Watcher = field(default=lambda trials: trials)
    """Wraps the trials, to show progress."""

    def plan(self, couplings: Couplings, ratio: float, scores: Scores, **planning: Unpack[AllPlanOptions]) -> Plan:
        """The best of the plan by scores and those by curves. planning: further options of `plan`."""
        best = last = make_plan(couplings, ratio, scores, **planning)
        least, to_ceiling = self.loss_of(best), planning.get("within") is not None
        for _ in range(self.rounds):
            base = {s.name: s.mask for s in last}
            trials = self._trials(last)
            share = last.removed_parameters / max(last.coupled_parameters, 1) if to_ceiling else ratio
            widths = {s.name: around(s.size, s.size - s.kept, share) for s in last}
            curves = measured_curves(trials, self.weights, scores.values, widths, base, self.watch)
            by_curves: AllPlanOptions = {**planning, "allocation": curves}
            plan = make_plan(couplings, ratio, scores, **by_curves)
            if plan == last:
                break
            last, loss = plan, self.loss_of(plan)
            if loss < least:
                best, least = plan, loss
        return best

    def loss_of(self, plan: Plan) -> float:
        """Mean loss on the held-out data under a plan."""
        (loss,) = self._trials(plan).losses([Trial("", (), [dict])])[""]
        return loss

    def _trials(self, plan: Plan) -> TrialLosses:
        keep = {s.name: s.mask for s in plan}
        names = {name for c in self.weights.couplings if c.name in keep for name in self.weights.touched(c)}
        return TrialLosses(self.evaluator, self.batches, self.loss, self.weights.weights(keep, names))


def around(size: int, removed: int, ratio: float) -> list[int]:
    """Kept units to try, from most to fewest, around a plan that removes some of a coupling's units."""
    share = max(removed / size, ratio / 2)
    tried = {min(max(round(size * (1 - min(step * share, MOST))), 1), size - 1) for step in STEPS}
    return sorted(tried, reverse=True)
