"""Parts of a model that compute without gradients do so in the smaller model as well."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import ecospa_fx as eco
from ecospa_fx.verify import masked_error


class Frozen(nn.Module):
    """A trunk that is run without gradients, and a head that learns."""

    def __init__(self, without: Callable[[], torch.no_grad]) -> None:
        super().__init__()
        self.up, self.down, self.head, self.without = nn.Linear(6, 12), nn.Linear(12, 6), nn.Linear(6, 3), without

    def forward(self, x: Tensor) -> Tensor:
        with self.without():
            trunk = self.down(self.up(x).relu())
        result: Tensor = self.head(trunk)
        return result


class Twice(Frozen):
    """The same weights, with gradients and without."""

    def forward(self, x: Tensor) -> Tensor:
        with self.without():
            target = self.down(self.up(x).relu())
        result: Tensor = self.head(self.down(self.up(2 * x).relu()) - target)
        return result


class Detached(Frozen):
    """The same, by `detach`."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.down(self.up(x).relu()).detach())
        return result


MODELS = [lambda: Frozen(torch.no_grad), lambda: Twice(torch.no_grad), lambda: Detached(torch.no_grad)]


@pytest.mark.parametrize("build", MODELS)
def test_gradients_stop_where_they_stopped(build: Callable[[], nn.Module]) -> None:
    model, args = build().double(), (torch.randn(4, 6).double(),)
    plan = eco.plan(eco.detect(model, args), ratio=0.5, scores="random")
    small = eco.shrink(model, plan, args)
    assert masked_error(model, small, plan, args) <= 1e-12
    small(*args).sum().backward()
    model(*args).sum().backward()
    for name, parameter in model.named_parameters():
        assert (small.get_parameter(name).grad is None) == (parameter.grad is None), name


def gradients(module: nn.Module, args: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Gradients of the parameters that have one."""
    module.zero_grad()
    module(*args).square().sum().backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def test_a_difference_has_the_gradient_of_its_first_half_alone() -> None:
    model, args = Twice(torch.no_grad).double(), (torch.randn(4, 6).double(),)
    nothing = eco.Plan((), tuple(eco.detect(model, args).shapes.items()))
    wanted, found = (gradients(m, args) for m in (model, eco.shrink(model, nothing, args)))
    assert len(wanted) == 6
    assert wanted.keys() == found.keys()
    assert all(torch.allclose(found[name], gradient, rtol=1e-12) for name, gradient in wanted.items())
