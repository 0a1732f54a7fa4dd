"""Least-squares reconstruction at a shrink: weights that lost inputs are fitted anew on batches, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ecospa_fx.errors import TrainingError
from ecospa_fx.importance.score import Batch, arguments
from ecospa_fx.passes.lossy.reconstruct import Reconstruct
from ecospa_fx.plan import Plan
from ecospa_fx.runtime.interpreter import PartialInterpreter
from ecospa_fx.training.distributed import add_up, of_first

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Evaluate = Callable[[Plan, Mapping[str, Tensor]], PartialInterpreter]
"""What computes the model with a plan applied, on given values of its parameters."""


def calibration_batches(batches: Iterable[object] | None) -> list[Batch]:
    """Calibration data as a list."""
    return [arguments(batch, number) for number, batch in enumerate(batches or ())]


class Compensation:
    """Least squares on batches, in eval mode: see `ecospa_fx.passes.lossy.Reconstruct`.

    batches: what to fit on, in each process of `group` its own part. Raises TrainingError where there are none.
    """

    def __init__(self, batches: Sequence[Batch], group: ProcessGroup | None = None) -> None:
        self.batches, self.group = batches, group
        if not batches:
            raise TrainingError("compensate=True needs data: give batches=, as eco.score takes them")

    def changes(
        self, evaluate: Evaluate, before: tuple[Plan, Mapping[str, Tensor]], after: tuple[Plan, Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """What to add to parameters, by name, so that the model after a shrink does what it did before."""

        with torch.inference_mode(False):
            small = evaluate(*after)
            old = dict(small.program.values)
            Reconstruct().run(evaluate(*before), small, self.batches, total=partial(add_up, group=self.group))
            fitted = {name: value for name, value in small.program.values.items() if value is not old[name]}
            return {name: of_first((value - old[name]).detach(), self.group) for name, value in fitted.items()}
