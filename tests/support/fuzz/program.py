"""Random programs as data: steps in single-assignment form, their Python source, and the module that it makes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

PRELUDE = "import torch\nimport torch.nn.functional as F\nfrom torch import nn\n"
Element = tuple[str, int, int, int, int]
"""Parameter, axis, position; then the carrier's axis and the slice of it that the position lies in, or -1 and -1."""
Unit = frozenset[Element]
"""Elements that go together."""


@dataclass(frozen=True, slots=True)
class Step:
    """One assignment.

    operator: what it is counted as; code: a Python expression in which ``{0}``, ``{1}``, … stand for the inputs and
    ``self.…`` for attributes of the module; inputs: numbers of earlier values.
    """

    operator: str
    code: str
    inputs: tuple[int, ...] = ()
    planted: bool = False
    """Whether it belongs to a planted coupling, which it would no longer be without it."""

    @property
    def text(self) -> str:
        """The expression over variable names."""
        return self.code.format(*(f"v{i}" for i in self.inputs))


@dataclass(frozen=True, slots=True)
class Planted:
    """A coupling whose elements are known: every unit must be offered as this very set.

    coarse: it may be offered as unions of these units, because on the way its dims lie in a rectangle whose rows are
    also taken apart, before or after: what the rows keep can differ no longer.
    """

    kind: str
    units: frozenset[Unit]
    coarse: bool = False

    @property
    def owners(self) -> set[str]:
        """Attributes that hold its elements."""
        return {element[0].partition(".")[0] for unit in self.units for element in unit}


@dataclass(frozen=True)
class Program:
    """A module that nobody wrote.

    inputs: code of the example inputs at batch size B, values v0, v1, …; attributes: code of the module's parameters,
    buffers and submodules by name; steps: values that follow the inputs; outputs: which values are returned, as one
    tensor, a tuple or a dict; planted: couplings that must be found; seed: of the weights.
    """

    inputs: tuple[str, ...]
    attributes: Mapping[str, str]
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]
    form: str = "tensor"
    planted: tuple[Planted, ...] = ()
    seed: int = 0

    # -- as Python ---------------------------------------------------------------------------------------------

    @cached_property
    def source(self) -> str:
        """A class ``Model`` and a function ``example(B)``, complete and readable."""
        lines = [PRELUDE, "", "class Model(nn.Module):", "    def __init__(self):", "        super().__init__()"]
        for name, code in self.attributes.items():
            buffer = code.startswith("buffer:")
            made = f"register_buffer({name!r}, {code[7:]})" if buffer else f"{name} = {code}"
            lines.append(f"        self.{made}")
        names = ", ".join(f"v{i}" for i in range(len(self.inputs)))
        lines += ["", f"    def forward(self, {names}):", "        B = v0.shape[0]"]
        for number, step in enumerate(self.steps, len(self.inputs)):
            lines.append(f"        v{number} = {step.text}")
        lines += [f"        return {self._returned()}", "", "", "def example(B):"]
        lines.append(f"    return ({', '.join(self.inputs)},)")
        return "\n".join(lines) + "\n"

    def _returned(self) -> str:
        names = [f"v{i}" for i in self.outputs]
        if self.form == "dict":
            return "{" + ", ".join(f'"{n}": {n}' for n in names) + "}"
        return names[0] if self.form == "tensor" else f"({', '.join(names)},)"

    @property
    def reproducer(self) -> str:
        """The source with the lines that show what goes wrong."""
        return f"{self.source}\n\ntorch.manual_seed({self.seed})\nmodel, args = Model().double().eval(), example(2)\n"

    # -- as a module -------------------------------------------------------------------------------------------

    def build(self) -> nn.Module:
        """The module in float64, with the weights of its seed."""
        torch.manual_seed(self.seed)
        model: nn.Module = self._names["Model"]().double().eval()
        return model

    def example(self, batch: int) -> tuple[Tensor, ...]:
        """Inputs at a batch size, always the same."""
        torch.manual_seed(self.seed + 1)
        made: tuple[Tensor, ...] = self._names["example"](batch)
        return made

    @cached_property
    def _names(self) -> dict[str, Any]:
        names: dict[str, Any] = {"__name__": "random_program"}
        exec(compile(self.source, "<random program>", "exec"), names)
        return names

    # -- smaller ones ------------------------------------------------------------------------------------------

    def without_dead_steps(self) -> Program:
        """Only what the outputs need; numbers of values close up."""
        used, count = set(self.outputs), len(self.inputs)
        for number in range(count + len(self.steps) - 1, count - 1, -1):
            if number in used:
                used.update(self.steps[number - count].inputs)
        numbers = {i: i for i in range(count)}
        steps: list[Step] = []
        for number, step in enumerate(self.steps, count):
            if number in used:
                numbers[number] = count + len(steps)
                steps.append(replace(step, inputs=tuple(numbers[i] for i in step.inputs)))
        text = " ".join(step.code for step in steps)
        attributes = {n: code for n, code in self.attributes.items() if _mentions(text, n)}
        outputs = tuple(numbers[i] for i in self.outputs)
        planted = tuple(p for p in self.planted if p.owners <= set(attributes))
        return replace(self, steps=tuple(steps), attributes=attributes, outputs=outputs, planted=planted)

    def simplifications(self) -> Iterator[Program]:
        """Programs with one output or one step less; not all of them run."""
        for i in range(len(self.outputs)) if len(self.outputs) > 1 else ():
            yield replace(self, outputs=self.outputs[:i] + self.outputs[i + 1 :]).without_dead_steps()
        count = len(self.inputs)
        for number in range(count + len(self.steps) - 1, count - 1, -1):
            step = self.steps[number - count]
            for other in () if step.planted else step.inputs:
                yield self._skipping(number, other).without_dead_steps()

    def _skipping(self, number: int, other: int) -> Program:
        """Value `other` wherever `number` was read."""
        steps = (replace(s, inputs=tuple(other if i == number else i for i in s.inputs)) for s in self.steps)
        return replace(self, steps=tuple(steps), outputs=tuple(other if i == number else i for i in self.outputs))


def _mentions(text: str, attribute: str) -> bool:
    return any(f"self.{attribute}{end}" in text + " " for end in ".()[] ,")


GLOBALS: dict[str, Any] = {"torch": torch, "F": functional, "nn": nn}
"""What the code of a step may name."""


def evaluate(code: str, names: Mapping[str, Any]) -> Any:
    """The value of an expression."""
    return eval(code, GLOBALS, dict(names))


def planted_units(planted: Sequence[Planted]) -> frozenset[Unit]:
    """All units of several planted couplings."""
    return frozenset(unit for one in planted for unit in one.units)
