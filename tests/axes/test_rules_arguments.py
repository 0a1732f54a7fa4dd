"""Every branch of an operator's own arguments: what each rule claims must hold for each of their values.

The tables of the families have one case or two for each rule. Here a rule meets all values of its arguments between
which it tells: bounds that hold 0 and bounds that do not, written keywords and defaults, negative axes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ecospa_fx as eco
from ecospa_fx.axes import registry
from ecospa_fx.axes.call import Value
from ecospa_fx.axes.flow import analyse
from ecospa_fx.capture.export import capture
from ecospa_fx.verify import masked_error
from tests.support.exported_once import exported_once
from tests.support.oracle import OfParameters, Sandwich, check_exact, check_literal, check_rule, sandwich, tagged

SUMMED = "summed over although removed elements are not zero there"
BOUNDS = (None, -0.5, 0.0, 0.5)


def signed(*shape: int) -> Tensor:
    """Values around 0, none of them 0, all of them different."""
    return (tagged(*shape) - tagged(*shape).mean() + 0.25) / 3


def bounded() -> list[Any]:
    """Every pair of bounds, in every spelling of a clamp."""
    both = [(low, high) for low in BOUNDS for high in BOUNDS if (low, high) != (None, None)]
    ordered = [(low, high) for low, high in both if low is None or high is None or low <= high]
    calls: dict[str, Callable[[Tensor], Tensor]] = {}
    for low, high in ordered:
        calls[f"clamp({low}, {high})"] = partial(torch.clamp, min=low, max=high)
        if low is not None and high is not None:
            calls[f"hardtanh({low}, {high})"] = partial(F.hardtanh, min_val=low, max_val=high)
        if low is not None and high is None:
            calls[f"clamp_min({low})"] = partial(torch.clamp_min, min=low)
        if high is not None and low is None:
            calls[f"clamp_max({high})"] = partial(torch.clamp_max, max=high)
    return [pytest.param(call, id=name) for name, call in calls.items()]


def claims_zero(function: Callable[..., Tensor]) -> bool:
    """Whether the rules say that the result is 0 at the positions of removed elements, along every axis."""
    with torch.no_grad():
        program = capture(OfParameters(function, [signed(4, 6)], []), (), None, dynamic=False)
    walked = analyse(program)
    (output,) = program.graph.find_nodes(op="output")
    value = walked.values[output.args[0][0]]
    assert isinstance(value, Value)
    return all(value.zero)


@pytest.mark.parametrize("function", bounded())
def test_a_clamp_keeps_zero_exactly_where_its_bounds_do(function: Callable[[Tensor], Tensor]) -> None:
    assert check_rule(function, [signed(4, 6)]) == 2
    assert claims_zero(function) == (not function(torch.zeros(1)).any())


POINTWISE: list[tuple[str, Callable[[Tensor], Tensor]]] = [
    ("threshold to 0", lambda h: F.threshold(h, 0.1, 0.0)),
    ("masked_fill 0", lambda h: h.masked_fill(h > 1, 0)),
    ("masked_fill 2", lambda h: h.masked_fill(h > 1, 2)),
    ("masked_fill where 0", lambda h: h.masked_fill(h < 1, 2.0)),
    ("where else 0", lambda h: torch.where(h > 1, h, 0.0)),
    ("where else 1", lambda h: torch.where(h > 1, h, 1.0)),
    ("where its own 0 stays", lambda h: torch.where(h > 1, 1.0, h)),
    ("add alpha", lambda h: torch.add(h, h.relu(), alpha=3)),
    ("sub alpha", lambda h: torch.sub(h.relu(), h, alpha=0.5)),
    ("add 0", lambda h: h + 0),
    ("rsub 1", lambda h: 1 - h),
    ("pow 2", lambda h: h**2),
    ("pow 1", lambda h: h**1),
    ("pow 0.5", lambda h: h.abs() ** 0.5),
    ("pow 0", lambda h: h**0),
    ("2 to its power", lambda h: 2.0**h),
    ("remainder", lambda h: h % 1.5),
    ("floor_divide", lambda h: torch.div(h, 2.0, rounding_mode="floor")),
    ("nan_to_num", lambda h: torch.nan_to_num(h, nan=1.0, posinf=2.0)),
    ("leaky_relu", lambda h: F.leaky_relu(h, 0.3)),
    ("elu", lambda h: F.elu(h, 2.0)),
    ("celu", lambda h: F.celu(h, 0.5)),
    ("softplus", lambda h: F.softplus(h, 2.0)),
    ("softshrink", lambda h: F.softshrink(h, 0.2)),
    ("hardshrink", lambda h: F.hardshrink(h, 0.2)),
    ("hardsigmoid", F.hardsigmoid),
    ("erfc", torch.erfc),
    ("round", lambda h: torch.round(h, decimals=1)),
    ("gelu tanh", lambda h: F.gelu(h, approximate="tanh")),
    ("glu rows", lambda h: F.glu(torch.cat([h, h.exp()], 0), dim=0)),
    ("glu of exp", lambda h: F.glu(torch.cat([h.exp(), h], 0), dim=0)),
    ("lerp", lambda h: torch.lerp(h, h.relu(), 0.25)),
    ("lerp from 1", lambda h: torch.lerp(h.exp(), h, 0.25)),
    ("addcmul value", lambda h: torch.addcmul(h, h, h.exp(), value=2)),
    ("addcmul of exp", lambda h: torch.addcmul(h, h.exp(), h.cos(), value=2)),
    ("addcdiv", lambda h: torch.addcdiv(h, h, h.exp(), value=2)),
    ("maximum with 1", lambda h: torch.maximum(h, torch.ones_like(h))),
    ("ge 0", lambda h: (h >= 0).to(h.dtype)),
    ("gt 0", lambda h: (h > 0).to(h.dtype)),
    ("ne 0", lambda h: (h != 0).to(h.dtype)),
]


@pytest.mark.parametrize("function", [pytest.param(function, id=name) for name, function in POINTWISE])
def test_a_pointwise_rule_claims_zero_only_where_it_is(function: Callable[[Tensor], Tensor]) -> None:
    assert check_rule(function, [signed(4, 6)])
    assert not claims_zero(function) or not function(torch.zeros(2, 2, dtype=torch.float64)).any()


def test_a_product_that_is_summed_over_blocks_what_is_not_zero() -> None:
    """Both operands of an inner product that is no matrix product."""
    for label, function in {
        "vecdot": lambda h: torch.linalg.vecdot(h.exp(), h.cos())[..., None],
        "vecdot by one": lambda h: torch.linalg.vecdot(h.exp(), torch.ones(1, dtype=h.dtype))[..., None],
        "einsum": lambda h: torch.einsum("btd,btd->bt", h.exp(), h.cos())[..., None],
    }.items():
        case = sandwich(OPERATORS.get(label, "aten.linalg_vecdot"), function, "", SUMMED, label=label)
        check_literal(case)


OPERATORS = {"einsum": "aten.einsum"}


def test_a_destination_that_is_zero_does_not_make_what_is_put_there_zero() -> None:
    places = torch.tensor([0]), torch.tensor([1])
    check_literal(
        sandwich(
            "aten.index_put",
            lambda h: h.relu().index_put(places, h[0, 0].exp()).sum(-1, keepdim=True),
            "",
            SUMMED,
            label="exp",
        )
    )
    fine = sandwich(
        "aten.index_put",
        lambda h: h.relu().index_put(places, h[0, 0].sin()).sum(-1, keepdim=True).relu(),
        prefix_of_summed(),
        label="sin",
    )
    check_literal(fine)
    check_exact(fine)


def prefix_of_summed() -> str:
    """What a sum over the width of the sandwich is called, whatever that is."""
    (coupling,) = eco.detect(Sandwich(lambda h: h.relu().sum(-1, keepdim=True)), (torch.randn(2, 3, 6),)).offered
    return f"{coupling.kind} {coupling.size}"


class Normed(nn.Module):
    """An FFN with a batch norm over its inner width."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 8), norm, nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(self.norm(self.up(x).mT).mT)
        return result


