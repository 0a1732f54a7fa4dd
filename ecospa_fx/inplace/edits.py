"""Reversible edits of a module: parameters cut, buffers and attributes replaced, and a log to undo them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from ecospa_fx.coupling.unit_elements import Factors, kept_part, zeroed
from ecospa_fx.errors import PlanError


class Edits:
    """A log of changes; `undo` takes all of them back, the last one first."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def parameters(self, model: nn.Module, factors: Mapping[str, Factors]) -> None:
        """Keep of each parameter what its factors keep; it stays the same object, so that ties and hooks hold on."""
        parameters = dict(model.named_parameters())
        for name, kept in factors.items():
            self.data(parameters[name], lambda tensor: _part(tensor, kept))  # noqa: B023  # called at once

    def zeros(self, model: nn.Module, factors: Mapping[str, Factors]) -> None:
        """0 in place of what the factors of each parameter do not keep."""
        parameters = dict(model.named_parameters())
        for name, kept in factors.items():
            self.data(parameters[name], lambda tensor: zeroed(tensor, kept))  # noqa: B023  # called at once

    def data(self, parameter: nn.Parameter, change: Callable[[Tensor], Tensor]) -> None:
        """Another tensor in a parameter, and in its gradient; the parameter stays the same object."""
        data, grad = parameter.data, parameter.grad

        def back() -> None:
            parameter.grad = None  # of another shape than the data would be refused
            parameter.data, parameter.grad = data, grad

        self._undo.append(back)
        parameter.grad = None
        with torch.no_grad():
            parameter.data = change(data)
            if grad is not None:
                parameter.grad = change(grad)

    def weights(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        """Other numbers in parameters of the same shapes, by first name; their gradients, which are of others, go."""
        parameters = dict(model.named_parameters())
        for name, value in weights.items():
            parameter = parameters[name]
            if parameter.shape != value.shape:
                raise PlanError(
                    f"parameter {name!r} is {tuple(value.shape)} in the compressed graph and {tuple(parameter.shape)} "
                    "in the module, so nothing is written back: use ecospa_fx.compress"
                )
            self.data(parameter, lambda old: value.detach().to(old, copy=True))  # noqa: B023  # called at once
            parameter.grad = None

    def values(self, parameter: nn.Parameter, tensor: Tensor) -> None:
        """Other values of a parameter, which stays the same object."""
        data = parameter.data
        self._undo.append(lambda: setattr(parameter, "data", data))
        parameter.data = tensor

    def buffer(self, model: nn.Module, name: str, tensor: Tensor) -> None:
        """Another tensor in the place of a buffer."""
        path, _, attribute = name.rpartition(".")
        buffers = model.get_submodule(path)._buffers
        old = buffers[attribute]
        self._undo.append(lambda: buffers.__setitem__(attribute, old))
        buffers[attribute] = tensor

    def attribute(self, owner: object, name: Hashable, value: object) -> None:
        """Another value of an attribute, or of an entry of a dictionary."""
        attributes = cast(dict[Hashable, object], owner if isinstance(owner, dict) else vars(owner))
        old = attributes[name]
        self._undo.append(lambda: attributes.__setitem__(name, old))
        attributes[name] = value

    def undo(self) -> None:
        """Everything as it was."""
        while self._undo:
            self._undo.pop()()


def _part(tensor: Tensor, factors: Factors) -> Tensor:
    kept = kept_part(tensor, factors)
    if kept is None:
        raise PlanError(UNEVEN)
    return kept


UNEVEN = "the plan keeps different numbers of units in different places: make the plan anew"


def cut(tensor: Tensor, mask: Tensor) -> Tensor:
    """What a mask keeps of a tensor of its shape, in memory of its own: a tensor of as many axes.

    Raises PlanError where what is kept is no such tensor.
    """
    shape = [int(mask.sum(axis).max()) for axis in range(mask.dim())]
    with torch.no_grad():
        kept = tensor[mask]
    if kept.numel() != torch.Size(shape).numel():
        raise PlanError(UNEVEN)
    return kept.view(shape)
