"""The options of `plan`, checked together before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from ecospa_fx.budget.alignment import ENGINES, Engine
from ecospa_fx.budget.ceiling import Ceiling, Unit
from ecospa_fx.budget.cost import CostModel
from ecospa_fx.checks import check_flag, check_whole, is_number
from ecospa_fx.coupling.choice import ChoiceOptions, checked_limits, texts
from ecospa_fx.errors import PlanError
from ecospa_fx.importance.scores import Given
from ecospa_fx.importance.sensitivity import Curves


class _Default(float):
    """A number that nobody gave."""


RATIO = _Default(0.5)
"""The share that goes where neither a ratio nor widths are given."""

WITH_WIDTHS = ("scores", "seed", "kinds", "exclude", "widths", "ratio", "progress")
"""What may be given beside widths: everything else says how a ratio is spread."""


class PlanOptions(ChoiceOptions, total=False):
    """Options of `plan` beside those in its signature."""

    allocation: Literal["global", "ragged", "uniform"] | Curves
    """"global" by default: of all couplings, what scores least for what it frees goes first. "ragged": the same where
    heads may keep different numbers of units. "uniform": the same share everywhere. `Curves`: measured loss."""
    uniform: bool
    """False by default. True: the same as allocation="uniform"."""
    budget: Literal["parameters", "flops", "latency"] | CostModel
    """"parameters" by default. What the ratio counts: parameters, each once; "flops" of the example call of `detect`;
    "latency", seconds of its products on this machine, measured once; or a cost model of one's own."""
    expressible_in: Literal["module"] | None
    """None by default. "module": only what `shrink_` can write back into the user's own code, found by trying; with
    uniform widths the configuration can describe it too."""
    widths: Mapping[str, int] | None
    """None by default. In place of a ratio: units per carrier to keep, by name of a coupling or shell pattern on
    names; a name counts before a pattern."""

    within: str | Mapping[Unit, float] | None
    """None by default. In place of a ratio: what the whole smaller model stays within, as bytes of its parameters and
    buffers, like "6GiB", or as a number of "parameters", "bytes", "flops" of the example call or "seconds" that it
    takes, like {"parameters": 100e6}. Seconds are measured on this machine and predicted."""

    progress: bool
    """False by default. True: a bar on stderr while what a module can carry is searched for."""


class AllPlanOptions(PlanOptions, total=False):
    """All that `plan` takes by name but couplings, ratio and scores."""

    seed: int
    """0 by default. What "random" scores are drawn from."""
    round_to: int | Engine | None
    """1 by default. Kept units are a multiple of this; by name, of what an engine likes; None: what the device does."""


