"""The options of the verbs that take many, typed for editors and type checkers, and checked before anything slow.

Defaults stand where the options are read: `ecospa_fx.budget.settings.PlanSettings`, `ecospa_fx.recipe.Recipe`,
`ecospa_fx.training.settings.Settings`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from inspect import signature
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from ecospa_fx.errors import EcospaError, OptionError

if TYPE_CHECKING:
    from torch import nn

    from ecospa_fx.budget.cost import Spending
    from ecospa_fx.coupling.types import Couplings
    from ecospa_fx.importance.score import Batch, Loss
    from ecospa_fx.importance.sensitivity import Curves


class ChoiceOptions(TypedDict, total=False):
    """Which couplings may lose units, and how many at most: options of `plan`, `compress` and `SparseTraining`."""

    kinds: str | Sequence[str] | None
    """Only couplings of these kinds; None: all offered, heads only where what is in them is not."""
    exclude: str | Sequence[str]
    """Shell patterns on module paths whose parameters stay whole, see `ecospa_fx.coupling.choice`; () for none. The
    ratio counts what may go."""
    limits: Mapping[str, float] | None
    """Largest share, 0 to 1, that each coupling of a kind or under a pattern may lose; of several the least counts."""
    floor: float
    """Least share of its units that a coupling keeps, 0 to below 1, at least one unit; 0.05."""


class PlanOptions(ChoiceOptions, total=False):
    """Options of `plan` beside those in its signature."""

    allocation: Literal["global", "ragged", "uniform"] | Curves
    """How the ratio is spread, "global" by default."""
    uniform: bool
    """True: the same as allocation="uniform", the same share everywhere."""
    budget: Literal["parameters", "flops", "latency"] | Spending
    """What the ratio is counted in, "parameters" by default."""
    expressible_in: Literal["module"] | None
    """"module": only what `shrink_` can write back into the user's own code."""
    widths: Mapping[str, int] | None
    """In place of a ratio: units per carrier to keep, by name of a coupling or shell pattern on names."""


class CompressOptions(ChoiceOptions, total=False):
    """Options of `compress` beside those in its signature; those of `Recipe` go with method="second-order"."""

    allow: str | Iterable[str]
    seed: int
    round_to: int | None
    uniform: bool
    budget: Literal["parameters", "flops", "latency"] | Spending
    expressible_in: Literal["module"] | None
    widths: Mapping[str, int] | None
    allocation: Literal["ragged", "global", "uniform", "sensitivity"] | None
    progress: bool
    steps: int
    basis: bool | None
    damping: float
    gates: bool
    gate_damping: float
    least_squares: bool | str
    least_squares_damping: float
    rounds: int
    distillation: int | None
    rate: float
    step: int
    mixed: float
    predicted: float


class TrainingOptions(ChoiceOptions, total=False):
    """Options of `SparseTraining` beside those in its signature, see `ecospa_fx.training.settings.Settings`."""

    total_steps: int | None
    allocation: Literal["global", "uniform"]
    band: tuple[float, float] | None
    round_to: int | None
    couplings: Couplings | None
    allow: str | Iterable[str]
    window: int
    compensate: bool | None
    batches: Iterable[Batch] | None
    loss: Loss | None
    wrap: Callable[[nn.Module], nn.Module] | None
    group: Any


def check_known(verb: str, options: Iterable[str], known: Iterable[str]) -> None:
    """Raise OptionError, a TypeError as for any function, for an option that a verb does not have."""
    every = sorted(known)
    for name in options:
        if name not in every:
            near = get_close_matches(name, every, 1, 0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(every)}"
            raise OptionError(f"{verb}() has no option {name!r}: {hint}")


def check_options(verb: str, options: Iterable[str], kind: Any, function: Callable[..., Any]) -> None:
    """`check_known` for a verb whose further options a typed dictionary lists, beside those in its signature."""
    explicit = (n for n, p in signature(function).parameters.items() if p.kind is not p.VAR_KEYWORD and n != "self")
    check_known(verb, options, {*kind.__optional_keys__, *explicit})


# -- values: each check says in one sentence which option is wrong, and what it takes ------------------------------


def check_flag(name: str, value: object, refused: type[EcospaError]) -> None:
    """Raise `refused` for what is neither True nor False."""
    if not isinstance(value, bool):
        raise refused(f"{name}={value!r:.60} is neither True nor False")


def check_whole(name: str, value: object, least: int, refused: type[EcospaError], what: str = "a count") -> None:
    """Raise `refused` for what is no whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise refused(f"{name}={value!r:.60} is not {what}: give a whole number of at least {least}")


def is_number(value: object) -> bool:
    """Whether a value is a number, which True and False are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_share(name: str, value: object, refused: type[EcospaError], what: str = "a share") -> None:
    """Raise `refused` for what is no number from 0 to below 1."""
    if not is_number(value) or not 0 <= value < 1:  # type: ignore[operator]  # a number, as has been checked
        raise refused(f"{name}={value!r:.60} is not {what}: give a number from 0 to below 1")


def check_function(name: str, value: object, refused: type[EcospaError], how: str) -> None:
    """Raise `refused` for what cannot be called. how: the arguments and the result of what is wanted."""
    if not callable(value):
        raise refused(f"{name}={value!r:.60} cannot be called: give a function {how}")


def check_data(batches: object, loss: object, refused: type[EcospaError], progress: object = False) -> None:
    """Raise `refused` for what cannot be a series of (args, kwargs), a loss that cannot be called, and no flag."""
    check_flag("progress", progress, refused)
    if loss is not None:
        check_function("loss", loss, refused, "(output, args, kwargs) -> scalar")
    if isinstance(batches, str | bytes | Mapping) or not isinstance(batches, Iterable) or hasattr(batches, "dtype"):
        raise refused(
            f"batches={batches!r:.60} is no series of batches: give pairs (args, kwargs), for example [((ids,), {{}})]"
        )
