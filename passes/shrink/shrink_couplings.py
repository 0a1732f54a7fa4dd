"""Remove what a plan removes: parameters are sliced, literal sizes follow, stored operands are gathered.

Exact: the result equals the graph with every parameter multiplied by its mask.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from ecospa_fx.axes.axis import has_table
from ecospa_fx.axes.findings import ROUNDED, Gather, several
from ecospa_fx.axes.flow import AxisFlow, analyse
from ecospa_fx.axes.narrowing import DimSelection, Narrowing, slice_of
from ecospa_fx.axes.resize import Resize, find_resize
from ecospa_fx.coupling.blocks import AddedBranch, find_blocks
from ecospa_fx.coupling.detection import find_couplings
from ecospa_fx.coupling.types import BLOCK, LocatedCoupling, Member
from ecospa_fx.errors import PlanError
from ecospa_fx.ir.build import evaluate, inherit, layout
from ecospa_fx.ir.passes import PassResult
from ecospa_fx.ir.program import AttributeForm, Program
from ecospa_fx.ir.provenance import module_of
from ecospa_fx.ir.schema import Args, is_operator, named_arguments, operator_name, tensor_arguments, with_arguments
from ecospa_fx.ir.slices import take
from ecospa_fx.ir.tracing import one_at_a_time
from ecospa_fx.passes.shrink.drop_blocks import drop_blocks
from ecospa_fx.passes.shrink.example_values import ExampleValues
from ecospa_fx.passes.shrink.fixed_orders import rewrite_orders
from ecospa_fx.passes.shrink.fold_factors import fold_factors
from ecospa_fx.passes.shrink.ragged_parameters import store_ragged
from ecospa_fx.passes.shrink.term_nodes import TermNodes, replace_results
from ecospa_fx.plan import Plan, Selection

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class ShrinkCouplings:
    """The pass: ``ShrinkCouplings(plan).run(graph_module)``.

    Takes a graph of ``torch.ops`` calls whose parameters are attributes, as ``torch.export.export(…).module()`` gives,
    with example values in ``node.meta["val"]``. Changes the graph module in place and returns it.
    Raises PlanError where the plan was made for another model.
    """

    name: ClassVar[str] = "shrink-couplings"

    plan: Plan
    """What to remove; made for this graph."""

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        """Shrink a graph module in place."""
        program = AttributeForm(graph_module)
        changes = shrink_program(program, self.plan)
        graph_module.recompile()
        return PassResult(graph_module, changes)

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """The same, as torch's ``PassManager`` wants it. Outputs may get narrower, where the plan allows caches."""
        return self.run(graph_module)


@one_at_a_time()
def shrink_program(program: Program, plan: Plan, *, fold: bool = True) -> int:
    """Shrink a program in place. Returns how many parameters and nodes changed.

    fold: whether parameters are multiplied by the factors that norms over fewer units need, and buffers that hold an
    order of units get the new one; otherwise the graph does it, and parameters, buffers, gradients and whatever is kept
    about them are parts of the dense ones.
    """
    dropped = [s for s in plan if s.kind == BLOCK and not s.kept]
    if plan.ragged and dropped:
        raise PlanError(f"coupling {dropped[0].name!r} is a whole block, which no ragged plan drops: plan without it")
    if plan.ragged:
        return shrink_program(program, plan.even(), fold=fold) + store_ragged(program, plan)
    walked = analyse(program, {*plan.allow, ROUNDED})
    blocks = _blocks(dropped, find_blocks(walked, program.shapes) if dropped else ())
    kept = Narrowing(walked.sizes, _choices(plan, find_couplings(walked, program.shapes), walked))
    if not kept.choices:
        return drop_blocks(program, blocks)
    cut = _cut_parameters(program, walked, kept)
    states = _cut_state(program, walked, kept) | _narrow_inputs(program, walked, kept)
    orders, readers = rewrite_orders(program, walked, kept) if fold else (set[fx.Node](), set[fx.Node]())
    states |= orders
    changes = len(cut) + len(states)
    gathers = _Gathers(program, kept)
    # A choice that differs along another axis is made last, when that axis is cut already.
    for gather in sorted(walked.record.gathers, key=lambda g: kept.carrier_axis(g.target, g.target_axis) is not None):
        changes += gathers.insert(gather)
    renormalised, products = {blocker.node for blocker in walked.record.inexact}, dict[fx.Node, float]()
    for node in [n for n in program.graph.nodes if n in walked.values and is_operator(n)]:
        resize = _resized(program, walked, kept, node, node in renormalised) if node not in readers else None
        terms = _edited(program, node, resize) if resize is not None else None
        changes += terms is not None
        products |= terms.products if terms is not None else {}
    if fold:
        fold_factors(program, products)
    _note_outputs(program, walked, kept)
    changes += drop_blocks(program, blocks)
    _propagate(program, walked, kept, {n for n, name in program.parameters.items() if name in cut} | states)
    program.graph.lint()
    return changes


