"""A program under construction: every step is run as it is added, so that shapes are known and nonsense is rejected."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.fuzz.program import Planted, Program, Step, evaluate
from tests.support.fuzz.source import Source, chance, choose

BATCHES = (2, 3)
"""Batch sizes that every step is tried at; the first is the example's."""
LARGEST, DEEPEST = 3000, 6
"""Elements and axes of a value at most."""


class Rejected(Exception):
    """This step does not run, or its result is of no use."""


@dataclass(frozen=True, slots=True)
class Size:
    """`number`, times the batch size where `batch` is set."""

    number: int
    batch: bool = False

    @property
    def text(self) -> str:
        """As code."""
        if not self.batch:
            return str(self.number)
        return "B" if self.number == 1 else f"{self.number} * B"

    def times(self, other: Size) -> Size:
        """The size of two axes merged. Raises Rejected for a batch squared."""
        if self.batch and other.batch:
            raise Rejected("batch squared")
        return Size(self.number * other.number, self.batch or other.batch)


@dataclass(frozen=True, slots=True)
class Ref:
    """A value of the program."""

    number: int
    shape: tuple[Size, ...]

    @property
    def rank(self) -> int:
        """How many axes."""
        return len(self.shape)

    def plain(self, at_least: int = 2) -> list[int]:
        """Axes of a fixed size of at least so much."""
        return [i for i, size in enumerate(self.shape) if not size.batch and size.number >= at_least]


class Builder:
    """Adds steps, attributes and planted couplings; `finish` gives the program."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.inputs: list[str] = []
        self.attributes: dict[str, str] = {}
        self.steps: list[Step] = []
        self.planted: list[Planted] = []
        self.count = 0
        self.pool: list[Ref] = []
        """Values that later steps may read."""
        self.private: set[str] = set()
        """Attributes of planted couplings, which no other step may use."""
        self.hidden = False
        """Whether steps belong to a planted coupling now."""
        self._module = nn.Module()
        self._environments: list[dict[str, Any]] = [{"B": batch, "self": self._module} for batch in BATCHES]

    # -- adding ------------------------------------------------------------------------------------------------

    def input(self, code: str) -> Ref:
        """A model input."""
        self.inputs.append(code)
        whole = evaluate(code, self._environments[-1])
        return self._keep([whole[: environment["B"]] for environment in self._environments])

    def check_unmixed(self, ref: Ref) -> None:
        """Raise Rejected where the first samples of a value depend on how many follow."""
        small, large = (environment[f"v{ref.number}"] for environment in self._environments)
        if not torch.allclose(small, large[: len(small)]):
            raise Rejected("samples are mixed")

    def attribute(self, code: str) -> str:
        """A parameter, a buffer (code beginning with ``buffer:``) or a submodule; its name."""
        name = f"{'b' if code.startswith('buffer:') else 'p' if code.startswith('nn.Parameter') else 'm'}"
        name += str(len(self.attributes))
        held = evaluate(code.removeprefix("buffer:"), {})
        if isinstance(held, nn.Module):
            held = held.double().eval()
        elif held.is_floating_point():
            held = nn.Parameter(held.double()) if isinstance(held, nn.Parameter) else held.double()
        setattr(self._module, name, held)
        self.attributes[name] = code
        return name

    def parameter(self, *shape: int) -> str:
        """A parameter of a shape, not too large; ``self.…`` as code."""
        numbers = ", ".join(map(str, shape))
        return f"self.{self.attribute(f'nn.Parameter(torch.randn({numbers}) / 2)')}"

    def buffer(self, *shape: int) -> str:
        """A stored tensor of a shape; ``self.…`` as code."""
        numbers = ", ".join(map(str, shape))
        return f"self.{self.attribute(f'buffer:torch.randn({numbers})')}"

    def add(self, operator: str, code: str, *inputs: Ref) -> Ref:
        """A step with one tensor as its result. Raises Rejected, and leaves nothing behind."""
        step = Step(operator, code, tuple(ref.number for ref in inputs), self.hidden)
        with torch.no_grad():
            made = [self._run(step, environment) for environment in self._environments]
        ref = self._keep(made)
        self.steps.append(step)
        return ref

    def _run(self, step: Step, environment: dict[str, Any]) -> Any:
        try:
            return evaluate(step.text, environment)
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            raise Rejected(str(error)) from error

    def _keep(self, made: list[Any]) -> Ref:
        if not all(isinstance(t, Tensor) for t in made):
            raise Rejected("not a tensor")
        shapes = [tuple(t.shape) for t in made]
        if len({len(shape) for shape in shapes}) > 1 or len(shapes[0]) > DEEPEST:
            raise Rejected("rank")
        ref = Ref(self.count, tuple(_size(*pair) for pair in zip(*shapes, strict=True)))
        if any(not 0 < t.numel() <= LARGEST for t in made):
            raise Rejected("size")
        numbers = made[0].abs() if made[0].is_floating_point() else torch.ones(1)
        if not torch.isfinite(numbers).all() or numbers.max() > 1e4 or numbers.max() < 1e-4:
            raise Rejected("numbers")
        for environment, tensor in zip(self._environments, made, strict=True):
            environment[f"v{ref.number}"] = tensor
        self.count += 1
        self.pool.append(ref)
        return ref

    # -- trying ------------------------------------------------------------------------------------------------

    def attempt(self, recipe: Callable[[], Ref]) -> Ref | None:
        """What a recipe makes; None where some step of it was rejected (steps before it stay, unread)."""
        try:
            return recipe()
        except Rejected:
            return None

    def choose(self, options: Any) -> Any:
        """One of several. Raises Rejected where there is none."""
        if not options:
            raise Rejected("no option")
        return choose(self.source, options)

    def chance(self, percent: int) -> bool:
        """True so often."""
        return chance(self.source, percent)

    def integer(self, low: int, high: int) -> int:
        """A number from low to high, both included."""
        if low > high:
            raise Rejected("no number")
        return self.source.integer(low, high)

    def finish(self, outputs: tuple[Ref, ...], form: str, seed: int) -> Program:
        """The program, without steps that nothing reads."""
        numbers = tuple(ref.number for ref in outputs)
        program = Program(
            tuple(self.inputs), self.attributes, tuple(self.steps), numbers, form, tuple(self.planted), seed
        )
        return program.without_dead_steps()


def _size(small: int, large: int) -> Size:
    if small == large:
        return Size(small)
    if small % BATCHES[0] or small // BATCHES[0] * BATCHES[1] != large:
        raise Rejected("a size that is no multiple of the batch")
    return Size(small // BATCHES[0], True)


def sizes(shape: tuple[Size, ...]) -> str:
    """A shape as arguments in code."""
    return ", ".join(size.text for size in shape)
