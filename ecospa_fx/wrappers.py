"""Modules that only stand around another one, as compiling, data parallelism and averaging put them there."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from ecospa_fx.errors import CaptureError, EcospaError

Model = TypeVar("Model")

WRAPPING = ("torch._dynamo.", "torch.nn.parallel.", "torch.distributed.", "torch.optim.")
"""Packages whose modules compute what the only module inside them computes."""

SIZED = ("torch.nn.parallel.distributed", "torch.distributed.")
"""Those that keep buckets or shards of the sizes that the parameters have."""


def unwrapped(model: Model, *, resizing: type[EcospaError] | None = None) -> Model:
    """The module that a user wrote, inside all that ``torch.compile``, parallel or averaging wrappers put around it.

    A wrapper is a module of one of torch's own packages that has one child and no parameter. What is none comes back
    as it is. resizing: the error to raise where the parameters are going to get other shapes and a wrapper holds memory
    of the shapes that they have. Raises CaptureError for TorchScript, and for parameters in one flat tensor.
    """
    inside: object = model
    if isinstance(model, nn.Module) and not isinstance(model, torch.jit.ScriptModule):
        _refuse_flat(model)
    while isinstance(inside, nn.Module):
        _refuse_scripted(inside)
        if not _wraps(inside):
            break
        if resizing is not None and _is_of(inside, SIZED):
            raise resizing(
                f"{type(inside).__name__} holds memory for the shapes that the parameters have: pass the module inside "
                "it, and wrap the result anew"
            )
        (inside,) = (m for m in inside._modules.values() if m is not None)
    return inside  # type: ignore[return-value]  # a Module for a Module, and anything else as it is


def _wraps(module: nn.Module) -> bool:
    children = [m for m in module._modules.values() if m is not None]
    return len(children) == 1 and not module._parameters and _is_of(module, WRAPPING)


def _is_of(module: nn.Module, packages: tuple[str, ...]) -> bool:
    return any(kind.__module__.startswith(packages) for kind in type(module).__mro__)


def _refuse_scripted(module: nn.Module) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        raise CaptureError(
            f"this {getattr(module, 'original_name', type(module).__name__)} is a TorchScript module, whose weights "
            "only its compiled code can read: pass the nn.Module that it was made from"
        )


def _refuse_flat(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if getattr(parameter, "_is_flat_param", False):  # of FullyShardedDataParallel, anywhere in the model
            raise CaptureError(
                f"parameter {name!r} is a shard of several parameters in one: pass the module before it is wrapped in "
                "FullyShardedDataParallel, and wrap the result"
            )
