"""How far one output of a model is from another, as a loss tells it, by its slopes alone.

The Bregman divergence of a loss L is what it adds beyond its slope at the dense output y₀,

    D(y, y₀) = L(y) - L(y₀) - ⟨∇L(y₀), y - y₀⟩ = ∫₀¹ ⟨∇L(y₀ + t (y - y₀)) - ∇L(y₀), y - y₀⟩ dt.

For a cross-entropy that is the Kullback-Leibler divergence of the two predictions, for a squared error the squared
distance; the labels cancel in both (Banerjee et al., 2005). The integral needs no value of the loss, so that what is
added to a loss changes nothing, and small divergences of large losses keep their digits.

D is at least 0 where the loss is convex in the output, and only then it is a distance: a loss that is to be small far
away would have a model run there. That is refused where D is negative. Where a loss is convex in some of its terms and
concave in others, D may be positive all the same, so that a second measure goes along that knows no sign, the mean
square of how much the slopes differ on the way. Nothing counts as nearer that is farther by it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ecospa_fx.errors import ScoreError
from ecospa_fx.importance.losses import (
    Batch,
    Loss,
    NormalisedLoss,
    Slopes,
    leaves_of,
    length,
    moved,
    parts_of,
    slopes_of,
)
from ecospa_fx.importance.unit_reduction import accumulator_dtype
from ecospa_fx.runtime.interpreter import NodeValues, PartialInterpreter

_ROOT = math.sqrt(6.0)
RADAU = (
    ((4 - _ROOT) / 10, (16 - _ROOT) / 36),
    ((4 + _ROOT) / 10, (16 + _ROOT) / 36),
    (1.0, 1 / 9),
)
"""Where on the way from 0 to 1 slopes are taken, and their weights: exact for polynomials up to the fourth power."""

NEAR = 0.1
"""How far an answer is moved, in its root mean squares, to see whether the divergence is one."""

ROUNDED = 4.0
"""What a divergence may be below zero by rounding, in units of it."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """How far an output is from another; sums and means over batches are those of all three numbers."""

    value: float
    """D(y, y₀)."""
    change: float
    """The mean square difference of the slopes on the way."""
    rounding: float
    """What of D may be rounding."""

    @property
    def is_negative(self) -> bool:
        return self.value < -self.rounding

    def is_nearer_than(self, other: Divergence) -> bool:
        """Whether this is nearer by one measure and not farther by the other."""
        return -self.rounding <= self.value < other.value and self.change <= other.change

    def scaled(self, factor: float) -> Divergence:
        return Divergence(self.value * factor, self.change * factor * factor, self.rounding * factor)


def mean(divergences: Sequence[Divergence]) -> Divergence:
    """Over batches."""
    columns = zip(*((d.value, d.change, d.rounding) for d in divergences), strict=True)
    return Divergence(*(sum(column) / len(divergences) for column in columns))


def divergence(loss: Loss, answer: object, slopes: Slopes, output: object, batch: Batch) -> Divergence:
    """Of an output from an answer of equal structure, where the loss has these slopes; NaN where it is not finite."""
    begin, (end, rebuilt) = leaves_of(answer), parts_of(output)
    steps = [None if s is None else _step(a.detach(), b.detach()) for a, b, s in zip(begin, end, slopes, strict=True)]
    value, change, size = 0.0, 0.0, 0.0
    for place, weight in RADAU:
        pairs = zip(begin, end, steps, strict=True)
        between = [b if step is None else _on_the_way(a.detach(), b.detach(), place) for a, b, step in pairs]
        there = slopes_of(loss, rebuilt(between), batch)
        for before, after, step in zip(slopes, there, steps, strict=True):
            if before is not None and step is not None:
                risen = (torch.zeros_like(before) if after is None else after) - before
                value += weight * _inner(risen, step)
                change += weight * length([risen]) ** 2
                size += weight * (length([risen]) + length([before])) * length([step])
    eps = max((torch.finfo(s.dtype).eps for s in slopes if s is not None), default=0.0)
    return Divergence(value, change, ROUNDED * eps * size)


def _step(first: Tensor, second: Tensor) -> Tensor:
    """From one to the other; none between the same infinities, as of masked logits."""
    return torch.where(first == second, 0, second - first)


def _on_the_way(first: Tensor, second: Tensor, place: float) -> Tensor:
    return torch.where(first == second, first, first.lerp(second.to(first), place))


def _inner(first: Tensor, second: Tensor) -> float:
    wide = torch.promote_types(torch.promote_types(first.dtype, second.dtype), torch.float32)
    return float((first.to(wide) * second).sum(dtype=accumulator_dtype(first.device)))


def divergence_of_zero(loss: Loss, answer: object, slopes: Slopes, batch: Batch) -> float:
    """That of an output that is zero everywhere, by the values of the loss; NaN where it is not finite."""
    leaves, rebuilt = parts_of(answer)
    pairs = list(zip(leaves, slopes, strict=True))
    nothing = [leaf if slope is None else torch.zeros_like(leaf) for leaf, slope in pairs]
    linear = sum(_inner(slope, leaf) for leaf, slope in pairs if slope is not None)
    with torch.no_grad():
        outputs = rebuilt(nothing), answer
        there, here = (float(loss(output, *batch)) for output in outputs)
    return there - here + linear


def check_convex(loss: Loss, answer: object, batch: Batch) -> None:
    """Raise ScoreError for a loss whose divergence is negative where the answer is moved a little."""
    unit = NormalisedLoss(loss)
    slopes = slopes_of(unit, answer, batch)
    check_positive(divergence(unit, answer, slopes, moved(answer, slopes, NEAR), batch))


def check_positive(distance: Divergence) -> None:
    """Raise ScoreError for a divergence below zero."""
    if distance.is_negative:
        raise ScoreError(
            "the loss does not tell how far an output is from the dense model's, because its divergence is below zero "
            "there, as that of a loss that is to be small far away: pass distillation=0, which needs its slope alone, "
            "or a loss that is convex in the model's output, such as a cross-entropy or a squared error"
        )


def answer_of(evaluator: PartialInterpreter, weights: NodeValues, batch: Batch) -> object:
    """What a program returns with these weights."""
    values = {**evaluator.start(*batch), **weights}
    evaluator.run(evaluator.order, values)
    return evaluator.returned(values, *batch)
