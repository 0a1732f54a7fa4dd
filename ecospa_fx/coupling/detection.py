"""From the walk's findings to couplings: which dims of parameters can go, what goes with them, or why they cannot."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from torch import fx, nn

from ecospa_fx.axes.dims import Axis, DimKind, Dims, Piece
from ecospa_fx.axes.findings import Action, Blocker, Effect, several
from ecospa_fx.axes.flow import AxisFlow, analyse
from ecospa_fx.axes.reasons import Reason
from ecospa_fx.coupling.carriers import carriers_of
from ecospa_fx.coupling.choice import texts
from ecospa_fx.coupling.couplings import Analysis, Couplings
from ecospa_fx.coupling.labels import Labels
from ecospa_fx.coupling.types import Box, Coupling, EvidenceStep, LocatedCoupling, Member, Refusal, Symmetry
from ecospa_fx.errors import InputError
from ecospa_fx.ir.program import Program
from ecospa_fx.ir.provenance import module_of, operator_of, source_of
from ecospa_fx.ir.tracing import one_at_a_time

ALLOWED = ("renormalise", "cache")
"""What `detect` may be allowed."""


@one_at_a_time()
def detected(
    program: Program, model: nn.Module, allow: str | Iterable[str] = (), example: tuple[Any, Any] | None = None
) -> Couplings:
    """The couplings of a model captured with an example. allow: see `detect`; raises InputError for anything else."""
    walked = analyse(program, check_allow(allow))
    found = find_couplings(walked, program.shapes)
    analysis = Analysis(walked, tuple(found), program.sizes)
    return Couplings((_advised(f.coupling) for f in found), model, analysis, example)


def check_allow(allow: object) -> tuple[str, ...]:
    """What is allowed, by name. Raises InputError for what is not known."""
    allowed = tuple(texts("allow", allow, InputError))
    unknown = [name for name in allowed if name not in ALLOWED]
    if unknown:
        raise InputError(f"allow={unknown[0]!r} is unknown: give one of {', '.join(ALLOWED)}")
    return allowed


def _advised(coupling: Coupling) -> Coupling:
    """A refusal with what lifts it where a weight is computed from others, by what torch calls a parametrization."""
    told = coupling.blocked
    if told is None or not any(".parametrizations." in f".{m.parameter}" for m in coupling.members):
        return coupling
    how = "fold it into the weight first, with torch.nn.utils.parametrize.remove_parametrizations"
    if how in told.message:
        return coupling
    return replace(coupling, blocked=replace(told, message=f"{told.message}; a parametrization reads it: {how}"))


def find_couplings(flow: AxisFlow, shapes: Mapping[str, tuple[int, ...]]) -> list[LocatedCoupling]:
    """Every dim of a parameter that something is done to, as a coupling or a refusal, in graph order."""
    events = _by_dim(flow.dims, flow.record.events)
    record = flow.record
    refusals, inexact, resized = (_refusals(flow, found) for found in (record.blocks, record.inexact, record.resized))
    consumed = {(name, root) for name, dim in flow.record.consumed for root in _roots(flow.dims, dim)}
    places = _places(flow)
    carriers = carriers_of(flow, [d for d in places if d in events and d not in refusals])
    paths = _paths(flow, {d: e for d, e in events.items() if d not in refusals})
    windows = {root for dim in record.windows for root in _roots(flow.dims, dim)} - events.keys()
    wanted = {d: where for d, where in places.items() if d in events or (d in refusals and d not in windows)}
    labels, opposed = Labels(flow), _opposed(flow)
    found = []
    for dim, (chosen, members) in _all_members(flow.dims, wanted, carriers, consumed).items():
        own = events.get(dim, ())
        coupling = _coupling(flow.dims, dim, chosen, members, labels.kind(dim, own), own, refusals.get(dim))
        turns = coupling.symmetry != "linear" or _two_sided(members, opposed.get(dim, ()))
        if dim in labels.fixed or not turns:
            coupling = replace(coupling, symmetry="permutation")
        if dim not in refusals:
            coupling = replace(coupling, inexact=inexact.get(dim), resized=resized.get(dim))
        if coupling.inexact is not None and coupling.symmetry == "linear":
            coupling = replace(coupling, symmetry="permutation")  # no other basis has the same norms
        found.append(LocatedCoupling(replace(coupling, path=paths.get(dim, ())), dim, chosen))
    return _finished(found, shapes)


def _roots(dims: Dims, dim: int) -> Iterator[int]:
    for piece in dims.roots(dim):
        for root, _ in piece.dims:
            yield root


def _by_dim(dims: Dims, events: Iterable[Effect]) -> dict[int, list[Effect]]:
    result: dict[int, list[Effect]] = {}
    for event in events:
        for root in dict.fromkeys(_roots(dims, event.dim)):
            if dims.origins[root] is DimKind.PARAMETER:
                result.setdefault(root, []).append(event)
    return result


def _refusals(flow: AxisFlow, recorded: Iterable[Blocker]) -> dict[int, Refusal]:
    """The first obstacle of every dim that has one."""
    result: dict[int, Refusal] = {}
    made: dict[tuple[Reason, fx.Node, fx.Node], Refusal] = {}
    for obstacle in recorded:
        for root in _roots(flow.dims, obstacle.dim):
            if root in result or flow.dims.origins[root] is not DimKind.PARAMETER:
                continue
            key = (obstacle.reason, obstacle.node, obstacle.shown)
            if key not in made:
                made[key] = _refusal(*key)
            result[root] = made[key]
    return {**_squared(flow), **result}


def _refusal(reason: Reason, node: fx.Node, shown: fx.Node) -> Refusal:
    return Refusal(str(reason), node.name, operator_of(node), source_of(shown), reason.remedy)


def _squared(flow: AxisFlow) -> dict[int, Refusal]:
    """Dims that a reshape merges with themselves: what a unit holds there is a cross of rows and columns."""
    result: dict[int, Refusal] = {}
    reason = Reason("it is merged with itself into one axis, where its units would be crosses")
    for node, value in flow.values.items():
        for axis in (a for one in several(value) for a in one.axes):
            for piece in flow.dims.resolve(axis).pieces:
                held = [d for d, _ in piece.dims]
                for dim in held if len(set(held)) < len(held) else ():
                    if held.count(dim) > 1 and flow.dims.origins[dim] is DimKind.PARAMETER:
                        result.setdefault(dim, _refusal(reason, node, node))
    return result


# -- places and members ------------------------------------------------------------------------------------------

Occurrence = tuple[str, int, tuple[Axis, ...]]
"""Parameter, axis, and all axes of the parameter."""


def _places(flow: AxisFlow) -> dict[int, list[Occurrence]]:
    """Where each dim occurs among the parameters, in the order of the parameters."""
    result: dict[int, list[Occurrence]] = {}
    for name, value in flow.parameters.items():
        axes = tuple(flow.dims.resolve(axis) for axis in value.axes)
        for i, axis in enumerate(axes):
            for dim in flow.dims.dims_of(axis):
                result.setdefault(dim, []).append((name, i, axes))
    return result


Members = tuple[tuple[int, ...], tuple[Member, ...]]
"""Carriers, outer ones first, and members."""


def _all_members(
    dims: Dims, wanted: Mapping[int, Sequence[Occurrence]], carriers: Mapping[int, tuple[int, ...]],
    consumed: set[tuple[str, int]],
) -> dict[int, Members]:  # fmt: skip
    """Members of every dim. A carrier whose own choice differs along a third dim carries only what that carries too."""
    result = {dim: _members(dims, dim, carriers.get(dim, ()), where, consumed) for dim, where in wanted.items()}
    again = True
    while again:
        again = False
        for dim, (chosen, _) in result.items():
            kept = tuple(c for c in chosen if c not in result or set(result[c][0]) <= set(chosen))
            if kept != chosen:
                result[dim] = _members(dims, dim, kept, wanted[dim], consumed)
                again = True
    return result


def _members(
    dims: Dims, dim: int, carriers: tuple[int, ...], where: Sequence[Occurrence], consumed: set[tuple[str, int]]
) -> Members:
    """Members of a dim, with as many of the carriers as every member can express."""
    while True:
        drop = {c for _, axis, axes in where for c in _inexpressible(dims, dim, axis, axes, carriers)}
        if not drop:
            break
        carriers = tuple(c for c in carriers if c not in drop)
    carriers = _ordered(dim, where, carriers)
    if any(_outside(dims, dim, a, x, carriers) is False for _, a, x in where):
        carriers = ()
    members = []
    for name, axis, axes in where:
        role = "consumer" if (name, dim) in consumed else "producer"
        members.append(_member(dims, dim, carriers, name, axis, axes, role))
    return carriers, tuple(members)


def _pieces(dim: int, axis: Axis) -> list[Piece]:
    return [p for p in axis.pieces if any(d == dim for d, _ in p.dims)]


def _inexpressible(dims: Dims, dim: int, axis: int, axes: Sequence[Axis], carriers: Iterable[int]) -> set[int]:
    """Carriers that a member cannot express together: neither all on its own axis nor all of one other axis."""
    own = [{d for d, _ in p.dims} for p in _pieces(dim, axes[axis])]
    inside = {c for c in carriers if all(c in piece for piece in own)}
    if inside:
        return set(carriers) - inside
    for other, candidate in enumerate(axes):
        held = [d for d in dims.dims_of(candidate) if d in carriers]
        if other != axis and held and _is_product(dims, candidate, held):
            return set(carriers) - set(held)
    return set(carriers)


def _is_product(dims: Dims, axis: Axis, held: Sequence[int]) -> bool:
    """Whether an axis is one piece of exactly these dims."""
    pieces = dims.resolve(axis).pieces
    return len(pieces) == 1 and pieces[0].offset == 0 and [d for d, _ in pieces[0].dims] == list(held)


def _ordered(dim: int, where: Sequence[Occurrence], carriers: tuple[int, ...]) -> tuple[int, ...]:
    """Carriers from outer to inner, as in the first parameter."""
    _, axis, axes = where[0]
    pieces = _pieces(dim, axes[axis])
    order = [d for d, _ in pieces[0].dims if d in carriers]
    order += [d for a in axes for p in a.pieces for d, _ in p.dims if d in carriers and d not in order]
    return tuple(dict.fromkeys(order))


def _outside(dims: Dims, dim: int, axis: int, axes: Sequence[Axis], carriers: tuple[int, ...]) -> int | bool | None:
    """The axis that is the carrier itself; None where carriers lie on the member's own axis; False where unordered."""
    if not carriers or all(d in {x for x, _ in _pieces(dim, axes[axis])[0].dims} for d in carriers):
        return None
    for other, candidate in enumerate(axes):
        if other != axis and _is_product(dims, candidate, carriers):
            return other
    return False


