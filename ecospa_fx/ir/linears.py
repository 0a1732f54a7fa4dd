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
    """One use of a matrix."""

    node: fx.Node
    """The product."""
    input: fx.Node
    """Its activation, [..., in]."""
    parameter: str
    """The name of the matrix."""
    rows: bool
    """Whether the matrix is [out, in], not [in, out]."""
    bias: str | None
    """The name of the parameter [out] that is added in the same operation, or None."""

    @property
    def in_axis(self) -> int:
        """The axis of the parameter that meets the activation."""
        return 1 if self.rows else 0

    def matrix(self, weight: Tensor) -> Tensor:
        """The parameter as [out, in]."""
        return weight if self.rows else weight.T


def linear_uses(program: Program) -> list[LinearUse]:
    """The products by matrices in a graph, in its order; only by matrices that nothing else reads."""
    products = [use for node in program.graph.nodes if (use := _linear_use(program, node)) is not None]
    uses = Counter(program.parameters[n] for n in program.parameters for _ in n.users)
    return [use for use in products if uses[use.parameter] == 1 and (use.bias is None or uses[use.bias] == 1)]


def _linear_use(program: Program, node: fx.Node) -> LinearUse | None:
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