# -- plan to choices ---------------------------------------------------------------------------------------------


def _key(members: Sequence[Member]) -> frozenset[tuple[object, ...]]:
    return frozenset((m.parameter, m.axis, m.carrier_axis, m.carriers, m.units, frozenset(m.boxes)) for m in members)


def _choices(plan: Plan, couplings: Sequence[LocatedCoupling], walked: AxisFlow) -> dict[int, DimSelection]:
    """Per dim what a plan keeps; couplings are recognised by their members."""
    by_members = {_key(f.coupling.members): f for f in couplings}
    choices = {}
    for selection in (s for s in plan if s.kind != BLOCK):
        entry = by_members.get(_key(selection.members))
        if entry is None or entry.coupling.blocked is not None:
            raise _refused(selection, _why(selection, couplings))
        sizes = [walked.sizes[c] for c in entry.carriers]
        choices[entry.dim] = DimSelection(entry.carriers, selection.mask.view(*sizes, selection.size))
    return choices


def _blocks(dropped: Sequence[Selection], blocks: Sequence[AddedBranch]) -> list[AddedBranch]:
    """The blocks that a plan drops."""
    by_members = {_key(block.coupling.members): block for block in blocks}
    for selection in dropped:
        if _key(selection.members) not in by_members:
            raise _refused(selection, "it is not there")
    return [by_members[_key(selection.members)] for selection in dropped]


def _refused(selection: Selection, why: str) -> PlanError:
    return PlanError(
        f"coupling {selection.name!r} of the plan cannot be shrunk in this graph: {why}; detect and plan again on this "
        "model and these inputs"
    )


def _why(selection: Selection, couplings: Sequence[LocatedCoupling]) -> str:
    """Why a graph does not offer what a plan selected: what blocks a dim of this size in the same places."""

    def places(members: Sequence[Member]) -> tuple[int, set[tuple[str, int]]]:
        return members[0].units, {(m.parameter, m.axis) for m in members}

    wanted = places(selection.members)
    refusals = (c.blocked.message for c in (f.coupling for f in couplings) if c.blocked and places(c.members) == wanted)
    return next(refusals, "it is not there")


# -- parameters --------------------------------------------------------------------------------------------------


def _cut_parameters(program: Program, walked: AxisFlow, kept: Narrowing) -> set[str]:
    cut = set()
    for name, value in walked.parameters.items():
        if any(kept.changed(axis) for axis in value.axes):
            with torch.no_grad():
                program.replace_parameter(name, take(program.tensor(name), slice_of(kept, value.axes)))
            cut.add(name)
    return cut


def _cut_state(program: Program, walked: AxisFlow, kept: Narrowing) -> set[fx.Node]:
    """Buffers that the graph writes into, such as caches, get the widths of what is written."""
    cut = set()
    for node, name in program.state.items():
        value = walked.values.get(node)
        if any(kept.changed(axis) for part in several(value) for axis in part.axes):
            (part,) = several(value)
            program.cut_buffers[name] = slice_of(kept, part.axes)
            program.replace_buffer(node, name, take(program.buffer(name), program.cut_buffers[name]))
            cut.add(node)
    return cut


def _narrow_inputs(program: Program, walked: AxisFlow, kept: Narrowing) -> set[fx.Node]:
    """Inputs that the caller allowed to get narrower."""
    cut = set()
    for node in program.inputs:
        for value in several(walked.values.get(node)):
            if any(kept.changed(axis) for axis in value.axes):
                sizes = [kept.count(axis) if kept.changed(axis) else None for axis in value.axes]
                program.narrow_input(node, slice_of(kept, value.axes), sizes)
                cut.add(node)
    return cut


def _note_outputs(program: Program, walked: AxisFlow, kept: Narrowing) -> None:
    """How outputs get narrower, for whoever compares them with the dense ones."""
    for node in (source for end in program.graph.find_nodes(op="output") for source in end.all_input_nodes):
        for value in several(walked.values.get(node)):
            if any(kept.changed(axis) for axis in value.axes):
                program.narrowed[node] = slice_of(kept, value.axes)


# -- stored operands ---------------------------------------------------------------------------------------------


