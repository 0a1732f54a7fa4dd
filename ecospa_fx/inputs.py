"""Example inputs without their values: shapes and types as JSON, and tensors of zeros from them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def described(value: Any) -> Any:
    """A value as JSON; of a tensor its shape and type. Raises TypeError for what has no description.

    >>> described((torch.ones(2, 3), {"use_cache": False}))["tuple"]
    [{'tensor': [2, 3], 'dtype': 'float32'}, {'dict': {'use_cache': {'value': False}}}]
    """
    if isinstance(value, Tensor):
        return {"tensor": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    if type(value) in (tuple, list):
        return {type(value).__name__: [described(item) for item in value]}
    if type(value) is dict and all(isinstance(key, str) for key in value):
        return {"dict": {key: described(item) for key, item in value.items()}}
    raise TypeError(f"a {type(value).__name__} has no description")


def blank(told: Any) -> Any:
    """The value that was described, with zeros in its tensors. Raises ValueError for anything else."""
    if not isinstance(told, dict):
        raise ValueError(f"{told!r:.40} describes no value")
    if "tensor" in told:
        dtype = getattr(torch, str(told.get("dtype")), None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{told.get('dtype')!r:.40} is no type of tensor")
        return torch.zeros([int(n) for n in told["tensor"]], dtype=dtype)
    if "value" in told:
        return told["value"]
    if "dict" in told:
        return {key: blank(item) for key, item in told["dict"].items()}
    if "tuple" in told:
        return tuple(blank(item) for item in told["tuple"])
    return [blank(item) for item in told.get("list", ())]
