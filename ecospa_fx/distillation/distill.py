"""Distil the dense model into the smaller one as a whole: on the calibration data, and without its labels.

How far an output is from the dense one is measured by the loss itself: see `ecospa_fx.distillation.divergence`. Least
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

PROBED = 8
"""On how many batches a loss may have no signal before it is taken for one that never has."""

USUAL_LOSS = 0.04
"""Share of the dense model's answers that is lost, where its loss cannot tell: what a third of the blocks is worth."""


@dataclass(frozen=True, slots=True)
class Distill:
    """``Distill(…).run(dense, small, batches, loss)``: Adam on the divergence of the smaller program's output.

    The learning rate of a parameter W is r √s ‖W‖: `rate` r, the share s of the dense model's output that is lost, that
    is D(y, y₀) / D(0, y₀), and the operator norm that a random W of its size has. It is constant for half of the steps
    and then falls to zero.
    """

    length: int = 224
    """Batches to learn from in all, each as often as it takes."""
    rate: float = 0.125
    """r in the learning rate."""
    step: int = 1
    """Batches per step."""
    mixed: float = 0.2
    """Share of positions that come from other batches, see `TokenMixing`."""
    predicted: float = 0.25
    """Share of positions that the dense model predicted, see `TokenMixing`."""
    fresh: Sequence[Batch] = ()
    """Batches that are read once each, as they are, among those that are read again and again."""
    second: Sequence[Batch] = ()
    """Validation batches of another kind, whose mean counts as much as that of the first kind, however many they are:
    what is lost on one kind for what is gained on the other is not learnt."""
    name: str = "distill"

    def run(
        self,
        dense: PartialInterpreter,
        small: PartialInterpreter,
        batches: Sequence[Batch],
        loss: Loss,
        validation: Sequence[Batch] = (),
        watch: Callable[[Sequence[int]], Iterable[int]] = lambda numbers: numbers,
    ) -> tuple[float, float]:
        """Change the smaller program's parameters that lost elements, and its vectors, such as biases, in place.

        validation: batches that decide whether it helped, and how far to go; best such as nothing has been fitted to,
        and by default those that are learnt from. watch: wraps the numbers of the batches to come, to show progress.
        Returns the mean divergence over the validation batches, before and after. Where it did not fall, or where the
        slopes of the loss differ more from the dense model's, nothing has changed. Raises ScoreError where the
        divergence is not finite before, or below zero.
        """
        leaves, unit = _trained(dense, small), NormalisedLoss(loss, exact=True)
        if not leaves or not _has_signal(dense, small, [*batches, *self.fresh], unit):
            return 0.0, 0.0
        pair = _Pair(dense, small, dense.weights(), small.weights(), leaves, unit)
        kinds = [kind for kind in (validation or batches, self.second) if kind]
        before, lost = pair.validated(kinds)
        if not math.isfinite(before.value):
            raise ScoreError("the smaller model's loss is not finite: run it in bfloat16 or float32")
        check_positive(before)
        begun = _copies(leaves)
        with torch.inference_mode(False), torch.enable_grad(), medium_precision():
            self._descend(pair.rounded(), self.rate * math.sqrt(lost), batches, watch)
        after = pair.settle(begun, kinds, before)
        if after < before.value:
            for node, leaf in leaves.items():
                values = leaf.detach().to(pair.small_weights[node].dtype)
                small.program.replace_parameter(small.program.parameters[node], values)
        return before.value / unit.unit, after / unit.unit

    def _descend(
        self, pair: _Pair, rate: float, batches: Sequence[Batch],
        watch: Callable[[Sequence[int]], Iterable[int]],
    ) -> None:  # fmt: skip
        groups = [{"params": [leaf], "lr": rate * _step_size(leaf)} for leaf in pair.leaves.values()]
        fused = all(leaf.device.type in ("cpu", "cuda") for leaf in pair.leaves.values())
        optimizer = torch.optim.Adam(groups, betas=(0.8, 0.95), eps=EPSILON, fused=fused)
        source = torch.Generator().manual_seed(0)
        order = _order(len(batches), len(self.fresh), self.length, source)
        steps, mix = math.ceil(len(order) / self.step), TokenMixing(self.mixed, self.predicted)
        last = {number: done for done, number in enumerate(order, 1)}
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, 2 - 2 * i / steps))
        for done, number in enumerate(watch(order), 1):
            again = number < len(batches)
            batch = mix(batches, number) if again else self.fresh[number - len(batches)]
            logits = pair.pull(batch)
            if again and done < last[number]:
                mix.observe(number, batch, logits)
            if done % self.step == 0 or done == len(order):
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()


def _order(repeated: int, once: int, length: int, source: torch.Generator) -> list[int]:
    """Numbers of `length` batches to read: the first `repeated` again and again, the next `once` in random places."""
    epochs = math.ceil((length - once) / repeated) if repeated else 0
    drawn = [torch.randperm(repeated, generator=source) for _ in range(epochs)]
    order = torch.cat([torch.empty(0, dtype=torch.long), *drawn])[: max(length - once, 0)]
    if once:
        order = torch.cat([order, torch.arange(repeated, repeated + once)])
        order = order[torch.randperm(len(order), generator=source)]
    return order.tolist()


