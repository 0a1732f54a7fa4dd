"""Rotary position embedding as LLaMA writes it: dim i of a head turns with dim i + width / 2."""

from __future__ import annotations

import torch
from torch import Tensor


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x · cos + [-x₂, x₁] · sin, where x₁ and x₂ are the halves of the last axis."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin
