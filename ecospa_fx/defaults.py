"""What `compress` is not given and what follows from the model: example inputs, calibration data and the loss.

Of a causal language model of token ids all three do. Whatever else a model is, what was not given stays so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ecospa_fx.calibration.causal import CausalModel, causal_model
from ecospa_fx.calibration.generation import LENGTH, GeneratedText
from ecospa_fx.calibration.second_text import NextTokenLoss, SecondText
from ecospa_fx.calibration.token_call import NotCausalError
from ecospa_fx.errors import ScoreError
from ecospa_fx.importance.losses import Batch, Loss
from ecospa_fx.importance.score import arguments
from ecospa_fx.runtime.guards import leaves_untouched

NO_BATCHES: tuple[Batch, ...] = ()
"""What `batches` is where it was not given, by identity."""

SHARE = 0.5
"""Of the calibration samples that a causal language model writes where there are others, by default."""

EXAMPLE = 2, 16
"""Sequences and tokens of example inputs."""


@dataclass(frozen=True, slots=True, eq=False)
class CalibrationData:
    """What a model is called with, and what it is measured on."""

    args: Sequence[object]
    """Example inputs by position."""
    kwargs: Mapping[str, object]
    """Example inputs by name."""
    batches: Iterable[Batch]
    """The user's."""
    loss: Loss | None
    """The user's, or that of the next token."""
    causal: CausalModel | None = None
    """The model, where it writes text of its own."""
    share: float = 0.0
    """Of all samples that it writes; 1 where the user has none."""

    @property
    def writes(self) -> bool:
        """Whether there is to be text of the model's own."""
        return self.share > 0

    def text(self, windows: int, seed: int, *, progress: bool) -> SecondText | None:
        """The model's own text, which is written now: slow. None where none is wanted.

        windows: how many to calibrate on where there is nothing else.
        """
        if self.causal is None or not self.writes:
            return None
        ids = [self.causal.call.tokens(*batch)[0] for batch in self.batches]
        rows = sum(each.shape[0] for each in ids)
        length = min(LENGTH, max((each.shape[1] for each in ids), default=LENGTH))
        count = windows if self.share == 1 else max(1, round(rows * self.share / (1 - self.share)))
        text = GeneratedText(self.causal.model, *_example(self.causal), max(2, length), seed)
        return SecondText.written(text, count, self.share, progress=progress)


@leaves_untouched(calls=True)
def calibration_data(
    model: nn.Module,
    args: Sequence[object],
    kwargs: Mapping[str, object] | None,
    batches: Iterable[Batch],
    loss: Loss | None,
    share: float | None = None,
    *,
    measures: bool = True,
) -> CalibrationData:
    """What was given, and where something was not, what follows from a causal language model.

    share: of the calibration samples that the model writes; None for 1 where there are no batches, `SHARE` where there
    is no loss, and otherwise 0. measures: whether data is needed at all. Raises ScoreError where a share is wanted and
    the model is none that writes.
    """
    kwargs = kwargs or {}
    absent = batches is NO_BATCHES
    lacking = measures and (absent or loss is None)
    if not lacking and (args or kwargs) and not share:
        return CalibrationData(args, kwargs, batches, loss)
    batches = NO_BATCHES if absent else [arguments(batch, number) for number, batch in enumerate(batches)]
    first = batches[0] if batches else (args, kwargs)
    try:
        causal = causal_model(model, *first)
    except NotCausalError as reason:
        if share:
            raise ScoreError(
                f"generated_share={share} needs a model that writes text, and {type(model).__name__} does not because "
                f"{reason}: leave it out"
            ) from reason
        return CalibrationData(args, kwargs, batches, loss)
    if not (args or kwargs):
        args, kwargs = _example(causal)
    if not measures:
        return CalibrationData(args, kwargs, batches, loss)
    if share is None:
        share = 1.0 if absent else SHARE if loss is None else 0.0
    elif absent and share:
        share = 1.0
    return CalibrationData(args, kwargs, batches, NextTokenLoss(causal) if loss is None else loss, causal, share)


def _example(causal: CausalModel) -> Batch:
    """Example inputs, of different tokens as far as there are."""
    rows, positions = EXAMPLE
    positions = causal.length(positions)
    with torch.inference_mode(False):  # as of text
        numbers = torch.arange(rows * positions).view(rows, positions) % len(causal.valid)
        return causal.call.batch(causal.valid[numbers.to(causal.valid.device)])
