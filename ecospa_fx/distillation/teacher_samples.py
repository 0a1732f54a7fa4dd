"""What a model says comes next in its own inputs, where that is what it does.

The output at one position of a model that continues its input foretells the input at the next one. What such a model
would have said in place of the data is text of its own making, of which there is as much as anyone wants.
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
    """Predictions by number of a batch, drawn from the outputs that were heard for it.

    Whether an output [rows, positions, classes] foretells an input [rows, positions] is judged by what is drawn from
    its softmax: it has to be right more often than whoever always says a batch's most frequent value, by more than
    chance would have it (three standard deviations of a count of so many rare events). Draws are from `source`.
    """

    def __init__(self, source: torch.Generator) -> None:
        self._source = source
        self._drawn: dict[int, dict[int, Tensor]] = {}
        self._counts: dict[int, tuple[int, int]] = {}

    def hear(self, number: int, batch: Batch, outputs: Sequence[Tensor]) -> None:
        """Take in what the model answers to a batch, or to one like it, that is known as `number`."""
        leaves, found = pytree.tree_leaves(batch), dict[int, Tensor]()
        for output in outputs:
            if places := [i for i, leaf in enumerate(leaves) if _may_be_foretold(leaf, output)]:
                said = self._said(output)
                found |= {place: self._judged(place, leaves[place], said) for place in places}
        self._drawn[number] = found

    def inputs(self, number: int) -> Mapping[int, Tensor]:
        """By place among a batch's leaves, inputs of the model's own making; none where it foretells nothing."""
        return {place: said for place, said in self._drawn.get(number, {}).items() if self._is_foretold(place)}

    def _is_foretold(self, place: int) -> bool:
        right, usual = self._counts[place]
        return right - usual > 3 * math.sqrt(right)

    def _judged(self, place: int, own: Tensor, said: Tensor) -> Tensor:
        """The input with every value but the first as it was foretold; how many were right is noted."""
        after, before = own[:, 1:], self._counts.get(place, (0, 0))
        usual = torch.unique(after, return_counts=True)[1].max()
        right = (said[:, :-1] == after).sum()
        self._counts[place] = before[0] + int(right), before[1] + int(usual)
        return torch.cat([own[:, :1], said[:, :-1].to(own)], 1)

    def _said(self, output: Tensor) -> Tensor:
        """[rows, positions] classes, drawn by where a uniform number falls among the sums of the probabilities."""
        sums = output.detach().float().softmax(-1).cumsum(-1)
        uniform = torch.rand(*sums.shape[:-1], 1, generator=self._source).to(sums.device)
        return torch.searchsorted(sums, uniform * sums[..., -1:]).squeeze(-1).clamp(max=sums.shape[-1] - 1)


def _may_be_foretold(leaf: object, output: Tensor) -> TypeGuard[Tensor]:
    if not has_positions(leaf) or output.dim() != 3:
        return False
    return leaf.shape == output.shape[:2] and leaf.shape[1] > 1


def has_positions(value: object) -> TypeGuard[Tensor]:
    """Whether a leaf of a batch is whole numbers [rows, positions, …], any at all."""
    if not isinstance(value, Tensor) or value.dim() < 2 or value.numel() == 0:
        return False
    return not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
