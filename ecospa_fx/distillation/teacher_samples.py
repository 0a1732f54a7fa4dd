"""What a teacher predicts of its own inputs, where it is a model that continues them.

The output at one position of such a model predicts the input at the next one. What it would have said in place of the
data is text of its own making, of which there is as much as anyone wants.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeGuard

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ecospa_fx.importance.score import Batch


class TeacherSamples:
    """Predictions by number of a batch, drawn from the outputs that were observed for it.

    Whether an output [rows, positions, classes] predicts an input [rows, positions] is decided by what is drawn from
    its softmax: it has to be right more often than whoever always says a batch's most frequent value, by more than
    chance would have it (three standard deviations of a count of so many rare events). Draws are from `source`.
    """

    def __init__(self, source: torch.Generator) -> None:
        self._source = source
        self._drawn: dict[int, dict[int, Tensor]] = {}
        self._counts: dict[int, tuple[int, int]] = {}

    def observe(self, number: int, batch: Batch, logits: Sequence[Tensor]) -> None:
        """Take in the teacher's outputs for a batch, or for one like it, that is known as `number`."""
        leaves, drawn = pytree.tree_leaves(batch), dict[int, Tensor]()
        for output in logits:
            if places := [i for i, leaf in enumerate(leaves) if _may_be_predicted(leaf, output)]:
                classes = self._draw(output)
                drawn |= {place: self._replaced(place, leaves[place], classes) for place in places}
        self._drawn[number] = drawn

    def inputs(self, number: int) -> Mapping[int, Tensor]:
        """By place among a batch's leaves, inputs of the teacher's making; none where it predicts nothing."""
        drawn = self._drawn.get(number, {})
        return {place: inputs for place, inputs in drawn.items() if self._is_predicted(place)}

    def _is_predicted(self, place: int) -> bool:
        right, usual = self._counts[place]
        return right - usual > 3 * math.sqrt(right)

    def _replaced(self, place: int, inputs: Tensor, predicted: Tensor) -> Tensor:
        """The inputs with every value but the first as it was predicted; how many were right is noted."""
        after, before = inputs[:, 1:], self._counts.get(place, (0, 0))
        usual = torch.unique(after, return_counts=True)[1].max()
        right = (predicted[:, :-1] == after).sum()
        self._counts[place] = before[0] + int(right), before[1] + int(usual)
        return torch.cat([inputs[:, :1], predicted[:, :-1].to(inputs)], 1)

    def _draw(self, output: Tensor) -> Tensor:
        """[rows, positions] classes, drawn by where a uniform number falls among the sums of the probabilities."""
        sums = output.detach().float().softmax(-1).cumsum(-1)
        uniform = torch.rand(*sums.shape[:-1], 1, generator=self._source).to(sums.device)
        return torch.searchsorted(sums, uniform * sums[..., -1:]).squeeze(-1).clamp(max=sums.shape[-1] - 1)


def _may_be_predicted(leaf: object, output: Tensor) -> TypeGuard[Tensor]:
    if not has_positions(leaf) or output.dim() != 3:
        return False
    return leaf.shape == output.shape[:2] and leaf.shape[1] > 1


def has_positions(value: object) -> TypeGuard[Tensor]:
    """Whether a leaf of a batch is whole numbers [rows, positions, …], any at all."""
    if not isinstance(value, Tensor) or value.dim() < 2 or value.numel() == 0:
        return False
    return not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
