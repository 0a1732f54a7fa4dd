"""Concrete numbers in place of symbolic sizes, so chosen that no two sizes agree by accident."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

import sympy
import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from ecospa_fx.ir.schema import Size, Sizes

Numbers: TypeAlias = Mapping[sympy.Symbol, int]
"""Numbers in place of symbols."""


def concrete_sizes(graph: fx.Graph) -> Sizes:
    """Sizes as numbers: a symbol counts as a small prime, so that it equals no width of the model by accident.

    Where what the graph requires of a symbol allows none, or a size in it could not be computed, another number than
    the example's is taken if there is one; a size that the data decides counts as a large prime.
    """
    numbers = _Numbers(list(_computed_sizes(graph)))
    sizes: dict[sympy.Expr, int] = {}

    def size(value: Size) -> int:
        if isinstance(value, int):
            return value
        expression = value.node.expr
        if expression not in sizes:
            symbols = sorted(expression.free_symbols, key=str)
            chosen = {symbol: numbers.of(symbol, value.node.shape_env) for symbol in symbols}
            sizes[expression] = int(expression.subs(chosen))
        return sizes[expression]

    return size


def _computed_sizes(graph: fx.Graph) -> Iterator[sympy.Expr]:
    """The different sizes in a graph that are computed from symbols by more than sums and products."""
    seen: set[sympy.Expr | None] = set()
    for node in graph.nodes:
        for leaf in pytree.tree_leaves(node.meta.get("val")):
            for size in leaf.shape if isinstance(leaf, Tensor) else (leaf,):
                expression = size.node.expr if isinstance(size, torch.SymInt) else None
                if expression is not None and expression not in seen and expression.has(sympy.Function):
                    yield expression
                seen.add(expression)


class _Numbers:
    """A number for every symbol. computed: sizes that must be whole numbers with them."""

    PRIMES = (11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97, 7, 5, 3)

    def __init__(self, computed: Sequence[sympy.Expr]) -> None:
        self.computed = computed
        self.known: dict[sympy.Expr, int] = {}
        self.unknown = 0

    def of(self, symbol: sympy.Symbol, environment: ShapeEnv) -> int:
        """The number of a symbol, always the same."""
        if symbol not in self.known:
            self.known[symbol] = self._choose(symbol, environment)
        return self.known[symbol]

    def _choose(self, symbol: sympy.Symbol, environment: ShapeEnv) -> int:
        named = "backed_var_to_val" if hasattr(environment, "backed_var_to_val") else "var_to_val"
        hint = getattr(environment, named).get(symbol)
        if hint is None:
            self.unknown += 1
            return _prime(self.unknown - 1)
        required = [guard.expr for guard in environment.guards if symbol in guard.expr.free_symbols]
        computed = [expression for expression in self.computed if symbol in expression.free_symbols]
        limits = environment.var_to_range.get(symbol)
        candidates: list[int] = [*self.PRIMES, *range(2 * int(hint), 9 * int(hint), int(hint)), *range(2, int(hint))]
        for number in (n for n in candidates if n not in self.known.values()):
            numbers = {**self.known, symbol: number}
            inside = limits is None or limits.lower <= number <= limits.upper
            allowed = inside and all(_holds(guard, numbers) for guard in required)
            if allowed and all(_is_size(expression, numbers) for expression in computed):
                return number
        return int(hint)


def _holds(guard: sympy.Basic, numbers: Numbers) -> bool:
    """Whether a requirement may be met: not where it is false, or where something in it is divided by zero."""
    value = _value(guard, numbers)
    return value is not None and value != False  # noqa: E712 (sympy's)


def _is_size(expression: sympy.Expr, numbers: Numbers) -> bool:
    """Whether a size can be computed, as far as its symbols have numbers."""
    value = _value(expression, numbers)
    return value is not None and (not value.is_number or (bool(value.is_integer) and value >= 0))


def _value(expression: sympy.Basic, numbers: Numbers) -> sympy.Basic | None:
    """An expression with numbers in place of symbols; None where it has no value."""
    try:
        value = expression.subs(numbers)
    except (ArithmeticError, AssertionError, ValueError):  # divisions by zero, and what its functions do not take
        return None
    return None if value.has(sympy.nan, sympy.zoo) else value


def _prime(index: int) -> int:
    """Primes far from any width, one per unknown size."""
    candidate, count = 1_000_003, -1
    while True:
        if all(candidate % d for d in range(3, 1001, 2)):
            count += 1
            if count == index:
                return candidate
        candidate += 2
