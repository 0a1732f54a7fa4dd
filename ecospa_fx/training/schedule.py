"""Pruning schedules: at which steps a model shrinks, and to what share of the target.

Steps are calls of ``SparseTraining.step()``, counted from 1. No schedule ever gives anything back.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Protocol

from ecospa_fx.checks import is_number
from ecospa_fx.errors import TrainingError


class Schedule(Protocol):
    """When a model shrinks, and how far."""

    @property
    def steps(self) -> tuple[int, ...]:
        """Those at which the model shrinks, ascending."""
        ...

    def share(self, step: int) -> float:
        """The share of the target to have reached by a step, 0 to 1."""
        ...


@dataclass(frozen=True, slots=True)
class AtStart:
    """Removes everything before the first step, by scores of a few batches: peak memory is never the dense model's."""

    @property
    def steps(self) -> tuple[int, ...]:
        return ()

    def share(self, step: int) -> float:
        return 1.0


@dataclass(frozen=True, slots=True)
class OneShot:
    """Removes everything at one step.

    Examples:
        >>> OneShot(100).share(99), OneShot(100).share(100)
        (0.0, 1.0)
    """

    step: int
    """The step at which the model shrinks."""

    def __post_init__(self) -> None:
        _whole(self, "step", self.step)

    @property
    def steps(self) -> tuple[int, ...]:
        return (self.step,)

    def share(self, step: int) -> float:
        return float(step >= self.step)


@dataclass(frozen=True, slots=True)
class Linear:
    """Removes equal parts of the target at `start`, then every `every` steps, and at `end`.

    Examples:
        >>> Linear(start=10, end=40, every=10).steps
        (10, 20, 30, 40)
        >>> Linear(start=10, end=40, every=10).share(25)
        0.5
    """

    start: int
    """The first step at which the model shrinks."""
    end: int
    """The last one."""
    every: int
    """Steps from one shrink to the next."""

    def __post_init__(self) -> None:
        for name in ("start", "end", "every"):
            _whole(self, name, getattr(self, name))
        if self.end < self.start:
            raise TrainingError(f"{self} ends before it starts: give an end of at least {self.start}")

    @property
    def steps(self) -> tuple[int, ...]:
        return (*range(self.start, self.end, self.every), self.end)

    def share(self, step: int) -> float:
        steps = self.steps
        return sum(s <= step for s in steps) / len(steps)


@dataclass(frozen=True, slots=True)
class Cubic(Linear):
    """Removes large parts first, small ones last: 1 - (1 - t)³ of the target.

    Examples:
        >>> [round(Cubic(start=10, end=40, every=10).share(s), 3) for s in (9, 10, 20, 30, 40)]
        [0.0, 0.578, 0.875, 0.984, 1.0]
    """

    def share(self, step: int) -> float:
        return 1 - (1 - Linear.share(self, step)) ** 3


@dataclass(frozen=True, slots=True)
class Constant:
    """Removes the same part of the target every `every` steps until it is reached.

    Examples:
        >>> Constant(every=50, part=0.4).steps
        (50, 100, 150)
    """

    every: int
    """Steps from one shrink to the next."""
    part: float = 0.1
    """Share of the target that each removes."""
    start: int | None = None
    """The first step at which the model shrinks; None: `every`."""

    def __post_init__(self) -> None:
        _whole(self, "every", self.every)
        _whole(self, "start", self._first)
        if not is_number(self.part) or not 0 < self.part <= 1:
            raise TrainingError(f"{self} takes no part of the target: give a part above 0 and at most 1")

    @property
    def _first(self) -> int:
        return self.every if self.start is None else self.start

    @property
    def steps(self) -> tuple[int, ...]:
        first = self._first
        return tuple(first + i * self.every for i in range(ceil(1 / self.part - 1e-9)))

    def share(self, step: int) -> float:
        return min(1.0, self.part * sum(s <= step for s in self.steps))


def default_schedule(total_steps: int | None, compensated: bool = False) -> Cubic:
    """Eleven shrinks between a quarter and three quarters of the run: late ones cost least quality.

    compensated: whether remaining weights compensate for removed units; then two shrinks, at 35 and 45 %, cost less
    still. Raises TrainingError where the length of the run is not known.
    """
    if total_steps is None:
        raise TrainingError("there is no schedule: give one, like eco.Cubic(start=…, end=…, every=…), or total_steps=")
    first, last, count = (0.35, 0.45, 2) if compensated else (0.25, 0.75, 11)
    start, end = (max(1, int(total_steps * share)) for share in (first, last))
    return Cubic(start, end, max(1, (end - start) // (count - 1)))


def check_schedule(schedule: Schedule, total_steps: int | None, *, own_scores: bool = False) -> None:
    """Raise TrainingError for what is no schedule, and for one that goes on after the last step.

    own_scores: whether scores are the user's own, which training makes worthless.
    """
    if own_scores and not isinstance(schedule, AtStart):
        raise TrainingError(
            "scores= are tensors, which do not follow what training changes: use schedule=eco.AtStart(), or name a "
            "method, such as 'gate-fisher'"
        )
    if not isinstance(getattr(schedule, "steps", None), tuple):
        raise TrainingError(f"schedule={schedule!r} is none: give one with its steps, such as eco.OneShot(100)")
    last = max(schedule.steps, default=0)
    if total_steps is not None and last > total_steps:
        raise TrainingError(
            f"{schedule} shrinks for the last time at step {last} and training ends at step {total_steps}, so the "
            "target would not be reached: let it end earlier"
        )


def _whole(schedule: object, name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise TrainingError(f"{name}={value!r} of {type(schedule).__name__} is no step: give a whole number from 1 up")
