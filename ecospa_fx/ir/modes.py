"""Literals that differ between training and evaluation follow the mode of the module.

Export writes the mode into the graph: a dropout that was off stays off. Two exports, one in each mode, show which
literals depend on it, whatever the operators are.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ecospa_fx.ir.schema import Args, Kwargs, Size, input_node, is_operator, named_arguments, with_arguments

KEY = "by_mode"
"""Where a node keeps {argument: (in training, in evaluation)} in its meta data."""

_DROPOUT = tuple(
    getattr(torch.ops.aten, name).default
    for name in ("dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout")
)

_LAYOUT = (torch.ops.aten.contiguous.default, torch.ops.aten.clone.default, torch.ops.aten.alias.default)
"""Operators that change no number: which of them are in a graph depends on the kernels of the example."""


@dataclass(frozen=True, slots=True)
class Aligned:
    """Two graphs of one model that differ in literals only."""

    pairs: tuple[tuple[fx.Node, fx.Node | None], ...]
    """The nodes of both that correspond; a dropout that evaluation left out has None."""

    @property
    def complete(self) -> bool:
        """Whether every node has its counterpart."""
        return all(other is not None for _, other in self.pairs)

    def note(self, training: bool) -> None:
        """Note on the nodes of one of the graphs what differs."""
        for node, other in self.pairs:
            differing = _literals(node, other)
            target = node if training else other
            if differing and target is not None:
                target.meta[KEY] = differing


class ModesDiffer(Exception):
    """The graphs of the two modes differ in more than literals; the message names the first node that does."""


def align(training: fx.Graph, evaluation: fx.Graph, numbers: bool = False) -> Aligned:
    """Match the graphs of the two modes node by node. Raises ModesDiffer where they differ in more than literals.

    numbers: one graph has the example's sizes where the other has symbols. Then a whole number that differs is a
    reason, too, because it may come from either.
    """
    matched: dict[fx.Node, fx.Node] = {}
    """Nodes of both graphs by the node of `evaluation` that has their value."""
    pairs: list[tuple[fx.Node, fx.Node | None]] = []
    mine, its = list(training.nodes), list(evaluation.nodes)
    while mine or its:
        node, other = mine[0] if mine else None, its[0] if its else None
        if numbers and node is not None and _is_size(node):
            mine.pop(0)
        elif numbers and other is not None and _is_size(other):
            its.pop(0)
        elif numbers and node is not None and _shows_whole(node, matched):
            matched[node] = matched[input_node(mine.pop(0))]
        elif numbers and other is not None and _shows_whole(other, matched):
            matched[other] = matched[input_node(its.pop(0))]
        elif node is not None and other is not None and _corresponds(node, other, matched, numbers):
            matched[node] = matched[other] = other
            pairs.append((mine.pop(0), its.pop(0)))
        elif node is not None and _passes(node, matched, _LAYOUT):
            matched[node] = matched[input_node(mine.pop(0))]
        elif other is not None and _passes(other, matched, _LAYOUT):
            matched[other] = matched[input_node(its.pop(0))]
        elif node is not None and _passes(node, matched, _DROPOUT):
            matched[node] = matched[input_node(node)]
            pairs.append((mine.pop(0), None))
        else:
            raise ModesDiffer(
                f"node {node or other} of {'training' if node else 'evaluation'} has no counterpart in the other mode"
            )
    return Aligned(tuple(pairs))


def _passes(node: fx.Node, matched: dict[fx.Node, fx.Node], operators: Sequence[object]) -> bool:
    return node.op == "call_function" and node.target in operators and node.args[0] in matched


def _is_size(node: fx.Node) -> bool:
    """Whether a node computes a size, or only checks one."""
    if node.op != "call_function":
        return False
    value = node.meta.get("val")
    return isinstance(value, torch.SymInt | torch.SymBool | torch.SymFloat) or (value is None and not node.users)


def _shows_whole(node: fx.Node, matched: dict[fx.Node, fx.Node]) -> bool:
    """Whether a node is a slice of all that there is, for the example's sizes; with numbers torch leaves it out."""
    if not _passes(node, matched, (torch.ops.aten.slice.Tensor,)):
        return False
    shapes = [[_hint(size) for size in n.meta["val"].shape] for n in (node, input_node(node))]
    return None not in shapes[0] and shapes[0] == shapes[1]


def _hint(size: Size) -> int | None:
    """The number of a size in the example; None for one that depends on data."""
    if isinstance(size, torch.SymInt):
        return size.node.hint if size.node.has_hint() else None
    return int(size)


