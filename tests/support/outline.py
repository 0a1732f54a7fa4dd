"""What a module is, asked otherwise than the library does, to compare before and after."""

from __future__ import annotations

from typing import Any

from torch import nn


def outline(model: nn.Module) -> list[Any]:
    """What a model is, asked otherwise than the library does."""
    parts = []
    for path, part in model.named_modules():
        hooks = [(n, list(v)) for n, v in vars(part).items() if n.endswith("hooks")]
        tensors = [
            (n, id(t), t._version, t.requires_grad, id(t.grad))
            for held in (part._parameters, part._buffers) for n, t in held.items() if t is not None
        ]  # fmt: skip
        plain = {n: repr(v) for n, v in vars(part).items() if not isinstance(v, nn.Module) and n != "keep"}
        parts.append((path, id(part), type(part), part.training, hooks, tensors, list(vars(part)), plain))
    return parts
