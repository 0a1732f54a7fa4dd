"""The decorator of public verbs that leave a model as it was."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from ecospa_fx.ir.tracing import model_locked, random_state_restored
from ecospa_fx.runtime.lift_parameters import check_model
from ecospa_fx.snapshot import untouched

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def leaves_untouched(*, calls: bool) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Let a verb, whose first argument is a model, leave that and random numbers as they were, whatever happens.

    calls: whether it calls the model's own code, other than to trace it, which looks after itself. Threads that look at
    the same model wait for each other. Raises CaptureError for what is no model.
    """

    def decorated(verb: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        @wraps(verb)
        def looking(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            model: Any = args[0] if args else kwargs.get("model")
            if not (args or "model" in kwargs):
                return verb(*args, **kwargs)  # which says what is missing
            check_model(model)
            with model_locked(model), random_state_restored(), untouched(model) if calls else nullcontext():
                return verb(*args, **kwargs)

        return looking

    return decorated
