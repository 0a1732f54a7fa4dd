"""A plan in front of torch.compile, in inference and in training."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ecospa_fx as eco
from tests.support.hugging import couplings_of, tiny
from tests.support.inplace import half, largest, masked_twin, plan_of


class Pair(nn.Module):
    """Two linear layers; `split`: with a break of the graph between them."""

    def __init__(self, split: bool = False) -> None:
        super().__init__()
        self.split, self.up, self.down = split, nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x).relu()
        if self.split:
            torch._dynamo.graph_break()
        out: Tensor = self.down(x)
        return out


def pair(split: bool = False) -> tuple[nn.Module, eco.Plan, nn.Module, Tensor]:
    """A model, a plan, the masked model and an input."""
    torch._dynamo.reset()
    model, x = Pair().double(), torch.randn(3, 8, dtype=torch.float64)
    plan = plan_of(eco.detect(model, (x,)), ["ffn"], half)
    model.split = split
    return model, plan, masked_twin(model, plan), x


def compiled(model: nn.Module, backend: Any, **options: Any) -> Any:
    return torch.compile(model, backend=backend, **options)


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
def test_the_compiled_model_equals_the_masked_one(compiler: str) -> None:
    model, plan, twin, x = pair()
    run = compiled(model, eco.backend(plan, compiler=compiler))
    with torch.no_grad():
        assert largest(run(x), twin(x)) < 1e-12
        assert largest(run(x.repeat(3, 1)), twin(x.repeat(3, 1))) < 1e-12  # a graph with a symbolic size
    run(x).square().sum().backward()
    twin(x).square().sum().backward()
    masks = plan.masks(model)
    for (name, own), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert own.grad is not None
        assert other.grad is not None
        assert largest(own.grad, other.grad * masks.get(name, torch.ones(()))) < 1e-12


def test_the_smaller_graph_is_what_is_compiled() -> None:
    model, plan, _, x = pair()
    shapes: list[tuple[int, ...]] = []

    def look(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        shapes.extend(tuple(value.shape) for value in inputs if isinstance(value, Tensor))
        return graph

    compiled(model, eco.backend(plan, compiler=look), fullgraph=True)(x)
    assert (16, 8) in shapes
    assert (32, 8) not in shapes


def test_an_optimizer_trains_the_dense_parameters() -> None:
    model, plan, twin, x = pair()
    run = compiled(model, eco.backend(plan, compiler="eager"))
    with torch.no_grad():
        run(x)  # copies of what is kept
    masks = plan.masks(model)
    for one, own in ((run, model), (twin, twin)):
        optimizer = torch.optim.SGD(own.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            one(x).square().sum().backward()
            for name, parameter in own.named_parameters():
                if name in masks and parameter.grad is not None:
                    parameter.grad.mul_(masks[name])
            optimizer.step()
    with torch.no_grad():
        assert largest(run(x), twin(x)) < 1e-12  # the copies are made anew


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "vit"])
def test_models_of_transformers(name: str) -> None:
    torch._dynamo.reset()
    model, kwargs = tiny(name)
    plan = eco.plan(couplings_of(name), ratio=0.5, scores="random")
    twin = masked_twin(model, plan)
    run = compiled(model, eco.backend(plan, compiler="aot_eager"), fullgraph=True)
    with torch.no_grad():
        assert largest(run(**kwargs).logits, twin(**kwargs).logits) < 1e-9
    run(**kwargs).logits.square().sum().backward()
    twin(**kwargs).logits.square().sum().backward()
    masks, most = plan.masks(model), max(float(p.grad.abs().max()) for p in twin.parameters() if p.grad is not None)
    for (path, own), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        if other.grad is not None and own.grad is not None:
            assert float((own.grad - other.grad * masks.get(path, torch.ones(()))).abs().max()) < 1e-9 * most


def test_a_graph_with_a_part_of_a_coupling_is_refused() -> None:
    model, plan, _, x = pair(split=True)
    with pytest.raises(Exception, match=r"only a part of coupling 'ffn': .*fullgraph=True"):
        compiled(model, eco.backend(plan, compiler="eager"))(x)


def test_another_model_is_refused_and_other_names_are_told_by_the_model() -> None:
    model, plan, twin, x = pair()
    with pytest.raises(Exception, match=r"reads a parameter '1.up.weight' of shape \(32, 8\), which the plan does not"):
        compiled(nn.Sequential(nn.Identity(), model), eco.backend(plan, compiler="eager"))(x)
    torch._dynamo.reset()
    run = compiled(nn.Sequential(nn.Identity(), model), eco.backend(plan, compiler="eager", model=model))
    assert largest(run(x), twin(x)) < 1e-12


def test_the_model_stays_dense() -> None:
    model, plan, _, x = pair()
    before = copy.deepcopy(model.state_dict())
    compiled(model, eco.backend(plan, compiler="eager"))(x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
