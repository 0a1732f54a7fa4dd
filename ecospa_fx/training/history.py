"""The history of a training with structured pruning: one record per shrink, as a table and as a plot."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

from ecospa_fx.errors import TrainingError
from ecospa_fx.notebook import html_paragraph, html_table


@dataclass(frozen=True, slots=True)
class Shrink:
    """The model after one shrink."""

    step: int
    """At which it happened."""
    removed: float
    """Share of the couplings' dense parameters that is removed so far."""
    parameters: int
    """Of the whole model."""
    optimizer_bytes: int
    """Memory of the optimizers' states."""
    modules: int
    """Modules whose graph changed, which torch.compile has to compile again."""
    compiled: int
    """Graphs compiled in this process before the shrink."""
    seconds: float
    """Duration of the shrink."""
    widths: Mapping[str, int]
    """Units per carrier of each coupling."""


def table(history: Sequence[Shrink], dense: Mapping[str, tuple[str, int]], now: str) -> str:
    """The history as a table. dense: kind and units of every coupling; now: a last line."""
    head, rows = _rows(history, dense)
    return f"{tabulate(rows, headers=head, disable_numparse=True, stralign='right')}\n{now}"


def table_html(history: Sequence[Shrink], dense: Mapping[str, tuple[str, int]], now: str) -> str:
    """The same table for notebooks."""
    head, rows = _rows(history, dense)
    return html_table(rows, head, ["right"] * len(head), now) if rows else html_paragraph(now)


def _rows(history: Sequence[Shrink], dense: Mapping[str, tuple[str, int]]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table."""
    kinds = list(dict.fromkeys(kind for kind, _ in dense.values()))
    rows = []
    for shrink in history:
        kept = {kind: [shrink.widths[n] / size for n, (k, size) in dense.items() if k == kind] for kind in kinds}
        shares = [f"{sum(v) / len(v):.0%} ({min(v):.0%} to {max(v):.0%})" for v in kept.values()]
        rows.append([
            f"{shrink.step:,}", f"{shrink.removed:.1%}", f"{shrink.parameters:,}",
            f"{shrink.optimizer_bytes / 2**20:,.1f}", str(shrink.modules), str(shrink.compiled),
            f"{shrink.seconds:.2f}", *shares,
        ])  # fmt: skip
    head = ["step", "removed", "parameters", "optimizer MiB", "modules changed", "compiled before", "seconds"]
    return [*head, *(f"{kind} kept" for kind in kinds)], rows


def plot(history: Sequence[Shrink], dense: Mapping[str, tuple[str, int]], last: int, path: str | Path) -> None:
    """Draw the share of units that each coupling keeps over the steps, one panel per kind.

    Raises TrainingError where matplotlib is not installed, and for what is no path.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError as error:
        raise TrainingError('plot() needs matplotlib: pip install "ecospa-fx[report]"') from error
    if not isinstance(path, str | os.PathLike):
        raise TrainingError(f"path={path!r:.60} is no path: give a file, .png, .svg or .pdf")
    kinds = list(dict.fromkeys(kind for kind, _ in dense.values()))
    figure = Figure(figsize=(4 * len(kinds) + 1, 3.5), layout="constrained")
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    steps = [0, *(s.step for s in history), last]
    for panel, kind in zip(panels, kinds, strict=True):
        names = [name for name, (k, _) in dense.items() if k == kind]
        for index, name in enumerate(names):
            kept = [1.0, *(s.widths[name] / dense[name][1] for s in history)]
            colour = colormaps["viridis"](index / max(len(names) - 1, 1))
            panel.step(steps, [*kept, kept[-1]], where="post", color=colour, label=name)
        panel.set(title=kind, xlabel="step", ylim=(0, 1.05))
        if len(names) <= 8:
            panel.legend(fontsize="x-small")
    panels[0].set_ylabel("share of units kept")
    figure.savefig(path)