def _corresponds(node: fx.Node, other: fx.Node, matched: dict[fx.Node, fx.Node], numbers: bool) -> bool:
    if (node.op, node.op != "placeholder" and node.target) != (other.op, other.op != "placeholder" and other.target):
        return False
    mine, structure = pytree.tree_flatten(_arguments(node))
    its, its_structure = pytree.tree_flatten(_arguments(other))
    if structure != its_structure:
        return False
    matches = _matches_in_numbers if numbers else _matches
    return all(matches(a, b, matched) for a, b in zip(mine, its, strict=True))


def _matches_in_numbers(a: object, b: object, matched: dict[fx.Node, fx.Node]) -> bool:
    a, b = _example(a), _example(b)
    return _matches(a, b, matched) and (not isinstance(a, int) or isinstance(a, bool) or a == b)


def _example(value: object) -> object:
    """The number of a size in the example; anything else as it is."""
    size = value.meta.get("val") if isinstance(value, fx.Node) else value
    number = _hint(size) if isinstance(size, torch.SymInt) else None
    return value if number is None else number


def _matches(a: object, b: object, matched: dict[fx.Node, fx.Node]) -> bool:
    if isinstance(a, fx.Node) or isinstance(b, fx.Node):
        return isinstance(a, fx.Node) and isinstance(b, fx.Node) and matched.get(a) is matched.get(b) is not None
    return type(a) is type(b) and (_numeric(a) or bool(a == b))


def _numeric(value: object) -> bool:
    return isinstance(value, bool | int | float)


def _arguments(node: fx.Node) -> Kwargs:
    if not is_operator(node):
        return {"args": node.args, "kwargs": dict(node.kwargs)}
    return named_arguments(node, defaults=True)


def _literals(node: fx.Node, other: fx.Node | None) -> dict[str, tuple[float, float]]:
    """Literal arguments that differ; a dropout that is missing is one that is off."""
    mine = _arguments(node)
    its = {**mine, "train": False} if other is None else _arguments(other)
    return {n: (v, its[n]) for n, v in mine.items() if _numeric(v) and _numeric(its[n]) and v != its[n]}


def evaluation_arguments(node: fx.Node) -> tuple[Args, Kwargs]:
    """The arguments of a call as they are in evaluation mode."""
    noted = node.meta.get(KEY)
    if not noted:
        return node.args, dict(node.kwargs)
    return with_arguments(node, {name: evaluation for name, (_, evaluation) in noted.items()})


# -- from notes to code ------------------------------------------------------------------------------------------


def drops_nothing(node: fx.Node) -> bool:
    """Whether a node is dropout with a probability of zero in either mode, which returns its input."""
    return node.target in _DROPOUT and _arguments(node)["p"] == 0 and "p" not in node.meta.get(KEY, {})


def draws(graph: fx.Graph) -> set[object]:
    """The operators of a graph that draw random numbers, but for dropout, which either mode may do without."""
    drawn = (n.target for n in graph.nodes if is_operator(n) and torch.Tag.nondeterministic_seeded in n.target.tags)
    return {target for target in drawn if target not in _DROPOUT}


def note_dropout(graph: fx.Graph) -> None:
    """Note on every dropout of a single graph that it works in training only."""
    attention = torch.ops.aten.scaled_dot_product_attention.default
    for node in graph.nodes:
        arguments = _arguments(node) if node.op == "call_function" else {}
        if node.target in _DROPOUT and isinstance(arguments.get("train"), bool):
            node.meta.setdefault(KEY, {"train": (True, False)})
        elif node.target is attention and isinstance(arguments["dropout_p"], float) and arguments["dropout_p"] > 0:
            node.meta.setdefault(KEY, {"dropout_p": (arguments["dropout_p"], 0.0)})


def follow_notes(graph: fx.Graph, of: str = "") -> int:
    """Make noted arguments depend on ``self.training`` of the module that runs the graph. Returns how many nodes do.

    of: the attribute of that module whose ``training`` is meant instead.
    """
    noted = [node for node in graph.nodes if node.op == "call_function" and node.meta.get(KEY)]
    if not noted:
        return 0
    with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder")):
        mode = graph.create_node("get_attr", f"{of}.training" if of else "training")
        mode.meta["val"] = True
    for node in noted:
        with graph.inserting_before(node):
            chosen = {name: _chosen(graph, mode, *values) for name, values in node.meta.pop(KEY).items()}
        node.args, node.kwargs = with_arguments(node, chosen)
    return len(noted)


def _chosen(graph: fx.Graph, mode: fx.Node, training: float, evaluation: float) -> fx.Node:
    if isinstance(training, bool):
        return mode if training else graph.call_function(operator.not_, (mode,))
    part = graph.call_function(operator.mul, (training - evaluation, mode))
    return part if evaluation == 0 else graph.call_function(operator.add, (evaluation, part))