@dataclass(frozen=True, slots=True, eq=False)
class _Pair:
    """A dense and a smaller program."""

    dense: PartialInterpreter
    small: PartialInterpreter
    dense_weights: NodeValues
    small_weights: NodeValues
    leaves: Mapping[fx.Node, nn.Parameter]
    """What is trained, in place of some of the smaller one's weights."""
    loss: Loss

    def rounded(self) -> _Pair:
        """The same two with products rounded where that is quicker; what comes of it is validated without."""
        names = {self.small.program.parameters[node] for node in self.leaves}
        return replace(self, dense=in_bfloat16(self.dense, names), small=in_bfloat16(self.small, names))

    def divergence(self, batch: Batch) -> Divergence:
        """How far the smaller one's output is from the dense one's."""
        answer, slopes, output = self._outputs(batch)
        return divergence(self.loss, answer, slopes, output, batch)

    def validated(self, kinds: Sequence[Sequence[Batch]]) -> tuple[Divergence, float]:
        """The mean divergence, and what share it is, between 0 and 1, of that of an output that is zero everywhere."""
        divergences, whole = [], 0.0
        with torch.no_grad():
            for batches in kinds:
                of_kind = []
                for batch in batches:
                    answer, slopes, output = self._outputs(batch)
                    of_kind.append(divergence(self.loss, answer, slopes, output, batch))
                    whole += divergence_of_zero(self.loss, answer, slopes, batch) / len(batches) / len(kinds)
                divergences.append(mean(of_kind))
        share = mean(divergences).value / whole if whole > 0 else math.nan
        return mean(divergences), min(1.0, max(0.0, share)) if math.isfinite(share) else USUAL_LOSS

    def pull(self, batch: Batch) -> list[Tensor]:
        """Add the divergence's gradient, which at the output is ∇L(y) - ∇L(y₀), to the leaves.

        Returns the tensors of the dense one's output that the loss depends on, such as logits.
        """
        # What a graph overwrites may be what a gradient needs.
        with torch.autograd.graph.allow_mutation_on_saved_tensors() if self.small.overwrites else nullcontext():
            answer, slopes, output = self._outputs(batch)
            tensors, gradients = [], []
            small_slopes = slopes_of(self.loss, output, batch)
            for leaf, slope, dense_slope in zip(leaves_of(output), small_slopes, slopes, strict=True):
                if slope is not None and leaf.requires_grad:
                    tensors.append(leaf)
                    gradients.append((slope if dense_slope is None else slope - dense_slope).to(leaf.dtype))
            torch.autograd.backward(tensors, gradients)
            return [leaf for leaf, s in zip(leaves_of(answer), slopes, strict=True) if s is not None]

    def settle(self, begun: Mapping[fx.Node, Tensor], kinds: Sequence[Sequence[Batch]], before: Divergence) -> float:
        """Leave the leaves where the cost is least between `begun` and where they are; returns the cost there."""
        learned, negative = _copies(self.leaves), False

        def go(way: float) -> None:
            for node, leaf in self.leaves.items():
                leaf.data.copy_(begun[node].lerp(learned[node], way))

        def cost(way: float) -> float:
            nonlocal negative
            go(way)
            with torch.no_grad():
                there = mean([mean([self.divergence(batch) for batch in batches]) for batches in kinds])
            negative |= there.is_negative
            return there.value if there.is_nearer_than(before) else max(there.value, before.value)

        way, least = _best_interpolation(cost, before.value)
        go(way)
        if negative and way == 0:
            warn_caller(
                "the loss is not convex in what the model returns, so that it led away from the dense model's answers, "
                "and distillation is left out"
            )
        return least

    def _outputs(self, batch: Batch) -> tuple[object, Slopes, object]:
        """The dense one's output, the loss's slopes there, and the smaller one's output."""
        trained = {node: leaf.to(self.small_weights[node].dtype) for node, leaf in self.leaves.items()}
        answer = answer_of(self.dense, self.dense_weights, batch)
        slopes = slopes_of(self.loss, answer, batch)
        return answer, slopes, answer_of(self.small, {**self.small_weights, **trained}, batch)


def _copies(leaves: Mapping[fx.Node, nn.Parameter]) -> dict[fx.Node, Tensor]:
    return {node: leaf.detach().clone() for node, leaf in leaves.items()}


def _best_interpolation(cost: Callable[[float], float], start: float) -> tuple[float, float]:
    """How far to go from 0, where the cost is `start`, to 1, and the cost there.

    The best of both ends, the half, and where the parabola through these three is least. What is learnt from few data
    goes too far by what they have of their own (Wortsman et al., "Robust fine-tuning of zero-shot models", 2022).
    """
    costs = {0.0: start, 0.5: cost(0.5), 1.0: cost(1.0)}
    # d(t) = start + (rise - bend) t + bend t²
    bend, rise = 2 * (start - 2 * costs[0.5] + costs[1.0]), costs[1.0] - start
    if math.isfinite(bend) and bend > 0:
        way = min(1.0, max(0.0, (bend - rise) / (2 * bend)))
        if way not in costs:
            costs[way] = cost(way)
    finite = {way: value for way, value in costs.items() if math.isfinite(value)}
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


def _has_signal(dense: PartialInterpreter, small: PartialInterpreter, batches: Sequence[Batch], loss: Loss) -> bool:
    """Whether the loss tells the two programs apart; warns where it never can, having the same slopes everywhere."""
    differ = False
    for batch in batches[:PROBED]:
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
