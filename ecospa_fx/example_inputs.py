"""Describes example inputs as JSON, tensors by shape and type, and builds inputs of zeros from the description."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any, cast

import torch
from torch import Tensor


def describe(value: object) -> dict[str, object]:
    """A value as JSON; of a tensor its shape and type. Raises TypeError for what has no description.

    >>> describe((torch.ones(2, 3), {"use_cache": False}))["tuple"]
    [{'tensor': [2, 3], 'dtype': 'float32'}, {'dict': {'use_cache': {'value': False}}}]
    """
    if isinstance(value, Tensor):
        return {"tensor": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if value is None or (isinstance(value, bool | int | float | str) and abs(_size(value)) < float("inf")):
        return {"value": value}
    if isinstance(value, tuple | list) and type(value) in (tuple, list):
        return {type(value).__name__: [describe(item) for item in value]}
    if isinstance(value, dict) and type(value) is dict and all(isinstance(key, str) for key in value):
        return {"dict": {key: describe(item) for key, item in value.items()}}
    raise TypeError(f"a {type(value).__name__} has no description")


def _size(value: bool | int | float | str) -> float:
    return value if isinstance(value, float) else 0.0


LIMIT = 1 << 36
"""Bytes of all example inputs: more is no example."""


def from_description(description: object) -> Any:
    """The value that was described, with zeros in its tensors. Raises ValueError for anything else."""
    try:
        if _bytes(description) > LIMIT:
            raise ValueError("the example inputs would not fit into memory")
        return _zeros(cast(Mapping[str, Any], description))
    except (RecursionError, RuntimeError, OverflowError, TypeError, AttributeError, KeyError) as error:
        raise ValueError("it describes no value") from error


def _bytes(description: object) -> int:
    """Of all tensors of a description."""
    if not isinstance(description, dict) or len(description.keys() - {"dtype"}) != 1:
        raise ValueError(f"a {type(description).__name__} describes no value")
    ((kind, content),) = ((key, value) for key, value in description.items() if key != "dtype")
    if kind == "tensor":
        if not all(type(n) is int and n >= 0 for n in content):
            raise ValueError(f"{content!r:.40} is no shape")
        return prod(content) * 16
    if kind in ("dict", "tuple", "list"):
        return sum(map(_bytes, content.values() if kind == "dict" else content))
    if kind != "value" or not (content is None or isinstance(content, bool | int | float | str)):
        raise ValueError(f"a {type(description).__name__} describes no value")
    return 0


def _zeros(description: Mapping[str, Any]) -> Any:
    if "tensor" in description:
        dtype = getattr(torch, str(description.get("dtype")), None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{description.get('dtype')!r:.40} is no type of tensor")
        return torch.zeros(description["tensor"], dtype=dtype)
    if "value" in description:
        return description["value"]
    if "dict" in description:
        return {key: _zeros(item) for key, item in description["dict"].items()}
    items = [_zeros(item) for item in description["tuple" if "tuple" in description else "list"]]
    return tuple(items) if "tuple" in description else items
