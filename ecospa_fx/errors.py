"""Every error that the library raises on purpose. Each message is one sentence: what, where, what to do."""

from __future__ import annotations

import sys
import warnings


class EcospaError(Exception):
    """Base class: catch this to catch everything that the library refuses."""


class CaptureError(EcospaError):
    """The module could not be traced into a graph."""


class InputError(EcospaError, ValueError):
    """Arguments that a verb or a smaller model does not take."""


class OptionError(EcospaError, TypeError):
    """An option that a verb does not have."""


class PlanError(EcospaError):
    """A plan that cannot be made, read, or applied to this model."""


class ScoreError(EcospaError):
    """Importance scores that cannot be computed: no data, NaN, a loss without gradients."""


class TrainingError(EcospaError):
    """Sparse training that cannot begin or go on: an optimizer, schedule or checkpoint that does not fit."""


class StorageError(EcospaError):
    """A file or folder that cannot be written or does not hold what it should."""


class PassError(EcospaError):
    """A pass left a graph that it should not have left."""


def warn_caller(message: str) -> None:
    """Warn once, at the line outside of this library, and of torch on the way to it, that called it."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in {__package__, "torch"}:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


class TorchFailure(Exception):
    """What torch raised, as the cause of an error of ours, in one line.

    original: torch's own exception, with all that it says and where: ``error.__cause__.original``.
    """

    def __init__(self, original: Exception) -> None:
        first = next((line.strip() for line in str(original).splitlines() if line.strip()), "")
        super().__init__(f"{type(original).__name__}: {first}" if first else type(original).__name__)
        self.original = original