def instance_norm(width: int) -> nn.Module:
    """An instance norm that keeps statistics."""
    return nn.InstanceNorm1d(width, affine=True, track_running_stats=True)


@pytest.mark.parametrize("build", [nn.BatchNorm1d, instance_norm])
def test_statistics_that_move_while_training_are_refused(build: Callable[[int], nn.Module]) -> None:
    model, args = Normed(build(8)).double(), (torch.randn(4, 3, 6).double(),)
    couplings = eco.detect(model.train(), args)
    assert not couplings.offered
    assert any("running statistics" in c.blocked.message for c in couplings.blocked if c.blocked)


def test_stored_statistics_of_a_batch_norm_are_gathered() -> None:
    model, args = Normed(nn.BatchNorm1d(8)).double(), (torch.randn(4, 3, 6).double(),)
    assert isinstance(model.norm, nn.BatchNorm1d)
    assert model.norm.running_mean is not None
    model.norm.running_mean.uniform_(-1, 1)
    couplings = eco.detect(model.eval(), args)
    plan = eco.plan(couplings, ratio=0.5, scores="random")
    small = eco.shrink(model, plan, args)
    assert masked_error(model, small, plan, args) <= 1e-12
    assert small.get_parameter("norm.weight").shape == (plan[couplings.offered[0].name].kept,)