def _member(
    dims: Dims, dim: int, carriers: tuple[int, ...], name: str, axis: int, axes: Sequence[Axis], role: str
) -> Member:
    carrier_axis = _outside(dims, dim, axis, axes, carriers)
    assert carrier_axis is not False  # checked by the caller
    boxes = []
    for piece in _pieces(dim, axes[axis]):
        strides = dict(piece.dims)
        own = () if carrier_axis is not None else tuple((dims.sizes[c], strides[c]) for c in carriers)
        rest = tuple((dims.sizes[d], s) for d, s in piece.dims if d != dim and d not in carriers)
        boxes.append(Box(piece.offset, own, strides[dim], rest))
    count = prod(dims.sizes[c] for c in carriers)
    return Member(name, axis, "consumer" if role == "consumer" else "producer", carrier_axis, tuple(boxes), count,
                  dims.sizes[dim])  # fmt: skip


# -- labels ------------------------------------------------------------------------------------------------------


def _coupling(
    dims: Dims, dim: int, carriers: tuple[int, ...], members: tuple[Member, ...], kind: str, events: Sequence[Effect],
    refusal: Refusal | None,
) -> Coupling:  # fmt: skip
    actions = {event.action for event in events}
    layer = _layer([m.parameter for m in members])
    return Coupling("", kind, layer, dims.sizes[dim], prod(dims.sizes[c] for c in carriers),
                    _symmetry(kind, actions), members, 0, refusal)  # fmt: skip