class _Gathers:
    """Reduces stored operands where they are used; equal reductions of one operand are made once."""

    def __init__(self, program: Program, kept: Narrowing) -> None:
        self.program, self.kept = program, kept
        self.made: dict[tuple[object, ...], fx.Node] = {}
        self.current: dict[tuple[fx.Node, fx.Node], fx.Node] = {}
        """What a user reads in place of an operand so far."""
        self.done: set[tuple[fx.Node, fx.Node, int]] = set()
        self.constants: dict[tuple[object, ...], fx.Node] = {}

    def insert(self, gather: Gather) -> int:
        """Reduce one operand before its user; 0 where nothing of it goes."""
        if not self.kept.changed(gather.target[gather.target_axis]):
            return 0
        operand, user, axis = gather.source, gather.user, gather.operand_axis
        if (user, operand, axis) in self.done:
            return 0
        self.done.add((user, operand, axis))
        source = self.current.get((user, operand), operand)
        mask = self.kept.mask(gather.target, gather.target_axis)
        places = self.kept.carrier_axis(gather.target, gather.target_axis)
        lead = len(gather.target) - len(gather.operand.axes)
        if places is not None and bool((mask == mask[:1]).all()):
            places, mask = None, mask[:1]
        if places is not None:
            mask = mask[self.kept.mask(gather.target, places)[0]]
        mask = mask[:, self._present(gather)]
        key = (source, module_of(user), axis, places, lead, mask.numpy().tobytes())
        if key not in self.made or not self.made[key] < user:
            with self.program.graph.inserting_before(user):
                self.made[key] = self._reduce(gather, source, mask, places, lead)
        user.replace_input_with(source, self.made[key])
        self.current[user, operand] = self.made[key]
        return 1

    def _present(self, gather: Gather) -> Tensor:
        """Which positions the operand still has: repeats of something stored may be cut where they are made."""
        rows = self.kept.mask(gather.operand.axes, gather.operand_axis)
        if not bool((rows == rows[:1]).all()):
            raise PlanError(f"node {gather.user.name} reads a stored tensor whose repeats differ along another axis")
        return rows[0]

    def _reduce(self, gather: Gather, source: fx.Node, mask: Tensor, places: int | None, lead: int) -> fx.Node:
        rank, axis, user = len(gather.operand.axes), gather.operand_axis, gather.user
        if places is None:
            return self._select(source, axis, mask[0], gather)
        if not is_concrete_int(gather.source.meta["val"].shape[axis]):
            raise PlanError(f"node {user.name} reads a symbolic axis whose kept positions differ along another one")
        positions = mask.nonzero()[:, 1].reshape(len(mask), -1)
        other = places - lead
        if other >= 0 and gather.operand.axes[other].size > 1:
            view = [1] * rank
            view[other], view[axis] = positions.shape
            index = self._constant((positions if other < axis else positions.T).reshape(view), user)
            # Not take_along_dim, which would fix every symbolic size of its input.
            part = self._call(aten.slice.Tensor, (source, axis, 0, positions.shape[1]), user)
            return self._call(
                aten.gather.default, (source, axis, self._call(aten.expand_as.default, (index, part), user)), user
            )
        flat = self._constant(positions.flatten(), user)
        node = self._call(aten.index_select.default, (source, axis, flat), user)
        node = self._call(aten.unflatten.int, (node, axis, list(positions.shape)), user)
        if other < 0:
            for _ in range(-other - 1):
                node = self._call(aten.unsqueeze.default, (node, 0), user)
                axis += 1
            return self._call(aten.movedim.int, (node, axis, 0), user)
        node = self._call(aten.movedim.int, (node, axis, other), user)
        return self._call(aten.squeeze.dim, (node, other + 1 if other < axis else other - 1), user)

    def _select(self, source: fx.Node, axis: int, mask: Tensor, gather: Gather) -> fx.Node:
        """One choice for all: a slice where it is contiguous. A leading symbolic size stays outside the choice."""
        size, user = gather.source.meta["val"].shape[axis], gather.user
        if not is_concrete_int(size):
            return self._select_inside(source, axis, mask, gather)
        kept = mask.nonzero().flatten()
        first, last = int(kept[0]), int(kept[-1]) + 1
        if last - first == len(kept):
            return self._call(aten.slice.Tensor, (source, axis, first, last), user)
        return self._call(aten.index_select.default, (source, axis, self._constant(kept, user)), user)

    def _select_inside(self, source: fx.Node, axis: int, mask: Tensor, gather: Gather) -> fx.Node:
        target = gather.target[gather.target_axis]
        cut = [(d, s) for p in target.pieces for d, s in p.dims if d in self.kept.choices]
        inner = max((self.kept.sizes[d] * s for d, s in cut if isinstance(s, int)), default=0)
        if len(target.pieces) != 1 or has_table(target) or inner == 0 or mask.numel() % inner:
            raise PlanError(f"node {gather.user.name} combines a cut axis with a symbolic one in several parts")
        rows = mask.view(-1, inner)
        user = gather.user
        node = self._call(aten.unflatten.int, (source, axis, [-1, inner]), user)
        index = self._constant(rows[0].nonzero().flatten(), user)
        node = self._call(aten.index_select.default, (node, axis + 1, index), user)
        return self._call(aten.flatten.using_ints, (node, axis, axis + 1), user)

    def _constant(self, tensor: Tensor, user: fx.Node) -> fx.Node:
        key = (module_of(user), tuple(tensor.shape), tensor.numpy().tobytes())
        if key not in self.constants:
            self.constants[key] = self.program.add_buffer(module_of(user), tensor.contiguous())
        return self.constants[key]

    def _call(self, target: Callable[..., object], args: Args, user: fx.Node) -> fx.Node:
        return inherit(self.program.graph.call_function(target, args), user)


