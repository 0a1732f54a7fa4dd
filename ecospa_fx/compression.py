"""What `compress` was asked for: every option sorted and checked before anything slow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from ecospa_fx.budget.cost import CostModel
from ecospa_fx.budget.settings import RATIO, PlanSettings
from ecospa_fx.checks import check_flag, check_whole
from ecospa_fx.coupling.choice import ChoiceOptions
from ecospa_fx.errors import OptionError, PlanError, ScoreError
from ecospa_fx.importance.methods import method_named
from ecospa_fx.importance.scores import Scores
from ecospa_fx.recipe import SECOND_ORDER, Recipe

SHARED = ("allocation", "progress")
"""Ingredients of the recipe that other methods have too."""

STEPS = 4
"""Scoring passes of methods that only remove, by default."""


class CompressOptions(ChoiceOptions, total=False):
    """Options of `compress` beside those in its signature; those of `Recipe` go with method="second-order"."""

    allow: str | Iterable[str]
    seed: int
    round_to: int | None
    uniform: bool
    budget: Literal["parameters", "flops", "latency"] | CostModel
    expressible_in: Literal["module"] | None
    widths: Mapping[str, int] | None
    allocation: Literal["ragged", "global", "uniform", "sensitivity"] | None
    progress: bool
    steps: int
    basis: bool | None
    damping: float
    gates: bool
    gate_damping: float
    least_squares: bool | str
    least_squares_damping: float
    rounds: int
    distillation: int | None
    rate: float
    step: int
    mixed: float
    predicted: float


@dataclass(frozen=True, slots=True, eq=False)
class Compression:
    """ratio, scores: as given, of which RATIO and None stand for nothing; planning: options of `plan`.

    recipe: of second-order compression; steps, progress: of `scored`, for the methods that only remove.
    """

    method: str
    ratio: float
    scores: Scores | Mapping[str, Any] | None
    planning: Mapping[str, Any]
    recipe: Recipe
    steps: int
    progress: bool

    @classmethod
    def of(cls, method: str, ratio: float | None, scores: object, options: Mapping[str, Any]) -> Compression:
        """Sort the options of `compress`. Raises PlanError, ScoreError or OptionError for what makes no sense."""
        _check_method(method, options)
        if scores is not None and not isinstance(scores, Scores | Mapping):
            raise ScoreError(
                f"scores={scores!r:.60} are none: give what score() returned or a mapping of coupling names to "
                "tensors, or name a method with method="
            )
        names = {field.name for field in fields(Recipe)}
        planning = {
            "round_to": None,
            **{name: v for name, v in options.items() if name not in {*names, "steps", "allow"}},
        }
        steps, progress = options.get("steps", STEPS), options.get("progress", False)
        check_whole("steps", steps, 1, ScoreError, "a number of scoring passes")
        check_flag("progress", progress, ScoreError)
        recipe = Recipe()
        if method == SECOND_ORDER:
            ingredients = {name: value for name, value in options.items() if name in names}
            recipe = _with_scores(ingredients, scores)
        elif "allocation" in options:
            planning["allocation"] = options["allocation"]
        if ratio is None and planning.get("widths") is None:
            raise OptionError("compress() needs ratio=, the share of the couplings' parameters to remove, or widths=")
        found = cls(method, RATIO if ratio is None else ratio, scores, planning, recipe, steps, progress)
        PlanSettings(found.ratio, **found.all_planning)
        return found

    @property
    def all_planning(self) -> dict[str, Any]:
        """Options of `plan`, with the allocation that the method chooses."""
        return self.recipe.planning(self.planning) if self.method == SECOND_ORDER else dict(self.planning)


def _check_method(method: object, options: Mapping[str, Any]) -> None:
    """Raise for a method that is not there, and for options of another one."""
    if method == SECOND_ORDER:
        if "steps" in options:
            raise OptionError(
                f"compress() takes steps= with methods that only remove, and method={SECOND_ORDER!r} scores once: "
                "leave it out"
            )
        return
    method_named(method, SECOND_ORDER)
    for name in (field.name for field in fields(Recipe)):
        if name in options and name not in SHARED:
            raise OptionError(
                f"compress() takes {name}= with method={SECOND_ORDER!r} only, and method={method!r} only removes: "
                "leave it out"
            )


def _with_scores(ingredients: Mapping[str, Any], scores: object) -> Recipe:
    """The recipe; units that somebody has scored are those of the weights' own bases."""
    if scores is None:
        return Recipe(**ingredients)
    if ingredients.get("basis"):
        raise PlanError("scores= are of units as they are, and basis=True turns them first: leave one of them out")
    return Recipe(**{**ingredients, "basis": False})
