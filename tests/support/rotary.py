"""Rotary position embedding as LLaMA writes it: dim i of a head turns with dim i + width / 2."""

from __future__ import annotations

import torch
from torch import Tensor


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x · cos + [-x₂, x₁] · sin, where x₁ and x₂ are the halves of the last axis."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin
