"""Let the smaller model as a whole answer like the dense one: on the calibration data, and without its labels.

How far an output is from the dense one is told by the loss itself: see `ecospa_fx.distillation.divergence`. Least
squares layer by layer cannot see that the errors of several layers add up; this can.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from ecospa_fx.distillation.divergence import (
    Divergence,
    answer_of,
    check_positive,
    divergence,
    divergence_of_zero,
    mean,
)
from ecospa_fx.distillation.token_mixing import TokenMixing
from ecospa_fx.errors import ScoreError, warn_caller
from ecospa_fx.importance.losses import Batch, Loss, NormalisedLoss, Slopes, leaves_of, slopes_of
from ecospa_fx.runtime.bfloat16 import in_bfloat16, medium_precision
from ecospa_fx.runtime.interpreter import NodeValues, PartialInterpreter

EPSILON = 3e-7
"""Gradients below this move nothing, where the slope of the loss at the dense model's answers has a length about 1."""

TELLING = 8
"""On how many batches a loss may tell nothing before it is taken for one that never does."""

USUAL_LOSS = 0.04
"""Share of the dense model's answers that is lost, where its loss cannot tell: what a third of the blocks is worth."""


@dataclass(frozen=True, slots=True)
class Distill:
    """``Distill(…).run(dense, small, batches, loss)``.

    length: batches to learn from in all, each as often as it takes; rate: of what a parameter is as an operator, how
    much a step may change, times the root of the share of the dense model's answers that is lost, for who lost little
    has not far to go; from half of the steps on it falls to zero; step: batches per step; mixed, predicted: shares of
    positions that vary, as `TokenMixing` takes them.
    """

    length: int = 224
    rate: float = 0.125
    step: int = 1
    mixed: float = 0.2
    predicted: float = 0.25
    name: str = "distill"

    def run(
        self,
        dense: PartialInterpreter,
        small: PartialInterpreter,
        batches: Sequence[Batch],
        loss: Loss,
        judges: Sequence[Batch] = (),
        watch: Callable[[Sequence[int]], Iterable[int]] = lambda numbers: numbers,
    ) -> tuple[float, float]:
        """Change the smaller program's parameters that lost elements, and its vectors, such as biases, in place.

        judges: batches by which is judged whether it helped, and how far to go; best such as nothing has been fitted
        to, and by default those that are learnt from. watch: wraps the numbers of the batches to come, to show
        progress. Returns the mean divergence over the judges, before and after; where it did not fall, nothing has
        changed. Nor has anything where the loss differs more from the dense model's by its slopes. Raises ScoreError
        where the divergence is not finite before, or below zero.
        """
        leaves, unit = _trained(dense, small), NormalisedLoss(loss, exact=True)
        if not leaves or not _is_told(dense, small, batches, unit):
            return 0.0, 0.0
        pair = _Pair(dense, small, dense.weights(), small.weights(), leaves, unit)
        judges = list(judges or batches)
        before, lost = pair.judged(judges)
        if not math.isfinite(before.value):
            raise ScoreError("the smaller model's loss is not finite: run it in bfloat16 or float32")
        check_positive(before)
        begun = _copies(leaves)
        with torch.inference_mode(False), torch.enable_grad(), medium_precision():
            self._descend(pair.rounded(), self.rate * math.sqrt(lost), batches, watch)
        after = pair.settle(begun, judges, before)
        if after < before.value:
            for node, leaf in leaves.items():
                held = leaf.detach().to(pair.fixed[node].dtype)
                small.program.replace_parameter(small.program.parameters[node], held)
        return before.value / unit.unit, after / unit.unit

    def _descend(
        self, pair: _Pair, rate: float, batches: Sequence[Batch],
        watch: Callable[[Sequence[int]], Iterable[int]],
    ) -> None:  # fmt: skip
        groups = [{"params": [leaf], "lr": rate * _step_size(leaf)} for leaf in pair.leaves.values()]
        fused = all(leaf.device.type in ("cpu", "cuda") for leaf in pair.leaves.values())
        optimizer = torch.optim.Adam(groups, betas=(0.8, 0.95), eps=EPSILON, fused=fused)
        source = torch.Generator().manual_seed(0)
        epochs = math.ceil(self.length / len(batches))
        drawn = torch.cat([torch.randperm(len(batches), generator=source) for _ in range(epochs)])
        order = drawn[: self.length].tolist()
        steps, mix = math.ceil(len(order) / self.step), TokenMixing(self.mixed, self.predicted)
        last = {number: done for done, number in enumerate(order, 1)}
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, 2 - 2 * i / steps))
        for done, number in enumerate(watch(order), 1):
            batch = mix(batches, number)
            told = pair.pull(batch)
            if done < last[number]:
                mix.hear(number, batch, told)
            if done % self.step == 0 or done == len(order):
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()


