"""Programs that come in other ways: graphs of other tracers, transforms of functions, parametrized weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

import ecospa_fx as eco
from ecospa_fx.errors import CaptureError
from ecospa_fx.verify import masked_error
from tests.support.exported_once import exported_once

HIDDEN, UNITS = 6, 8


class Pair(nn.Module):
    """linear → operation → linear."""

    def __init__(self, middle: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        self.up, self.down, self.middle = nn.Linear(HIDDEN, UNITS), nn.Linear(UNITS, HIDDEN), middle

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.middle(self.up(x)))
        return out


X = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def pair(middle: Callable[[Tensor], Tensor] = torch.relu) -> Pair:
    torch.manual_seed(0)
    return Pair(middle).double()


def offers(model: nn.Module, args: Any = (X,)) -> str:
    """Detects, proves two random plans, and returns what was offered."""
    couplings = eco.detect(model, args)
    with exported_once():
        for seed in range(2 if couplings.offered else 0):
            plan = eco.plan(couplings, ratio=0.5, scores="random", seed=seed)
            small = eco.shrink(model, plan, args)
            assert masked_error(model, small, plan, args) <= 1e-9
            whole = sum(p.numel() for p in couplings.model.parameters())
            assert sum(p.numel() for p in small.parameters()) == whole - plan.removed_parameters < whole
    return ", ".join(sorted(f"{c.size}×{c.carriers}" for c in couplings.offered))


def messages(model: nn.Module) -> str:
    return " | ".join(c.blocked.message for c in eco.detect(model, (X,)).blocked if c.blocked)


# -- graphs of other tracers ---------------------------------------------------------------------------------------


def compiled(model: nn.Module, **options: Any) -> tuple[fx.GraphModule, tuple[Any, ...]]:
    """What a backend of torch.compile is given."""
    caught: list[tuple[fx.GraphModule, Any]] = []

    def backend(graph: fx.GraphModule, inputs: Any) -> Any:
        caught.append((graph, inputs))
        return graph.forward

    torch._dynamo.reset()
    torch.compile(model, backend=backend, **options)(X)
    ((graph, inputs),) = caught
    return graph, tuple(inputs)


def test_a_graph_of_a_compile_backend_owns_the_parameters_it_is_given() -> None:
    graph, inputs = compiled(pair())
    assert [type(value) for value in inputs].count(nn.Parameter) == 4
    assert offers(graph, inputs) == "8×1"
    couplings = eco.detect(graph, inputs)
    assert all("parameters_weight" in m.parameter for c in couplings.offered for m in c.members if m.axis == 1)
    small = eco.shrink(graph, eco.plan(couplings, ratio=0.5, scores="magnitude"), inputs)
    (got,) = small(X)
    assert got.shape == X.shape
    with pytest.raises(TypeError, match="leave Parameters out, the smaller model has its own"):
        small(*inputs)


def test_a_graph_of_symbolic_sizes_is_taken_with_the_sizes_of_the_example() -> None:
    graph, inputs = compiled(pair(), dynamic=True)
    assert any(isinstance(value, torch.SymInt) for value in inputs)
    assert offers(graph, inputs) == "8×1"


def test_a_functional_call_owns_the_parameters_in_its_containers() -> None:
    model = pair()

    def function(weights: dict[str, Tensor], x: Tensor) -> Any:
        return torch.func.functional_call(model, weights, (x,))

    graph = make_fx(function)(dict(model.named_parameters()), X)
    assert offers(graph, (dict(model.named_parameters()), X)) == "8×1"
    (found,) = eco.detect(graph, (dict(model.named_parameters()), X)).offered
    assert {m.parameter.split(".", 1)[1] for m in found.members} == {"up.weight", "up.bias", "down.weight"}


def test_parameters_beside_other_tensors_in_one_argument_are_refused() -> None:
    class Mixed(nn.Module):
        def forward(self, held: Any) -> Tensor:
            return torch.relu(held[0] @ held[1])

    with pytest.raises(CaptureError, match="pass Parameters as arguments of their own"):
        eco.detect(Mixed(), ([torch.randn(2, 3), nn.Parameter(torch.randn(3, 3))],))


@pytest.mark.parametrize("trace", [lambda m: make_fx(m)(X), fx.symbolic_trace])
def test_graphs_with_parameters_or_modules_inside(trace: Callable[[nn.Module], fx.GraphModule]) -> None:
    assert offers(trace(pair(torch.tanh))) == "8×1"


# -- transforms of functions ---------------------------------------------------------------------------------------


class Mapped(Pair):
    """Row by row."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.func.vmap(lambda row: self.down(self.middle(self.up(row))))(x)
        return out


class Ensemble(nn.Module):
    """Three pairs with their weights in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, UNITS, HIDDEN)), nn.Parameter(torch.randn(3, HIDDEN, UNITS))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.func.vmap(lambda up, down: torch.relu(x @ up.T) @ down.T)(self.up, self.down).sum(0)
        return out


@pytest.mark.slow
def test_vmap_is_written_out() -> None:
    assert offers(pair(torch.func.vmap(torch.tanh))) == "8×1"
    assert offers(pair(torch.func.vmap(torch.func.vmap(torch.sin)))) == "8×1"
    assert offers(Mapped().double()) == "8×1"
    assert offers(Ensemble().double()) == "3×1, 8×3"
    small = eco.shrink(pair(), eco.plan(eco.detect(Mapped().double(), (X,)), ratio=0.5, scores="magnitude"), (X,))
    assert small(torch.cat([X, X])).shape == (8, HIDDEN)


def test_a_gradient_inside_a_model_is_refused() -> None:
    def energy(h: Tensor) -> Tensor:
        return h.tanh().square().sum()

    by_us = r"at .*test_programs.py:\d+.* lies inside a transform of torch.func that"
    with pytest.raises(CaptureError, match=rf"{by_us}|cannot be exported"):  # torch 2.11 refuses it itself
        eco.detect(pair(torch.func.grad(energy)), (X,))
    with pytest.raises(CaptureError, match="Pair cannot be exported"):
        eco.detect(pair(lambda h: torch.autograd.grad(energy(h), h, create_graph=True)[0]), (X,))


def test_a_derivative_forwards_names_the_operator_without_a_rule() -> None:
    model = pair(lambda h: torch.func.jvp(torch.tanh, (h,), (h,))[1])
    try:
        assert offers(model) == ""
    except CaptureError:
        pytest.skip("this version of torch cannot export a derivative forwards")
    assert "no axis rule for operator" in messages(model)


# -- parametrized weights --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("norm", [nn.utils.parametrizations.spectral_norm, nn.utils.parametrizations.weight_norm])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layers", [["up"], ["down"], ["up", "down"]])
def test_normalised_weights_say_how_to_fold_them(norm: Any, training: bool, layers: list[str]) -> None:
    model = pair().train(training)
    for name in layers:
        norm(model.get_submodule(name))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert offers(model) == ""
    assert "torch.nn.utils.parametrize.remove_parametrizations" in messages(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for name in layers:
        nn.utils.parametrize.remove_parametrizations(model.get_submodule(name), "weight")
    assert offers(model) == "8×1"


def test_a_parametrized_root_is_traced() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(HIDDEN, HIDDEN).double())
    assert "remove_parametrizations" in messages(layer)
