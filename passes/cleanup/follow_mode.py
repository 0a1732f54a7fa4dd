"""Dropout follows the mode of the module again: export freezes it as it was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from ecospa_fx.ir.modes import follow_notes, note_dropout
from ecospa_fx.ir.passes import CallablePass, PassResult


@dataclass(frozen=True, slots=True)
class FollowMode(CallablePass):
    """``train()`` and ``eval()`` of the graph module turn its dropout on and off, attention's own included.

    A graph that was exported in evaluation has lost what its code left out there; export in training to keep it.
    Exact to the bit in the mode of the export.
    """

    name: ClassVar[str] = "follow-mode"

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite the graph in place."""
        note_dropout(graph_module.graph)
        changes = follow_notes(graph_module.graph)
        if changes:
            for method in ("train", "eval"):  # torch.export replaces them with ones that refuse
                graph_module.__dict__.pop(method, None)
        return PassResult(graph_module, changes)