def _paths(flow: AxisFlow, events: Mapping[int, Sequence[Effect]]) -> dict[int, tuple[EvidenceStep, ...]]:
    """Per dim every node that carries it or does something to it, in graph order."""
    actions: dict[int, dict[fx.Node, dict[str, None]]] = {d: {} for d in events}
    for node, value in flow.values.items():
        for one in several(value) if node.op == "call_function" else ():
            for axis in one.axes:
                for dim in flow.dims.dims_of(axis):
                    if dim in actions:
                        actions[dim].setdefault(node, {})
    for dim, own in events.items():
        for event in own:
            actions[dim].setdefault(event.node, {})[event.action] = None
    order = {node: i for i, node in enumerate(flow.values)}
    return {
        dim: tuple(_step(node, own, at) for node, own in sorted(at.items(), key=lambda item: order[item[0]]))
        for dim, at in actions.items()
    }


def _step(node: fx.Node, own: Iterable[str], carrying: Mapping[fx.Node, object]) -> EvidenceStep:
    action = ", ".join(own) or ("passes" if any(n in carrying for n in node.all_input_nodes) else "produced")
    return EvidenceStep(node.name, operator_of(node), action, source_of(node), module_of(node))


_FIXES_BASIS = {Action.NONLINEAR, Action.BATCHED, Action.CONTRACTS_ONES}


