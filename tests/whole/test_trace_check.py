"""What was traced is compared with the model on the example, once, and a sentence says where they differ."""

from __future__ import annotations

import copy
import random
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ecospa_fx as eco


class Ffn(nn.Module):
    """A residual FFN; `how` it does something else while it is being traced, or seems to."""

    calls: Tensor

    def __init__(self, how: str = "") -> None:
        super().__init__()
        self.how, self.seen = how, 0
        self.up, self.down, self.norm = nn.Linear(8, 16), nn.Linear(16, 8), nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        self.seen += 1
        if self.how == "counted":
            self.calls.add_(1)
        y = self.down(self.drop(self.up(x).relu()))
        if self.how == "sign" and torch.compiler.is_exporting():
            y = -y
        if self.how == "order" and torch.compiler.is_exporting():
            x = x.flip(0)
        if self.how == "random":
            y = y + torch.rand(8, dtype=y.dtype)
        if self.how == "chance" and random.random() < 2:
            y = y + random.random()
        if self.how == "normed":
            y = self.norm(y)
        return {"y": x + y, "least": y.masked_fill(y > 0, -1e9)}


def shrunk(model: nn.Module, dtype: torch.dtype = torch.float64, verb: str = "shrink") -> list[str]:
    """What is said when half of a model goes."""
    model, x = model.to(dtype), torch.randn(3, 8).to(dtype)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if verb == "compress":
            batches: Any = [((torch.randn(3, 8).to(dtype),), {}) for _ in range(4)]
            loss = lambda out, args, kwargs: out["y"].square().mean()  # noqa: E731
            eco.compress(model, (x,), ratio=0.5, batches=batches, loss=loss, distillation=0)
        else:
            eco.shrink(model, eco.plan(eco.detect(model, (x,)), ratio=0.5), (x,))
    files = {one.filename for one in told if "what was traced" in str(one.message)}
    assert files <= {__file__}
    return [str(one.message) for one in told if "what was traced" in str(one.message)]


@pytest.mark.parametrize("how", ["sign", "order"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_is_traced_otherwise_is_said(how: str, dtype: torch.dtype) -> None:
    told = shrunk(Ffn(how).eval(), dtype)
    assert len(told) == 1
    assert "what was traced of Ffn is not what it computes on the example (relative error" in told[0]


def test_compress_says_it_too() -> None:
    assert len(shrunk(Ffn("sign").eval(), verb="compress")) == 1


@pytest.mark.parametrize("how", ["", "counted", "random", "chance", "normed"])
@pytest.mark.parametrize("training", [False, True])
def test_what_is_the_same_or_random_is_not(how: str, training: bool) -> None:
    if training and how == "counted":
        pytest.skip("the same as in evaluation mode")
    model = Ffn(how).train(training)
    model.down.eval()
    before, state = copy.deepcopy(model), torch.get_rng_state()
    model = model.double()
    torch.set_rng_state(state)
    told = shrunk(model)
    assert not told
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert model.seen == 0
    for name, buffer in before.named_buffers():
        assert torch.equal(model.get_buffer(name).double(), buffer.double())


def test_random_numbers_of_the_user_stay() -> None:
    model, x = Ffn("random").eval(), torch.randn(3, 8)
    plan = eco.plan(eco.detect(model, (x,)), ratio=0.5, scores="magnitude")
    torch.manual_seed(7)
    want = torch.rand(3)
    torch.manual_seed(7)
    eco.shrink(model, plan, (x,))
    assert torch.equal(torch.rand(3), want)


def test_models_without_values_are_shrunk_as_before() -> None:
    model, x = Ffn("sign").eval().to("meta"), torch.randn(3, 8, device="meta")
    plan = eco.plan(eco.detect(model, (x,)), ratio=0.5, scores="random")
    assert eco.shrink(model, plan, (x,)).get_parameter("up.weight").is_meta


class Memory:
    """Keeps a tensor that a call writes into, as a cache of fixed length does."""

    def __init__(self) -> None:
        self.rows, self.calls = torch.zeros(3, 8, dtype=torch.float64), torch.zeros((), dtype=torch.long)


class Writing(nn.Module):
    """Writes into what its argument holds, and returns the argument with its answer."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.ffn = how, Ffn()

    def forward(self, x: Tensor, memory: Memory) -> Any:
        y = self.ffn(x)["y"]
        row = -1.0 if self.how == "sign" and torch.compiler.is_exporting() else 1.0
        memory.rows.mul_(0.5)[1:].add_(y[1:] * row)
        memory.calls.add_(1)
        return x + memory.rows.sum() if self.how == "not returned" else (y, memory)


@pytest.mark.parametrize(("how", "said"), [("returned", 0), ("not returned", 0), ("sign", 1)])
def test_arguments_that_a_call_writes_into_are_compared_as_they_are_left(how: str, said: int) -> None:
    model, x, memory = Writing(how).double().eval(), torch.randn(3, 8, dtype=torch.float64), Memory()
    plan = eco.plan(eco.detect(model, (x, memory)), ratio=0.5, scores="random")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        eco.shrink(model, plan, (x, memory))
    assert len([one for one in told if "what was traced" in str(one.message)]) == said
    assert not memory.rows.any()
    assert not memory.calls
