"""How far a compressed model is from the dense one: on what it was calibrated on, and on what the dense one writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ecospa_fx.distillation.divergence import answer_of, divergence, mean
from ecospa_fx.errors import ScoreError
from ecospa_fx.importance.losses import Batch, Loss, NormalisedLoss, slopes_of
from ecospa_fx.progress import log
from ecospa_fx.runtime.interpreter import PartialInterpreter
from ecospa_fx.wrappers import unwrapped

ATTRIBUTE = "ecospa_distances"


@dataclass(frozen=True, slots=True)
class Distances:
    """Mean divergence of a compressed model's predictions from the dense one's, on two kinds of text.

    In units of the loss: with the next-token loss that is the Kullback-Leibler divergence in nats per token, and the
    perplexity on text that the dense model wrote is about exp of it times the dense one's. Where `on_generated` is much
    the greater, the model has been specialised in what it was calibrated on.
    """

    on_generated: float
    """On windows that the dense model wrote, and that nothing was fitted to."""
    on_batches: float | None
    """On every sixteenth of the user's samples, which nothing was fitted to, or on all where they are fewer; None where
    there are none."""

    def __str__(self) -> str:
        on_batches = "" if self.on_batches is None else f", {self.on_batches:.3f} on the batches"
        return f"{self.on_generated:.3f} on text that the dense model wrote{on_batches}"


def distances(model: nn.Module) -> Distances:
    """How far a model that `compress` or `compress_` returned is from the dense one, on two kinds of text.

    Raises ScoreError for any other model, and where the dense one wrote no text, as where data and loss were passed.

    Example:
        >>> import torch, ecospa_fx as eco
        >>> small = eco.compress(model, ratio=0.2, batches=batches)  # doctest: +SKIP
        >>> print(eco.calibration.distances(small))  # doctest: +SKIP
        0.071 on text that the dense model wrote, 0.052 on the batches
    """
    noted = noted_distances(model)
    if noted is None:
        raise ScoreError(
            f"of {type(model).__name__} no distances are known: compress a causal language model without a loss, or "
            "with generated_share="
        )
    return noted


def noted_distances(model: nn.Module) -> Distances | None:
    """What is known of a model."""
    noted = getattr(unwrapped(model), ATTRIBUTE, None)
    return noted if isinstance(noted, Distances) else None


def note_distances(model: nn.Module, noted: Distances | None) -> None:
    """Let `distances` know of a model, and log it."""
    if noted is not None:
        setattr(model, ATTRIBUTE, noted)
        log.info("divergence from the dense model: %s", noted)


def mean_divergence(
    dense: PartialInterpreter, small: PartialInterpreter, batches: Sequence[Batch], loss: Loss
) -> float | None:
    """Of a smaller program's outputs from the dense one's, in units of the loss; None without batches."""
    unit, weights = NormalisedLoss(loss, exact=True), (dense.weights(), small.weights())
    values = []
    with torch.no_grad():
        for batch in batches:
            answer, output = (answer_of(e, w, batch) for e, w in zip((dense, small), weights, strict=True))
            values.append(divergence(unit, answer, slopes_of(unit, answer, batch), output, batch))
    return mean(values).value / unit.unit if values else None
