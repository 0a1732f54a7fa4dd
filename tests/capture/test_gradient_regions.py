"""Regions without gradients, wherever they begin and end: the smaller model learns where the dense one does."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ecospa_fx as eco
from ecospa_fx.verify import masked_error


class Ffn(nn.Module):
    """A residual FFN that switches gradients before its second half, if it is told a mode."""

    def __init__(self, mode: bool | None = None, late: bool = True) -> None:
        super().__init__()
        self.up, self.down, self.mode, self.late = nn.Linear(4, 6), nn.Linear(6, 4), mode, late

    def forward(self, x: Tensor) -> Tensor:
        if self.mode is not None and not self.late:
            torch.set_grad_enabled(self.mode)
        h = torch.relu(self.up(x))
        if self.mode is not None and self.late:
            torch.set_grad_enabled(self.mode)
        result: Tensor = x + self.down(h)
        return result


class Spanning(nn.Module):
    """Off in the middle of one module, on in the middle of another, with another one between; and a way around them."""

    def __init__(self) -> None:
        super().__init__()
        self.off, self.between, self.on, self.head = Ffn(False), Ffn(), Ffn(True), Ffn()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(x + self.on(self.between(self.off(x))))
        return result


class Within(nn.Module):
    """Two regions, each from one inner module into the next."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(Ffn(False), Ffn(True))
        self.second = nn.Sequential(Ffn(), nn.Sequential(Ffn(False), Ffn()), Ffn(True, late=False))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(x + self.first(x))
        return result


class Nested(nn.Module):
    """On again inside a region that is off, and inference mode."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d, self.e = Ffn(), Ffn(), Ffn(), Ffn(), Ffn()

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.a(x)
            with torch.enable_grad():
                y = self.b(y)
            y = self.c(y)
        with torch.inference_mode():
            z = self.d(x)
        result: Tensor = self.e(x + y + z.clone())
        return result


class Toggled(nn.Module):
    """One module called twice, which switches gradients off and on."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.head = Ffn(True), Ffn()

    def forward(self, x: Tensor) -> Tensor:
        self.part.mode = False
        y = self.part(x)
        self.part.mode = True
        result: Tensor = self.head(self.part(y))
        return result


def learns(model: nn.Module, args: tuple[Tensor, ...]) -> set[str]:
    """The names of the parameters that get gradients."""
    output = model(*args)
    torch.set_grad_enabled(True)
    output.sum().backward()
    found = {name for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("kind", [Spanning, Within, Nested, Toggled])
def test_the_smaller_model_learns_where_the_dense_one_does(kind: type[nn.Module]) -> None:
    model, args = kind().double().eval(), (torch.randn(2, 4, dtype=torch.float64),)
    plan = eco.plan(eco.detect(model, args), ratio=0.5, scores="random")
    assert torch.is_grad_enabled()
    small = eco.shrink(model, plan, args)
    assert torch.is_grad_enabled()
    assert masked_error(model, small, plan, args) < 1e-12
    assert learns(small, args) == learns(model, args) != set()


class Reversible(torch.autograd.Function):
    """Runs modules without gradients, and has a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module) -> Tensor:
        with torch.no_grad():
            result: Tensor = x + module(x)
        return result.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None


class Custom(nn.Module):
    """A custom function between two FFNs."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.inside, self.after = Ffn(), Ffn(), Ffn()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.after(Reversible.apply(self.before(x), self.inside))  # type: ignore[no-untyped-call]
        return result


def test_gradients_go_on_after_a_custom_function_and_it_is_named() -> None:
    model, args = Custom().double().eval(), (torch.randn(2, 4, dtype=torch.float64),)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what is only looked at is not trained
        couplings = eco.detect(model, args)
    plan = eco.plan(couplings, ratio=0.5, scores="random")
    with pytest.warns(
        UserWarning, match=r"test_gradient_regions\.Reversible, whose own backward is not part of a graph"
    ):
        small = eco.shrink(model, plan, args)
    assert masked_error(model, small, plan, args) < 1e-12
    assert {name.partition(".")[0] for name in learns(small, args)} == {"after"}
    assert {name.partition(".")[0] for name in learns(model, args)} == {"before", "after"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Nested, Spanning, Ffn])
@pytest.mark.parametrize("within", [False, True])
def test_a_caller_in_inference_mode_gets_what_others_get(kind: type[nn.Module], within: bool) -> None:
    """within: its example is made there too, and cannot be one of those that gradients need."""
    torch.manual_seed(0)
    model, x = kind().double(), torch.randn(3, 4, dtype=torch.float64)
    couplings = eco.detect(model, (x,))
    plan = eco.plan(couplings, ratio=0.4, scores="magnitude")
    with torch.inference_mode():
        args = (x.clone() if within else x,)
        assert args[0].is_inference() == within
        assert [c.name for c in eco.detect(model, args).offered] == [c.name for c in couplings.offered]
        small = eco.shrink(model, plan, args)
        assert torch.is_inference_mode_enabled()
        assert masked_error(model, small, plan, args) < 1e-12
    with torch.inference_mode():
        inside = small(x)
    torch.testing.assert_close(eco.shrink(model, plan, (x,))(x), inside, rtol=0, atol=1e-12)


def test_what_tracing_replaces_is_put_back() -> None:
    mode, function = torch.inference_mode.__enter__, torch.autograd.Function.__dict__["apply"]
    with pytest.raises(eco.errors.CaptureError):
        eco.detect(nn.Linear(2, 2), (torch.ones(3, 5),))
    assert torch.inference_mode.__enter__ is mode
    assert torch.autograd.Function.__dict__.get("apply") is function


@torch.library.custom_op("ecospagradients::tripled", mutates_args=())
def tripled(x: Tensor) -> Tensor:
    return x * 3


@tripled.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


tripled.register_autograd(lambda ctx, gradient: gradient * 3)


class Operator(nn.Module):
    """An operator of the user's, which has a backward of its own, after an FFN."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = Ffn(), Ffn()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.after(torch.ops.ecospagradients.tripled(self.before(x)))
        return result


def test_operators_with_a_backward_of_their_own_keep_it() -> None:
    model, args = Operator().double().eval(), (torch.randn(2, 4, dtype=torch.float64),)
    plan = eco.plan(eco.detect(model, args), ratio=0.5, scores="random")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = eco.shrink(model, plan, args)
    assert learns(small, args) == learns(model, args)
    assert masked_error(model, small, plan, args) < 1e-12
