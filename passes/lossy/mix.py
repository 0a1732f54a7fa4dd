"""More inputs than the calibration data holds: some positions of a batch are read from another one.

Who learns from another model's answers needs no labels, so any input will do that the dense model can read. Few windows
of text, each seen several times, teach their own words; with some of those exchanged, what holds for all text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeGuard

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ecospa_fx.importance.score import Batch


@dataclass(frozen=True, slots=True)
class Mix:
    """``Mix(share)(batches, number)``: batch `number` with about that share of its positions from another batch.

    Positions are the first two axes, [rows, positions], of whole-number inputs, such as token ids, and what further
    axes hold goes along. Only values between the least and the greatest of a batch come in, so that an index stays one.
    Other inputs, and batches of another structure, are left alone. The same calls in the same order give the same
    batches.
    """

    share: float = 0.2
    source: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def __call__(self, batches: Sequence[Batch], number: int) -> Batch:
        if self.share == 0 or len(batches) < 2:
            return batches[number]
        other = (number + int(torch.randint(1, len(batches), (), generator=self.source))) % len(batches)
        leaves, spec = pytree.tree_flatten(batches[number])
        theirs, their_spec = pytree.tree_flatten(batches[other])
        if spec != their_spec:
            return batches[number]
        drawn: dict[tuple[int, ...], Tensor] = {}
        mixed = [self._mixed(*pair, drawn) for pair in zip(leaves, theirs, strict=True)]
        result: Batch = pytree.tree_unflatten(mixed, spec)
        return result

    def _mixed(self, own: object, other: object, drawn: dict[tuple[int, ...], Tensor]) -> object:
        """drawn: by shape, which positions change, so that they are the same ones in all inputs."""
        if not _has_positions(own) or not _has_positions(other) or own.shape[2:] != other.shape[2:]:
            return own
        shape = tuple(map(min, own.shape[:2], other.shape[:2]))
        if shape not in drawn:
            drawn[shape] = torch.rand(shape, generator=self.source) < self.share
        part = tuple(map(slice, shape))
        new, known = other[part].to(own), (own.amin(), own.amax())
        taken = drawn[shape].to(own.device) & ((new >= known[0]) & (new <= known[1])).reshape(*shape, -1).all(2)
        result = own.clone()
        result[part][taken] = new[taken]
        return result


def _has_positions(value: object) -> TypeGuard[Tensor]:
    if not isinstance(value, Tensor) or value.dim() < 2 or value.numel() == 0:
        return False
    return not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
