"""The registry: one rule per operator, nothing guessed, every rule tested, and an oracle that catches a wrong rule."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.library import custom_op

import ecospa_fx as eco
from ecospa_fx.axes import registry
from ecospa_fx.axes.call import Call, Value
from ecospa_fx.errors import PlanError
from tests.support.oracle import Case, check_exact, check_literal, check_rule, prepared, sandwich, tagged

FAMILIES = ("pointwise", "move", "contract", "attention", "reduce", "norm", "index", "create", "convolution", "effects")

EXEMPT = {
    "flexible_attention": "on the CPU torch traces it only without gradients; tested in test_higher_order",
    "reshape_as": "written out as a reshape before the walk wherever one suffices; tested in test_beyond",
    "grouped_mm": "needs an operator that transformers registers; tested by its own name in test_rules_contract",
}
"""Rule functions without a case in the tables, and where they are tested instead."""


@custom_op("ecospatest::double", mutates_args=())
def double(x: Tensor) -> Tensor:
    return 2 * x


@double.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@custom_op("ecospatest::backwards", mutates_args=())
def backwards(x: Tensor) -> Tensor:
    return x.flip(-1)


@backwards.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def passes(call: Call) -> Value:
    """Every position stays where it is."""
    return call.passes(call["x"])


@pytest.fixture
def forgotten() -> Iterator[None]:
    """Rules registered in a test are gone after it."""
    yield
    for operator in ("ecospatest.double", "ecospatest.backwards"):
        if registry.find(operator) is not None:
            registry.unregister(operator)


def cases() -> list[Case]:
    """Every case of every table."""
    return [c for f in FAMILIES for c in importlib.import_module(f"tests.axes.test_rules_{f}").CASES]


# -- coverage ------------------------------------------------------------------------------------------------------


def test_every_rule_has_a_literal_and_an_oracle_test() -> None:
    tested = {registry.find(c.operator) for c in cases()}
    rules = [registry.find(o) for o in registry.operators()]
    missing = {rule.__name__ for rule in rules if rule is not None and rule not in tested}
    assert missing == set(EXEMPT)


def test_every_operator_exists() -> None:
    foreign = {"transformers.grouped_mm_fallback"}
    names = {*registry.operators(), *registry.refused()} - foreign
    higher = {o for o in names if "." not in o}
    assert [o for o in higher if not hasattr(torch.ops.higher_order, o)] == []
    wrong = [o for o in names - higher if not hasattr(getattr(torch.ops, o.split(".")[0]), o.split(".")[1])]
    assert [o for o in wrong if not o.startswith("quantized_decomposed.")] == []


def test_every_rule_says_what_its_operators_do() -> None:
    rules = {registry.find(o) for o in registry.operators()}
    assert all(rule is not None and rule.__doc__ for rule in rules)


# -- registration --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", ["aten.relu", "aten.as_strided"])
def test_a_second_registration_is_refused(operator: str) -> None:
    registry.load()
    with pytest.raises(ValueError, match=f"{operator} has an axis rule already"):
        eco.axis_rule(operator)(passes)
    with pytest.raises(ValueError, match="already"):
        registry.refuse("no reason", operator)


def test_forgetting_what_is_unknown_names_what_is_near() -> None:
    with pytest.raises(KeyError, match=r"aten\.relu"):
        registry.unregister("aten.reluu")


def test_in_place_operators_follow_their_functional_form() -> None:
    registry.load()
    assert registry.find("aten.relu_") is registry.find("aten.relu") is not None
    case = sandwich("aten.mul_", lambda h: h.sin().mul_(2))
    check_literal(case)
    check_exact(case)


# -- operators without a rule --------------------------------------------------------------------------------------


def test_an_unknown_operator_blocks_and_says_how_to_register() -> None:
    _, _, couplings = prepared(sandwich("ecospatest.double", lambda h: torch.ops.ecospatest.double(h)))
    assert couplings.offered == ()
    refusals = [c.blocked for c in couplings.blocked if c.blocked and "ecospatest" in c.blocked.message]
    assert refusals
    assert refusals[0].message == (
        "no axis rule for operator ecospatest.double; register one with ecospa_fx.axis_rule('ecospatest.double')"
    )
    assert refusals[0].operator == "ecospatest.double"
    assert "oracle.py" in refusals[0].source


@pytest.mark.usefixtures("forgotten")
def test_a_registered_rule_lifts_the_block() -> None:
    eco.axis_rule("ecospatest.double")(passes)
    case = sandwich("ecospatest.double", lambda h: torch.ops.ecospatest.double(h).relu())
    check_literal(case)
    check_exact(case)


@pytest.mark.usefixtures("forgotten")
def test_a_rule_that_notes_what_is_no_action_is_an_error() -> None:
    def misspelt(call: Call) -> Value:
        call.note(call["x"].axes, "non-linear")  # type: ignore[arg-type]  # that is what is tested
        return call.passes(call["x"])

    eco.axis_rule("ecospatest.double")(misspelt)
    with pytest.raises(ValueError, match="'non-linear' is not a valid Action"):
        check_rule(torch.ops.ecospatest.double, [tagged(6)])


@pytest.mark.parametrize(("operator", "reason"), sorted(registry.refused().items()))
def test_refused_operators_have_a_reason(operator: str, reason: str) -> None:
    assert registry.find(operator) is None
    assert str(registry.refusal(operator)) == reason
    assert len(reason.split()) > 4


# -- the oracles against a wrong rule ------------------------------------------------------------------------------


@pytest.mark.usefixtures("forgotten")
def test_both_oracles_catch_a_rule_that_lies() -> None:
    eco.axis_rule("ecospatest.backwards")(passes)
    case = sandwich("ecospatest.backwards", lambda h: torch.ops.ecospatest.backwards(h.relu()))
    check_literal(case)
    with pytest.raises(AssertionError, match="error"):
        check_exact(case)
    with pytest.raises(AssertionError, match="differs"):
        check_rule(torch.ops.ecospatest.backwards, [tagged(6)], masked=False)


@pytest.mark.usefixtures("forgotten")
def test_the_oracle_catches_a_zero_that_is_none() -> None:
    eco.axis_rule("ecospatest.double")(lambda call: Value(call["x"].axes, (True,), (), call.node))
    assert check_rule(torch.ops.ecospatest.double, [tagged(6)]) == 1
    with pytest.raises(AssertionError, match="is not 0 where cut"):
        check_rule(lambda a: torch.ops.ecospatest.double(a.exp()), [tagged(6)])


def test_the_literal_check_catches_wrong_expectations() -> None:
    with pytest.raises(AssertionError):
        check_literal(sandwich("aten.relu", torch.relu, "ffn 9"))
    with pytest.raises(AssertionError, match="is not in the graph"):
        check_literal(sandwich("aten.gelu", torch.relu))
    with pytest.raises(AssertionError):
        check_literal(sandwich("aten.relu", torch.relu, blocked="no such reason"))


def test_a_plan_for_another_model_is_refused() -> None:
    model, args, _ = prepared(sandwich("aten.relu", torch.relu))
    _, _, others = prepared(sandwich("aten.relu", torch.relu, width=12))
    with pytest.raises(PlanError, match="another model"):
        eco.shrink(model, eco.plan(others, 0.5, "random"), args)
