"""Modules that are called several times keep their parameters in one place.

Where the calls of one module differ, unflattening makes a module per call, ``layer``, ``layer@1``, …, with parameters
of its own. The later ones read those of the first instead, and are no children of their parents, so that names, states,
optimisers and sharding see each parameter once.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch import fx, nn

_CALL = re.compile(r"@\d+")
FIRST_CALL = "first_call"


@contextmanager
def calls_compared_in_depth() -> Iterator[None]:
    """Inside, unflattening takes two calls of a module for one only where all calls within them are the same too.

    torch compares their own operators alone, and so runs the first call of a module in place of a later one whose
    submodules do something else.
    """
    module: Any = importlib.import_module("torch.export.unflatten")
    equal = module._check_graph_equivalence

    def equivalent(x: nn.Module, y: nn.Module) -> bool:
        if x is y:
            return True
        if not equal(x, y):
            return False
        pairs = zip(_called(x), _called(y), strict=True)
        return all(a is b or (_has_graph(a) and _has_graph(b) and equivalent(a, b)) for a, b in pairs)

    with patch.object(module, "_check_graph_equivalence", equivalent):
        yield


def _called(module: Any) -> list[Any]:
    """The modules that a module's graph calls."""
    return [module.get_submodule(str(node.target)) for node in module.graph.nodes if node.op == "call_module"]


def _has_graph(module: object) -> bool:
    return isinstance(getattr(module, "graph", None), fx.Graph)


def share_repeated(module: nn.Module) -> None:
    """Change an unflattened module in place."""
    named = dict(module.named_modules(remove_duplicate=False))
    for path, repeated in named.items():
        first = named[_CALL.sub("", path)]
        if first is not repeated and FIRST_CALL not in repeated.__dict__:
            _read_from(repeated, first)
    for path, repeated in named.items():
        parent, _, name = path.rpartition(".")
        if _CALL.search(name):
            named[parent].__dict__[name] = repeated
            named[parent]._modules.pop(name, None)


def _read_from(repeated: nn.Module, first: nn.Module) -> None:
    """Let the graph of `repeated` read parameters and buffers from `first`."""
    graph = getattr(repeated, "graph", None)
    if isinstance(graph, fx.Graph):
        for node in _reads(repeated, graph):
            node.target = f"{FIRST_CALL}.{_CALL.sub('', str(node.target))}"
    # into __dict__, past nn.Module.__setattr__, which would register it as a child
    repeated.__dict__[FIRST_CALL] = first
    repeated._parameters.clear()
    repeated._buffers.clear()
    if isinstance(graph, fx.Graph) and "graph_module" in repeated.__dict__:
        repeated.__dict__["graph_module"] = fx.GraphModule(repeated, graph)


def _reads(module: nn.Module, graph: fx.Graph) -> Iterator[fx.Node]:
    """Nodes that read a parameter or a buffer, here or in a module below."""
    names = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    names |= {name for name, _ in module.named_buffers(remove_duplicate=False)}
    for node in graph.nodes:
        if node.op == "get_attr" and str(node.target) in names:
            yield node