@dataclass(frozen=True, slots=True, eq=False)
class _Pair:
    """A dense and a smaller program, `given` and `fixed` being their weights, in place of some of which are leaves."""

    dense: PartialInterpreter
    small: PartialInterpreter
    given: NodeValues
    fixed: NodeValues
    leaves: Mapping[fx.Node, nn.Parameter]
    loss: Loss

    def rounded(self) -> _Pair:
        """The same two with products rounded where that is quicker; what comes of it is judged without."""
        names = {self.small.program.parameters[node] for node in self.leaves}
        return replace(self, dense=in_bfloat16(self.dense, names), small=in_bfloat16(self.small, names))

    def divergence(self, batch: Batch) -> Divergence:
        """How far the smaller one's output is from the dense one's."""
        answer, slopes, output = self._outputs(batch)
        return divergence(self.loss, answer, slopes, output, batch)

    def judged(self, batches: Sequence[Batch]) -> tuple[Divergence, float]:
        """The mean divergence, and what share it is, between 0 and 1, of that of an output that is zero everywhere."""
        own, whole = [], 0.0
        with torch.no_grad():
            for batch in batches:
                answer, slopes, output = self._outputs(batch)
                own.append(divergence(self.loss, answer, slopes, output, batch))
                whole += divergence_of_zero(self.loss, answer, slopes, batch) / len(batches)
        share = mean(own).value / whole if whole > 0 else math.nan
        return mean(own), min(1.0, max(0.0, share)) if math.isfinite(share) else USUAL_LOSS

    def pull(self, batch: Batch) -> list[Tensor]:
        """Add the divergence's gradient, which at the output is ∇L(y) - ∇L(y₀), to the leaves.

        Returns what the loss sees of the dense one's output.
        """
        # What a graph overwrites may be what a gradient needs.
        with torch.autograd.graph.allow_mutation_on_saved_tensors() if self.small.overwrites else nullcontext():
            answer, slopes, output = self._outputs(batch)
            tensors, gradients = [], []
            for leaf, own, other in zip(leaves_of(output), slopes_of(self.loss, output, batch), slopes, strict=True):
                if own is not None and leaf.requires_grad:
                    tensors.append(leaf)
                    gradients.append((own if other is None else own - other).to(leaf.dtype))
            torch.autograd.backward(tensors, gradients)
            return [leaf for leaf, s in zip(leaves_of(answer), slopes, strict=True) if s is not None]

    def settle(self, begun: Mapping[fx.Node, Tensor], judges: Sequence[Batch], before: Divergence) -> float:
        """Leave the leaves where the judges find it best between `begun` and where they are; returns the cost there."""
        learned, negative = _copies(self.leaves), False

        def go(way: float) -> None:
            for node, leaf in self.leaves.items():
                leaf.data.copy_(begun[node].lerp(learned[node], way))

        def cost(way: float) -> float:
            nonlocal negative
            go(way)
            with torch.no_grad():
                there = mean([self.divergence(batch) for batch in judges])
            negative |= there.is_negative
            return there.value if there.is_nearer_than(before) else max(there.value, before.value)

        way, least = _best_way(cost, before.value)
        go(way)
        if negative and way == 0:
            warn_caller(
                "the loss is not convex in what the model returns, so that it led away from the dense model's answers, "
                "and distillation is left out"
            )
        return least

    def _outputs(self, batch: Batch) -> tuple[object, Slopes, object]:
        """The dense one's output, the loss's slopes there, and the smaller one's output."""
        own = {node: leaf.to(self.fixed[node].dtype) for node, leaf in self.leaves.items()}
        answer = answer_of(self.dense, self.given, batch)
        slopes = slopes_of(self.loss, answer, batch)
        return answer, slopes, answer_of(self.small, {**self.fixed, **own}, batch)


