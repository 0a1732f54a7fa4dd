"""The contract of a pass."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx


@dataclass(frozen=True, slots=True, eq=False)
class PassResult:
    """What a pass returns: the graph module, how many nodes changed, and what was left alone and why."""

    graph_module: fx.GraphModule
    changes: int
    reasons: tuple[str, ...] = ()

    @property
    def modified(self) -> bool:
        """Whether anything changed."""
        return self.changes > 0
