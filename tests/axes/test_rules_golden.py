"""What every rule says, in the notation of axes: ``tests/axes/golden/rules`` has a file for each family of operators.

A line is a call: the axes of its operands, as the rule leaves them, and those of its results. What the rule notes about
dims stands below. `python -m tests.axes.test_rules_golden` writes the files anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ecospa_fx.axes import registry
from ecospa_fx.axes.call import Call, Value
from ecospa_fx.axes.dims import DimKind, Dims
from ecospa_fx.axes.findings import Descent, Findings, resolved
from ecospa_fx.axes.flow import apply_rule
from ecospa_fx.axes.notation import Notation, product_text, statements
from tests.support.rule_examples import FAMILIES, Example, Operand

FOLDER = Path(__file__).with_name("golden") / "rules"
KINDS = {"x": DimKind.PARAMETER, "y": DimKind.PARAMETER, "w": DimKind.PARAMETER, "c": DimKind.BLANK}
HEADER = """\
# OPERATOR(ARGUMENT OPERAND(AXES), …) : AXES OF THE RESULTS    # sizes
# x activation, 0 where masking removes; y activation that is not; w parameter
# s stored; c constant; i positions; m mask
# letters of axes: see ecospa_fx/axes/notation.py
"""


def schema(example: Example) -> Any:
    """The schema of the overload that a call means; None for a higher-order operator."""
    namespace, _, name = example.operator.rpartition(".")
    if not namespace or namespace == "transformers":
        return None
    packet = getattr(getattr(torch.ops, namespace), name)
    args, kwargs = pytree.tree_map(_tensor, (example.args, example.kwargs))
    overload = torch._C._jit_resolve_packet(f"{namespace}::{name}", *args, **kwargs)
    return getattr(packet, overload)._schema


def _tensor(leaf: object) -> object:
    return leaf.tensor if isinstance(leaf, Operand) else leaf


def shapes(example: Example) -> list[tuple[int, ...]]:
    """Shapes of the tensors that a call returns."""
    if example.shapes is not None:
        return list(example.shapes)
    namespace, _, name = example.operator.rpartition(".")
    args, kwargs = pytree.tree_map(_tensor, (example.args, example.kwargs))
    results = getattr(getattr(torch.ops, namespace), name)(*args, **kwargs)
    return [tuple(t.shape) for t in pytree.tree_leaves(results) if isinstance(t, Tensor)]


def named(example: Example) -> dict[str, Any]:
    """The arguments of a call by the names that the rule reads."""
    signature = schema(example)
    if signature is None:
        names = ["input", "weight", "offs"] if example.operator.startswith("transformers") else list("012")
    else:
        names = [argument.name for argument in signature.arguments]
    return {**dict(zip(names, example.args, strict=False)), **example.kwargs}


class Statement:
    """One call as its rule sees it, and what the rule says."""

    def __init__(self, example: Example) -> None:
        self.dims, self.findings, self.graph = Dims(), Findings(), fx.Graph()
        self.node = self.graph.placeholder("call")
        self.arguments = pytree.tree_map(lambda leaf: self.value(leaf), named(example))
        self.literal = named(example)
        call = Call(self.node, example.operator, self.arguments, shapes(example), self.dims, self.findings)
        result = apply_rule(call)
        self.example, self.findings = example, self.findings.resolved(self.dims)
        self.result = (
            [resolved(v, self.dims) for v in result] if isinstance(result, list) else resolved(result, self.dims)
        )
        self.arguments = pytree.tree_map(self.resolved, self.arguments, is_leaf=lambda leaf: isinstance(leaf, Value))

    def value(self, leaf: object) -> object:
        """A tensor of a call; anything else as it is."""
        if not isinstance(leaf, Operand):
            return leaf
        axes = tuple(self.dims.fresh(size, KINDS.get(leaf.kind, DimKind.STORED)) for size in leaf.shape)
        node = self.graph.placeholder(leaf.kind)
        node.meta["val"] = leaf.tensor
        weights = (node.name,) if leaf.kind == "w" else ()
        zero = (leaf.kind in "xw",) * len(axes)
        return Value(axes, zero, weights, node, weights, descent=Descent(learnt=leaf.kind in "xy"))

    def resolved(self, leaf: object) -> object:
        """A tensor of a call, when the rule has spoken."""
        return resolved(leaf, self.dims) if isinstance(leaf, Value) else leaf

    def lines(self) -> Iterator[str]:
        """The call and what is noted."""
        notation = Notation(self.dims.sizes, self.dims.origins)
        arguments = ", ".join(
            f"{name} {self.text(a, notation, self.literal[name])}" for name, a in self.arguments.items()
        )
        results = notation.value(self.result) or "()"
        call = f"{self.example.operator}({arguments}) : {results}"
        yield f"{call}    # {notation.legend()}" if notation.legend() else call
        for text in statements(self.findings, notation).get(self.node, ()):
            yield f"    {text}"
        for product in self.findings.products:
            yield f"    {product_text(product, notation)}"
        for route in self.findings.routed:
            yield f"    {notation.dim(route.dim)}: each position belongs to one of {notation.axis(route.axis)}"

    def text(self, argument: object, notation: Notation, literal: object) -> str:
        """An argument in the notation."""
        if isinstance(argument, Value):
            return f"{literal!r}{notation.axes(argument.axes)}"
        if isinstance(argument, list) and isinstance(literal, list):
            return f"[{', '.join(self.text(a, notation, b) for a, b in zip(argument, literal, strict=True))}]"
        return str(argument)


def golden(family: str) -> str:
    """The file of a family."""
    registry.load()
    texts = []
    for example in FAMILIES[family]():
        texts += list(Statement(example).lines())
    return HEADER + "\n".join(texts) + "\n"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rules_say_what_they_said(family: str) -> None:
    assert golden(family) == (FOLDER / f"{family}.txt").read_text(encoding="utf-8")


def test_every_operator_has_an_example() -> None:
    shown = {example.operator for family in FAMILIES.values() for example in family()}
    assert {o for o in registry.operators() if not o.startswith("ecospatest.")} == shown


@pytest.mark.parametrize("family", FAMILIES)
def test_an_example_is_of_its_family(family: str) -> None:
    registry.load()
    rules = {example.operator: registry.find(example.operator) for example in FAMILIES[family]()}
    assert [o for o, rule in rules.items() if rule is None or not rule.__module__.endswith(f".{family}")] == []


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in FAMILIES:
        (FOLDER / f"{name}.txt").write_text(golden(name), encoding="utf-8")