def _copies(leaves: Mapping[fx.Node, nn.Parameter]) -> dict[fx.Node, Tensor]:
    return {node: leaf.detach().clone() for node, leaf in leaves.items()}


def _best_way(cost: Callable[[float], float], start: float) -> tuple[float, float]:
    """How far to go from 0, where the cost is `start`, to 1, and the cost there.

    The best of both ends, the half, and where the parabola through these three is least. What is learnt from few data
    goes too far by what they have of their own (Wortsman et al., "Robust fine-tuning of zero-shot models", 2022).
    """
    found = {0.0: start, 0.5: cost(0.5), 1.0: cost(1.0)}
    # d(t) = start + (rise - bend) t + bend t²
    bend, rise = 2 * (start - 2 * found[0.5] + found[1.0]), found[1.0] - start
    if math.isfinite(bend) and bend > 0:
        way = min(1.0, max(0.0, (bend - rise) / (2 * bend)))
        if way not in found:
            found[way] = cost(way)
    finite = {way: value for way, value in found.items() if math.isfinite(value)}
    return min(finite.items(), key=lambda pair: pair[1])


def _step_size(parameter: Tensor) -> float:
    """The entries of a matrix of one sign pattern whose norm as an operator is that of this one, if it is random.

    With m rows, n columns and a root mean square r that is r (√m + √n), and √(m n) for a pattern of ones, which a step
    of Adam is at its worst. A vector counts as square. For zeros r is what it is for common initialisations.
    """
    size = float(parameter.detach().float().square().mean().sqrt()) or 0.02
    rows = len(parameter) if parameter.dim() > 0 else 1
    columns = parameter.numel() // rows if parameter.dim() > 1 else rows
    return size * (1 / math.sqrt(rows) + 1 / math.sqrt(columns))


def _is_told(dense: PartialInterpreter, small: PartialInterpreter, batches: Sequence[Batch], loss: Loss) -> bool:
    """Whether the loss tells the two apart; says so where it never can, having the same slopes everywhere."""
    differ = False
    for batch in batches[:TELLING]:
        answers = [answer_of(e, e.weights(), batch) for e in (dense, small)]
        if not _equal(*(leaves_of(answer) for answer in answers)):
            differ = True
            if not _equal(*(slopes_of(loss, answer, batch) for answer in answers)):
                return True
    if differ:
        warn_caller(
            "the loss is linear in what the model returns, so it does not tell how far two outputs are apart, and "
            "distillation is left out: compute the loss from the model's predictions (its logits), not from a loss "
            "that it returns"
        )
    return False


def _equal(first: Sequence[object], second: Sequence[object]) -> bool:
    """Whether all tensors are; the other leaves do not count."""
    pairs = zip(first, second, strict=True)
    return all(a.equal(b) for a, b in pairs if isinstance(a, Tensor) and isinstance(b, Tensor))


def _trained(dense: PartialInterpreter, small: PartialInterpreter) -> dict[fx.Node, nn.Parameter]:
    """Fresh leaves, in at least float32, for the parameters that lost elements, and for vectors.

    Vectors are few numbers, biases and the scales of norms, and say how large everything is that comes after them; but
    not those that are frozen in a model that is not. None where nothing lost any.
    """
    program, original = small.program, dense.program
    floating = {
        node: tensor
        for node, name in program.parameters.items()
        if (tensor := program.tensor(name)).is_floating_point() and tensor.numel() and node.users
    }
    lost = [n for n, tensor in floating.items() if tensor.shape != original.tensor(program.parameters[n]).shape]
    moving = [node for node, tensor in floating.items() if tensor.requires_grad]
    vectors = [node for node in moving or floating if floating[node].dim() == 1]
    chosen = dict.fromkeys((*lost, *vectors) if lost else ())
    return {node: nn.Parameter(_precise(floating[node].detach())) for node in chosen}


def _precise(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32), copy=True)
