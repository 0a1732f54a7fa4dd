"""Measured sensitivity: how much the loss rises as each coupling loses units, the others staying as they are.

Scores predict what units cost; here it is measured, at a few widths of each coupling, on data that the scores have not
seen. One walk over the graph serves all couplings: the values up to where a coupling's parameters are first read are
kept per batch, and only the rest is run for each width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor, fx

from ecospa_fx.coupling.types import Coupling
from ecospa_fx.errors import ScoreError
from ecospa_fx.importance.compensation import Compensated, Keep
from ecospa_fx.importance.output_distance import judging
from ecospa_fx.importance.score import Batch, Loss
from ecospa_fx.runtime.interpreter import NodeValues, PartialInterpreter

ChangedWeights = Mapping[str, Tensor]
"""Parameters by name, of their dense shapes."""

Watcher = Callable[[Sequence["Trial"]], Iterable["Trial"]]
"""Wraps the trials, to show progress."""

TINY = 1e-12
"""What each unit is predicted to cost at least, as a share of the whole prediction."""

LEAST = 0.1
"""A measured rise counts as at least this share of what the scores predict, in the currency of all measurements."""


@dataclass(frozen=True, slots=True, eq=False)
class Curves:
    """Rise of the loss as each coupling loses units, measured at some widths.

    Between these widths the rise goes as the scores' prediction does; beyond them nothing is known, and no width is
    chosen. Given to `plan`, all widths are chosen at once so that the sum of the rises is least.

    >>> made = plan(couplings, 0.3, scores, allocation=curves)  # doctest: +SKIP
    """

    rises: Mapping[str, tuple[tuple[int, float], ...]]
    """By coupling (kept units, rise) from most to fewest kept; of the whole coupling the rise is 0."""
    rate: float = 0.0
    """What one unit of the scores' prediction has cost on average."""

    def rise(self, coupling: Coupling, kept: Sequence[int], predicted: Callable[[Sequence[int]], Tensor]) -> Tensor:
        """float64 [widths]: the rise at any widths. predicted: the scores' prediction at widths, ascending."""
        widths, rises = zip(*((coupling.size, 0.0), *self.rises[coupling.name]), strict=True)
        tiny = TINY * (float(predicted(widths).max()) or 1.0)
        x, wanted = (predicted(some) + tiny * (coupling.size - torch.tensor(some)) for some in (widths, kept))
        y = torch.tensor(rises, dtype=torch.float64).maximum(LEAST * self.rate * x).cummax(0).values
        high = torch.searchsorted(x, wanted).clamp(min=1)
        unknown = high == len(x)
        high = high.clamp(max=len(x) - 1)
        low = (high - 1).clamp(min=0)
        slope = (y[high] - y[low]) / (x[high] - x[low]).clamp(min=tiny)
        return (y[low] + (wanted - x[low]) * slope).masked_fill(unknown & (wanted > 0), torch.inf)


@dataclass(frozen=True, slots=True, eq=False)
class Trial:
    """Weights to try in place of the base's."""

    coupling: str
    """Name of the coupling that loses units."""
    parameters: Collection[str]
    """Names of those that change."""
    variants: Sequence[Callable[[], ChangedWeights]]
    """Make the weights when they are needed."""