def _symmetry(kind: str, actions: set[Action]) -> Symmetry:
    """What commutes with everything that happens to the dim on its way."""
    if kind == "heads" or actions & _FIXES_BASIS:
        return "permutation"
    if Action.PAIRED in actions:
        return "rotary" if kind == "qk" else "permutation"
    return "permutation" if actions & {Action.MULTIPLIED, Action.MULTIPLIED_ACTIVATIONS} else "linear"


def _opposed(flow: AxisFlow) -> dict[int, list[tuple[tuple[str, ...], tuple[str, ...], bool]]]:
    result: dict[int, list[tuple[tuple[str, ...], tuple[str, ...], bool]]] = {}
    for dim, first, second, apart in flow.record.opposed:
        for root in _roots(flow.dims, dim):
            result.setdefault(root, []).append((first, second, apart))
    return result


def _two_sided(
    members: Sequence[Member], contractions: Iterable[tuple[tuple[str, ...], tuple[str, ...], bool]]
) -> bool:
    """Whether every contraction is one of producers with consumers: what turns these is undone by turning those.

    A matrix that makes both sides is told apart by its halves, unless these were one dim before.
    """
    roles: dict[str, str] = {m.parameter: m.role for m in members}
    for first, second, apart in contractions:
        sides = [{roles[name] for name in side if name in roles} for side in (first, second)]
        if roles.keys() & set(first) & set(second):
            if not apart:
                return False
        elif any(len(side) != 1 for side in sides) or sides[0] == sides[1]:
            return False
    return True


def _width(member: Member) -> int:
    return sum(prod(n for n, _ in box.width) for box in member.boxes)


def _layer(parameters: Sequence[str]) -> str:
    """The innermost module that holds all parameters; without the parameter's own module where it is one module."""
    paths = [p.split(".")[:-1] for p in parameters]
    shared = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def _finished(found: Sequence[LocatedCoupling], shapes: Mapping[str, tuple[int, ...]]) -> list[LocatedCoupling]:
    """Names, sizes, and which couplings contain which."""
    used: dict[str, int] = {}
    named = []
    for entry in found:
        c = entry.coupling
        name = f"{c.layer}.{c.kind}" if c.layer else c.kind
        used[name] = used.get(name, 0) + 1
        name = name if used[name] == 1 else f"{name}.{used[name]}"
        named.append(replace(entry, coupling=replace(c, name=name, parameters=_elements(c, shapes))))
    content = _content(named)
    return [
        replace(e, coupling=replace(e.coupling, contains=content[e.coupling.name])) if e.coupling.name in content else e
        for e in named
    ]


def _content(named: Sequence[LocatedCoupling]) -> dict[str, tuple[str, ...]]:
    """Per head coupling the finer couplings that its heads hold: those on the same axes of the same parameters."""
    finer: dict[tuple[str, int], list[str]] = {}
    for entry in named:
        if entry.coupling.blocked is None and entry.coupling.kind != "heads":
            for member in entry.coupling.members:
                finer.setdefault((member.parameter, member.axis), []).append(entry.coupling.name)
    found = {}
    for entry in named:
        if entry.coupling.kind == "heads":
            held = (name for m in entry.coupling.members for name in finer.get((m.parameter, m.axis), ()))
            found[entry.coupling.name] = tuple(dict.fromkeys(held))
    return found


def _elements(coupling: Coupling, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Parameter elements that the whole coupling holds."""
    total = 0
    for parameter in dict.fromkeys(m.parameter for m in coupling.members):
        shape = shapes[parameter]
        own = [m for m in coupling.members if m.parameter == parameter]
        left = prod(shape)
        for axis in dict.fromkeys(m.axis for m in own):
            gone = sum(_span(m) for m in own if m.axis == axis)
            left = left // shape[axis] * (shape[axis] - gone)
        total += prod(shape) - left
    return total


def _span(member: Member) -> int:
    """Positions of its axis that a member holds."""
    per_carrier = member.units * _width(member)
    on_axis = any(box.carriers for box in member.boxes)
    return per_carrier * (member.carriers if on_axis else 1)
