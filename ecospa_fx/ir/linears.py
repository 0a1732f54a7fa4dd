"""Where a stored matrix multiplies an activation: y = x Wᵀ + b over the last axis of x."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ecospa_fx.ir.program import Program
from ecospa_fx.ir.schema import named_arguments

aten = torch.ops.aten

_PRODUCTS = {
    aten.linear.default: ("input", "weight", "bias", True),
    aten.addmm.default: ("mat1", "mat2", "self", False),
    aten.mm.default: ("self", "mat2", None, False),
    aten.matmul.default: ("self", "other", None, False),
}
"""Operator to its activation, matrix, addend, and whether it multiplies by the matrix transposed."""

_TRANSPOSING = (aten.t.default, aten.numpy_T.default, aten.transpose.int, aten.permute.default, aten.mT.default)


@dataclass(frozen=True, slots=True, eq=False)
class LinearUse:
    """One use of a matrix.

    node: the product; input: its activation [..., in]; parameter: the matrix, [out, in] where `rows` is True and
    [in, out] otherwise; bias: the parameter [out] that is added in the same operation, or None.
    """

    node: fx.Node
    input: fx.Node
    parameter: str
    rows: bool
    bias: str | None

    @property
    def in_axis(self) -> int:
        """The axis of the parameter that meets the activation."""
        return 1 if self.rows else 0

    def matrix(self, weight: Tensor) -> Tensor:
        """The parameter as [out, in]."""
        return weight if self.rows else weight.T


def linear_uses(program: Program) -> list[LinearUse]:
    """The sites of a graph in its order; only of parameters that nothing else reads."""
    sites = [site for node in program.graph.nodes if (site := _site(program, node)) is not None]
    uses = Counter(program.parameters[n] for n in program.parameters for _ in n.users)
    return [site for site in sites if uses[site.parameter] == 1 and (site.bias is None or uses[site.bias] == 1)]


def _site(program: Program, node: fx.Node) -> LinearUse | None:
    if node.op != "call_function" or node.target not in _PRODUCTS or not node.users:
        return None
    activation, matrix, addend, transposed = _PRODUCTS[node.target]
    arguments = named_arguments(node)
    if node.target is aten.addmm.default and (arguments.get("beta", 1), arguments.get("alpha", 1)) != (1, 1):
        return None
    source, flipped = _stored(arguments[matrix])
    if source not in program.parameters or len(program.shapes[program.parameters[source]]) != 2:
        return None
    bias = arguments.get(addend) if addend else None
    if bias is not None and (bias not in program.parameters or len(program.shapes[program.parameters[bias]]) != 1):
        return None
    name = program.parameters[bias] if bias is not None else None
    return LinearUse(node, arguments[activation], program.parameters[source], transposed != flipped, name)


def _stored(node: fx.Node) -> tuple[fx.Node, bool]:
    """The node behind transpositions of a matrix, and whether their number is odd."""
    flipped = False
    while isinstance(node, fx.Node) and node.op == "call_function" and node.target in _TRANSPOSING:
        if node.meta["val"].dim() != 2:
            break
        axes = [int(a) % 2 for a in pytree.tree_leaves(node.args[1:])]
        moved = not axes or axes == [1, 0] or (node.target is aten.transpose.int and axes == [0, 1])
        flipped, node = flipped != moved, node.args[0]  # type: ignore[assignment]  # a tensor comes from a node
    return node, flipped
