"""Cutting parameters, their gradients and what optimizers keep beside them, in place.

A Parameter stays the object that it is and gets narrower data. Parameter groups, schedulers, hooks and everything else
that holds it go on working, and no more than one parameter exists twice at any moment.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ecospa_fx.errors import TrainingError
from ecospa_fx.training.cut import Cut


def check_optimizers(optimizers: Sequence[Optimizer], known: Iterable[Tensor]) -> None:
    """Raise TrainingError where an optimizer holds parameters that are not known, or none at all."""
    known_ids = {id(tensor) for tensor in known}
    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer):
            raise TrainingError(f"{optimizer!r} is no optimizer: give a torch.optim.Optimizer, or a list of them")
        kind, held = type(optimizer).__name__, list(_held(optimizer))
        foreign = sum(id(p) not in known_ids for p in held)
        if foreign:
            raise TrainingError(
                f"{kind} holds {foreign} of {len(held)} parameters that are not this model's: build it from "
                "model.parameters(), or follow() the copies that it trains before you attach() it"
            )


def check_states(optimizers: Sequence[Optimizer], tensors: Mapping[str, Tensor], cuts: Mapping[str, Cut]) -> None:
    """Raise TrainingError, before anything changes, where a state beside a parameter cannot be cut."""
    for name, cut in cuts.items():
        for optimizer in optimizers:
            for key, value in optimizer.state.get(tensors[name], {}).items():
                for tensor in _tensors(value):
                    if cut.beside(torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")) is None:
                        raise TrainingError(
                            f"{type(optimizer).__name__} keeps {key!r} of shape {tuple(tensor.shape)} and type "
                            f"{tensor.dtype} beside parameter {name!r} of shape {cut.before}, and how it follows "
                            "cannot be told: use an optimizer whose states have the parameter's shape"
                        )


def cut_all(optimizers: Sequence[Optimizer], tensors: Mapping[str, Tensor], cuts: Mapping[str, Cut]) -> None:
    """Cut every tensor, its gradient and the optimizers' states, one parameter at a time."""
    for name, cut in cuts.items():
        tensor = tensors[name]
        for optimizer in optimizers:
            state: dict[str, Any] = optimizer.state.get(tensor, {})
            for key, value in state.items():
                state[key] = _mapped(value, cut)
        narrow(tensor, cut)


def narrow(tensor: Tensor, cut: Cut) -> None:
    """Give a leaf tensor, parameter or not, its kept part as data, and its gradient likewise."""
    gradient, tensor.grad = tensor.grad, None
    data = cut(tensor.detach())
    # Autograd remembers the shape that a leaf had when a graph first used it, for as long as that graph lives (the
    # loss of the last step is usually still there). A change of type makes it forget; a change of shape does not.
    other = torch.float32 if data.dtype is torch.float16 else torch.float16
    tensor.data = torch.empty(0, dtype=other, device=data.device)
    tensor.data = data
    if gradient is not None:
        tensor.grad = cut(gradient)


def held_bytes(optimizers: Sequence[Optimizer]) -> int:
    """Bytes of all tensors that optimizers keep beside parameters."""
    values = [v for optimizer in optimizers for state in optimizer.state.values() for v in state.values()]
    return sum(t.numel() * t.element_size() for value in values for t in _tensors(value))


def _held(optimizer: Optimizer) -> Iterator[nn.Parameter]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)


def _mapped(value: Any, cut: Cut) -> Any:
    if isinstance(value, Tensor):
        return cut.beside(value)
    if isinstance(value, list | tuple):
        return type(value)(_mapped(item, cut) for item in value)
    if isinstance(value, dict):
        return {key: _mapped(item, cut) for key, item in value.items()}
    return value
