"""Which elements of each parameter a choice of units keeps: as masks, and as counts that need no masks.

Along one axis a choice is a vector of kept positions; where the carrier is an axis itself it is a matrix
[slice, position]. These *factors* multiply: an element stays where every factor of its parameter keeps it. The number
of kept elements is therefore one contraction over the factors, whatever the parameter's size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from ecospa_fx.coupling.types import Member

Shapes = Mapping[str, tuple[int, ...]]
"""Dense shape of every parameter by name."""

Weights = Mapping[str, int]
"""What one element of each parameter counts, by its name."""

Factors = dict[tuple[int, ...], Tensor]
"""Of one parameter: (axis,) to BoolTensor [positions], (carrier axis, axis) to BoolTensor [slices, positions]."""

UnitChoice = tuple[Sequence[Member], Tensor]
"""Members of one coupling and `keep`, BoolTensor [carriers, units], True where a unit is kept."""


def keep_factors(shapes: Shapes, choices: Iterable[UnitChoice]) -> dict[str, Factors]:
    """The factors of every parameter that loses elements; True where positions stay."""
    result: dict[str, Factors] = {}
    for members, keep in choices:
        removed = keep.flatten().logical_not().nonzero().flatten()
        if not len(removed):
            continue
        for member in members:
            shape, positions = shapes[member.parameter], member.indices.flatten(0, 1).index_select(0, removed)
            axes = (member.axis,) if member.carrier_axis is None else (member.carrier_axis, member.axis)
            if member.carrier_axis is not None:
                positions = positions + (removed // member.units)[:, None] * shape[member.axis]
            factors = result.setdefault(member.parameter, {})
            if axes not in factors:
                factors[axes] = torch.ones([shape[a] for a in axes], dtype=torch.bool)
            factors[axes].view(-1).index_fill_(0, positions.flatten(), False)
    return result


def mask(shape: Sequence[int], factors: Factors, device: torch.device | None = None) -> Tensor:
    """BoolTensor of `shape`, True where an element stays."""
    result = torch.ones(tuple(shape), dtype=torch.bool, device=device)
    for axes, kept in factors.items():
        ordered = kept if list(axes) == sorted(axes) else kept.T
        view = [size if axis in axes else 1 for axis, size in enumerate(shape)]
        result &= ordered.to(result.device).reshape(view)
    return result


def kept_sizes(shape: Sequence[int], factors: Factors) -> list[int]:
    """The most elements that stay along each axis, which are all where the kept part is a tensor."""
    if any(len(axes) > 1 for axes in factors):
        kept = mask(shape, factors)
        return [int(kept.sum(axis).max()) for axis in range(kept.dim())]
    sizes = [int(factors[axis,].sum()) if (axis,) in factors else size for axis, size in enumerate(shape)]
    return sizes if all(sizes) else [0] * len(sizes)


def kept_part(tensor: Tensor, factors: Factors) -> Tensor | None:
    """What stays of a tensor, in memory of its own; None where that is no tensor of as many axes."""
    if any(len(axes) > 1 for axes in factors):
        kept, sizes = tensor[mask(tensor.shape, factors, tensor.device)], kept_sizes(tensor.shape, factors)
        return kept.view(sizes) if kept.numel() == prod(sizes) else None
    for (axis,), kept in factors.items():
        tensor = tensor.index_select(axis, kept.nonzero().flatten().to(tensor.device))
    return tensor


def zeroed(tensor: Tensor, factors: Factors) -> Tensor:
    """A copy of a tensor with 0 in place of what goes."""
    if any(len(axes) > 1 for axes in factors):
        return tensor.masked_fill(~mask(tensor.shape, factors, tensor.device), 0)
    for (axis,), kept in factors.items():
        tensor = tensor.index_fill(axis, kept.logical_not().nonzero().flatten().to(tensor.device), 0)
    return tensor


def kept_elements(shape: Sequence[int], factors: Factors) -> int:
    """How many True elements `mask` would hold."""
    operands: list[Tensor | list[int]] = []
    for axes, kept in factors.items():
        operands += [kept.to(torch.float64), list(axes)]
    count = int(torch.einsum(*operands, []).item()) if operands else 1
    covered = {axis for axes in factors for axis in axes}
    for axis, size in enumerate(shape):
        count *= 1 if axis in covered else size
    return count


def removed_elements(shapes: Shapes, choices: Iterable[UnitChoice], weights: Weights | None = None) -> int:
    """How many parameter elements are removed, each counted once however many couplings hold it.

    weights: by name of a parameter what one of its elements counts, such as its bytes; by default 1.
    """
    removed = {
        name: prod(shapes[name]) - kept_elements(shapes[name], factors)
        for name, factors in keep_factors(shapes, choices).items()
    }
    return sum(count if weights is None else count * weights[name] for name, count in removed.items())


def coupled_elements(shapes: Shapes, couplings: Iterable[Sequence[Member]], weights: Weights | None = None) -> int:
    """How many parameter elements couplings hold, each counted once, or as much as `weights` say.

    couplings: the members of each.
    """
    nothing = ((members, torch.zeros(members[0].carriers, members[0].units).bool()) for members in couplings)
    return removed_elements(shapes, nothing, weights)
