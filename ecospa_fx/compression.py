"""What `compress` was asked for: every option sorted and checked before anything slow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, Literal, cast

from torch import Tensor

from ecospa_fx.budget.alignment import Engine
from ecospa_fx.budget.ceiling import Unit
from ecospa_fx.budget.cost import CostModel
from ecospa_fx.budget.settings import RATIO, AllPlanOptions, PlanSettings
from ecospa_fx.calibration.generation import COUNT
from ecospa_fx.checks import check_flag, check_share, check_whole
from ecospa_fx.coupling.choice import ChoiceOptions
from ecospa_fx.errors import OptionError, PlanError, ScoreError
from ecospa_fx.importance.methods import method_named
from ecospa_fx.importance.scores import Scores
from ecospa_fx.importance.second_order import SECOND_ORDER
from ecospa_fx.recipe import Recipe

SHARED = ("allocation", "progress")
"""Ingredients of the recipe that other methods have too."""

APART = "steps", "allow", "generated_share", "generated_windows"
"""Options that are neither of the recipe nor of `plan`."""

STEPS = 4
"""Scoring passes of methods that only remove, by default."""


class CompressOptions(ChoiceOptions, total=False):
    """Options of `compress` beside those in its signature; from `basis` on they go with method="second-order" only."""

    allow: str | Iterable[str]
    """() by default. What else may be offered, "renormalise" or "cache": see `detect`."""
    seed: int
    """0 by default. What "random" scores are drawn from."""
    round_to: int | Engine | None
    """None by default. Kept units are a multiple of this; "gguf", "marlin" or "tensor-cores": of what these like; None:
    of what the kernels of the model's device prefer."""
    generated_share: float | None
    """None by default. Share, from 0 to below 1, of the calibration samples that a causal language model writes itself
    beside `batches`; None: 0.5 where there are batches and no loss, all where there are no batches, and else 0."""
    generated_windows: int
    """128 by default. Windows that a causal language model writes to calibrate on where there are no batches."""
    uniform: bool
    """False by default. True: the same as allocation="uniform"."""
    budget: Literal["parameters", "flops", "latency"] | CostModel
    """"parameters" by default. What the ratio is counted in: see `ecospa_fx.budget.settings.PlanOptions`."""
    expressible_in: Literal["module"] | None
    """None by default. "module": only what `shrink_` could write back into the user's own code."""
    widths: Mapping[str, int] | None
    """None by default. In place of a ratio: units per carrier to keep, by name of a coupling or shell pattern."""
    within: str | Mapping[Unit, float] | None
    """None by default. In place of a ratio: what the whole smaller model stays within, like "6GiB" or
    {"parameters": 100e6}: see `ecospa_fx.budget.settings.PlanOptions`."""
    allocation: Literal["ragged", "global", "uniform", "sensitivity"] | None
    """None by default. How the ratio is spread over couplings: see `ecospa_fx.recipe.Recipe`."""
    progress: bool
    """False by default. True: bars on stderr."""
    steps: int
    """4 by default. Scoring passes of methods that only remove; each scores what the one before left."""
    basis: bool | None
    """True by default. Turn linear couplings before units are chosen."""
    damping: float
    """0.01 by default. Of the matrices that units are chosen by, in means of their diagonals."""
    gates: bool
    """True by default. Rescale kept queries and keys for removed ones."""
    gate_damping: float
    """0.1 by default. Of the gates' Fisher matrix, in means of its diagonal."""
    least_squares: bool | str
    """True by default. Solve matrices that lost inputs; "in turn": layer by layer, in a pass of its own."""
    least_squares_damping: float
    """0.1 by default. Of least squares, in means of the diagonal."""
    rounds: int
    """2 by default. How often sensitivities are measured, with allocation="sensitivity"."""
    distillation: int | None
    """None by default: 224 to 640. Samples that the smaller model learns the dense one's output on; 0: none."""
    rate: float
    """0.125 by default. Learning rate of distillation."""
    step: int
    """1 by default. Samples per step of distillation."""
    mixed: float
    """0.2 by default. Share of positions that come from other samples."""
    predicted: float
    """0.25 by default. Share of positions that the dense model itself predicted."""


