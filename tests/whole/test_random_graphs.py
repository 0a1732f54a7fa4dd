"""Random programs: whatever is offered is exact, planted couplings are found, and the harness itself can fail."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

from ecospa_fx.axes import registry
from ecospa_fx.axes.call import Call, Value
from tests.support.fuzz.check import Failure, check, failure_of, reduced
from tests.support.fuzz.generate import programs, seeded
from tests.support.fuzz.program import Planted, Program, Step

PARTS, EACH = 5, 5
"""Seeds 0 to 24; `benchmarks/fuzz.py` runs as many as wanted."""


def reported(program: Program, *, whole: bool) -> None:
    """Check a program; what fails is shown as the smallest program that fails in the same way."""
    failure = failure_of(program, whole=whole, most=3)
    if failure is not None:
        smaller, failure = reduced(program, failure, whole=whole)
        pytest.fail(f"{failure}\n\n{smaller.reproducer}")


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_seeds(part: int) -> None:
    for seed in range(part * EACH, (part + 1) * EACH):
        reported(seeded(seed), whole=seed % EACH == 0)


@pytest.mark.slow
@settings(max_examples=8, deadline=None, derandomize=True, phases=[Phase.generate],
          suppress_health_check=list(HealthCheck))  # fmt: skip
@given(programs())
def test_any_program(program: Program) -> None:
    reported(program, whole=False)


# -- the generator ---------------------------------------------------------------------------------------------------


def test_a_seed_is_a_program() -> None:
    assert seeded(7).source == seeded(7).source
    assert seeded(7).source != seeded(8).source


def test_a_seed_is_the_same_program_after_others() -> None:
    """A step is kept or rejected for its numbers, which come from no state that others left."""
    made = []
    for state in range(3):
        torch.manual_seed(state)
        made.append(seeded(2000948).source)
        assert torch.initial_seed() == state
    assert len(set(made)) == 1


def test_the_source_is_the_program() -> None:
    """What a reproducer shows is what was run."""
    program = seeded(3)
    names: dict[str, object] = {}
    exec(program.reproducer, names)
    assert sorted(names["model"].state_dict()) == sorted(program.build().state_dict())  # type: ignore[attr-defined]


@pytest.mark.slow
def test_programs_are_of_every_kind() -> None:
    made = [seeded(seed) for seed in range(300)]
    steps = Counter(step.operator for program in made for step in program.steps)
    planted = Counter(p.kind for program in made for p in program.planted)
    wanted = {
        "linear", "matmul", "einsum", "tensordot", "reshape", "unflatten", "flatten", "permute", "split", "unbind",
        "cat", "stack", "slice", "narrow", "expand", "repeat", "unary", "binary", "buffer", "scale", "layer_norm",
        "softmax", "attention", "rotary", "shared", "sum", "embedding", "select",
    }  # fmt: skip
    assert wanted <= set(steps), wanted - set(steps)
    assert set(planted) == {"ffn", "einsum", "qk", "vo", "heads"}
    assert {program.form for program in made} == {"tensor", "tuple", "dict"}
    assert len({len(program.inputs) for program in made}) > 1


# -- the harness against faults --------------------------------------------------------------------------------------


@pytest.fixture
def rules() -> Iterator[None]:
    """Rules that a test replaces are back after it."""
    registry.load()
    before = copy.copy(registry._ENTRIES)
    yield
    registry._ENTRIES.clear()
    registry._ENTRIES.update(before)


def use(operator: str, rule: Callable[[Call], Value | list[Value]]) -> None:
    registry.unregister(operator)
    registry.axis_rule(operator)(rule)


FEED_FORWARD = Program(
    inputs=("torch.randn(B, 3, 6, dtype=torch.float64)",),
    attributes={"up": "nn.Linear(6, 8)", "down": "nn.Linear(8, 6)"},
    steps=(
        Step("linear", "self.up({0})", (0,)),
        Step("unary", "F.relu({0})", (1,)),
        Step("linear", "self.down({0})", (2,)),
    ),
    outputs=(3,),
)


def with_middle(code: str) -> Program:
    steps = FEED_FORWARD.steps
    return replace(FEED_FORWARD, steps=(steps[0], replace(steps[1], code=code), steps[2]))


def kind_of(program: Program) -> str:
    failure = failure_of(program)
    return failure.kind if failure is not None else "none"


def test_a_good_program_passes() -> None:
    outcome = check(FEED_FORWARD)
    assert outcome.offered == Counter(ffn=1)
    assert outcome.whole == "shrunk"
    assert outcome.plans > 2
    assert outcome.removed > 0


@pytest.mark.usefixtures("rules")
@pytest.mark.parametrize(
    ("operator", "code"),
    [
        ("aten.flip", "{0}.flip(-1)"),
        ("aten.roll", "torch.roll({0}, 1, -1)"),
        ("aten.sigmoid", "torch.sigmoid({0}) * torch.sigmoid({0}).sum(-1, keepdim=True)"),
        ("aten.softmax", "{0}.softmax(-1)"),
        ("aten.sort", "{0}.sort(-1).values"),
    ],
)
def test_a_rule_that_lies_is_caught(operator: str, code: str) -> None:
    assert kind_of(with_middle(code)) == "none"

    def passes(call: Call) -> Value | list[Value]:
        result = call.passes(call.values[0])
        return [result] * len(call.outputs) if len(call.outputs) > 1 else result

    use(operator, passes)
    assert kind_of(with_middle(code)) == "inexact"


@pytest.mark.usefixtures("rules")
def test_a_rule_that_forgets_an_operand_is_caught() -> None:
    program = with_middle("{0} * torch.arange(1.0, 9.0)")
    assert kind_of(program) == "none"
    use("aten.mul", lambda call: call.passes(call["self"]))
    assert kind_of(program) in {"shrink", "inexact"}


@pytest.mark.usefixtures("rules")
def test_a_rule_that_crashes_is_caught() -> None:
    def broken(call: Call) -> Value:
        raise IndexError(call.operator)

    use("aten.relu", broken)
    assert kind_of(FEED_FORWARD) == "detect"


@pytest.mark.usefixtures("rules")
def test_a_planted_coupling_that_is_refused_is_caught() -> None:
    units = {
        frozenset({("up.weight", 0, i, -1, -1), ("up.bias", 0, i, -1, -1), ("down.weight", 1, i, -1, -1)})
        for i in range(8)
    }
    program = replace(FEED_FORWARD, planted=(Planted("ffn", frozenset(units)),))
    assert check(program).planted == Counter(ffn=1)
    use("aten.relu", lambda call: call.block_all("it is unknown")[0])
    assert kind_of(program) == "planted"


def test_a_planted_coupling_of_other_elements_is_caught() -> None:
    unit = frozenset({("up.weight", 0, 0, -1, -1), ("down.weight", 1, 1, -1, -1)})
    with pytest.raises(Failure, match="planted: ffn: 1 of 1 units are not offered"):
        check(replace(FEED_FORWARD, planted=(Planted("ffn", frozenset({unit})),)))


@pytest.mark.slow
@pytest.mark.parametrize(("order", "kind"), [(range(8), "none"), ([1, 0, 2, 3, 4, 5, 6, 7], "planted")])
def test_larger_units_must_be_unions_of_planted_ones(order: Sequence[int], kind: str) -> None:
    """Halves that became rows: unit i goes with unit i + 4, and with nothing else."""
    program = with_middle("torch.cat({0}.split(4, -1), -1).unflatten(-1, (2, 4)).flatten(-2).relu()")
    units = {
        frozenset({("up.weight", 0, i, -1, -1), ("up.bias", 0, i, -1, -1), ("down.weight", 1, order[i], -1, -1)})
        for i in range(8)
    }
    planted = Planted("ffn", frozenset(units), coarse=True)
    assert kind_of(replace(program, planted=(planted,))) == kind
    assert kind_of(replace(program, planted=(replace(planted, coarse=False),))) == "planted"


@pytest.mark.usefixtures("rules")
def test_a_failure_is_reduced_to_what_it_takes() -> None:
    use("aten.softmax", lambda call: call.passes(call.values[0]))
    steps = (
        Step("linear", "self.up({0})", (0,)),
        Step("unary", "F.relu({0})", (1,)),
        Step("softmax", "{0}.softmax(-1)", (2,)),
        Step("unary", "-{0}", (3,)),
        Step("linear", "self.down({0})", (4,)),
        Step("binary", "{0} + {1}", (5, 0)),
    )
    program = replace(FEED_FORWARD, steps=steps, outputs=(6,))
    failure = failure_of(program)
    assert failure is not None
    smaller, found = reduced(program, failure)
    assert found.kind == failure.kind == "inexact"
    assert [step.code for step in smaller.steps] == ["self.up({0})", "{0}.softmax(-1)", "self.down({0})"]
    assert "v1.softmax(-1)" in smaller.reproducer