# -- literal sizes -----------------------------------------------------------------------------------------------


def _resized(program: Program, walked: AxisFlow, kept: Narrowing, node: fx.Node, renormalises: bool) -> Resize | None:
    """What the operator's resize rule says; None where there is none or nothing gets narrower."""
    name = operator_name(node.target)
    rule = find_resize(name)
    if rule is None:
        return None
    inputs = [v for n in tensor_arguments(node) for v in several(walked.values.get(n))]
    outputs = several(walked.values[node])
    if not any(kept.changed(axis) for v in [*inputs, *outputs] for axis in v.axes):
        return None

    def scale(size: Any, old: int, new: int) -> Any:
        common = gcd(old, new)
        with program.graph.inserting_before(node):
            part = inherit(program.graph.call_function(operator.floordiv, (size, old // common)), node)
            return inherit(program.graph.call_function(operator.mul, (part, new // common)), node)

    arguments = named_arguments(node)
    resize = Resize(node, name, arguments, (inputs, outputs), kept, scale, renormalises=renormalises)
    try:
        rule(resize)
    except (IndexError, TypeError, ValueError) as error:
        raise PlanError(f"the sizes of node {node.name} ({name}) cannot follow the plan: {error}") from error
    return resize


def _edited(program: Program, node: fx.Node, resize: Resize) -> TermNodes | None:
    """Do what a resize rule says; None where that is nothing."""
    if resize.results:
        return replace_results(program, node, resize.results)
    terms = TermNodes(program, node)
    if resize.replacement is not None:
        terms.give(node, resize.replacement)
    elif resize.edits:
        edits = {name: terms.argument(value) for name, value in resize.edits.items()}
        node.args, node.kwargs = with_arguments(node, edits)
    else:
        return None
    return terms


# -- values ------------------------------------------------------------------------------------------------------


def _propagate(program: Program, walked: AxisFlow, kept: Narrowing, stale: set[fx.Node]) -> None:
    """New example values for every node that a change reaches, checked against what the axes predict."""
    examples = ExampleValues(program.sizes)
    for node in program.graph.nodes:
        axes_of = walked.values.get(node)
        touched = "val" not in node.meta or any(n in stale for n in node.all_input_nodes)
        touched = touched or any(kept.changed(axis) for v in several(axes_of) for axis in v.axes)
        if node.op != "call_function" or not touched:
            continue
        before = layout(node.meta.get("val"))
        _free_of_strides(program, node)
        try:
            examples.renew(node)
        except Exception as error:
            raise PlanError(
                f"the smaller graph does not compute at node {node.name} ({node.target}): {error}"
            ) from error
        _check(program, walked, kept, node)
        if before != layout(node.meta["val"]):
            stale.add(node)


def _free_of_strides(program: Program, node: fx.Node) -> None:
    """Other widths have other strides, for which a view may not exist."""
    if node.target is aten.view.default:
        node.target = aten.reshape.default
    elif node.target is aten.view_as_complex.default:
        (source,) = node.args
        with program.graph.inserting_before(node):
            copy = inherit(program.graph.call_function(aten.contiguous.default, (source,)), node)
        copy.meta["val"] = evaluate(copy)
        node.args = (copy,)


def _check(program: Program, walked: AxisFlow, kept: Narrowing, node: fx.Node) -> None:
    example = node.meta["val"]
    tensors = [t for t in (example if isinstance(example, list | tuple) else [example]) if isinstance(t, Tensor)]
    for tensor, value in zip(tensors, several(walked.values.get(node)), strict=False):
        shape = [program.sizes(s) for s in tensor.shape]
        want = [kept.count(axis) if kept.changed(axis) else size for axis, size in zip(value.axes, shape, strict=True)]
        if shape != want:
            raise PlanError(f"the smaller graph has shape {shape} at node {node.name} where {want} was expected")
