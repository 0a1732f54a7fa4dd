"""The contract of a pass, and what runs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ecospa_fx.errors import PassError
from ecospa_fx.ir.tracing import one_at_a_time


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


@runtime_checkable
class Pass(Protocol):
    """A frozen dataclass whose fields are its options."""

    @property
    def name(self) -> str:
        """In kebab case, as people type it."""
        ...

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite a graph of ``torch.ops`` calls with example values in ``node.meta["val"]``, in place."""
        ...


def check_passes(passes: object) -> None:
    """Raise PassError for what is no sequence of passes."""
    several = isinstance(passes, Sequence) and not isinstance(passes, str)
    if not several or not all(isinstance(p, Pass) and not isinstance(p, type) for p in passes):  # type: ignore[attr-defined]
        raise PassError(f"passes={passes!r:.60} are no passes: give some of ecospa_fx.passes, or () for none")


@one_at_a_time()
def run_passes(graph_module: fx.GraphModule, passes: Sequence[Pass]) -> PassResult:
    """Run passes one after the other, in place, and check the graph after each.

    Afterwards the graph is well formed, every node has its example value, and the outputs have the shapes and types
    that they had. Raises PassError with the pass, the node and the passes before it where that is not so.
    """
    changes, before = 0, _outputs(graph_module)
    reasons: list[str] = []
    for at, one in enumerate(passes):
        done = ", ".join(p.name for p in passes[:at])
        told = f"pass {one.name}" + (f" (after {done})" if done else "")
        try:
            result = one.run(graph_module)
            graph_module.graph.lint()
        except RuntimeError as error:
            raise PassError(f"{told} left a graph that is not well formed: {error}") from error
        if result.modified:
            graph_module.recompile()
        _check(graph_module, before, told)
        changes += result.changes
        reasons += result.reasons
    return PassResult(graph_module, changes, tuple(reasons))


def _check(graph_module: fx.GraphModule, before: list[Any], told: str) -> None:
    for node in graph_module.graph.nodes:
        if node.op == "call_function" and node.users and "val" not in node.meta:
            raise PassError(f"{told} left node {node.name} without an example value")
    after = _outputs(graph_module)
    if after != before:
        raise PassError(f"{told} changed the outputs from {before} to {after}")


def _outputs(graph_module: fx.GraphModule) -> list[Any]:
    """Shape and type of every output."""
    output = next(n for n in reversed(graph_module.graph.nodes) if n.op == "output")
    values = [n.meta.get("val") if isinstance(n, fx.Node) else n for n in pytree.tree_leaves(output.args)]
    return [(tuple(str(s) for s in v.shape), v.dtype) if isinstance(v, Tensor) else type(v).__name__ for v in values]
