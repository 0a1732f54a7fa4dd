"""From the walk's findings to couplings: which dims of parameters can go, what goes with them, or why they cannot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from torch import fx, nn

from ecospa_fx.axes.axis import DimKind
from ecospa_fx.axes.findings import Action, Blocker, Contraction, Effect, several
from ecospa_fx.axes.flow import AxisFlow, analyse
from ecospa_fx.axes.reasons import Reason
from ecospa_fx.coupling.carriers import carriers_of
from ecospa_fx.coupling.choice import texts
from ecospa_fx.coupling.couplings import Analysis, Couplings
from ecospa_fx.coupling.labels import Labels
from ecospa_fx.coupling.members import MemberSearch, Membership, occurrences
from ecospa_fx.coupling.naming import common_module, named_couplings
from ecospa_fx.coupling.types import Coupling, EvidenceStep, LocatedCoupling, Member, Refusal, Symmetry
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
    located = find_couplings(walked, program.shapes)
    analysis = Analysis(walked, tuple(located), program.sizes)
    return Couplings((_advised(entry.coupling) for entry in located), model, analysis, example)


def check_allow(allow: object) -> tuple[str, ...]:
    """What is allowed, by name. Raises InputError for what is not known."""
    allowed = tuple(texts("allow", allow, InputError))
    unknown = [name for name in allowed if name not in ALLOWED]
    if unknown:
        raise InputError(f"allow={unknown[0]!r} is unknown: give one of {', '.join(ALLOWED)}")
    return allowed


def _advised(coupling: Coupling) -> Coupling:
    """A refusal with what lifts it where a weight is computed from others, by what torch calls a parametrization."""
    refusal = coupling.blocked
    if refusal is None or not any(".parametrizations." in f".{m.parameter}" for m in coupling.members):
        return coupling
    how = "fold it into the weight first, with torch.nn.utils.parametrize.remove_parametrizations"
    if how in refusal.message:
        return coupling
    return replace(coupling, blocked=replace(refusal, message=f"{refusal.message}; a parametrization reads it: {how}"))


def find_couplings(flow: AxisFlow, shapes: Mapping[str, tuple[int, ...]]) -> list[LocatedCoupling]:
    """Every dim of a parameter that something is done to, as a coupling or a refusal, in graph order."""
    record, effects = flow.record, _by_dim(flow)
    refusals = {**_squared(flow), **_refusals(flow, record.blocks)}
    inexact, resized = _refusals(flow, record.inexact), _refusals(flow, record.resized)
    places = occurrences(flow)
    carriers = carriers_of(flow, [dim for dim in places if dim in effects and dim not in refusals])
    windows = set(record.windows) - effects.keys()
    wanted = {d: where for d, where in places.items() if d in effects or (d in refusals and d not in windows)}
    paths = _paths(flow, {dim: here for dim, here in effects.items() if dim not in refusals})
    labels, contractions = Labels(flow), _by_contracted_dim(record.contractions)
    located = []
    for dim, membership in MemberSearch(flow.sizes, set(record.consumed)).all(wanted, carriers).items():
        here = effects.get(dim, ())
        coupling = _coupling(flow, dim, membership, labels.kind(dim, here))
        symmetry = _symmetry(coupling.kind, {effect.action for effect in here})
        turns = symmetry != "linear" or _two_sided(membership.members, contractions.get(dim, ()))
        if dim in labels.fixed or not turns:
            symmetry = "permutation"
        if dim in refusals:
            coupling = replace(coupling, blocked=refusals[dim])
        else:
            coupling = replace(coupling, inexact=inexact.get(dim), resized=resized.get(dim))
        if coupling.inexact is not None and symmetry == "linear":
            symmetry = "permutation"  # no other basis has the same norms
        coupling = replace(coupling, symmetry=symmetry, path=paths.get(dim, ()))
        located.append(LocatedCoupling(coupling, dim, membership.carriers))
    return named_couplings(located, shapes)


def _coupling(flow: AxisFlow, dim: int, membership: Membership, kind: str) -> Coupling:
    """A coupling that has no name yet, and of whose symmetry nothing is known."""
    layer = common_module([member.parameter for member in membership.members])
    carriers = prod(flow.sizes[carrier] for carrier in membership.carriers)
    return Coupling("", kind, layer, flow.sizes[dim], carriers, "permutation", membership.members, 0)


def _by_dim(flow: AxisFlow) -> dict[int, list[Effect]]:
    """What happens to each dim of a parameter."""
    result: dict[int, list[Effect]] = {}
    for effect in flow.record.events:
        if flow.origins[effect.dim] is DimKind.PARAMETER:
            result.setdefault(effect.dim, []).append(effect)
    return result


def _by_contracted_dim(contractions: Iterable[Contraction]) -> dict[int, list[Contraction]]:
    result: dict[int, list[Contraction]] = {}
    for contraction in contractions:
        result.setdefault(contraction.dim, []).append(contraction)
    return result


# -- refusals ----------------------------------------------------------------------------------------------------


def _refusals(flow: AxisFlow, blockers: Iterable[Blocker]) -> dict[int, Refusal]:
    """The first reason against every dim that has one."""
    result: dict[int, Refusal] = {}
    written: dict[tuple[Reason, fx.Node, fx.Node], Refusal] = {}
    for blocker in blockers:
        if blocker.dim in result or flow.origins[blocker.dim] is not DimKind.PARAMETER:
            continue
        key = (blocker.reason, blocker.node, blocker.shown)
        if key not in written:
            written[key] = _refusal(*key)
        result[blocker.dim] = written[key]
    return result


def _refusal(reason: Reason, node: fx.Node, shown: fx.Node) -> Refusal:
    return Refusal(str(reason), node.name, operator_of(node), source_of(shown), reason.remedy)


def _squared(flow: AxisFlow) -> dict[int, Refusal]:
    """Dims that a reshape merges with themselves: what a unit holds there is a cross of rows and columns."""
    result: dict[int, Refusal] = {}
    reason = Reason("it is merged with itself into one axis, where its units would be crosses")
    for node, value in flow.values.items():
        for axis in (axis for tensor in several(value) for axis in tensor.axes):
            for piece in axis.pieces:
                dims = [d for d, _ in piece.dims]
                for dim in dims if len(set(dims)) < len(dims) else ():
                    if dims.count(dim) > 1 and flow.origins[dim] is DimKind.PARAMETER:
                        result.setdefault(dim, _refusal(reason, node, node))
    return result


# -- evidence ----------------------------------------------------------------------------------------------------


def _paths(flow: AxisFlow, effects: Mapping[int, Sequence[Effect]]) -> dict[int, tuple[EvidenceStep, ...]]:
    """Per dim every node that carries it or does something to it, in graph order."""
    actions: dict[int, dict[fx.Node, dict[str, None]]] = {dim: {} for dim in effects}
    for node, value in flow.values.items():
        for tensor in several(value) if node.op == "call_function" else ():
            for dim in (dim for axis in tensor.axes for dim in axis.dims):
                if dim in actions:
                    actions[dim].setdefault(node, {})
    for dim, here in effects.items():
        for effect in here:
            actions[dim].setdefault(effect.node, {})[effect.action] = None
    order = {node: i for i, node in enumerate(flow.values)}
    return {
        dim: tuple(_step(node, here, nodes) for node, here in sorted(nodes.items(), key=lambda item: order[item[0]]))
        for dim, nodes in actions.items()
    }


def _step(node: fx.Node, actions: Iterable[str], carrying: Mapping[fx.Node, object]) -> EvidenceStep:
    action = ", ".join(actions) or ("passes" if any(n in carrying for n in node.all_input_nodes) else "produced")
    return EvidenceStep(node.name, operator_of(node), action, source_of(node), module_of(node))


# -- symmetry ----------------------------------------------------------------------------------------------------


_FIXES_BASIS = {Action.NONLINEAR, Action.BATCHED, Action.CONTRACTS_ONES}


def _symmetry(kind: str, actions: set[Action]) -> Symmetry:
    """What commutes with everything that happens to the dim on its way."""
    if kind == "heads" or actions & _FIXES_BASIS:
        return "permutation"
    if Action.PAIRED in actions:
        return "rotary" if kind == "qk" else "permutation"
    return "permutation" if actions & {Action.MULTIPLIED, Action.MULTIPLIED_ACTIVATIONS} else "linear"


def _two_sided(members: Sequence[Member], contractions: Iterable[Contraction]) -> bool:
    """Whether every contraction is one of producers with consumers: what turns these is undone by turning those.

    A matrix that makes both sides is told apart by its halves, unless these were one dim before.
    """
    roles: dict[str, str] = {member.parameter: member.role for member in members}
    for contraction in contractions:
        first, second = contraction.first, contraction.second
        sides = [{roles[name] for name in side if name in roles} for side in (first, second)]
        if roles.keys() & set(first) & set(second):
            if not contraction.apart:
                return False
        elif any(len(side) != 1 for side in sides) or sides[0] == sides[1]:
            return False
    return True
