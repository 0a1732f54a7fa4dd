"""Switches of gradients that torch.export misses (inference mode, custom functions), recorded while it traces.

It records calls of ``torch.set_grad_enabled``. It knows nothing of inference mode, and it does not see that a function
with a backward of its own runs without gradients, and ends that.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import Tensor
from torch.autograd import Function
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils import _pytree as pytree

from ecospa_fx.errors import warn_caller


@contextmanager
def gradient_modes_recorded(functions: dict[str, None]) -> Iterator[None]:
    """Inside, the exporter records where gradients are switched by inference mode and by custom functions.

    functions: takes the names of the custom functions that were given something that needs gradients, in order.
    """

    regions, original = torch.inference_mode, cast(Any, Function.apply)
    entered, left = regions.__enter__, regions.__exit__

    def enter(region: Any) -> None:
        region.before = torch.is_grad_enabled() if get_proxy_mode() is not None else None
        if region.before is None:  # torch itself, around what it traces: what stands for a tensor is in its mode
            entered(region)
        else:
            torch.set_grad_enabled(not region.mode)

    def leave(region: Any, *raised: Any) -> None:
        if region.before is None:
            left(region, *raised)
        else:
            torch.set_grad_enabled(region.before)

    def apply(kind: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        of_operator = kind.__module__.startswith("torch._library.")  # the graph holds the operator, and so its backward
        if not of_operator and torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            functions.setdefault(f"{kind.__module__}.{kind.__qualname__}")
        result = original.__func__(kind, *args, **kwargs)
        torch.set_grad_enabled(torch.is_grad_enabled())  # its forward may have said otherwise last
        return result

    with (
        patch.object(regions, "__enter__", enter),
        patch.object(regions, "__exit__", leave),
        patch.object(Function, "apply", classmethod(apply)),
    ):
        yield


def warn_of_custom_functions(names: Collection[str]) -> None:
    """Say that gradients through custom functions are not those of the original."""
    if names:
        warn_caller(
            f"the model calls {', '.join(names)}, whose own backward is not part of a graph: the smaller "
            "model computes the same, but gradients there are those of its forward, and none where that runs without"
        )