@dataclass(frozen=True, slots=True, eq=False)
class Compression:
    """What `compress` was asked for, checked."""

    method: str
    """"second-order", or a method of `score`."""
    ratios: tuple[float, ...]
    """One, `RATIO` where the user gave none, or several, ascending."""
    is_list: bool
    """Whether as many models are to be returned in a list."""
    scores: Scores | Mapping[str, Tensor] | None
    """The user's own, None where the method scores."""
    planning: AllPlanOptions
    """Options of `plan`."""
    recipe: Recipe
    """Of second-order compression."""
    steps: int
    """Scoring passes of methods that only remove."""
    progress: bool
    """Whether these show a bar."""
    share: float | None
    """Of the samples that a language model writes itself; None for the default."""
    windows: int
    """Of its own text, where it has no other."""
    seed: int
    """Of what it writes."""

    @property
    def measures(self) -> bool:
        """Whether data is needed."""
        return self.method == SECOND_ORDER or (self.scores is None and self.method != "magnitude")

    @classmethod
    def of(
        cls,
        method: str,
        ratio: float | tuple[float, ...] | list[float] | None,
        scores: object,
        options: CompressOptions,
    ) -> Compression:
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
            **{name: v for name, v in options.items() if name not in {*names, *APART} - {"progress"}},
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
        checked = cast("AllPlanOptions", planning)
        ratios, is_list = _ratios(ratio, checked), isinstance(ratio, tuple | list)
        compression = cls(method, ratios, is_list, scores, checked, recipe, steps, progress, *_writing(options))
        compression.check_share()
        for each in ratios:
            PlanSettings(each, **compression.all_planning)
        if is_list:
            _check_several(ratios, method)
        return compression

    def check_share(self) -> None:
        """Raise for a share that is none, or that the method has no use for."""
        if self.share is not None:
            check_share("generated_share", self.share, ScoreError)
            if not self.measures:
                raise OptionError(
                    f"compress() takes generated_share= where it measures, and method={self.method!r} does without data"
                    " here: leave it out"
                )

    @property
    def all_planning(self) -> AllPlanOptions:
        """Options of `plan`, with the allocation that the method chooses."""
        return self.recipe.planning(self.planning) if self.method == SECOND_ORDER else self.planning


def _ratios(ratio: float | tuple[float, ...] | list[float] | None, planning: AllPlanOptions) -> tuple[float, ...]:
    """One or several. Raises OptionError where nothing says how much goes."""
    if ratio is None and planning.get("widths") is None and planning.get("within") is None:
        raise OptionError(
            "compress() needs ratio=, the share of the couplings' parameters to remove, or within= or widths="
        )
    return tuple(ratio) if isinstance(ratio, tuple | list) else (RATIO if ratio is None else ratio,)


def _writing(options: CompressOptions) -> tuple[float | None, int, int]:
    """Share, windows and seed of a language model's own text. Raises ScoreError where there are to be no windows."""
    windows = options.get("generated_windows", COUNT)
    check_whole("generated_windows", windows, 1, ScoreError, "a number of windows")
    return options.get("generated_share"), windows, options.get("seed", 0)


def _check_method(method: object, options: CompressOptions) -> None:
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


def _check_several(ratios: Sequence[float], method: str) -> None:
    """Raise where several ratios cannot be had from one measurement."""
    if method != SECOND_ORDER:
        raise OptionError(
            f"compress() takes several ratios with method={SECOND_ORDER!r} only, and method={method!r} scores for each "
            "anew: call it once per ratio"
        )
    if not ratios or any(first >= second for first, second in pairwise(ratios)):
        raise OptionError(f"ratio={tuple(ratios)!r:.60} does not ascend: give at least one, from the least to the most")


def _with_scores(ingredients: Mapping[str, Any], scores: object) -> Recipe:
    """The recipe; units that somebody has scored are those of the weights' own bases."""
    if scores is None:
        return Recipe(**ingredients)
    if ingredients.get("basis"):
        raise PlanError("scores= are of units as they are, and basis=True turns them first: leave one of them out")
    return Recipe(**{**ingredients, "basis": False})
