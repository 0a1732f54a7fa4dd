"""The text that a model writes for its own compression: windows to measure on, to learn from, and to judge by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ecospa_fx.calibration.causal import CausalModel
from ecospa_fx.calibration.generation import GeneratedText
from ecospa_fx.importance.losses import Batch

JUDGES = 8
"""Windows that nothing is measured on, fitted to or learnt from; they are the first ones."""


@dataclass(frozen=True, slots=True, eq=False)
class SecondText:
    """Windows of a model's own text by what they are for. Each is for one thing only."""

    text: GeneratedText
    """What writes them."""
    judges: Sequence[Batch]
    """Held out."""
    windows: Sequence[Batch]
    """To calibrate on."""
    share: float
    """Of what distillation reads; 1 where there is nothing else."""
    progress: bool = False
    """Whether a bar is shown while more are written."""

    @classmethod
    def written(cls, text: GeneratedText, count: int, share: float, *, progress: bool = False) -> SecondText:
        """The first windows of a text, of which `count` are to calibrate on."""
        windows = text.windows(0, JUDGES + count, progress=progress)
        return cls(text, windows[:JUDGES], windows[JUDGES:], share, progress)

    def unread(self, count: int) -> list[Batch]:
        """So many windows for distillation, each once: those to calibrate on first, and then fresh ones."""
        more, start = count - len(self.windows), len(self.judges) + len(self.windows)
        fresh = self.text.windows(start, start + more, progress=self.progress) if more > 0 else []
        return [*self.windows[:count], *fresh]


@dataclass(frozen=True, slots=True, eq=False)
class NextTokenLoss:
    """Mean cross-entropy in nats of the tokens of a batch after the first ones, where its masks count them."""

    causal: CausalModel
    """Whose logits and ids they are."""

    def __call__(self, output: object, args: Sequence[object], kwargs: Mapping[str, object]) -> Tensor:
        ids, counted = self.causal.call.tokens(args, kwargs)
        logits = self.causal.logits(output)[:, :-1].flatten(0, 1)
        targets = ids[:, 1:].masked_fill(~counted[:, 1:], -100).flatten()
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets.long())
