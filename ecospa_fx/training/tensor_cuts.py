"""What a shrink leaves of one tensor: kept positions per axis, of the tensor as it is now.

Two sets of factors of the dense parameter (see `ecospa_fx.coupling.unit_elements`), before and after, give the
positions to take from what is there. The same cut applies to the parameter, its gradient, and whatever an optimizer
keeps beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ecospa_fx.coupling.unit_elements import Factors
from ecospa_fx.errors import TrainingError
from ecospa_fx.ir.slices import AxisSlice, TensorSlice, take


@dataclass(frozen=True, slots=True, eq=False)
class TensorCut:
    """What stays of one parameter and of everything shaped like it.

    before, after: its shape; slices: what is taken, those whose choice differs along another axis last.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    slices: TensorSlice

    def __call__(self, tensor: Tensor) -> Tensor:
        """The kept part of a tensor of shape `before`, contiguous, in memory of its own."""
        return take(tensor, self.slices).contiguous()

    def beside(self, tensor: Tensor) -> Tensor | None:
        """The kept part of what an optimizer stores beside the parameter, or None where that cannot be told.

        Per-parameter numbers stay. A tensor of the parameter's shape is cut like it; one that is reduced over some
        axes, of size 1 there or without them, is cut along the others, if only one way of matching them exists.
        Quantised values (integers or 8-bit floats of the parameter's shape) come with scales of unknown layout: None.
        """
        if tensor.numel() == 1:
            return tensor
        wide = tensor.is_floating_point() and tensor.element_size() > 1
        if not (wide or tensor.is_complex() or tensor.dtype is torch.bool) or tensor.layout is not torch.strided:
            return None
        present = _matching(tuple(tensor.shape), self.before)
        if present is None:
            return None
        lost = [a for a in range(len(self.before)) if a not in present]
        if any(axis_slice.other in lost and axis_slice.axis in present for axis_slice in self.slices):
            return None
        full = tensor.reshape([n if a in present else 1 for a, n in enumerate(self.before)])
        taken = take(full, tuple(axis_slice for axis_slice in self.slices if axis_slice.axis in present))
        if tensor.dim() < len(self.before):
            taken = taken.reshape([n for a, n in enumerate(taken.shape) if a in present])
        return taken.contiguous()


def _matching(shape: tuple[int, ...], whole: tuple[int, ...]) -> set[int] | None:
    """The axes of `whole` that a reduced tensor has; None where there is no way, or more than one."""
    if len(shape) == len(whole):
        fits = all(n in (1, m) for n, m in zip(shape, whole, strict=True))
        return {a for a, (n, m) in enumerate(zip(shape, whole, strict=True)) if n == m} if fits else None
    if len(shape) != len(whole) - 1:
        return None
    ways = [a for a in range(len(whole)) if shape == (*whole[:a], *whole[a + 1 :])]
    return set(range(len(whole))) - {ways[0]} if len(ways) == 1 else None


def cuts_between(
    shapes: Mapping[str, tuple[int, ...]], before: Mapping[str, Factors], after: Mapping[str, Factors]
) -> dict[str, TensorCut]:
    """The cut of every parameter that `after` leaves less of than `before` does. shapes: dense."""
    cuts = {}
    for name, factors in after.items():
        cut = _cut(name, shapes[name], before.get(name, {}), factors)
        if cut.before != cut.after:
            cuts[name] = cut
    return cuts


def _cut(name: str, shape: tuple[int, ...], before: Factors, after: Factors) -> TensorCut:
    old, new = _Grid.of(name, shape, before), _Grid.of(name, shape, after)
    plain, carried = [], []
    for axis in range(len(shape)):
        carrier = new.carriers.get(axis)
        if carrier is None:
            kept, there = new.masks[axis][0], old.masks[axis][0]
            plain.append(AxisSlice(axis, old.shape[axis], None, kept[there].nonzero().flatten()))
        else:
            places = new.masks[carrier][0]
            there = old.masks[axis].expand(shape[carrier], -1)[places]
            kept = new.masks[axis][places]
            rows = [k[t].nonzero().flatten() for k, t in zip(kept, there, strict=True)]
            carried.append(AxisSlice.along(axis, old.shape[axis], carrier, torch.stack(rows), len(shape)))
    cut = [axis_slice for axis_slice in (*plain, *carried) if axis_slice.count < axis_slice.size]
    return TensorCut(old.shape, new.shape, tuple(cut))


@dataclass(frozen=True, slots=True, eq=False)
class _Grid:
    """Kept positions of a parameter: per axis a mask [1 or slices, positions], and the axis that its slices are of."""

    shape: tuple[int, ...]
    masks: tuple[Tensor, ...]
    carriers: Mapping[int, int]

    @classmethod
    def of(cls, name: str, shape: tuple[int, ...], factors: Factors) -> _Grid:
        masks = [torch.ones(1, size, dtype=torch.bool) for size in shape]
        carriers: dict[int, int] = {}
        for axes, kept in factors.items():
            axis = axes[-1]
            if len(axes) == 2 and carriers.setdefault(axis, axes[0]) != axes[0]:
                raise TrainingError(f"axis {axis} of parameter {name!r} differs along two others: leave one kind out")
            masks[axis] = masks[axis] & (kept if len(axes) == 2 else kept[None])
        if any(carriers.get(c) is not None for c in carriers.values()):
            raise TrainingError(f"parameter {name!r} has an axis that differs along one which differs along another")
        sizes = []
        for axis, mask in enumerate(masks):
            rows = mask[masks[carriers[axis]][0]] if axis in carriers else mask
            sizes.append(int(rows[0].sum()))
        return cls(tuple(sizes), tuple(masks), carriers)
