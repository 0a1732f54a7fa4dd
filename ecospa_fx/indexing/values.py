"""Expressions for the elements of a tensor: numbers by condition (piecewise), and elements of other tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import product
from math import prod
from typing import TypeAlias

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch import fx

Number: TypeAlias = sympy.Expr
"""A number, as an expression of positions and sizes."""
Condition: TypeAlias = sympy.Basic
"""A truth value, as an expression of positions and sizes."""
TRUE, FALSE = sympy.true, sympy.false
LARGEST = 512
"""How many parts an expression may have: masks of many regions need more, and no flag says what they hide."""

COMBINATIONS = 32
"""How many combinations of cases a function is worked out for."""


class TooLarge(Exception):
    """An expression would have more than LARGEST parts, or come from more than COMBINATIONS cases."""


@cache
def position(axis: int) -> sympy.Symbol:
    """The position along an axis, counted from the left."""
    return sympy.Symbol(f"i{axis}", integer=True, nonnegative=True)


@dataclass(frozen=True, slots=True)
class Piecewise:
    """Numbers by condition. A truth value is 1 or 0."""

    cases: tuple[tuple[Condition, Number], ...]
    """Conditions and numbers; exactly one condition holds at each position."""

    def at(self, places: Mapping[object, object]) -> Piecewise:
        """The same, with positions replaced."""
        return merged((c.xreplace(dict(places)), n.xreplace(dict(places))) for c, n in self.cases)

    @property
    def single(self) -> Number | None:
        """The one expression that holds everywhere."""
        return self.cases[0][1] if len(self.cases) == 1 else None

    @property
    def truth(self) -> Condition:
        """Where it is not 0; meaningful for truth values."""
        return sympy.Or(*(c for c, n in self.cases if n != 0))


@dataclass(frozen=True, slots=True)
class IndexedRead:
    """One element of the tensor that another node computes."""

    source: fx.Node
    """The other node."""
    places: tuple[Number, ...]
    """The position along each axis of its tensor, from the positions in the reader's."""

    def at(self, places: Mapping[object, object]) -> IndexedRead:
        """The same, with positions replaced."""
        return IndexedRead(self.source, tuple(sympy.sympify(p).xreplace(dict(places)) for p in self.places))


ElementValue = Piecewise | IndexedRead


@lru_cache(maxsize=1 << 16)
def _parts(expression: sympy.Basic) -> int:
    return 1 + sum(_parts(part) for part in expression.args)


def small_enough(expressions: Iterable[object]) -> None:
    """Raises TooLarge where expressions have more than LARGEST parts together."""
    size = 0
    for expression in expressions:
        size += _parts(expression)
        if size > LARGEST:
            raise TooLarge


def merged(cases: Iterable[tuple[Condition, Number]]) -> Piecewise:
    """Cases without the impossible ones; equal numbers under one condition. Raises TooLarge for too many."""
    conditions: dict[Number, Condition] = {}
    for condition, number in cases:
        if condition is not FALSE and condition != FALSE:
            conditions[number] = sympy.Or(conditions.get(number, FALSE), condition)
            small_enough(conditions.values())
    if len(conditions) == 1:
        return Piecewise(((TRUE, next(iter(conditions))),))
    return Piecewise(tuple((c, n) for n, c in conditions.items()))


def constant(number: object) -> Piecewise:
    """The same number everywhere."""
    return Piecewise(((TRUE, as_number(number)),))


def as_number(value: object) -> Number:
    """A Python or symbolic number as an expression."""
    if isinstance(value, torch.SymInt):
        return value.node.expr
    if isinstance(value, bool):
        return sympy.Integer(int(value))
    return sympy.sympify(value)


def truth(condition: Condition) -> Piecewise:
    """A truth value."""
    return merged([(condition, sympy.Integer(1)), (negated(condition), sympy.Integer(0))])


