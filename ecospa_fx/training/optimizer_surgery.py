"""Slices parameters, their gradients and the optimizer states beside them, in place.

A Parameter stays the object that it is and gets narrower data. Parameter groups, schedulers, hooks and everything else
that holds it go on working, and no more than one parameter exists twice at any moment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ecospa_fx.errors import TrainingError
from ecospa_fx.training.state_evidence import (
    OptimizerStates,
    Path,
    collect_states,
    is_elementwise,
    leaves,
    shares_memory,
    states_of,
)
from ecospa_fx.training.tensor_cuts import TensorCut


def check_optimizers(optimizers: Sequence[Optimizer], tensors: Iterable[Tensor]) -> None:
    """Raise TrainingError where an optimizer holds parameters that are not known, or none at all."""
    known_ids = {id(tensor) for tensor in tensors}
    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer):
            raise TrainingError(f"{optimizer!r} is no optimizer: give a torch.optim.Optimizer, or a list of them")
        kind, parameters = type(optimizer).__name__, list(_parameters_of(optimizer))
        foreign = sum(id(p) not in known_ids for p in parameters)
        if foreign:
            raise TrainingError(
                f"{kind} holds {foreign} of {len(parameters)} parameters that are not this model's: build it from "
                "model.parameters(), or follow() the copies that it trains before you attach() it"
            )


def check_states(optimizers: Sequence[Optimizer], tensors: Mapping[str, Tensor], cuts: Mapping[str, TensorCut]) -> None:
    """Raise TrainingError, before anything changes, where something kept beside a parameter cannot be cut.

    Tensors that code has put on parameters, as accumulated gradients often are, follow like an optimizer's states.
    """
    stores = [*map(states_of, optimizers), _attributes(tensors)]
    for name, cut in cuts.items():
        for entries in stores:
            for path, tensor in leaves(entries.by_parameter.get(tensors[name], {})):
                why = _refusal(entries, tensors[name], path, tensor, cut)
                if why is not None:
                    raise TrainingError(
                        f"{entries.owner} keeps {path[0]!r} of shape {tuple(tensor.shape)} and type {tensor.dtype} "
                        f"beside parameter {name!r} of shape {cut.before}, and {why}"
                    )


def _refusal(entries: OptimizerStates, parameter: Tensor, path: Path, tensor: Tensor, cut: TensorCut) -> str | None:
    """Why one tensor cannot follow a cut, and what to do; None where it can."""
    plain = type(tensor) in (Tensor, nn.Parameter) or hasattr(tensor, "full_tensor")
    alike = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    if not plain or tensor.layout is not torch.strided or cut.beside(alike) is None:
        return "how it follows cannot be told: use an optimizer whose states have the parameter's shape"
    if tensor.numel() > 1 and shares_memory(entries, tensor):
        return "another parameter's lies in the same memory: keep one for each parameter"
    if tensor.numel() > 1 and not is_elementwise(entries, parameter, path, tensor):
        return (
            "it may hold a number per element or be a matrix about rows or columns, such as a preconditioner: use an "
            "optimizer of torch.optim, or leave this parameter's couplings out"
        )
    return None


def _attributes(tensors: Mapping[str, Tensor]) -> OptimizerStates:
    """Tensors that were set on parameters as attributes."""
    states = {t: {k: v for k, v in vars(t).items() if isinstance(v, Tensor)} for t in tensors.values()}
    return collect_states("the model's code", states, documented=False)


def cut_all(optimizers: Sequence[Optimizer], tensors: Mapping[str, Tensor], cuts: Mapping[str, TensorCut]) -> None:
    """Cut every tensor, its gradient and the optimizers' states, one parameter at a time."""
    for name, cut in cuts.items():
        tensor = tensors[name]
        for optimizer in optimizers:
            state: dict[str, object] = optimizer.state.get(tensor, {})
            for key, value in state.items():
                state[key] = _cut_state(value, cut)
        for key, value in list(vars(tensor).items()):
            if isinstance(value, Tensor):
                setattr(tensor, key, cut.beside(value))
        cut_tensor(tensor, cut)


def cut_tensor(tensor: Tensor, cut: TensorCut) -> None:
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


def optimizer_bytes(optimizers: Sequence[Optimizer]) -> int:
    """Bytes of all tensors that optimizers keep beside parameters."""
    values = [v for optimizer in optimizers for state in optimizer.state.values() for v in state.values()]
    return sum(t.numel() * t.element_size() for value in values for _, t in leaves(value))


def _parameters_of(optimizer: Optimizer) -> Iterator[nn.Parameter]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _cut_state(value: object, cut: TensorCut) -> object:
    if isinstance(value, Tensor):
        return cut.beside(value)
    if isinstance(value, list | tuple):
        items = [_cut_state(item, cut) for item in value]
        kind: Callable[..., object] = type(value)
        return kind(*items) if hasattr(value, "_fields") else kind(items)
    if isinstance(value, dict):
        return {key: _cut_state(item, cut) for key, item in value.items()}
    return value