class TrialLosses:
    """Tries weights on held-out batches. base: what differs from the program's own parameters in every trial."""

    def __init__(
        self, evaluator: PartialInterpreter, batches: Sequence[Batch], loss: Loss, base: ChangedWeights
    ) -> None:
        self.evaluator, self.batches = evaluator, batches
        with torch.no_grad():
            self._losses = judging(loss, lambda batch: evaluator.answer(*batch), batches)
        self._nodes = evaluator.program.parameters
        self._weights = {**evaluator.weights(), **self._by_node(base)}
        self._place = {node: place for place, node in enumerate(evaluator.order)}

    def _by_node(self, weights: ChangedWeights) -> NodeValues:
        return {node: weights[name] for node, name in self._nodes.items() if name in weights}

    def first(self, trial: Trial) -> int:
        """The place of the first node that reads a parameter of a trial."""
        nodes = (node for node, name in self._nodes.items() if name in trial.parameters)
        return min((self._place[user] for node in nodes for user in node.users if user in self._place), default=0)

    def losses(self, trials: Sequence[Trial], watch: Watcher = lambda trials: trials) -> dict[str, list[float]]:
        """Mean loss of each variant, by coupling."""
        losses, done = {}, 0
        with torch.no_grad():
            states = [self.evaluator.start(*batch) for batch in self.batches]
            for trial in watch(sorted(trials, key=self.first)):
                first = self.first(trial)
                states = [self._run(state, self.evaluator.order[done:first], {}) for state in states]
                done, rest = first, self.evaluator.order[first:]
                losses[trial.coupling] = [self._mean(states, rest, variant()) for variant in trial.variants]
        return losses

    def _mean(self, states: Sequence[NodeValues], rest: Sequence[fx.Node], weights: ChangedWeights) -> float:
        total = 0.0
        for state, (args, kwargs), loss in zip(states, self.batches, self._losses, strict=True):
            values = self._run(state, rest, self._by_node(weights))
            total += float(loss(self.evaluator.returned(values, args, kwargs), args, kwargs))
        mean = total / len(self.batches)
        return mean if isfinite(mean) else float("inf")

    def _run(self, state: NodeValues, nodes: Sequence[fx.Node], weights: NodeValues) -> NodeValues:
        """What a batch's values are after some nodes; the values before them stay as they were."""
        # Together, so that views of one tensor stay views of one.
        fresh = deepcopy(list(state.values())) if self.evaluator.overwrites else state.values()
        values = {**dict(zip(state, fresh, strict=True)), **self._weights, **weights}
        self.evaluator.run(nodes, values)
        return {node: value for node, value in values.items() if node not in self._weights}


def measured_curves(
    trial_losses: TrialLosses,
    weights: Compensated,
    scores: Mapping[str, Tensor],
    widths: Mapping[str, Sequence[int]],
    base: Keep,
    watch: Watcher = lambda trials: trials,
) -> Curves:
    """Curves of all couplings of `widths`, which lists kept units from most to fewest, around a base.

    scores: [carriers, units] by coupling, which say what goes first. Each coupling is tried whole and at its widths,
    the others at the base. Raises ScoreError where the loss with whole couplings is not finite.
    """
    trials = [_trial(weights, scores, c, widths[c.name], base) for c in weights.couplings if c.name in widths]
    losses = trial_losses.losses(trials, watch)
    rises: dict[str, tuple[tuple[int, float], ...]] = {}
    risen, predicted = 0.0, 0.0
    for name, (whole, *others) in losses.items():
        if not isfinite(whole):
            raise ScoreError(f"the loss is not finite while sensitivities are measured at {name!r}: check the batches")
        pairs = ((kept, max(loss - whole, 0.0)) for kept, loss in zip(widths[name], others, strict=True))
        rises[name] = tuple((kept, rise) for kept, rise in pairs if isfinite(rise))
        risen += sum(rise for _, rise in rises[name])
        predicted += sum(float(scores[name][~keep_best(scores[name], kept)].sum()) for kept, _ in rises[name])
    return Curves(rises, risen / predicted if predicted > 0 else 0.0)


def _trial(
    weights: Compensated, scores: Mapping[str, Tensor], coupling: Coupling, widths: Sequence[int], base: Keep
) -> Trial:
    touched = weights.touched(coupling)

    def variant(kept: int) -> Callable[[], ChangedWeights]:
        return lambda: weights.weights({**base, coupling.name: keep_best(scores[coupling.name], kept)}, touched)

    return Trial(coupling.name, touched, [variant(kept) for kept in (coupling.size, *widths)])


def keep_best(scores: Tensor, kept: int) -> Tensor:
    """BoolTensor [carriers, units], True for the `kept` units of greatest score in every carrier."""
    order = scores.to("cpu", torch.float64).sort(dim=1, stable=True).indices
    return torch.ones(scores.shape, dtype=torch.bool).scatter_(1, order[:, : scores.shape[1] - kept], False)
