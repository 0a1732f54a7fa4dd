"""Buffers that hold an order of positions, such as a permutation of channels, which are counted anew among those left.

Where all readers of such a buffer read in the same new order, the buffer itself holds that from now on. Otherwise each
reader gets a constant of its own, as its resize rule says.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from ecospa_fx.axes.findings import Value
from ecospa_fx.axes.flow import AxisFlow
from ecospa_fx.axes.narrowing import Narrowing
from ecospa_fx.ir.program import Program
from ecospa_fx.ir.schema import named_arguments


def rewrite_orders(program: Program, walked: AxisFlow, kept: Narrowing) -> tuple[set[fx.Node], set[fx.Node]]:
    """Give buffers the new orders of all that read them. Returns these, and their readers, which need no edit."""
    buffers, readers = set(), set()
    for node, name in program.stored.items():
        orders = [_order(walked, kept, user) for user in node.users]
        first = orders[0] if orders else None
        if first is None or not all(order is not None and torch.equal(order, first) for order in orders):
            continue
        old = program.buffer(name)
        if old.dim() == 1 and node not in program.state:
            program.replace_buffer(node, name, first.to(old))
            buffers.add(node)
            readers |= set(node.users)
    return buffers, readers


def _order(walked: AxisFlow, kept: Narrowing, reader: fx.Node) -> Tensor | None:
    """The new order, LongTensor [positions], in which a node reads; None where there is none, or not one for all."""
    value = walked.values.get(reader)
    if not isinstance(value, Value) or value.reads is None:
        return None
    source, (axis, positions) = walked.values.get(named_arguments(reader)["self"]), value.reads
    if not isinstance(source, Value) or not kept.changed(source.axes[axis]):
        return None
    ranks = kept.ranks(source.axes, axis, positions)
    return ranks[0] if len(ranks) == 1 else None
