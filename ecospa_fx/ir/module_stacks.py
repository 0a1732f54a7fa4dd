"""Which call of which module every node belongs to, in the form that lets a graph be cut into modules again.

The exporter notes on every node the modules from the root down, as {key: (path, class)}; the key of a module's second
call ends in "@1". Cutting works where the calls nest like brackets: the nodes of one call follow one another.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

KEY = "nn_module_stack"
Stack = dict[str, tuple[str, object]]
"""By key the path and the class of every module that a node lies in, from the root down."""


def arrange_stacks(graph: fx.Graph, paths: set[str]) -> None:
    """Make the modules of all nodes complete, their calls nested, and the calls that are left numbered from 0.

    paths: paths of the modules that exist.
    """
    _complete(graph, paths)
    _nest([node for node in graph.nodes if node.meta.get(KEY)])
    _renumber(graph)


def stack_between(before: fx.Node | None, after: fx.Node | None, wanted: Stack) -> Stack:
    """The modules of a node that is put between two others: those wanted, or where these would be entered anew, the
    modules that both others lie in."""
    sides = [[] if node is None else list(node.meta.get(KEY) or {}) for node in (before, after)]
    keys = list(wanted)
    if any(side[: len(keys)] == keys for side in sides):
        return dict(wanted)
    return _part(before.meta.get(KEY) or {} if before is not None else {}, _shared(*sides))


def _shared(a: Sequence[str], b: Sequence[str]) -> int:
    """How many entries two lists begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _part(stack: Stack, count: int) -> Stack:
    return dict(list(stack.items())[:count])


def _complete(graph: fx.Graph, paths: set[str]) -> None:
    """Give every node the modules from the root down; traced graph modules come without the outer ones.

    Sizes of the inputs come with a module that does not exist; they are the root's.
    """
    for node in graph.nodes:
        stack = node.meta.get(KEY)
        if not stack or next(iter(stack.values()))[0] == "":
            continue
        path, kind = next(reversed(stack.values()))
        if path.partition("@")[0] not in paths:
            path, kind = "", "torch.nn.modules.module.Module"
        parts = path.split(".")
        outer = {
            p: (p, "torch.nn.modules.module.Module") for p in ("", *(".".join(parts[:i]) for i in range(1, len(parts))))
        }
        node.meta[KEY] = {**outer, path: (path, kind)}


def _nest(nodes: Sequence[fx.Node]) -> None:
    """A node of a call that has ended belongs to the modules that both its neighbours lie in."""
    current: Stack = {}
    ended: set[str] = set()
    for node, after in zip(nodes, [*nodes[1:], None], strict=True):
        if not ended.isdisjoint(node.meta[KEY]):
            shared = _shared(list(current), list(after.meta[KEY]) if after is not None else [])
            node.meta[KEY] = _part(current, max(1, shared))
        ended.update(list(current)[_shared(list(current), list(node.meta[KEY])) :])
        current = node.meta[KEY]


def _renumber(graph: fx.Graph) -> None:
    """Number the calls of every module that have nodes left: a call whose result nothing reads has none."""
    calls: dict[str, dict[str, str]] = {}
    for node in graph.nodes:
        for key in node.meta.get(KEY) or ():
            name = key.partition("@")[0]
            numbered = calls.setdefault(name, {})
            numbered.setdefault(key, f"{name}@{len(numbered)}" if numbered else name)
    for node in graph.nodes:
        if stack := node.meta.get(KEY):
            node.meta[KEY] = {calls[key.partition("@")[0]][key]: entry for key, entry in stack.items()}
