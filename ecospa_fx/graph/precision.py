"""How exactly products of float32 matrices are computed where that hardly matters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def quick_products() -> Iterator[None]:
    """Float32 matrices are multiplied in bfloat16 or TF32, as is quickest, unless the caller has chosen per device."""
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # the newer settings, one per device, are in use
        yield
        return
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
