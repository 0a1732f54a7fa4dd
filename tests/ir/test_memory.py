"""What is written into, and what lies in the same memory: parameters are refused, buffers and inputs are not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ecospa_fx as eco
from ecospa_fx.errors import CaptureError
from ecospa_fx.verify import masked

LIBRARY: Any = torch.library.Library("memory_tests", "FRAGMENT")  # type: ignore[no-untyped-call]


def define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    LIBRARY.define(schema)
    name = schema.partition("(")[0]
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    LIBRARY.impl(name, fake, "Meta")


def doubled(*tensors: Tensor) -> None:
    for tensor in tensors:
        tensor.mul_(2)


define("second(Tensor x, Tensor(a!) w) -> ()", lambda x, w: doubled(w), lambda x, w: None)
define("named(Tensor x, *, Tensor(a!) w) -> ()", lambda x, *, w: doubled(w), lambda x, *, w: None)
define("several(Tensor x, Tensor(a!)[] w) -> ()", lambda x, w: doubled(*w), lambda x, w: None)
OPS: Any = torch.ops.memory_tests


class Writes(nn.Module):
    """An FFN and something that writes."""

    def __init__(self, write: Callable[[Any, Tensor], object]) -> None:
        super().__init__()
        self.up, self.down, self.write = nn.Linear(6, 8), nn.Linear(8, 6), write
        self.scale = nn.Parameter(torch.ones(6))
        self.register_buffer("held", torch.ones(6))
        self.register_buffer("inside", self.scale.data[:])
        self.plain = torch.ones(6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.down(torch.relu(self.up(x)))
        self.write(self, x)
        out: Tensor = h * self.scale * self.held * self.plain
        return out


INTO_PARAMETERS: dict[str, Callable[[Any, Tensor], object]] = {
    "second": lambda m, x: OPS.second(x, m.scale.detach()),
    "second, of a chunk": lambda m, x: OPS.second(x, m.scale.detach().chunk(2)[1]),
    "named": lambda m, x: OPS.named(x, w=m.scale.detach()),
    "among several": lambda m, x: OPS.several(x, [x.clone(), m.scale.detach()]),
    "foreach": lambda m, x: torch._foreach_mul_([m.scale.detach()], 2.0),
    "out": lambda m, x: torch.exp(x[0], out=m.scale.detach()),
    "a buffer in the same memory": lambda m, x: m.inside.mul_(2),
    "reshaped and turned": lambda m, x: m.scale.detach().reshape(2, 3).transpose(0, 1).mul_(2),
    "nothing dropped": lambda m, x: nn.functional.dropout(m.scale.detach(), 0.5, m.training).mul_(2),
    "of the same type": lambda m, x: m.scale.detach().type_as(x).mul_(2),
    "broadcast": lambda m, x: torch.ops.aten.broadcast_tensors([m.scale.detach(), x[0]])[0].mul_(2),
}


@pytest.mark.parametrize("write", INTO_PARAMETERS.values(), ids=INTO_PARAMETERS)
def test_code_that_writes_into_a_parameter_is_refused_however_it_does(write: Callable[[Any, Tensor], object]) -> None:
    model = Writes(write).eval()
    with pytest.raises(CaptureError, match=r"parameter 'scale' is written into"):
        eco.detect(model, (torch.randn(2, 6),))
    assert torch.equal(model.scale, torch.ones(6))


ELSEWHERE: dict[str, Callable[[Any, Tensor], object]] = {
    "a copy": lambda m, x: m.scale.detach().clone().mul_(2),
    "a buffer, second": lambda m, x: OPS.second(x, m.held),
    "a buffer, named": lambda m, x: OPS.named(x, w=m.held),
    "a buffer, out": lambda m, x: torch.exp(x[0], out=m.held),
    "a plain tensor": lambda m, x: m.plain.add_(1),
    "the input": lambda m, x: OPS.second(m.scale, x),
}


@pytest.mark.parametrize("write", ELSEWHERE.values(), ids=ELSEWHERE)
def test_code_that_writes_elsewhere_is_taken_and_writes_into_its_own(write: Callable[[Any, Tensor], object]) -> None:
    model, x = Writes(write).double().eval(), torch.randn(2, 6).double()
    twin, given = copy.deepcopy(model), x.clone()
    plan = eco.plan(eco.detect(model, (x,)), 0.5, scores="magnitude")
    small = eco.shrink(model, plan, (x,))
    with torch.no_grad(), masked(twin, plan):
        for _ in range(2):
            assert torch.allclose(small(x.clone()), twin(x.clone()), rtol=1e-12, atol=1e-12)
    assert torch.equal(x, given)
    for name, tensor in {**model.state_dict(), "plain": model.plain}.items():
        assert torch.equal(tensor, torch.ones(6)) or name.startswith(("up", "down"))


class Out(nn.Module):
    """Hidden units that are computed into another tensor, which is read afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        kept = torch.zeros(x.shape[0], 8, dtype=x.dtype)
        torch.exp(self.up(x).detach(), out=kept)
        out: Tensor = self.down(kept)
        return out


def test_what_is_computed_into_another_tensor_is_not_cut() -> None:
    model, x = Out().double().eval(), torch.randn(2, 6).double()
    couplings = eco.detect(model, (x,))
    assert not couplings.offered
    assert any("written into" in c.blocked.message for c in couplings.blocked if c.blocked is not None)
