"""The verbs of the library."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, Literal

import torch
from torch import nn

from ecospa_fx.budget.allocate import plan as make_plan
from ecospa_fx.coupling.couplings import Couplings
from ecospa_fx.coupling.find import detected
from ecospa_fx.errors import PlanError, ScoreError
from ecospa_fx.fitted import first_fit, shrunk
from ecospa_fx.graph.capture import capture, captures
from ecospa_fx.graph.looking import leaves_untouched
from ecospa_fx.graph.owned import owned
from ecospa_fx.graph.passes import Pass, run_passes
from ecospa_fx.graph.restore import restore
from ecospa_fx.importance.score import Batch, Loss, score_samples, splitter_of
from ecospa_fx.importance.scores import Scores
from ecospa_fx.origin import origin, remember
from ecospa_fx.plan import Plan
from ecospa_fx.recipe import SECOND_ORDER, Recipe, Task, checked, compress_program
from ecospa_fx.trace_check import compared
from ecospa_fx.verify import masked


@leaves_untouched(calls=False)
def detect(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    allow: str | Iterable[str] = (),
) -> Couplings:
    """Find the couplings of a model.

    model: an nn.Module on any device, "meta" included, or a traced ``fx.GraphModule``; args, kwargs: example inputs.
    Parameters among these, as graphs of torch.compile backends take them, become parameters of ``couplings.model``.
    Returns every prunable dim with everything that must shrink with it, and every dim that cannot be removed, with the
    reason. allow="renormalise" also offers what nothing but a norm over it blocks: the smaller model's norms run over
    what is kept, which is not what masking gives, so such couplings say why in ``inexact``. allow="cache" also offers
    what the model keeps from call to call, such as keys and values of attention: the smaller model takes and returns
    narrower tensors there, and such couplings say so in ``resized``. The model stays untouched. Raises CaptureError
    where ``torch.export`` cannot trace it.

    Example:
        >>> import torch, ecospa_fx as eco
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 8))
        >>> [(c.kind, c.size) for c in eco.detect(mlp, (torch.randn(2, 8),)) if c.blocked is None]
        [('ffn', 32)]
    """
    model, args, kwargs = owned(model, args, kwargs)
    return detected(capture(model, args, kwargs, dynamic=False), model, allow, (args, kwargs))


@leaves_untouched(calls=False)
def shrink(
    model: nn.Module,
    plan: Plan,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    passes: Sequence[Pass] | None = None,
) -> nn.Module:
    """A smaller module that equals `model` with every parameter multiplied by its mask.

    args, kwargs: example inputs; other batch sizes and lengths work where the model's own code allows them. Where
    Parameters are among these, the smaller model has its own and takes the other arguments. Parameters
    that lose nothing are shared with `model`, which stays untouched; ``copy.deepcopy`` the result to train both.
    passes: what cleans the graph up afterwards; ``ecospa_fx.passes.CLEANUP`` by default, ``()`` for nothing.
    Warns where what was traced is not what the model computes on the example. Raises PlanError where the plan was made
    for another model, CaptureError where it cannot be traced.

    Example:
        >>> import torch, ecospa_fx as eco
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 8))
        >>> x = torch.randn(2, 8)
        >>> small = eco.shrink(mlp, eco.plan(eco.detect(mlp, (x,)), ratio=0.5), (x,))
        >>> tuple(small.get_parameter("0.weight").shape)
        (16, 8)
    """
    return smaller(model, plan, args, kwargs, passes, compare=True)


def smaller(
    model: nn.Module,
    plan: Plan,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    passes: Sequence[Pass] | None = None,
    *,
    compare: bool = False,
) -> nn.Module:
    """What `shrink` returns. compare: warn where what was traced is not what the model computes on the example."""
    model, args, kwargs = owned(model, args, kwargs)
    program = shrunk(model, plan, args, kwargs, passes, compare=compare)
    return remember(restore(program, model, args, kwargs), origin(model, plan, args, kwargs))


@leaves_untouched(calls=True)
def compress(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    ratio: float,
    batches: Iterable[Batch] = (),
    loss: Loss | None = None,
    method: str = SECOND_ORDER,
    couplings: Couplings | None = None,
    **options: Any,
) -> nn.Module:
    """Detect, score, plan and shrink in one call, with the defaults that cost least quality.

    ratio: share of the couplings' parameters to remove; batches: calibration data as (args, kwargs), whose samples
    count as in `score`, however they are batched; loss: (output, args, kwargs) to a scalar, for one sample at a time.
    method: "second-order" chooses units by the loss's curvature, and what stays makes up for what goes: the result is
    no masked dense model, it is a better one; its ingredients are options, the fields of `ecospa_fx.recipe.Recipe`. Any
    method of `score` only removes; then `steps` and `progress` of `scored` are options. "magnitude" needs no batches or
    loss. couplings: what `detect` found in this model. Options of every method: `allow` of `detect`, those of `plan`;
    round_to=None, the default, keeps widths that the device likes. The model stays untouched. Raises what these raise.

    Example:
        >>> import torch, ecospa_fx as eco
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 8))
        >>> data = [((torch.randn(1, 8),), {}) for _ in range(4)]
        >>> small = eco.compress(mlp, *data[0], ratio=0.5, batches=data, loss=lambda y, args, kwargs: y.square().mean())
        >>> sum(p.numel() for p in small.parameters())
        280
    """
    model, args, kwargs = owned(model, args, kwargs)
    couplings = detect(model, args, kwargs, allow=options.pop("allow", ())) if couplings is None else couplings
    options = {"round_to": None, **_without_allow(options)}
    if method == SECOND_ORDER:
        return _rebuilt(Task(model, args, kwargs, couplings, *checked(batches, loss)), ratio, options)
    scores: Scores | Literal["magnitude"] = "magnitude"
    if method != "magnitude":
        scores = scored(model, couplings, list(batches), ratio=ratio, loss=loss, method=method, **options)
    planning = {name: value for name, value in options.items() if name not in {"steps", "progress"}}
    return shrink(model, make_plan(couplings, ratio, scores, **planning), args, kwargs)


def _without_allow(options: dict[str, Any]) -> dict[str, Any]:
    """The options, among which `allow` is none where the couplings are given."""
    if "allow" in options:
        raise PlanError("allow= is for detecting, and couplings= were detected before: pass allow= to detect")
    return options


def _rebuilt(task: Task, ratio: float, options: Mapping[str, Any]) -> nn.Module:
    """What `compress` returns for second-order compression."""
    from ecospa_fx.passes import CLEANUP

    ingredients = {field.name for field in fields(Recipe)}
    recipe = Recipe(**{name: value for name, value in options.items() if name in ingredients})
    planning = {name: value for name, value in options.items() if name not in ingredients}
    model, args, kwargs = task.model, task.args, task.kwargs
    # What cannot be reached, or is not of this model, is refused before anything slow.
    make_plan(task.couplings, ratio, **recipe.planning(planning)).check(model)
    with torch.inference_mode(False):  # what is fitted needs gradients, whatever the caller's mode
        programs = compared(captures(model, args, kwargs, dynamic=True), model, args, kwargs)
        program, plan = first_fit(programs, lambda p: compress_program(p, task, ratio, recipe, **planning))
    run_passes(program.exported.graph_module, CLEANUP)
    return remember(restore(program, model, args, kwargs), origin(model, plan, args, kwargs))


def scored(
    model: nn.Module,
    couplings: Couplings,
    batches: Sequence[Batch],
    *,
    ratio: float,
    loss: Loss | None = None,
    method: str = "gate-fisher",
    steps: int = 4,
    progress: bool = False,
    **planning: Any,
) -> Scores:
    """Scores for removing `ratio`, taken anew while units go: after each step on what is left.

    What a unit is worth depends on which others are still there. Step i of `steps` masks a plan for i / steps of the
    ratio and scores what is left; units that are gone score 0 and stay gone. The model is masked in between and
    restored at the end, whatever happens. planning: further options of `plan`. Raises ScoreError for fewer than one
    step.
    """
    if not isinstance(steps, int) or steps < 1:
        raise ScoreError(f"steps={steps!r} is not a number of scoring passes: give a whole number of at least 1")
    splitter = splitter_of(model, loss)  # one for all passes, so that it looks at batches, and warns, once
    scores = score_samples(model, couplings, batches, splitter, loss, method, progress)
    for step in range(1, steps):
        with masked(model, make_plan(couplings, ratio * step / steps, scores, **planning)):
            scores = score_samples(model, couplings, batches, splitter, loss, method, progress)
    return scores