# -- steps along an axis whose choice differs along another ---------------------------------------------------------


class Stepped(nn.Module):
    """Experts side by side; every second one of some axis is read, with the experts before or behind it."""

    def __init__(self, equation: str, step: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 8))
        self.equation, self.step = equation, step
        self.back = nn.Parameter(torch.randn(3, 4, 5))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.step(torch.einsum(self.equation, x, self.weight).relu())
        result: Tensor = torch.einsum("bteh,eho->bto", inner, self.back)
        return result


STEPS: Sequence[tuple[str, Callable[[Tensor], Tensor]]] = [
    ("btd,deh->bteh", lambda y: y[..., ::2]),
    ("btd,deh->bthe", lambda y: y[..., ::2, :].mT),
    ("btd,deh->bteh", lambda y: y[..., 1::2]),
    ("btd,deh->bthe", lambda y: y[:, :, 1::2].transpose(-1, -2)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("equation", "step"), STEPS)
def test_steps_over_an_axis_that_differs_by_carrier(equation: str, step: Callable[[Tensor], Tensor]) -> None:
    model, args = Stepped(equation, step).double(), (torch.randn(2, 3, 4).double(),)
    couplings = eco.detect(model, args)
    with exported_once():
        for seed in range(3):
            plan = eco.plan(couplings, ratio=0.5, scores="random", seed=seed)
            assert masked_error(model, eco.shrink(model, plan, args), plan, args) <= 1e-12


# -- which operators a family speaks for --------------------------------------------------------------------------


def test_the_operators_that_have_a_rule_are_these() -> None:
    """A name that leaves the list takes a whole family of models with it, and no table of rules would notice."""
    registry.load()
    assert {"aten.hardsigmoid", "aten.erfc", "aten.relu", "aten.linear"} <= set(registry.operators())
    listed = (registry_file()).read_text(encoding="utf-8").split()
    assert sorted(o for o in registry.operators() if not o.startswith("ecospatest.")) == listed


def registry_file() -> Path:
    """The list, one operator a line; `python -m tests.axes.test_rules_arguments` writes it anew."""
    return Path(__file__).with_name("golden") / "operators.txt"


if __name__ == "__main__":
    registry.load()
    registry_file().parent.mkdir(exist_ok=True)
    registry_file().write_text("\n".join(sorted(registry.operators())) + "\n", encoding="utf-8")
