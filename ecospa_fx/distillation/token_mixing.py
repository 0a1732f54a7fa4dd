"""More inputs than the calibration data holds: some positions of a batch are read from elsewhere.

Who learns from another model's answers needs no labels, so any input will do that the dense model can read. Few windows
of text, each seen several times, teach their own words; with some of those exchanged, what holds for all text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ecospa_fx.distillation.teacher_samples import TeacherSamples, has_positions
from ecospa_fx.importance.score import Batch

ENOUGH = 60000
"""Positions, such as tokens, from which on data needs no variations beside it."""
MOST = 4
"""As how many batches one may count."""


@dataclass(frozen=True, slots=True)
class TokenMixing:
    """``TokenMixing(share, predicted)(batches, number)``: batch `number`, varied.

    About a share `predicted` of its positions is what the teacher predicted when it was observed last, or else `share`
    of them are from another batch. Positions are the first two axes, [rows, positions], of whole-number inputs, such as
    token ids, and what further axes hold goes along. Only values between the least and the greatest of a batch come in,
    so that an index stays one. Other inputs, and batches of another structure, are left alone. The same calls in the
    same order give the same batches.
    """

    share: float = 0.2
    """Of positions from another batch."""
    predicted: float = 0.25
    """Of positions that the teacher predicted, where it does."""
    source: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))
    """Of the positions that change, and of what the teacher says."""
    _teacher: TeacherSamples = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_teacher", TeacherSamples(self.source))

    def observe(self, number: int, batch: Batch, outputs: Sequence[Tensor]) -> None:
        """Take in the teacher's outputs for the batch that was returned for `number`."""
        if self.predicted > 0:
            self._teacher.observe(number, batch, outputs)

    def __call__(self, batches: Sequence[Batch], number: int) -> Batch:
        predicted = self._teacher.inputs(number)
        if predicted:
            return self._varied(batches[number], predicted, self.predicted)
        if self.share == 0 or len(batches) < 2:
            return batches[number]
        other = (number + int(torch.randint(1, len(batches), (), generator=self.source))) % len(batches)
        theirs, spec = pytree.tree_flatten(batches[other])
        if spec != pytree.tree_structure(batches[number]):
            return batches[number]
        return self._varied(batches[number], dict(enumerate(theirs)), self.share)

    def _varied(self, batch: Batch, others: Mapping[int, object], share: float) -> Batch:
        """With that share of positions as the `others` have them, by their places among the leaves."""
        leaves, spec = pytree.tree_flatten(batch)
        drawn: dict[tuple[int, ...], Tensor] = {}
        mixed = [self._mixed(leaf, others.get(place), share, drawn) for place, leaf in enumerate(leaves)]
        result: Batch = pytree.tree_unflatten(mixed, spec)
        return result

    def _mixed(self, leaf: object, other: object, share: float, drawn: dict[tuple[int, ...], Tensor]) -> object:
        """drawn: by shape, which positions change, so that they are the same ones in all inputs."""
        if not has_positions(leaf) or not has_positions(other) or leaf.shape[2:] != other.shape[2:]:
            return leaf
        shape = tuple(map(min, leaf.shape[:2], other.shape[:2]))
        if shape not in drawn:
            drawn[shape] = torch.rand(shape, generator=self.source) < share
        part = tuple(map(slice, shape))
        new, bounds = other[part].to(leaf), (leaf.amin(), leaf.amax())
        taken = drawn[shape].to(leaf.device) & ((new >= bounds[0]) & (new <= bounds[1])).reshape(*shape, -1).all(2)
        result = leaf.clone()
        result[part][taken] = new[taken]
        return result


def augmented(batches: Sequence[Batch], share: float) -> list[Batch]:
    """The batches, and where they hold few positions, variations of them with a share from other batches.

    Up to `ENOUGH` positions in all and `MOST` batches for one.
    """
    mix, result = TokenMixing(share), list(batches)
    positions = sum(max((leaf.shape[0] * leaf.shape[1] for leaf in _positioned(batch)), default=0) for batch in batches)
    if share == 0 or positions == 0 or len(batches) < 2:
        return result
    wanted = min(MOST * len(batches), math.ceil(len(batches) * ENOUGH / positions))
    return result + [mix(batches, number % len(batches)) for number in range(wanted - len(batches))]


def _positioned(batch: Batch) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(batch) if has_positions(leaf)]
