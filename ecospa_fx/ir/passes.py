"""The contract of a graph pass, and the driver that runs passes and checks the graph after each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ecospa_fx.errors import PassError
from ecospa_fx.ir.tracing import one_at_a_time


@dataclass(frozen=True, slots=True, eq=False)
class PassResult:
    """What a pass returns."""

    graph_module: fx.GraphModule
    """The graph module that it was given, rewritten in place."""
    changes: int
    """How many nodes changed; 0 only where the graph is as it was."""
    reasons: tuple[str, ...] = ()
    """What was left alone, and why: one sentence each."""

    @property
    def modified(self) -> bool:
        """Whether anything changed."""
        return self.changes > 0


@runtime_checkable
class Pass(Protocol):
    """A frozen dataclass whose fields are its options."""

    name: ClassVar[str]
    """The name of its file in kebab case, as messages say it."""

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite a graph of ``torch.ops`` calls with example values in ``node.meta["val"]``, in place."""
        ...


class CallablePass:
    """What makes a pass a function too, from a graph module to a result, as torch's ``PassManager`` wants it."""

    __slots__ = ()

    def __call__(self: Pass, graph_module: fx.GraphModule) -> PassResult:
        """Run this pass alone, and check the graph afterwards: see `run_passes`."""
        return run_passes(graph_module, (self,))


def check_passes(passes: object) -> None:
    """Raise PassError for what is no sequence of passes."""
    is_sequence = isinstance(passes, Sequence) and not isinstance(passes, str)
    if not is_sequence or not all(isinstance(p, Pass) and not isinstance(p, type) for p in passes):  # type: ignore[attr-defined]
        raise PassError(f"passes={passes!r:.60} are no passes: give some of ecospa_fx.passes, or () for none")


@one_at_a_time()
def run_passes(graph_module: fx.GraphModule, passes: Sequence[Pass]) -> PassResult:
    """Run passes one after the other, in place, and check the graph after each that changed it.

    Afterwards the graph is well formed, every node has its example value, and the outputs have the shapes and types
    that they had. Raises PassError with the pass, the node and the passes before it where that is not so; what a pass
    itself refuses is raised as it is.
    """
    changes, outputs, bare = 0, _outputs(graph_module.graph), set(_without_values(graph_module.graph))
    reasons: list[str] = []
    for index, current in enumerate(passes):
        earlier = ", ".join(p.name for p in passes[:index])
        described = f"pass {current.name}" + (f" (after {earlier})" if earlier else "")
        try:
            result = current.run(graph_module)
            if result.modified:
                graph_module.graph.lint()
        except RuntimeError as error:
            raise PassError(f"{described} left a graph that is not well formed: {error}") from error
        if result.modified:
            _check(graph_module.graph, outputs, bare, described)
        changes += result.changes
        reasons += result.reasons
    if changes:
        graph_module.recompile()
    return PassResult(graph_module, changes, tuple(reasons))


def _check(graph: fx.Graph, before: list[str], bare: set[fx.Node], described: str) -> None:
    for node in _without_values(graph):
        if node not in bare:
            raise PassError(f"{described} left node {node.name} without an example value")
    after = _outputs(graph)
    if after != before:
        raise PassError(f"{described} changed the outputs from {_listed(before)} to {_listed(after)}")


def _without_values(graph: fx.Graph) -> list[fx.Node]:
    """Calls whose results are read, and have no example."""
    return [n for n in graph.nodes if n.op == "call_function" and n.users and "val" not in n.meta]


def _outputs(graph: fx.Graph) -> list[str]:
    """Shape and type of every output."""
    leaves = pytree.tree_leaves(graph.output_node().args)
    return [_described(leaf.meta.get("val") if isinstance(leaf, fx.Node) else leaf) for leaf in leaves]


def _described(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{value.dtype} [{', '.join(str(size) for size in value.shape)}]"


def _listed(outputs: list[str]) -> str:
    return f"({', '.join(outputs)})"
