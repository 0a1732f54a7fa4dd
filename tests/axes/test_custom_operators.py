"""An operator of the user's own, end to end: refused with what to do, then registered as told, found and exact."""

from __future__ import annotations

from collections.abc import Iterator
from re import search

import pytest
import torch
from torch import Tensor, nn
from torch.library import custom_op

import ecospa_fx as eco
from ecospa_fx.axes import registry
from ecospa_fx.axes.call import Call, Value
from ecospa_fx.coupling.types import Refusal
from ecospa_fx.errors import PlanError
from ecospa_fx.verify import masked_error

OPERATOR = "ecospausers.gated"


@custom_op("ecospausers::gated", mutates_args=())
def gated(gate: Tensor, value: Tensor) -> Tensor:
    return gate.sigmoid() * value


@gated.register_fake
def _(gate: Tensor, value: Tensor) -> Tensor:
    return torch.empty_like(value)


class Layer(nn.Module):
    """A gated feed-forward layer whose gate is one fused operator."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(6, 16), nn.Linear(6, 16, bias=False), nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(torch.ops.ecospausers.gated(self.gate(x), self.up(x)))
        return out


@pytest.fixture
def registered() -> Iterator[None]:
    """The rule that the refusal asks for, registered through the public name."""

    @eco.axis_rule(OPERATOR)
    def rule(call: Call) -> Value:
        return call.pointwise([call["gate"], call["value"]], "any")

    yield
    registry.unregister(OPERATOR)


def made() -> tuple[Layer, tuple[Tensor]]:
    torch.manual_seed(0)
    return Layer().double().eval(), (torch.randn(2, 3, 6, dtype=torch.float64),)


def refusal_of(parameter: str) -> Refusal:
    model, args = made()
    couplings = eco.detect(model, args)
    assert couplings.offered == ()
    told = [c.blocked for c in couplings.blocked if [m for m in c.members if (m.parameter, m.axis) == (parameter, 0)]]
    assert told[0] is not None
    return told[0]


@pytest.mark.parametrize("parameter", ["gate.weight", "gate.bias", "up.weight"])
def test_it_is_refused_with_what_to_register(parameter: str) -> None:
    told = refusal_of(parameter)
    assert told.message == f"no axis rule for operator {OPERATOR}; register one with ecospa_fx.axis_rule('{OPERATOR}')"
    assert told.operator == OPERATOR
    assert search(r"test_custom_operators\.py:\d+: .*ops\.ecospausers\.gated", told.source)


def test_a_plan_is_refused_with_what_to_register() -> None:
    model, args = made()
    registering = rf"register one with ecospa_fx\.axis_rule\('{OPERATOR}'\)"
    with pytest.raises(
        PlanError, match=rf"^there is nothing to remove because no coupling is offered: .*{registering}"
    ):
        eco.plan(eco.detect(model, args), ratio=0.5, scores="magnitude")


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_once_registered_the_coupling_is_found_and_exact(seed: int) -> None:
    model, args = made()
    (coupling,) = eco.detect(model, args).offered
    assert (coupling.kind, coupling.size) == ("ffn", 16)
    assert [(m.parameter, m.axis, m.role) for m in coupling.members] == [
        ("gate.weight", 0, "producer"),
        ("gate.bias", 0, "producer"),
        ("up.weight", 0, "producer"),
        ("down.weight", 1, "consumer"),
    ]
    plan = eco.plan(eco.detect(model, args), ratio=0.5, scores="random", seed=seed)
    small = eco.shrink(model, plan, args)
    assert tuple(small.get_parameter("up.weight").shape) == (8, 6)
    twice = (torch.cat([args[0], -args[0]]),)
    assert max(masked_error(model, small, plan, a) for a in (args, twice)) <= 1e-9