def combined(function: Callable[..., object], *values: Piecewise) -> Piecewise | None:
    """A function of numbers case by case; it returns a number, a condition, or None where it does not know."""
    cases: list[tuple[Condition, Number]] = []
    if prod(len(v.cases) for v in values) > COMBINATIONS:
        raise TooLarge
    for chosen in product(*(v.cases for v in values)):
        condition = all_of(*(c for c, _ in chosen))
        if condition == FALSE:
            continue
        result = function(*(n for _, n in chosen))
        if result is None or result is sympy.nan:
            return None
        for inner, number in truth(result).cases if is_condition(result) else [(TRUE, result)]:
            cases.append((all_of(condition, inner), number))
    return merged(cases)


def is_condition(value: object) -> bool:
    """Whether an expression is true or false; a symbol, which could be either, counts as a number here."""
    return isinstance(value, Boolean) and not isinstance(value, sympy.Symbol)


# -- conditions --------------------------------------------------------------------------------------------------


def at_least_zero(number: Number) -> Condition:
    """``number >= 0`` for a whole number, in the one form that is used throughout."""
    number = sympy.expand(number)
    return sympy.Ge(number, 0) if number.is_number or number.is_integer else None


def all_of(*conditions: Condition) -> Condition:
    """And; false where two comparisons exclude each other, and without those that others make superfluous."""
    condition = sympy.And(*conditions)
    if not isinstance(condition, sympy.And):
        return condition
    least: dict[Number, Number] = {}
    """By expression without its constant, the least value that the comparisons leave it."""
    rest = []
    for part in condition.args:
        if isinstance(part, sympy.Ge):
            offset, varying = (part.lhs - part.rhs).as_coeff_Add()
            least[varying] = max(least.get(varying, -offset), -offset)
        else:
            rest.append(part)
    if any(low > -least[-varying] for varying, low in least.items() if -varying in least):
        return FALSE
    return sympy.And(*(at_least_zero(varying - low) for varying, low in least.items()), *rest)


def negated(condition: Condition) -> Condition:
    """Not; a comparison of whole numbers stays one in the form that is used throughout."""
    if isinstance(condition, sympy.And | sympy.Or):
        other = sympy.Or if isinstance(condition, sympy.And) else sympy.And
        return other(*(negated(c) for c in condition.args))
    if isinstance(condition, sympy.Ge):
        return at_least_zero(-condition.lhs + condition.rhs - 1)
    return sympy.Not(condition)


def settled(condition: Condition, shape: Sequence[object]) -> Condition:
    """A condition without the comparisons that hold, or fail, at every position of a tensor of this shape."""
    constants = {}
    for atom in condition.atoms(sympy.Ge):
        gap = sympy.expand(atom.lhs - atom.rhs)
        if lowest(gap, shape):
            constants[atom] = TRUE
        elif lowest(-gap - 1, shape):
            constants[atom] = FALSE
    condition = condition.xreplace(constants) if constants else condition
    if not isinstance(condition, sympy.And):
        return condition
    parts = [c for c in condition.args if not any(_implies(other, c, shape) for other in condition.args)]
    return sympy.And(*parts)


def _implies(first: Condition, other: Condition, shape: Sequence[object]) -> bool:
    """Whether a comparison makes a different one superfluous."""
    if first == other or not (isinstance(first, sympy.Ge) and isinstance(other, sympy.Ge)):
        return False
    return lowest((other.lhs - other.rhs) - (first.lhs - first.rhs), shape)


def lowest(number: Number, shape: Sequence[object]) -> bool:
    """Whether a number is never negative at any position of a tensor of this shape, for all sizes from 1."""
    number = sympy.expand(number)
    for axis, size in enumerate(shape):
        slope = number.coeff(position(axis))
        if slope.is_number and slope != 0 and not (number - slope * position(axis)).has(position(axis)):
            number = number.xreplace({position(axis): 0 if slope > 0 else as_number(size) - 1})
            number = sympy.expand(number)
    sizes = [s for s in number.free_symbols if not str(s).startswith("i")]
    if any(s for s in number.free_symbols if s not in sizes):
        return False
    beyond_one = {s: 1 + sympy.Symbol(f"n_{s}", integer=True, nonnegative=True) for s in sizes}
    return bool(sympy.expand(number.xreplace(beyond_one)).is_nonnegative)
