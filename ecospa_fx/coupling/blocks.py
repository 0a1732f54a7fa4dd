"""Whole blocks: branches whose result is added to what they were computed from, such as attention, or an FFN.

Where the weight and the bias that make the result are 0, the result is, and the sum is what it is added to. The branch
leaves the graph with all that feeds nothing else: the weights inside, and the norm in front. A block is a coupling of
one unit that holds all these parameters: what makes the result as consumers, so that the derivative by a gate on the
branch is the sum of gradient times weight over them, and all others as producers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from ecospa_fx.axes.findings import Addition, Value
from ecospa_fx.axes.flow import AxisFlow
from ecospa_fx.coupling.naming import common_module, named_couplings
from ecospa_fx.coupling.types import BLOCK, Box, Coupling, LocatedCoupling, Member
from ecospa_fx.ir.alias import written_by


@dataclass(frozen=True, slots=True)
class AddedBranch:
    """A branch that can leave the graph."""

    coupling: Coupling
    """One unit: all parameters that go with the branch."""
    addition: Addition
    """Where the branch is added."""


def find_blocks(flow: AxisFlow, shapes: Mapping[str, tuple[int, ...]]) -> list[AddedBranch]:
    """The blocks of a graph, in its order. Linear in the size of the graph, as branches do not overlap much."""
    order = {node: number for number, node in enumerate(flow.values)}
    sources = {n: v for n, v in flow.values.items() if n.op != "call_function" and isinstance(v, Value)}
    names = {node: value.weights[0] for node, value in sources.items() if len(value.weights) == 1}
    couplings, additions = list[Coupling](), list[Addition]()
    for addition in flow.record.additions:
        dead = _dead(addition) if _is_branch(addition, order) else set()
        if any(written_by(node) for node in dead):
            continue
        removed = {names[node] for node in dead if node in names}
        removed -= {name for node, name in names.items() if node not in dead}
        if removed.issuperset(addition.parameters) and not _shares_units(flow, addition, dead, removed, names):
            couplings.append(_coupling(flow, addition, [name for name in flow.parameters if name in removed], shapes))
            additions.append(addition)
    named = named_couplings([LocatedCoupling(c, -1, ()) for c in couplings], shapes)
    return [AddedBranch(entry.coupling, addition) for entry, addition in zip(named, additions, strict=True)]


def _shares_units(
    flow: AxisFlow, addition: Addition, dead: set[fx.Node], removed: set[str], names: Mapping[fx.Node, str]
) -> bool:
    """Whether a parameter that stays holds the last axis of a branch too, which is then not 0 without it."""
    read = {names[n] for node in dead for n in node.all_input_nodes if n in names} - removed
    return any(not set(addition.axis.dims).isdisjoint(a.dims) for name in read for a in flow.parameters[name].axes)


def _is_branch(addition: Addition, order: Mapping[fx.Node, int]) -> bool:
    """Whether one term is computed from the other, which has its shape and type."""
    shapes = [(str(n.meta["val"].shape), n.meta["val"].dtype) for n in (addition.node, addition.stays)]
    if shapes[0] != shapes[1]:
        return False
    first, seen, waiting = order[addition.stays], {addition.branch}, [addition.branch]
    while waiting:
        node = waiting.pop()
        if node is addition.stays:
            return True
        ahead = {n for n in node.all_input_nodes if order.get(n, -1) >= first} - seen
        seen |= ahead
        waiting += ahead
    return False


def _dead(addition: Addition) -> set[fx.Node]:
    """The nodes that nothing reads once the branch is not added."""
    dead, waiting = set[fx.Node](), [addition.branch]
    while waiting:
        node = waiting.pop()
        if node not in dead and all(user in dead or user is addition.node for user in node.users):
            dead.add(node)
            waiting += [n for n in node.all_input_nodes if n is not addition.stays]
    return dead


def _coupling(
    flow: AxisFlow, addition: Addition, names: Sequence[str], shapes: Mapping[str, tuple[int, ...]]
) -> Coupling:
    """The coupling of a branch. What only scales its result is no consumer: a gate would be counted twice."""
    last, modules = addition.parameters, {name.rpartition(".")[0] for name in addition.parameters}
    layer = modules.pop().rpartition(".")[0] if len(modules) == 1 else common_module(last)
    factors = flow.record.factors.keys() - flow.record.bound
    makes = [name for name in last if name not in factors] or last
    return Coupling("", BLOCK, layer, 1, 1, "permutation", tuple(_members(names, makes, shapes)), 0)


def _members(names: Iterable[str], last: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> Iterable[Member]:
    """All of some parameters."""
    for name in names:
        shape = shapes[name]
        if shape:
            whole = Box(0, (), 1, ((shape[0], 1),))
            yield Member(name, 0, "consumer" if name in last else "producer", None, (whole,), 1, 1)
