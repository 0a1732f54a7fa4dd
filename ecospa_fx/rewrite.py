"""From a model and a plan to the smaller model: capture, shrink, clean up, restore."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from torch import nn

from ecospa_fx.capture.export import captures
from ecospa_fx.errors import PlanError
from ecospa_fx.ir.passes import Pass, check_passes, run_passes
from ecospa_fx.ir.program import ExportedForm, Program
from ecospa_fx.origin import origin, remember
from ecospa_fx.passes import CLEANUP
from ecospa_fx.passes.shrink.shrink_couplings import shrink_program
from ecospa_fx.plan import Plan, check_plan
from ecospa_fx.runtime.lift_parameters import lift_parameters
from ecospa_fx.runtime.restore import restore
from ecospa_fx.trace_check import compared

Form = TypeVar("Form", bound=Program)
Result = TypeVar("Result")


def shrunk(
    model: nn.Module,
    plan: Plan,
    args: Sequence[object],
    kwargs: Mapping[str, object],
    passes: Sequence[Pass] | None = None,
    *,
    compare: bool = False,
    whole: nn.Module | None = None,
) -> ExportedForm:
    """A model's program without what a plan removes, cleaned up by some passes, by default all exact ones.

    compare: warn where what was traced is not what the model computes on the example. whole: the model that it is a
    part of and that the plan was made for; the plan keeps what is outside of it.
    Raises PlanError where the plan was made for another model, CaptureError where that cannot be traced.
    """
    check_plan(plan)
    plan.check(model if whole is None else whole)
    if passes is not None:
        check_passes(passes)
    programs = captures(model, args, kwargs, dynamic=True, whole=whole)
    program = fitted(compared(programs, model, args, kwargs) if compare else programs, plan)
    run_passes(program.exported.graph_module, CLEANUP if passes is None else passes)
    return program


def smaller(
    model: nn.Module,
    plan: Plan,
    args: Sequence[object] = (),
    kwargs: Mapping[str, object] | None = None,
    passes: Sequence[Pass] | None = None,
    *,
    compare: bool = False,
) -> nn.Module:
    """What `shrink` returns. compare: warn where what was traced is not what the model computes on the example."""
    model, args, kwargs = lift_parameters(model, args, kwargs)
    program = shrunk(model, plan, args, kwargs, passes, compare=compare)
    return remember(restore(program, model, args, kwargs), origin(model, plan, args, kwargs))


def fitted(programs: Iterable[Form], plan: Plan) -> Form:
    """The first program that a plan fits, shrunk by it in place. Raises the first one's PlanError where there is none.

    programs: at least one, from most to fewest symbolic sizes; made only as far as they are needed.
    """
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
