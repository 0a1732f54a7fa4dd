"""Why a dim cannot be removed, and what would lift that: every refusal says both."""

from __future__ import annotations

from dataclasses import dataclass

NOTHING = "nothing lifts this"
RENORMALISE = "allow='renormalise' (--allow renormalise) offers it as inexact"
CACHE = "allow='cache' (--allow cache) would offer it with a narrower output"
RETURNED = "do not return it, for instance with use_cache=False"
PARAMETER = "make what it meets a parameter, or compute it from one, and it is cut along"
ZERO = "use a function with f(0) = 0 in front, or multiply by something that has the dim too and is 0 there"
FINITE = "add a small constant in front, so that it is never 0"
WHOLE = "use sizes that keep its parts whole, or give each part a weight of its own"
EVAL = "call model.eval() first where this is meant for training"
WHERE = "choose by torch.where over all positions instead"


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a dim cannot be removed, and what would lift that.

    Example:
        >>> print(Reason("its order is reversed", "reverse the weight instead"))
        its order is reversed; reverse the weight instead
    """

    why: str
    """What makes removal impossible."""
    remedy: str = NOTHING
    """What to change or which option lifts it, or that nothing does."""

    def __str__(self) -> str:
        return f"{self.why}; {self.remedy}" if self.remedy else self.why