@dataclass(frozen=True, slots=True)
class PlanSettings:
    """What a plan is made by: see `plan`. Raises PlanError for what is out of range or of another type."""

    ratio: float = RATIO
    """Share to remove, above 0 and below 1."""
    scores: Given = "magnitude"
    """What says which units go first."""
    seed: int = 0
    """What "random" scores are drawn from."""
    round_to: int | Engine | None = 1
    """Kept units are a multiple of this; None: of what the device prefers."""
    allocation: Literal["global", "ragged", "uniform"] | Curves = "global"
    """How the ratio is spread."""
    uniform: bool = False
    """The same as allocation="uniform"."""
    floor: float = 0.05
    """Least share of its units that a coupling keeps."""
    kinds: str | Sequence[str] | None = None
    """Only couplings of these kinds; None: all but residual widths and whole blocks."""
    exclude: str | Sequence[str] = ()
    """Shell patterns on module paths whose parameters stay whole."""
    limits: Mapping[str, float] | None = None
    """Largest share that couplings of a kind or under a pattern may lose."""
    widths: Mapping[str, int] | None = None
    """In place of a ratio: units per carrier to keep."""
    within: str | Mapping[Unit, float] | None = None
    """In place of a ratio: what the smaller model stays within."""
    budget: Literal["parameters", "flops", "latency"] | CostModel = "parameters"
    """What the ratio is counted in."""
    expressible_in: Literal["module"] | None = None
    """"module": only what `shrink_` can write back."""
    progress: bool = False
    """Whether a search shows a bar."""

    def __post_init__(self) -> None:
        _check_ratio(self.ratio)
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or not -(2**63) <= self.seed < 2**64:
            raise PlanError(f"seed={self.seed!r:.60} is not a seed: give a whole number")
        if isinstance(self.round_to, str) and self.round_to not in ENGINES:
            names = ", ".join(map(repr, ENGINES))
            raise PlanError(f"round_to={self.round_to!r:.60} is unknown: give a number of units, or one of {names}")
        if self.round_to is not None and not isinstance(self.round_to, str):
            check_whole("round_to", self.round_to, 1, PlanError, "a number of units")
        if not is_number(self.floor) or not 0 <= self.floor < 1:
            raise PlanError(
                f"floor={self.floor!r} is not a share of units to keep: give a number from 0 up to, not including, 1"
            )
        check_flag("uniform", self.uniform, PlanError)
        check_flag("progress", self.progress, PlanError)
        _check_allocation(self.allocation)
        _check_budget(self.budget)
        if self.expressible_in not in (None, "module"):
            raise PlanError(f"expressible_in={self.expressible_in!r:.60} is unknown: give 'module', or leave it out")
        if self.kinds is not None:
            texts("kinds", self.kinds)
        texts("exclude", self.exclude)
        checked_limits(self.limits)
        if self.how == "ragged" and (self.budget != "parameters" or self.expressible_in is not None):
            raise PlanError(
                "allocation='ragged' counts parameters, in graph form: leave budget= and expressible_in= out"
            )
        if self.widths is not None:
            self._check_widths()
        if self.within is not None:
            self._check_ceiling(Ceiling.of(self.within))

    @property
    def how(self) -> str | Curves:
        """How the ratio is spread."""
        return "uniform" if self.uniform else self.allocation

    def _check_ceiling(self, ceiling: Ceiling) -> None:
        if self.ratio is not RATIO:
            raise PlanError("ratio= and within= both say how much goes: give one of them")
        if self.budget != "parameters":
            raise PlanError(f"within= is counted in {ceiling.unit}, and budget= says otherwise: leave budget= out")
        if self.how == "ragged" and ceiling.unit in ("flops", "seconds"):
            raise PlanError(
                f"allocation='ragged' counts parameters, and within= {ceiling.unit}: use another allocation"
            )
        if self.expressible_in is not None and ceiling.unit == "seconds":
            raise PlanError("expressible_in='module' cannot spend seconds yet: give another unit")

    def _check_widths(self) -> None:
        if not isinstance(self.widths, Mapping) or not self.widths:
            raise PlanError(
                f"widths={self.widths!r:.60} is no mapping: give units to keep by name, like {{'layers.0.ffn': 24}}"
            )
        if self.ratio is not RATIO:
            raise PlanError("ratio= and widths= both say how much goes: give one of them")
        for field in fields(self):
            usual: tuple[Any, ...] = (1, None) if field.name == "round_to" else (field.default,)
            if field.name not in WITH_WIDTHS and not any(getattr(self, field.name) == value for value in usual):
                raise PlanError(
                    f"widths= says how many units stay, and {field.name}= how a ratio is spread: give one of them"
                )


def _check_ratio(ratio: object) -> None:
    if not is_number(ratio) or not 0 < ratio < 1:  # type: ignore[operator]  # a number, as has been checked
        raise PlanError(
            f"ratio={ratio!r:.60} is not a share of parameters to remove: give a number between 0 and 1, like 0.5"
        )


def _check_allocation(allocation: object) -> None:
    if isinstance(allocation, str) and allocation == "sensitivity":
        raise PlanError(
            "allocation='sensitivity' needs measured curves: pass these, or use compress() with method='second-order'"
        )
    if not isinstance(allocation, Curves) and allocation not in ("global", "ragged", "uniform"):
        raise PlanError(
            f"allocation={allocation!r:.60} is unknown: use 'global', 'ragged', 'uniform' or measured curves"
        )


def _check_budget(budget: object) -> None:
    if not isinstance(budget, CostModel) and budget not in ("parameters", "flops", "latency"):
        raise PlanError(f"budget={budget!r:.60} is unknown: use 'parameters', 'flops' or 'latency'")
