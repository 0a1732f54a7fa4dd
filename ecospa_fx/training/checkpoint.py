"""Checkpoints of sparse training: kept units, scores and history as numbers, text and tensors, without pickled code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ecospa_fx.errors import TrainingError
from ecospa_fx.strict_json import from_plain, to_plain
from ecospa_fx.training.history import Shrink

FORMAT = "ecospa-fx-sparse-training"
VERSION = 1

DenseShapes = Mapping[str, tuple[int, ...]]
State = tuple[int, bool, dict[str, Tensor], dict[str, Tensor], list[Shrink]]
"""Step, whether a shrink waits, kept units and scores per coupling, history."""


def pack_state(
    progress: tuple[int, bool],
    shapes: DenseShapes,
    keep: Mapping[str, Tensor],
    scores: Mapping[str, Tensor],
    history: Sequence[Shrink],
) -> dict[str, object]:
    """The state as a dictionary for ``torch.save``. shapes: of the dense parameters."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "step": progress[0],
        "pending": progress[1],
        "shapes": {name: list(shape) for name, shape in shapes.items()},
        "keep": {name: kept.clone() for name, kept in keep.items()},
        "scores": {name: value.to("cpu", copy=True) for name, value in scores.items()},
        "history": [to_plain(shrink) for shrink in history],
    }


def unpack_state(state: Mapping[str, Any], shapes: DenseShapes, keep: Mapping[str, Tensor]) -> State:
    """Read what `pack_state` made, for a model of these dense shapes that still has the units of `keep`.

    Raises TrainingError for anything else.
    """
    valid = isinstance(state, Mapping) and (state.get("format"), state.get("version")) == (FORMAT, VERSION)
    if not valid:
        raise TrainingError(
            f"this is no state of sparse training, format version {VERSION}: pass what SparseTraining.state_dict() gave"
        )
    if {name: tuple(shape) for name, shape in state["shapes"].items()} != dict(shapes):
        raise TrainingError("the state belongs to a model with other parameters: build the dense model it began with")
    kept: dict[str, Tensor] = state["keep"]
    if {n: k.shape for n, k in kept.items()} != {n: k.shape for n, k in keep.items()}:
        raise TrainingError("the state belongs to training with other couplings: use the options it began with")
    for name, units in kept.items():
        if units.dtype is not torch.bool or len(set(units.sum(1).tolist())) != 1 or not units.any():
            raise TrainingError(f"the state keeps no regular set of units of coupling {name!r}: it is damaged")
        if (units & ~keep[name]).any():
            raise TrainingError(
                f"the state has units of coupling {name!r} that this model has already lost: "
                "load it into a model that was just built; where the schedule shrinks at the start, give it as state="
            )
    history = [from_plain(Shrink, record) for record in state["history"]]
    return state["step"], state["pending"], kept, dict(state["scores"]), history
