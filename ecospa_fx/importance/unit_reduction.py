"""From a tensor shaped like a parameter to one sum per unit."""

from __future__ import annotations

import torch
from torch import Tensor

from ecospa_fx.coupling.types import Member

MarginKey = tuple[int, ...]


def margin_key(member: Member) -> MarginKey:
    """The axes that a member's sums are taken from; members with the same key share one margin."""
    return (member.axis,) if member.carrier_axis is None else (member.carrier_axis, member.axis)


def margin(values: Tensor, key: MarginKey) -> Tensor:
    """`values` summed over every axis not in `key`, in at least float32; axes of the result in the order of `key`."""
    others = [axis for axis in range(values.dim()) if axis not in key]
    wide = torch.promote_types(values.dtype, torch.float32)
    summed = values.sum(others, dtype=wide) if others else values.to(wide)
    return summed if list(key) == sorted(key) else summed.T


def unit_sums(margins: Tensor, member: Member) -> Tensor:
    """The margin of a member's parameter summed per unit: [carriers, units]."""
    positions = member.indices.to(margins.device)
    if member.carrier_axis is None:
        return margins[positions].sum(2)
    slices = torch.arange(member.carriers, device=margins.device)[:, None, None]
    return margins[slices, positions].sum(2)


def accumulator_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on the devices that have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def exact(values: Tensor) -> Tensor:
    """At least float32, so that products and sums of half-precision weights keep their digits."""
    return values.detach().to(torch.promote_types(values.dtype, torch.float32))
