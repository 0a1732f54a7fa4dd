"""Every error that the library raises on purpose. Each message is one sentence: what, where, what to do."""

from __future__ import annotations


class EcospaError(Exception):
    """Base class: catch this to catch everything that the library refuses."""


class CaptureError(EcospaError):
    """The module could not be traced into a graph."""


class InputError(EcospaError, ValueError):
    """Arguments that a smaller model does not take."""


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
