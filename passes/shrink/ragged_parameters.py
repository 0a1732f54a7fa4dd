"""Parameters of a ragged plan: they hold what is kept, and zeros fill what is computed up to the widest carrier."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ecospa_fx.errors import PlanError
from ecospa_fx.ir.build import evaluate, inherit, layout
from ecospa_fx.ir.linears import LinearUse, linear_uses
from ecospa_fx.ir.program import Program
from ecospa_fx.ir.provenance import module_of
from ecospa_fx.ir.schema import Args
from ecospa_fx.plan import Plan

aten = torch.ops.aten


def store_ragged(program: Program, plan: Plan) -> int:
    """Reduce the parameters of a program, shrunk by ``plan.even()``, to what the plan itself keeps.

    Products with a stored matrix are computed at its own width and filled up afterwards; any other use reads a
    parameter that is filled up before. Returns how many parameters changed.
    """
    real_of = _real_positions(plan)
    left = {name: dict(axes) for name, axes in real_of.items()}
    sites = {site.parameter: site for site in linear_uses(program)}
    edits = _Edits(program)
    for name in [n for n in left if n in sites]:
        _narrow_product(edits, sites[name], left)
    for name, axes in left.items():
        for node in [n for n, first in program.parameters.items() if first == name]:
            edits.fill_parameter(node, axes)
    stale = set()
    for name, axes in real_of.items():
        with torch.no_grad():
            values = program.tensor(name)
            for axis, real in axes.items():
                values = values.index_select(axis, real.nonzero().flatten().to(values.device))
            program.replace_parameter(name, values)
        stale |= {n for n, first in program.parameters.items() if first == name}
    _refresh(program.graph, stale)
    program.graph.lint()
    return len(real_of)


def _real_positions(plan: Plan) -> dict[str, dict[int, Tensor]]:
    """By parameter and axis BoolTensor over the positions that ``plan.even()`` leaves: True where the plan does too."""
    wide, result = plan.even().factors(), dict[str, dict[int, Tensor]]()
    for name, factors in plan.factors().items():
        for axes, kept in factors.items():
            before = wide.get(name, {}).get(axes, torch.ones_like(kept))
            if not kept.equal(before):
                if len(axes) > 1:
                    raise PlanError(f"parameter {name!r} cannot hold different numbers of units in its slices")
                result.setdefault(name, {})[axes[0]] = kept[before]
    return result


def _narrow_product(edits: _Edits, site: LinearUse, left: dict[str, dict[int, Tensor]]) -> None:
    """Let a product run at the widths of its matrix; takes out of `left` what is dealt with."""
    axes, out_axis = left[site.parameter], 1 - site.in_axis
    if site.in_axis in axes:
        edits.select_input(site, axes.pop(site.in_axis))
    addend = left.get(site.bias, {}).get(0) if site.bias is not None else None
    if out_axis in axes and (site.bias is None or (addend is not None and addend.equal(axes[out_axis]))):
        edits.fill_result(site.node, axes.pop(out_axis))
        if site.bias is not None:
            del left[site.bias][0]


@dataclass(frozen=True, slots=True, eq=False)
class _Edits:
    """Nodes that take positions out of tensors, or put zeros in."""

    program: Program

    def select_input(self, site: LinearUse, real: Tensor) -> None:
        """Read only the real positions of a product's activation."""
        with self.program.graph.inserting_before(site.node):
            index = self.program.add_buffer(module_of(site.node), real.nonzero().flatten())
            part = self._call(aten.index_select.default, (site.input, -1, index), site.node)
        site.node.replace_input_with(site.input, part)

    def fill_result(self, node: fx.Node, real: Tensor) -> None:
        """Put zeros between the results of a product along its last axis."""
        self._fill(node, -1, 1, real, like=node, before=node.next)

    def fill_parameter(self, node: fx.Node, axes: dict[int, Tensor]) -> None:
        """Put zeros between the positions of a parameter along some axes."""
        rank, first = node.meta["val"].dim(), min(node.users, default=node.next)
        for axis, real in axes.items():
            node = self._fill(node, axis, rank - axis, real, like=first, before=first)

    def _fill(self, node: fx.Node, axis: int, from_last: int, real: Tensor, like: fx.Node, before: fx.Node) -> fx.Node:
        """Zeros at the end, then everything to its place: no position is read twice, so gradients are not added up."""
        missing = len(real) - int(real.sum())
        place = torch.where(real, real.cumsum(0) - 1, len(real) - missing + (~real).cumsum(0) - 1)
        with self.program.graph.inserting_before(before):
            index = self.program.add_buffer(module_of(like), place)
            padding = [0, 0] * (from_last - 1) + [0, missing]
            padded = self._call(aten.constant_pad_nd.default, (node, padding), like)
            filled = self._call(aten.index_select.default, (padded, axis, index), like)
        node.replace_all_uses_with(filled, delete_user_cb=lambda user: user is not padded)
        return filled

    def _call(self, target: Callable[..., Any], args: Args, like: fx.Node) -> fx.Node:
        return inherit(self.program.graph.call_function(target, args), like)


def _refresh(graph: fx.Graph, stale: set[fx.Node]) -> None:
    """New example values for whatever follows from nodes whose values changed."""
    for node in graph.nodes:
        if node.op != "call_function" or ("val" in node.meta and stale.isdisjoint(node.all_input_nodes)):
            continue
        before = layout(node.meta.get("val"))
        node.meta["val"] = evaluate(node)
        if before != layout(node.meta["val"]):
            stale.add(node)
