"""Numbers of units that make widths at which a device's kernels are fast."""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd, lcm, prod

from torch import Tensor

from ecospa_fx.coupling.types import Coupling

ROW_BYTES = {"cuda": 16}
"""Bytes of which rows should be a multiple, by type of device: NVIDIA's tensor cores are fast from 16 on, that is 8
numbers of half precision. Kernels of devices that are not here are about as fast for any width."""


def preferred_multiple(coupling: Coupling, parameters: Mapping[str, Tensor], *, autocast: bool = False) -> int:
    """The units per carrier of which a multiple should stay: the least that make every axis a multiple of `ROW_BYTES`.

    A unit may be wider than one element: of half-precision numbers on CUDA, multiples of 8 neurons are preferred, of
    4 rotary pairs, and any number of whole heads of 64. Each carrier counts by itself, as each head is a matrix of its
    own. autocast: numbers count as of half precision, which products may make of them.

    >>> import torch, ecospa_fx
    >>> mlp = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 8))
    >>> ffn = ecospa_fx.detect(mlp, (torch.randn(2, 8),)).offered[0]
    >>> preferred_multiple(ffn, dict(mlp.named_parameters()))  # on a CPU
    1
    """
    steps, pairs = [1], coupling.symmetry == "rotary"  # whose two elements are in one head, wherever they stand there
    for member in coupling.members:
        parameter = parameters[member.parameter]
        bytes_each = min(parameter.element_size(), 2) if autocast else parameter.element_size()
        wanted = max(1, ROW_BYTES.get(parameter.device.type, 1) // bytes_each)
        widths = [2 if pairs else prod(size for size, _ in box.width) for box in member.boxes]
        steps += [wanted // gcd(wanted, width) for width in widths]
    return lcm(*steps)
