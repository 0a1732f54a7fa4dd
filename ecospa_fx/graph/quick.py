"""Passes whose products may be rounded, because rounding is far below what the choice of batches does.

A CPU multiplies bfloat16 twice as fast as float32 where it can do so at all, a GPU TF32 several times as fast.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ecospa_fx.graph.evaluate import Evaluator, Values

Call = tuple[Sequence[Any], Mapping[str, Any]]
"""Positional and keyword arguments."""


def output(evaluator: Evaluator, weights: Values, call: Call, *, quick: bool = False) -> object:
    """What a program returns for a call, with these values of its parameters; quick: see `quick_passes`."""
    with quick_passes(quick):
        values = {**evaluator.start(*call), **weights}
        evaluator.run(evaluator.order, values)
        found = evaluator.returned(values, *call)
    return precise(found) if quick else found


def quick_passes(quick: bool) -> torch.autocast:
    """Products of float32 matrices on a CPU are those of bfloat16 within, if `quick`."""
    return torch.autocast("cpu", torch.bfloat16, enabled=quick)


def precise(found: object) -> object:
    """What quick passes made, in float32."""
    return pytree.tree_map_only(Tensor, lambda t: t.float() if t.dtype == torch.bfloat16 else t, found)


def can_be_quick(evaluators: Iterable[Evaluator], call: Call) -> bool:
    """Whether quick passes are worth it: all is float32, on a CPU with bfloat16, and no operator objects."""
    used = list(evaluators)
    held = [tensor for each in used for tensor in each.weights().values() if tensor.is_floating_point()]
    if not all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in held):
        return False
    if not any(on for name, on in torch.cpu.get_capabilities().items() if "bf16" in name):
        return False
    try:
        with torch.no_grad():
            for each in used:
                output(each, each.weights(), call, quick=True)
    except RuntimeError:  # such as one that wants both of its arguments to be of one type
        return False
    return True


@contextmanager
def quick_products() -> Iterator[None]:
    """Products of float32 matrices on a GPU in TF32, where the caller has not chosen per device."""
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
