"""Recipes of `train_books.py`: what is trained, when it shrinks, by which scores, and how the learning rate goes."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Recipe:
    """One way to train.

    kind: "dense", "small" or "sparse"; more: factor of tokens; start, end: shares of the run between which it shrinks;
    shrinks: how many times, in parts that are "cubic" or "linear"; decay: of the learning rate, "cosine" to a tenth,
    "linear" to zero, or "flat" until `flat` and linear to zero after that; warm: steps over which it rises anew after
    a shrink; distill: share of the loss that a teacher gives from the last shrink on, the weights before the first
    shrink, or, with average above 0, their moving average; rate: factor of the learning rate; rise: share of the steps
    over which it rises first; after: a further factor at the final widths, before that by the share of the target
    reached; embed: one for the embeddings; consumers: one for o and down; fan: they learn at the rate times (inputs at
    the final widths / inputs now) to this power, 1 in Yang et al., 2022 (arXiv 2203.03466);
    beta2: AdamW's, of squared gradients; the rest as in `masked.Options`.
    """

    name: str
    kind: str = "sparse"
    more: float = 1.0
    scores: str = "gate-fisher"
    start: float = 0.25
    end: float = 0.75
    shrinks: int = 11
    curve: str = "cubic"
    allocation: Any = "global"
    band: str = "0.6,1.6"
    compensate: Any = "none"
    damping: float = 0.1
    fade: int = 0
    decay: str = "linear"
    flat: float = 0.7
    warm: int = 0
    distill: float = 0.0
    average: float = 0.0
    rate: float = 1.0
    after: float = 1.0
    consumers: float = 1.0
    fan: float = 0.0
    beta2: float = 0.95
    rise: float = 0.04
    embed: float = 1.0

    def at(self, steps: int) -> dict[int, float]:
        """Share of the target by the step that reaches it."""
        if self.kind != "sparse":
            return {}
        found = {}
        for i in range(1, self.shrinks + 1):
            place = self.start + (self.end - self.start) * (i - 1) / max(1, self.shrinks - 1)
            part = i / self.shrinks
            found[max(1, round(place * steps))] = part if self.curve == "linear" else 1 - (1 - part) ** 3
        return found

    def schedule(self, steps: int) -> Due:
        """The same as a schedule of `SparseTraining`."""
        return Due(tuple(self.at(steps).items()))


@dataclass(frozen=True, slots=True)
class Due:
    """A recipe's shrinks as a schedule of `SparseTraining`."""

    shares: tuple[tuple[int, float], ...]

    @property
    def steps(self) -> tuple[int, ...]:
        return tuple(step for step, _ in self.shares)

    def share(self, step: int) -> float:
        return max((share for at, share in self.shares if at <= step), default=0.0)


RECIPES = {
    r.name: r
    for r in (
        Recipe("dense", kind="dense", decay="flat"),
        Recipe("small", kind="small", decay="flat"),
        Recipe("ecospa", scores="fisher", start=0.05, end=0.25, allocation="uniform"),
        Recipe("ecospa-late", scores="fisher", allocation="uniform"),
        Recipe("late", allocation="global"),
        Recipe("own", shrinks=2, start=0.35, end=0.45, compensate="full", decay="flat"),
        Recipe("own-late", shrinks=2, start=0.45, end=0.55, compensate="full", decay="flat", flat=0.6),
    )
}


def recipe_of(text: str) -> Recipe:
    """A recipe from its name, `*` and a factor of tokens, and settings: "own*1.1 shrinks=2 decay=flat"."""
    name, *settings = text.split()
    base, _, more = name.partition("*")
    if base not in RECIPES:
        raise SystemExit(f"no recipe is called {base!r}; there are {', '.join(RECIPES)}")
    kinds = {f.name: type(getattr(RECIPES[base], f.name)) for f in fields(Recipe)}
    given = {key: kinds[key](value) for key, _, value in (s.partition("=") for s in settings)}
    return replace(RECIPES[base], name=text, more=float(more or 1), **given)
