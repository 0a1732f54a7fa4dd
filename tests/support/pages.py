"""A page of the hand-written model, with everything on it."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import torch

import ecospa_fx as eco
from ecospa_fx.coupling.couplings import Couplings
from ecospa_fx.plan import Plan
from ecospa_fx.report import verb
from ecospa_fx.training.history import Shrink
from tests.support.tiny import tiny, tiny_couplings

RATIOS = (0.1, 0.2, 0.4, 0.6)

FIGURES = {
    "dense": {"parameters": 2920, "perplexity": 11.25, "tokens/s": 420},
    "small": {"parameters": 1700, "perplexity": 12.5},
}


def couplings_and_plan(layers: int = 3) -> tuple[Couplings, Plan]:
    """Of the hand-written model, whose graph is not known."""
    couplings = tiny_couplings(tiny(layers))
    return couplings, eco.plan(couplings, 0.4, "magnitude")


def history(couplings: Couplings) -> list[Shrink]:
    """Of a training that shrank twice."""
    widths = [{c.name: max(1, c.size // n) for c in couplings.offered if not c.contains} for n in (1, 2)]
    return [Shrink(10 * (i + 1), 0.2 * i, 2000, 0, 0, 0, 0.1, w) for i, w in enumerate(widths)]


def written(path: Path, layers: int = 3) -> Path:
    """The page with all that it may hold."""
    couplings, plan = couplings_and_plan(layers)
    scores = {c.name: torch.linspace(1, 2, c.carriers * c.size).view(c.carriers, -1) for c in couplings.offered}
    with mock.patch.object(verb, "PERCENTS", RATIOS):
        return eco.report(
            couplings, plan=plan, scores=scores, history=history(couplings), figures=FIGURES, exactness=2.5e-15,
            path=path,
        )  # fmt: skip
