"""Which of a model's captures can be made smaller: the one with the most symbolic sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from ecospa_fx.errors import PlanError
from ecospa_fx.graph.program import Program
from ecospa_fx.plan import Plan

Form = TypeVar("Form", bound=Program)
Result = TypeVar("Result")


def fitted(programs: Iterable[Form], plan: Plan) -> Form:
    """The first program that a plan fits, shrunk by it in place. Raises the first one's PlanError where there is none.

    programs: at least one, from most to fewest symbolic sizes; made only as far as they are needed.
    """
    from ecospa_fx.passes.shrink_couplings import shrink_program

    return first_fit(programs, lambda program: shrink_program(program, plan))[0]


def first_fit(programs: Iterable[Form], rewrite: Callable[[Form], Result]) -> tuple[Form, Result]:
    """The first program that `rewrite` takes, and what that returned; raises the first one's PlanError for none."""
    failure: PlanError | None = None
    for program in programs:
        try:
            return program, rewrite(program)
        except PlanError as error:
            failure = failure or error
    assert failure is not None  # there is at least one program
    raise failure
