"""Allocation as a knapsack: of each group of couplings one option, so that enough is freed and least is lost.

Greedy allocation by loss per cost is right where both grow smoothly. A staircase of seconds, or a curve of measured
losses, has corners where it is not; and couplings that meet in one kernel have a price only together. Here the whole
choice is made at once, by dynamic programming over what is freed, in small steps of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import ceil, inf

import torch
from torch import Tensor

from ecospa_fx.budget.cost import CostModel
from ecospa_fx.coupling.types import Coupling

STEPS = 20_000
"""Steps of the whole budget; a group frees up to one step more than is counted."""

PER_GROUP = 250
"""At least so many steps per group."""

MOST = 128
"""Widths of a coupling that is alone; of several together, so many combinations."""

PredictedLoss = Callable[[Coupling, Sequence[int]], Tensor]
"""Predicted loss, float64 [widths], of a coupling at some numbers of kept units."""


@dataclass(frozen=True, slots=True)
class Option:
    """What some couplings keep together, what that frees, and what it is predicted to cost."""

    kept: tuple[tuple[str, int], ...]
    """(name of coupling, units kept) pairs."""
    freed: float
    """In the budget's unit."""
    loss: float
    """Predicted."""


class TooMuch(Exception):
    """More is to be freed than can be: `most` is the largest share that can."""

    def __init__(self, most: float) -> None:
        super().__init__(f"at most {most:.4f} can be freed")
        self.most = most


def widths(
    cost_model: CostModel,
    couplings: Sequence[Coupling],
    loss: PredictedLoss,
    allowed: Mapping[str, Sequence[int]],
    ratio: float,
) -> dict[str, int]:
    """Units that each coupling keeps so that at least `ratio` of the budget's unit is freed, at the least loss.

    allowed: by coupling, the widths short of all that it may have. A larger ratio never loses less. Raises TooMuch
    where no widths free as much.
    """
    groups = [options(cost_model, group, loss, allowed) for group in cost_model.together(couplings)]
    total = cost_model.total(couplings)
    step, target = total / max(STEPS, PER_GROUP * len(groups)), ratio * total
    most = sum(group[-1].freed for group in groups)
    if most < target:
        raise TooMuch(most / max(total, 1e-300))
    chosen = solve([[(int(o.freed / step), o.loss) for o in group] for group in groups], ceil(target / step - 1e-9))
    if chosen is None:  # within the steps of the last percent of what can be freed
        chosen = [len(group) - 1 for group in groups]
    return {name: kept for group, i in zip(groups, chosen, strict=True) for name, kept in group[i].kept}


def options(
    cost_model: CostModel, group: Sequence[Coupling], loss: PredictedLoss, allowed: Mapping[str, Sequence[int]]
) -> list[Option]:
    """Every combination of widths of some couplings that could be best, the whole first, then by what is freed."""
    axes = [(c.size, *_thinned(cost_model.priced(c, allowed[c.name]), len(group))) for c in group]
    costs = [dict(zip(axis, loss(c, axis).tolist(), strict=True)) for c, axis in zip(group, axes, strict=True)]
    combined = list(product(*axes))
    freed = cost_model.freed_together(group, combined)
    choices = [
        Option(
            tuple((c.name, k) for c, k in zip(group, kept, strict=True)),
            gain,
            sum(cost[k] for cost, k in zip(costs, kept, strict=True)),
        )
        for kept, gain in zip(combined, freed, strict=True)
    ]
    return [choices[0], *_undominated([o for o in choices[1:] if o.freed > 0 and o.loss < inf])]


def _thinned(widths: Sequence[int], couplings: int) -> Sequence[int]:
    """At most so many of some widths, the last among them."""
    every = ceil(len(widths) / max(2, round(MOST ** (1 / couplings))))
    return widths[::-1][::every][::-1] if every > 1 else widths


def _undominated(choices: Sequence[Option]) -> list[Option]:
    """Options of which none that frees as much loses less, by what they free."""
    best: list[Option] = []
    for option in sorted(choices, key=lambda o: (-o.freed, o.loss)):
        if not best or option.loss < best[-1].loss:
            best.append(option)
    return best[::-1]


def solve(groups: Sequence[Sequence[tuple[int, float]]], target: int) -> list[int] | None:
    """One option (weight, cost) of each group so that the weights sum to at least `target` at the least cost.

    Returns positions, or None where the weights do not suffice. Weights are whole and not negative. Exact: time and
    memory grow with the target times the number of options, and of groups. Of equally good choices the first.

    >>> solve([[(0, 0.0), (2, 1.0), (3, 5.0)], [(0, 0.0), (2, 2.0)]], 4)
    [1, 1]
    """
    least = torch.full((max(target, 0) + 1,), torch.inf, dtype=torch.float64)
    least[0] = 0.0  # of what is still to be freed: with no group, nothing
    taken = []
    for group in groups:
        best, which = torch.full_like(least, torch.inf), torch.zeros(len(least), dtype=torch.int32)
        for i, (weight, cost) in enumerate(group):
            enough = min(weight, len(least))
            rest = torch.cat([least[:1].expand(enough), least[: len(least) - enough]]) + cost
            which.masked_fill_(rest < best, i)
            best = torch.minimum(best, rest)
        least = best
        taken.append(which)
    if not torch.isfinite(least[-1]):
        return None
    left, chosen = len(least) - 1, []
    for which, group in zip(reversed(taken), reversed(groups), strict=True):
        chosen.append(int(which[left]))
        left = max(left - group[chosen[-1]][0], 0)
    return chosen[::-1]
