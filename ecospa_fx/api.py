"""The verbs of the library."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Unpack, cast

import torch
from torch import Tensor, nn

from ecospa_fx.capture.export import capture, captures
from ecospa_fx.checks import check_data, check_options, check_whole
from ecospa_fx.compression import Compression, CompressOptions
from ecospa_fx.coupling.choice import choosable
from ecospa_fx.coupling.couplings import Couplings, check_couplings
from ecospa_fx.coupling.detection import check_allow, detected
from ecospa_fx.errors import PlanError, ScoreError
from ecospa_fx.importance.score import Batch, Loss, score_samples, splitter_of
from ecospa_fx.importance.scores import Given, Scores
from ecospa_fx.ir.passes import Pass, run_passes
from ecospa_fx.origin import origin, remember
from ecospa_fx.passes import CLEANUP
from ecospa_fx.plan import Plan
from ecospa_fx.planning import plan as make_plan
from ecospa_fx.recipe import SECOND_ORDER, Task, checked, compress_program
from ecospa_fx.rewrite import first_fit, smaller
from ecospa_fx.runtime.guards import leaves_untouched
from ecospa_fx.runtime.lift_parameters import lift_parameters
from ecospa_fx.runtime.restore import restore
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
    check_allow(allow)
    model, args, kwargs = lift_parameters(model, args, kwargs)
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
        >>> small = eco.shrink(mlp, eco.plan(eco.detect(mlp, (x,)), ratio=0.5, scores="magnitude"), (x,))
        >>> tuple(small.get_parameter("0.weight").shape)
        (16, 8)
    """
    return smaller(model, plan, args, kwargs, passes, compare=True)


@leaves_untouched(calls=True)
def compress(  # noqa: PLR0913  # the data, the method and what may go meet here
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    ratio: float | None = None,
    batches: Iterable[Batch] = (),
    loss: Loss | None = None,
    method: str = SECOND_ORDER,
    couplings: Couplings | None = None,
    scores: Scores | Mapping[str, Tensor] | None = None,
    **options: Unpack[CompressOptions],
) -> nn.Module:
    """Detect, score, plan and shrink in one call, with the defaults that cost least quality.

    ratio: share of the couplings' parameters to remove; batches: calibration data as (args, kwargs), whose samples
    count as in `score`, however they are batched; loss: (output, args, kwargs) to a scalar, for one sample at a time.
    method: "second-order" chooses units by the loss's curvature, and what stays makes up for what goes: the result is a
    better model than the masked one; its ingredients, the fields of `ecospa_fx.recipe.Recipe`, are options. Methods of
    `score` only remove, with options `steps` and `progress`; "magnitude" needs no data. couplings: what `detect` found,
    or a selection. scores: tensors [carriers, units] by name, which say what goes. Options of all: `allow` of `detect`
    and those of `plan`, such as exclude, limits and widths; round_to=None, the default, is what the device likes.

    Example:
        >>> import torch, ecospa_fx as eco
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 8))
        >>> data = [((torch.randn(1, 8),), {}) for _ in range(4)]
        >>> small = eco.compress(mlp, *data[0], ratio=0.5, batches=data, loss=lambda y, args, kwargs: y.square().mean())
        >>> sum(p.numel() for p in small.parameters())
        280
    """
    check_options("compress", options, CompressOptions, compress)
    check_data(batches, loss, ScoreError)
    asked = Compression.of(method, ratio, scores, options)
    model, args, kwargs = lift_parameters(model, args, kwargs)
    couplings = _couplings(model, args, kwargs, couplings, options)
    if method == SECOND_ORDER:
        return _rebuilt(Task(model, args, kwargs, couplings, *checked(batches, loss), asked.scores), asked)
    by = _scores(model, couplings, batches, loss, asked)
    return shrink(model, make_plan(couplings, asked.ratio, by, **asked.planning), args, kwargs)


def _couplings(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], couplings: object, options: Mapping[str, Any]
) -> Couplings:
    """The couplings that were given, or those of the model. Raises PlanError for none, and where nothing can go."""
    if couplings is None:
        couplings = detect(model, args, kwargs, allow=options.get("allow", ()))
    elif "allow" in options:
        raise PlanError("allow= is for detecting, and couplings= were detected before: pass allow= to detect")
    check_couplings(couplings, PlanError)
    found = cast("Couplings", couplings)
    choosable(found, options.get("kinds"), options.get("exclude", ()))
    return found


def _scores(
    model: nn.Module, couplings: Couplings, batches: Iterable[Batch], loss: Loss | None, asked: Compression
) -> Given:
    """What says which units go, for a method that only removes."""
    if asked.scores is not None or asked.method == "magnitude":
        return "magnitude" if asked.scores is None else asked.scores
    how: dict[str, Any] = {"steps": asked.steps, "progress": asked.progress, **asked.planning}
    return scored(model, couplings, list(batches), ratio=asked.ratio, loss=loss, method=asked.method, **how)


def _rebuilt(task: Task, asked: Compression) -> nn.Module:
    """What `compress` returns for second-order compression."""

    model, args, kwargs, by = task.model, task.args, task.kwargs, task.scores
    # What cannot be reached, or is not of this model, is refused before anything slow.
    make_plan(task.couplings, asked.ratio, "magnitude" if by is None else by, **asked.all_planning).check(model)
    with torch.inference_mode(False):  # what is fitted needs gradients, whatever the caller's mode
        programs = compared(captures(model, args, kwargs, dynamic=True), model, args, kwargs)
        rewrite = partial(compress_program, task=task, ratio=asked.ratio, recipe=asked.recipe, **asked.planning)
        program, plan = first_fit(programs, rewrite)
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
    check_whole("steps", steps, 1, ScoreError, "a number of scoring passes")
    splitter = splitter_of(model, loss)  # one for all passes, so that it looks at batches, and warns, once
    scores = score_samples(model, couplings, batches, splitter, loss, method, progress)
    for step in range(1, steps):
        with masked(model, _stage(couplings, ratio, scores, step / steps, planning)):
            scores = score_samples(model, couplings, batches, splitter, loss, method, progress)
    return scores


def _stage(couplings: Couplings, ratio: float, scores: Scores, share: float, planning: Mapping[str, Any]) -> Plan:
    """The plan for a share of the way, to a ratio or to widths."""
    if planning.get("widths") is None:
        return make_plan(couplings, ratio * share, scores, **planning)
    last = make_plan(couplings, scores=scores, **planning)
    widths = {s.name: s.size - round((s.size - s.kept) * share) for s in last}
    return make_plan(couplings, scores=scores, **{**planning, "widths": widths})
