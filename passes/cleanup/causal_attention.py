"""A mask that hides exactly the positions to come is a flag, and a mask that hides nothing is none.

Export writes every mask as a tensor, which keeps attention from its fast kernels. What a mask hides is read off the
expressions of its elements, which hold for every batch size and length; masks that depend on an input, or hide
anything else, stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import sympy
import torch
from torch import fx

from ecospa_fx.indexing.call import shape_of
from ecospa_fx.indexing.evaluate import Elements
from ecospa_fx.indexing.values import Condition, ElementValue, Piecewise, at_least_zero, position, settled
from ecospa_fx.ir.build import allow_other_strides
from ecospa_fx.ir.passes import CallablePass, PassResult

ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


@dataclass(frozen=True, slots=True)
class CausalAttention(CallablePass):
    """Causal masks become ``is_causal=True``; masks that hide nothing go.

    Exact up to the order of summation within attention.
    """

    name: ClassVar[str] = "causal-attention"

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite the graph in place."""
        masked = [n for n in graph_module.graph.nodes if n.target is ATTENTION and _mask(n) is not None]
        if not masked:
            return PassResult(graph_module, 0)
        values, changes, reasons = Elements(graph_module.graph), 0, []
        for node in masked:
            mask = _mask(node)
            shown = _shown(mask, values[mask])
            causal = _is_causal(shown, mask, node)
            if shown == sympy.true or causal:
                _set(node, causal)
                changes += 1
            else:
                reasons.append(f"node {node.name} keeps its mask {mask.name}: {_why(shown, values[mask])}")
        if changes:
            allow_other_strides(graph_module.graph)
        return PassResult(graph_module, changes, tuple(reasons))


def _mask(node: fx.Node) -> Any:
    return node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")


def _shown(mask: fx.Node, value: ElementValue) -> Condition | None:
    """Where attention looks: where a truth value holds, or where what is added is 0 and elsewhere as good as -inf.

    Below the least number of its type, an addend leaves a softmax weight of exactly 0 wherever another one is finite.
    """
    if not isinstance(value, Piecewise):
        return None
    example = mask.meta["val"]
    if example.dtype is torch.bool:
        return settled(value.truth, example.shape)
    if not example.dtype.is_floating_point:
        return None
    hidden = [n for _, n in value.cases if n != 0]
    least = torch.finfo(example.dtype).min
    if not all(n.is_number and (n == -sympy.oo or n <= least) for n in hidden):
        return None
    return settled(sympy.Or(*(c for c, n in value.cases if n == 0)), example.shape)


def _is_causal(shown: Condition | None, mask: fx.Node, node: fx.Node) -> bool:
    """Whether query i sees keys up to i; all sizes must be those of the scores, not broadcast."""
    rank = len(shape_of(mask))
    if shown is None or rank < 2 or shown != at_least_zero(position(rank - 2) - position(rank - 1)):
        return False
    query, key = (shape_of(n) for n in node.args[:2])
    return [str(s) for s in shape_of(mask)[-2:]] == [str(query[-2]), str(key[-2])]


def _set(node: fx.Node, causal: bool) -> None:
    args, kwargs = list(node.args), dict(node.kwargs)
    kwargs.pop("attn_mask", None)
    if len(args) > 3:
        args[3] = None
    if causal:
        kwargs.pop("is_causal", None)
        args, kwargs = (args[:5], {**kwargs, "is_causal": True}) if len(args) <= 5 else ([*args[:5], True], kwargs)
    node.args, node.kwargs = tuple(args), kwargs


def _why(shown: Condition | None, value: ElementValue) -> str:
    if shown is not None:
        return f"it shows where {shown}, which no flag says"
    if isinstance(value, Piecewise):
        return "what it adds is neither 0 nor as good as -inf"
    return f"its elements come from node {value.source.name} ({value.source.target})"
