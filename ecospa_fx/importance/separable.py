"""Whether what a model and a loss make of a batch is made of what they make of its samples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf, isfinite, nan
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ecospa_fx.importance.losses import Batch, Loss, Slopes
from ecospa_fx.ir.pytrees import closed, is_object, opened

MIXED = 0.1
"""Up to this share, gradients may come from what a loss makes of several samples at once, as a balance of experts."""

SHARED, UNRELATED = -1, -2
"""In place of the axis of an output along which samples stand: there is none, or shapes say nothing."""


def open_tensors(tree: object) -> object:
    """The tree with those objects in parts that hold tensors, and all others as they are."""

    def in_parts(leaf: object) -> object:
        if not is_object(leaf) or isinstance(leaf, dict | list | tuple):
            return leaf
        parts = opened(leaf)
        return parts if any(isinstance(value, Tensor) for value in parts.leaves) else leaf

    return pytree.tree_map(in_parts, tree)


def closed_again(leaves: Sequence[object], spec: pytree.TreeSpec) -> Any:
    """What `open_tensors` took apart, from leaves; objects are new ones."""
    return closed(pytree.tree_unflatten(leaves, spec))[0]


def copied(batch: Batch) -> Batch:
    """The batch with tensors, and objects that hold some, of its own: a call may write into them."""
    leaves, spec = pytree.tree_flatten(open_tensors(batch))
    copies: dict[int, Tensor] = {}

    def copy(leaf: object) -> object:
        if not isinstance(leaf, Tensor) or isinstance(leaf, nn.Parameter):
            return leaf
        if id(leaf) not in copies:
            copies[id(leaf)] = leaf.clone()
        return copies[id(leaf)]

    result: Batch = closed_again([copy(leaf) for leaf in leaves], spec)
    return result


@dataclass(frozen=True, slots=True, eq=False)
class Output:
    """What a model returned, leaf by leaf."""

    leaves: list[Any]
    """Tensors, and whatever else it holds."""
    spec: pytree.TreeSpec
    """How the leaves make up what was returned."""

    @classmethod
    def of(cls, value: object) -> Output:
        """Take a result apart."""
        return cls(*pytree.tree_flatten(open_tensors(value)))

    def slopes(self, batch: Batch, loss: Loss) -> tuple[float, Slopes] | None:
        """The loss and its gradients; None where it is no scalar."""
        with torch.enable_grad():
            watched = [_watched(leaf) for leaf in self.leaves]
            # A loss may overwrite what it is given, which autograd does not allow of a leaf.
            seen = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in watched]
            value = loss(closed_again(seen, self.spec), *batch)
            if not isinstance(value, Tensor) or value.numel() != 1:
                return None
            if not value.requires_grad:
                return float(value), [None] * len(watched)
            places = [i for i, leaf in enumerate(watched) if isinstance(leaf, Tensor) and leaf.requires_grad]
            gradients = torch.autograd.grad(value.reshape(()), [watched[i] for i in places], allow_unused=True)
        by_place = dict(zip(places, gradients, strict=True))
        return float(value.detach()), [by_place.get(i) for i in range(len(watched))]


def _watched(leaf: object) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    plain = (leaf.clone() if leaf.is_inference() else leaf).detach()
    return plain.requires_grad_() if plain.is_floating_point() else plain


class Comparison:
    """A batch of `count` samples, to compare with them one after the other.

    loss, slopes: of the whole batch; types: of the numbers that the model computes with.
    """

    def __init__(self, whole: Output, loss: float, slopes: Slopes, count: int, types: Iterable[torch.dtype]) -> None:
        self._whole, self._loss, self._slopes, self._count = whole, loss, slopes, count
        self._losses: list[float] = []
        self._has_parts = self._inside = False
        self._steepness = sum(_square(slope) for slope in slopes if slope is not None) / count
        self._sizes = [_square(_finite(leaf)) / count if _is_floating(leaf) else 0.0 for leaf in whole.leaves]
        dtypes = {*types, *(leaf.dtype for leaf in whole.leaves if isinstance(leaf, Tensor))}
        epsilon = max((torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point), default=0.0)
        # Products of other sizes are rounded otherwise, and depth multiplies that.
        self._tolerance = float(epsilon ** (1 / 3))

    def add(self, place: int, output: Output, part: Batch, loss: Loss) -> str | None:
        """Why the batch is not made of such samples as number `place`; None where it may be."""
        if output.spec != self._whole.spec:
            return "the model's answer to a single sample of it has another structure"
        pairs = list(zip(self._whole.leaves, output.leaves, strict=True))
        axes = [_axis_of_samples(ours, theirs, self._count) for ours, theirs in pairs]
        parts = [self._part(ours, axis, place, theirs) for (ours, theirs), axis in zip(pairs, axes, strict=True)]
        if self._differ(parts, output.leaves, axes):
            return "the model's answer to one sample of it depends on the others"
        alone = Output(parts, output.spec).slopes(part, loss)
        slopes = [self._part(slope, axis, place, slope) for slope, axis in zip(self._slopes, axes, strict=True)]
        if alone is None or not self._agree(slopes, alone[1], axes):
            return "its loss is not made of the losses of its samples"
        self._losses.append(alone[0])
        return None

    def conclusion(self) -> str | None:
        """After all samples, as above. Where the model computes the loss, only its values can tell."""
        finite = [value for value in self._losses if isfinite(value)]
        if not self._inside:
            return None
        if finite:
            total = sum(finite)
            rounding = max(self._tolerance, 1e-3) * max(abs(self._loss), *map(abs, finite))
            if min(abs(self._loss - total), abs(self._loss - total / len(finite))) <= rounding:
                return None
            # A mean with weights, such as numbers of labels.
            if self._has_parts and min(finite) - rounding <= self._loss <= max(finite) + rounding:
                return None
        return "its loss is not made of the losses of its samples"

    def _part(self, leaf: object, axis: int, place: int, instead: object) -> Any:
        """What belongs to one sample."""
        if axis < 0 or not isinstance(leaf, Tensor):
            return instead
        size = leaf.shape[axis] // self._count
        return leaf.narrow(axis, place * size, size)

    def _differ(self, parts: Sequence[Any], leaves: Sequence[Any], axes: Sequence[int]) -> bool:
        """Whether outputs that matter to the loss are others than those of the sample alone."""
        placed = [i for i, axis in enumerate(axes) if axis >= 0 and _is_floating(leaves[i])]
        self._has_parts = self._has_parts or bool(placed)
        for i in [i for i in placed if self._slopes[i] is not None] or placed:
            apart = _square(_finite(_wide(parts[i]) - _wide(leaves[i])))
            if apart > self._tolerance**2 * max(_square(_finite(leaves[i])), self._sizes[i]):
                return True
        return False

    def _agree(self, ours: Slopes, theirs: Slopes, axes: Sequence[int]) -> bool:
        """Whether the batch's gradients at a sample's outputs are those of its own loss, up to a factor."""
        product, square, square_alone = 0.0, 0.0, 0.0
        for mine, alone, axis in zip(ours, theirs, axes, strict=True):
            here = _square(mine) if mine is not None else 0.0
            if axis == UNRELATED and here > 0:
                return False
            if axis < 0:
                self._inside = self._inside or here > 0
                continue
            square += here
            square_alone += _square(alone) if alone is not None else 0.0
            product += _product(mine, alone) if mine is not None and alone is not None else 0.0
        least = max(square, self._steepness)
        if not isfinite(square_alone):
            return square <= 1e-9 * least  # a sample without labels
        factor = max(0.0, product / square_alone) if square_alone > 0 else 0.0
        return square - 2 * factor * product + factor**2 * square_alone <= MIXED**2 * least


def _axis_of_samples(whole: object, single: object, count: int) -> int:
    """The one axis that is `count` times as long for a batch as for one sample."""
    if not isinstance(whole, Tensor) or not isinstance(single, Tensor):
        return SHARED
    if whole.dim() != single.dim():
        return UNRELATED
    axes = [axis for axis, sizes in enumerate(zip(whole.shape, single.shape, strict=True)) if sizes[0] != sizes[1]]
    if not axes:
        return SHARED
    return axes[0] if len(axes) == 1 and whole.shape[axes[0]] == count * single.shape[axes[0]] else UNRELATED


def _is_floating(leaf: object) -> TypeGuard[Tensor]:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _square(values: Tensor) -> float:
    return _product(values, values)


def _product(first: Tensor, second: Tensor) -> float:
    """Σ a·b. A loss of any scale has its squares in float64's range, though not in that of its gradients."""
    peaks = [float(_wide(values).abs().max()) if values.numel() else 0.0 for values in (first, second)]
    if not all(0 < peak < inf for peak in peaks):
        return 0.0 if 0 in peaks else nan
    return float((_wide(first) / peaks[0] * (_wide(second) / peaks[1])).sum()) * peaks[0] * peaks[1]


def _finite(values: Tensor) -> Tensor:
    """With zeros in place of what is not finite, such as what a mask hides."""
    return _wide(values).nan_to_num(0.0, 0.0, 0.0)
