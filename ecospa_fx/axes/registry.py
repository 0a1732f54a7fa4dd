"""Which rule speaks for which operator. A rule is a function from a `Call` to the axes of its outputs."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING

from torch import ops

from ecospa_fx.axes.reasons import NOTHING, Reason
from ecospa_fx.errors import InputError

if TYPE_CHECKING:
    from ecospa_fx.axes.call import Call, Value

Rule = Callable[["Call"], "Value | list[Value]"]


@dataclass(frozen=True, slots=True)
class Entry:
    """What is registered for an operator."""

    rule: Rule
    """The rule."""
    linear: bool
    """Whether another basis may be chosen along the axes that pass."""


_ENTRIES: dict[str, Entry] = {}
_REFUSED: dict[str, Reason] = {}
_FAMILIES = (
    "pointwise",
    "view",
    "move",
    "contract",
    "attention",
    "reduce",
    "norm",
    "index",
    "create",
    "convolution",
    "effects",
)


def axis_rule(*operators: str, linear: bool | Collection[str] = False) -> Callable[[Rule], Rule]:
    """Register a rule for operators by qualified name without overload: ``"aten.relu"``, ``"mylib.my_op"``.

    In-place variants (``aten.relu_``) follow their functional form unless registered themselves. linear: whether the
    operator (or which of them) treats all positions along an axis that passes alike, and linearly, so that another
    basis may be chosen there; what adds or multiplies through `Call.pointwise` says the rest itself.
    Raises InputError, a ValueError, for an operator that has a rule or a standing refusal already, and for a name that
    no operator can have.

    Examples:
        >>> from ecospa_fx import axis_rule
        >>> @axis_rule("mylib.scale")
        ... def scale(call):
        ...     return call.passes(call["input"])
    """

    check_operators("axis_rule", operators)

    def register(rule: Rule) -> Rule:
        if not callable(rule):
            raise InputError(f"the axis rule {rule!r:.60} cannot be called: give a function of a Call")
        for operator in operators:
            if operator in _ENTRIES or operator in _REFUSED:
                raise InputError(f"operator {operator} has an axis rule already; unregister(...) it first")
            _ENTRIES[operator] = Entry(rule, linear if isinstance(linear, bool) else operator in linear)
        return rule

    return register


def refuse(why: str, *operators: str, remedy: str = NOTHING) -> None:
    """List operators that have no rule on purpose, with the reason that users see, and what they may do about it.

    Raises InputError as `axis_rule` does.
    """
    check_operators("refuse", operators)
    if not isinstance(why, str):
        raise InputError(f"the reason {why!r:.60} is no text: say why, then name operators")
    for operator in operators:
        if operator in _ENTRIES or operator in _REFUSED:
            raise InputError(f"operator {operator} has an axis rule already; unregister(...) it first")
        _REFUSED[operator] = Reason(why, remedy)


def check_operators(verb: str, operators: tuple[object, ...]) -> None:
    """Raise InputError for no operators, and for names that no operator of a graph can have.

    These are "namespace.operator", without an overload; higher-order operators, such as cond, have no namespace.
    """
    if not operators:
        raise InputError(f"{verb}() names no operator: give some, like {verb}('mylib.my_op')")
    for operator in operators:
        parts = operator.split(".") if isinstance(operator, str) else []
        if all(part.isidentifier() for part in parts) and (
            len(parts) == 2 or (len(parts) == 1 and hasattr(ops.higher_order, parts[0]))
        ):
            continue
        raise InputError(
            f"{verb}({operator!r:.60}) names no operator: write its namespace and name without an overload, like "
            "'aten.relu' or 'mylib.my_op'"
        )


def unregister(operator: str) -> None:
    """Forget a rule or refusal, for instance to replace it. Raises KeyError naming similar operators."""
    load()
    if _ENTRIES.pop(operator, None) is None and _REFUSED.pop(operator, None) is None:
        near = get_close_matches(operator, [*_ENTRIES, *_REFUSED], n=3)
        raise KeyError(f"no axis rule for {operator}; near it: {', '.join(near) or 'none'}")


def load() -> None:
    """Import the rule families that come with the library."""
    for family in _FAMILIES:
        import_module(f"ecospa_fx.axes.rules.{family}")


def find(operator: str) -> Rule | None:
    """The rule of an operator, or None."""
    entry = _entry(operator)
    return entry.rule if entry is not None else None


def is_linear(operator: str) -> bool:
    """Whether another basis may be chosen along the axes that pass an operator."""
    entry = _entry(operator)
    return entry is not None and entry.linear


def _entry(operator: str) -> Entry | None:
    return _ENTRIES.get(operator) or _ENTRIES.get(operator.removesuffix("_"))


def refusal(operator: str) -> Reason:
    """Why an operator without a rule blocks the dims that reach it."""
    reason = _REFUSED.get(operator) or _REFUSED.get(operator.removesuffix("_"))
    if reason is not None:
        return reason
    remedy = f"register one with ecospa_fx.axis_rule({operator!r})"
    return Reason(f"no axis rule for operator {operator}", remedy)


def operators() -> tuple[str, ...]:
    """Names of all operators with rules."""
    load()
    return tuple(sorted(_ENTRIES))


def refused() -> dict[str, str]:
    """Operators that block on purpose, with their reasons and remedies in one sentence."""
    load()
    return {operator: str(reason) for operator, reason in _REFUSED.items()}
