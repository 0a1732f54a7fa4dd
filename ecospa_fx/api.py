"""The verbs of the library."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar, Unpack, cast, overload

import torch
from torch import Tensor, nn

from ecospa_fx.budget.settings import WITH_WIDTHS, AllPlanOptions
from ecospa_fx.calibration.distances import note_distances, noted_distances
from ecospa_fx.capture.export import capture, captures
from ecospa_fx.checks import check_data, check_options, check_whole
from ecospa_fx.compression import Compression, CompressOptions
from ecospa_fx.coupling.choice import choosable
from ecospa_fx.coupling.couplings import Couplings, check_couplings
from ecospa_fx.coupling.detection import check_allow, detected
from ecospa_fx.defaults import NO_BATCHES, CalibrationData, calibration_data
from ecospa_fx.errors import PlanError, ScoreError
from ecospa_fx.importance.score import Batch, Loss, score_samples, splitter_of
from ecospa_fx.importance.scores import Given, Scores
from ecospa_fx.importance.second_order import SECOND_ORDER
from ecospa_fx.inplace.shrink import check_expressible, write_back
from ecospa_fx.ir.passes import Pass, run_passes
from ecospa_fx.origin import origin, origin_of, remember
from ecospa_fx.parts import check_put_back, detected_in_parts, divided, only_part, smaller_in_parts
from ecospa_fx.passes import CLEANUP
from ecospa_fx.plan import Plan
from ecospa_fx.planning import plan as make_plan
from ecospa_fx.recipe import Task, checked, compress_program
from ecospa_fx.rewrite import first_fit, smaller
from ecospa_fx.runtime.guards import leaves_untouched
from ecospa_fx.runtime.lift_parameters import lift_parameters
from ecospa_fx.runtime.part import Part
from ecospa_fx.runtime.put_back import put_back
from ecospa_fx.runtime.restore import restore
from ecospa_fx.trace_check import compared
from ecospa_fx.verify import masked
from ecospa_fx.wrappers import unwrapped

Model = TypeVar("Model", bound=nn.Module)


@leaves_untouched(calls=False)
def detect(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    allow: str | Iterable[str] = (),
    part: str | Iterable[str] | None = None,
) -> Couplings:
    """Find the couplings of a model: the dims that can only be removed together, in all parameters that hold them.

    Returns every dim that can lose units, with everything that must shrink with it, and every dim that cannot, with the
    reason. The model stays untouched.

    Args:
        model: an ``nn.Module`` on any device, ``meta`` included, or a traced ``fx.GraphModule``.
        args: tuple of positional example inputs of the model, by default (). Parameters among them, as backends of
            ``torch.compile`` get them, become parameters of ``couplings.model``.
        kwargs: mapping of example inputs by name, by default none.
        allow: names of what else may be offered, one or several, by default (). "renormalise" lets norms over
            dims run over what is kept in the smaller model, also where what is removed is not 0: that is not what
            masking gives, and ``Coupling.inexact`` says so. "cache" offers dims of what the model
            keeps from call to call, such as keys and values of attention: the smaller model takes and returns
            narrower tensors there, and ``Coupling.resized`` says so.
        part: path of a module inside the model, or several, that are looked at by themselves, as where the whole cannot
            be traced; None, the default, for the whole. The model is called once, to see what it gives to them.

    Returns:
        `Couplings`, a sequence that prints as a table and is indexed by position or by name.

    Raises:
        CaptureError: the model, args or kwargs are none, or ``torch.export`` cannot trace the call.
        InputError: ``allow`` or ``part`` names something unknown.

    Examples:
        One coupling, of the hidden units of an MLP:

        >>> import torch, ecospa_fx as eco
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 8))
        >>> couplings = eco.detect(mlp, (torch.randn(2, 8),))
        >>> [(c.kind, c.size, c.parameters) for c in couplings.offered]
        [('ffn', 32, 544)]

        What must shrink with it:

        >>> [(m.parameter, m.axis, m.role) for m in couplings["ffn"].members]
        [('0.weight', 0, 'producer'), ('0.bias', 0, 'producer'), ('2.weight', 1, 'consumer')]

        A norm of what is not 0 blocks until it is allowed to run over fewer units:

        >>> units = torch.nn.Linear(8, 32), torch.nn.Sigmoid(), torch.nn.LayerNorm(32)
        >>> normed = torch.nn.Sequential(*units, torch.nn.Linear(32, 8))
        >>> len(eco.detect(normed, (torch.randn(2, 8),)).offered)
        0
        >>> len(eco.detect(normed, (torch.randn(2, 8),), allow="renormalise").offered)
        1
    """
    check_allow(allow)
    model, args, kwargs = lift_parameters(model, args, kwargs)
    if part is not None:
        return detected_in_parts(model, part, allow, args, kwargs)
    return detected(capture(model, args, kwargs, dynamic=False), model, allow, (args, kwargs))


@leaves_untouched(calls=False)
def shrink(
    model: nn.Module,
    plan: Plan,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    passes: Sequence[Pass] | None = None,
    part: str | Iterable[str] | None = None,
) -> nn.Module:
    """Make a smaller module, in which what a plan removes is gone.

    It computes what `model` computes with every parameter multiplied by its mask, to rounding. It is a rewritten graph:
    an ``nn.Module`` with the same parameter names and call, without the classes of the original. `model` stays
    untouched. Parameters that lose nothing are shared with it: ``copy.deepcopy`` the result to train both.

    Args:
        model: the ``nn.Module`` that the plan was made for.
        plan: a `Plan`, from the verb `plan`, from `Plan.keeping` or from JSON.
        args: tuple of positional example inputs, by default (). Other batch sizes and lengths work afterwards where the
            model's own code allows them. Where Parameters are among them, the result has its own and takes the others.
        kwargs: mapping of example inputs by name, by default none.
        passes: what cleans the graph up, a sequence of passes; None, the default, for ``ecospa_fx.passes.CLEANUP``, ()
            for nothing.
        part: what `detect` was given; None, the default, for the whole. The rest of the model is a copy with its own
            classes and code, which calls the smaller part.

    Returns:
        The smaller module, in the mode and on the device of `model`.

    Raises:
        PlanError: the plan was made for another model or part, or the whole with a smaller part is not the masked one.
        CaptureError: the model cannot be traced with these inputs.

    Warns where the traced graph does not compute what the model computes on the example.

    Examples:
        >>> import torch, ecospa_fx as eco
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 8))
        >>> x = torch.randn(2, 8)
        >>> plan = eco.plan(eco.detect(mlp, (x,)), ratio=0.5, scores="magnitude")
        >>> small = eco.shrink(mlp, plan, (x,))
        >>> tuple(small.get_parameter("0.weight").shape)
        (16, 8)

        Other batch sizes:

        >>> tuple(small(torch.randn(5, 8)).shape)
        (5, 8)

        It is what masking gives:

        >>> with torch.no_grad():
        ...     for name, mask in plan.masks(mlp).items():
        ...         _ = mlp.get_parameter(name).mul_(mask)
        ...     torch.allclose(small(x), mlp(x), atol=1e-6)
        True
    """
    if part is None:
        return smaller(model, plan, args, kwargs, passes, compare=True)
    model, args, kwargs = lift_parameters(model, args, kwargs)
    return smaller_in_parts(model, plan, part, args, kwargs, passes)


@overload
def compress(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    ratio: float | None = None,
    batches: Iterable[Batch] = NO_BATCHES,
    loss: Loss | None = None,
    method: str = SECOND_ORDER,
    couplings: Couplings | None = None,
    scores: Scores | Mapping[str, Tensor] | None = None,
    part: str | Iterable[str] | None = None,
    **options: Unpack[CompressOptions],
) -> nn.Module: ...


@overload
def compress(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    ratio: tuple[float, ...] | list[float],
    batches: Iterable[Batch] = NO_BATCHES,
    loss: Loss | None = None,
    method: str = SECOND_ORDER,
    couplings: Couplings | None = None,
    scores: Scores | Mapping[str, Tensor] | None = None,
    part: str | Iterable[str] | None = None,
    **options: Unpack[CompressOptions],
) -> list[nn.Module]: ...


@leaves_untouched(calls=True)
def compress(  # noqa: PLR0913  # the data, the method and what may go meet here
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    ratio: float | tuple[float, ...] | list[float] | None = None,
    batches: Iterable[Batch] = NO_BATCHES,
    loss: Loss | None = None,
    method: str = SECOND_ORDER,
    couplings: Couplings | None = None,
    scores: Scores | Mapping[str, Tensor] | None = None,
    part: str | Iterable[str] | None = None,
    **options: Unpack[CompressOptions],
) -> nn.Module | list[nn.Module]:
    """Detect, score, plan and shrink in one call, with the defaults that cost least quality.

    By default units are chosen by the curvature of the loss, and what is kept is changed to make up for what is
    removed, so that the result is better than the masked model. `model` stays untouched.

    A causal language model of token ids needs a ratio only. Example inputs follow from it, the loss is that of the next
    token, and text that it writes itself is what it is calibrated on, beside `batches` where there are any: it keeps
    every kind of text that the model knows, where a text of one kind keeps that kind. What it is away from the dense
    model then, on both texts, `ecospa_fx.calibration.distances` says.

    Args:
        model: an ``nn.Module`` with its weights, on any device but ``meta``.
        args: tuple of positional example inputs, by default (), or what a causal language model reads.
        kwargs: mapping of example inputs by name, by default none.
        ratio: share of the couplings' parameters to remove, above 0 and below 1. It has no default: give it or
            ``widths=``. Several, ascending, give as many models from one measurement, with method="second-order".
        batches: calibration data, an iterable of (args, kwargs) pairs of calls of the model. What counts are their
            samples, however they are batched: see `score`. By default none, which method="magnitude" takes, and causal
            language models, which write their own: see `ecospa_fx.calibration.generated`.
        loss: function (output, args, kwargs) to a scalar, called with one sample at a time. None, the default: of
            causal language models the cross-entropy of the next token, where no mask in the batch is 0; of all others
            how far the outputs are from the dense model's, see `ecospa_fx.OutputDistance`.
        method: how units are chosen. "second-order", the default, compensates what it removes; its ingredients are the
            fields of `ecospa_fx.recipe.Recipe`. Methods of `score`, such as "gate-fisher", only remove; of these
            "magnitude" needs no data.
        couplings: what `detect` returned for this model, or a selection of it; by default what it returns.
        scores: what decides which units are removed, in place of the method's: `Scores`, or tensors [carriers, units]
            by name of coupling. By default None.
        part: path of a module inside the model that is made smaller alone, see `detect`; loss and data are those of the
            whole. Several with methods that only remove. By default None.
        **options: see `ecospa_fx.compression.CompressOptions`: which couplings may lose units (kinds, exclude, limits,
            floor), what the ratio counts and how it is spread (budget, allocation, widths, round_to, expressible_in),
            and the ingredients of the recipe.

    Returns:
        The smaller module, as `shrink` returns it; a list of them for several ratios.

    Raises:
        OptionError: an option is unknown, belongs to another method, neither ratio nor widths is given, or ratios do
            not ascend.
        PlanError: the ratio is out of range or reach, or nothing can be removed.
        ScoreError: data is missing, or data or loss do not fit the model or tell nothing.
        CaptureError: the model cannot be traced.

    Examples:
        >>> import torch, ecospa_fx as eco
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 8))
        >>> data = [((torch.randn(1, 8),), {}) for _ in range(4)]
        >>> small = eco.compress(mlp, *data[0], ratio=0.5, batches=data, loss=lambda y, args, kwargs: y.square().mean())
        >>> sum(p.numel() for p in small.parameters())
        280

        Several sizes from one measurement:

        >>> options = {"batches": data, "loss": lambda y, args, kwargs: y.square().mean(), "distillation": 8}
        >>> models = eco.compress(mlp, *data[0], ratio=(0.25, 0.5), **options)
        >>> [sum(p.numel() for p in model.parameters()) for model in models]
        [416, 280]

        Without data, and only removing:

        >>> small = eco.compress(mlp, *data[0], ratio=0.25, method="magnitude")
        >>> tuple(small.get_parameter("0.weight").shape)
        (24, 8)

        A language model, without data, and with the user's text as a half of it:

        >>> small = eco.compress(model, ratio=0.2)  # doctest: +SKIP
        >>> small = eco.compress(model, ratio=0.2, batches=batches)  # doctest: +SKIP
        >>> eco.calibration.distances(small)  # doctest: +SKIP
        Distances(on_generated=0.071, on_batches=0.052)

        A language model, with a third of the FLOPs removed and the first layer left alone:

        >>> small = eco.compress(
        ...     model, (ids,), ratio=0.33, batches=batches, loss=loss, budget="flops", exclude="layers.0"
        ... )  # doctest: +SKIP
    """
    check_options("compress", options, CompressOptions, compress)
    check_data(batches, loss, ScoreError)
    if part is not None and method == SECOND_ORDER:  # what is mixed of several samples has images in other places
        options = cast("CompressOptions", {"mixed": 0.0, "predicted": 0.0, **options})
    asked = Compression.of(method, ratio, scores, options)
    data = calibration_data(model, args, kwargs, batches, loss, asked.share, measures=asked.measures)
    model, args, kwargs = lift_parameters(model, data.args, data.kwargs)
    couplings = _couplings(model, args, kwargs, couplings, options, part)
    if method == SECOND_ORDER:
        target = only_part(model, part, args, kwargs, f"method={method!r} measures one part at a time")
        measured = checked(data.batches, data.loss, optional=data.share == 1)
        models = _compressed(Task(target, args, kwargs, couplings, *measured, asked.scores), asked, data)
        return models if asked.is_list else models[0]
    by = _scores(model, couplings, data, asked)
    return shrink(model, make_plan(couplings, asked.ratios[0], by, **asked.planning), args, kwargs, part=part)


@leaves_untouched(calls=False)
def compress_(  # noqa: PLR0913  # what `compress` takes
    model: Model,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    ratio: float | None = None,
    batches: Iterable[Batch] = NO_BATCHES,
    loss: Loss | None = None,
    method: str = SECOND_ORDER,
    couplings: Couplings | None = None,
    scores: Scores | Mapping[str, Tensor] | None = None,
    **options: Unpack[CompressOptions],
) -> Model:
    """Compress a model in place: `compress`, written back into the user's own object, all of it or nothing.

    Class, methods, hooks, modes, Parameter objects and ties stay, and attributes such as ``in_features`` agree with the
    weights, so that generation with any cache, adapters, trainers and saving go on working. What the model's code can
    carry is searched for by trials, and what is written is proven as `shrink_` proves it, with the new weights too.
    With uniform=True the configuration follows where it can; where it cannot, a warning names its fields. Gradients
    are dropped, and an optimizer must be made anew.

    Args:
        model: an ``nn.Module`` with its weights; it is changed. A causal language model needs no inputs, data or loss.
        args: tuple of positional example inputs, by default ().
        kwargs: mapping of example inputs by name, by default none.
        ratio: share of the parameters of what the model can carry to remove, above 0 and below 1. It has no default:
            give it or ``widths=``.
        batches: calibration data, an iterable of (args, kwargs) pairs: see `compress`. By default none.
        loss: function (output, args, kwargs) to a scalar, called with one sample at a time. None, the default: how far
            the outputs are from the dense model's, see `ecospa_fx.OutputDistance`.
        method: how units are chosen, "second-order" by default: see `compress`.
        couplings: what `detect` returned for this model, or a selection of it; by default what it returns.
        scores: what decides which units are removed, in place of the method's. By default None.
        **options: see `ecospa_fx.compression.CompressOptions`; expressible_in is "module".

    Returns:
        The same model.

    Raises:
        OptionError: an option is unknown, belongs to another method, or neither ratio nor widths is given.
        PlanError: the ratio is out of range or reach, the model's code can carry nothing or not these widths, or it
            cannot be proven that what is written is right. The model is then exactly as it was.
        ScoreError: data is missing, or data or loss do not fit the model or tell nothing.
        CaptureError: the model cannot be traced.

    Examples:
        >>> import torch, ecospa_fx as eco
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 8))
        >>> data = [((torch.randn(1, 8),), {}) for _ in range(4)]
        >>> eco.compress_(mlp, *data[0], ratio=0.5, batches=data, loss=lambda y, args, kwargs: y.square().mean())[0]
        Linear(in_features=8, out_features=16, bias=True)

        Again without data, to a width of one's own:

        >>> eco.compress_(mlp, *data[0], widths={"ffn": 12}, method="magnitude")[2]
        Linear(in_features=12, out_features=8, bias=True)

        A model of transformers, in which all layers get the widths that its configuration can say:

        >>> eco.compress_(model, (ids,), ratio=0.3, batches=batches, loss=loss, uniform=True)  # doctest: +SKIP
        >>> model.generate(ids), model.save_pretrained(folder)  # doctest: +SKIP
    """
    check_options("compress_", options, CompressOptions, compress_)
    check_data(batches, loss, ScoreError)
    inside = unwrapped(model, resizing=PlanError)
    data = calibration_data(inside, args, kwargs, batches, loss, measures=False)
    asked: CompressOptions = {**options}
    if asked.get("widths") is None:
        asked["expressible_in"] = "module"
    else:
        couplings = _carried(inside, args, kwargs or {}, couplings, Compression.of(method, ratio, scores, asked), asked)
        asked.pop("allow", None)  # they are detected
    small = compress(
        inside,
        data.args,
        data.kwargs,
        ratio=ratio,
        batches=data.batches,
        loss=loss,
        method=method,
        couplings=couplings,
        scores=scores,
        **asked,
    )
    write_back(inside, origin_of(small).plan, data.args, data.kwargs, small)
    note_distances(inside, noted_distances(small))
    return model


def _carried(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], couplings: object, asked: Compression,
    options: CompressOptions,
) -> Couplings:  # fmt: skip
    """The couplings. Raises PlanError, before anything slow, where the model's code cannot carry the widths asked for.

    Units are those of least magnitude where nobody scored them, for which ones go makes no difference to most code.
    """
    chosen = _couplings(model, args, kwargs, couplings, options, None)
    by: Given = "magnitude" if asked.scores is None else asked.scores
    check_expressible(model, make_plan(chosen, scores=by, **asked.all_planning), args, kwargs)
    return chosen


def _couplings(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    couplings: object,
    options: CompressOptions,
    part: str | Iterable[str] | None,
) -> Couplings:
    """The couplings that were given, or those of the model. Raises PlanError for none, and where nothing can go."""
    if couplings is None:
        couplings = detect(model, args, kwargs, allow=options.get("allow", ()), part=part)
    elif "allow" in options:
        raise PlanError("allow= is for detecting, and couplings= were detected before: pass allow= to detect")
    check_couplings(couplings, PlanError)
    chosen = cast("Couplings", couplings)
    choosable(chosen, options.get("kinds"), options.get("exclude", ()))
    return chosen


def _scores(model: nn.Module, couplings: Couplings, data: CalibrationData, asked: Compression) -> Given:
    """What says which units go, for a method that only removes."""
    if asked.scores is not None or asked.method == "magnitude":
        return "magnitude" if asked.scores is None else asked.scores
    text = data.text(asked.windows, asked.seed, progress=asked.progress)
    return scored(
        model,
        couplings,
        [*data.batches, *(text.windows if text else ())],
        ratio=asked.ratios[0],
        loss=data.loss,
        method=asked.method,
        steps=asked.steps,
        **asked.planning,
    )


def _compressed(task: Task, asked: Compression, data: CalibrationData) -> list[nn.Module]:
    """What `compress` returns for second-order compression, one per ratio."""
    part, args, kwargs, by = cast("Part", task.model), task.args, task.kwargs, task.scores
    # What cannot be reached, or is not of this model, is refused before anything slow.
    for ratio in asked.ratios:
        plan = make_plan(task.couplings, ratio, "magnitude" if by is None else by, **asked.all_planning)
        plan.check(part.whole)
        divided(plan, [part])
    task = replace(task, text=data.text(asked.windows, asked.seed, progress=asked.recipe.progress))
    source = part.module, part.args, part.kwargs
    with torch.inference_mode(False):  # what is fitted needs gradients, whatever the caller's mode
        programs = compared(captures(*source, dynamic=True, whole=part.whole), *source)
        rewrite = partial(compress_program, task=task, ratios=asked.ratios, recipe=asked.recipe, **asked.planning)
        results = first_fit(programs, rewrite)[1]
    models = []
    for program, plan, distances in results:
        run_passes(program.exported.graph_module, CLEANUP)
        small = put_back([(part, restore(program, *source))])
        if part.path:
            check_put_back(part.whole, small, plan, args, kwargs, exact=False)
        parts = (part.path,) if part.path else ()
        models.append(remember(small, origin(part.whole, plan, args, kwargs, parts=parts)))
        note_distances(small, distances)
    return models


def scored(
    model: nn.Module,
    couplings: Couplings,
    batches: Sequence[Batch],
    *,
    ratio: float,
    loss: Loss | None = None,
    method: str = "gate-fisher",
    steps: int = 4,
    **planning: Unpack[AllPlanOptions],
) -> Scores:
    """Scores for removing `ratio`, in several steps: each scores what the one before left.

    What a unit is worth depends on which others are still there. Step i of `steps` masks a plan for i / steps of the
    ratio and scores the rest; masked units score 0 and stay masked. The model is restored at the end, whatever happens.
    planning: further options of `plan`. Raises ScoreError for fewer than one step.
    """
    check_whole("steps", steps, 1, ScoreError, "a number of scoring passes")
    progress = planning.get("progress", False)
    splitter = splitter_of(model, loss)  # one for all passes, so that it looks at batches, and warns, once
    scores = score_samples(model, couplings, batches, splitter, method, progress)
    for step in range(1, steps):
        with masked(model, _stage(couplings, ratio, scores, step / steps, planning)):
            scores = score_samples(model, couplings, batches, splitter, method, progress)
    return scores


def _stage(couplings: Couplings, ratio: float, scores: Scores, share: float, planning: AllPlanOptions) -> Plan:
    """The plan for a share of the way, to a ratio, a ceiling or widths."""
    if planning.get("widths") is None and planning.get("within") is None:
        return make_plan(couplings, ratio * share, scores, **planning)
    last = make_plan(couplings, scores=scores, **planning)
    widths = {s.name: s.size - round((s.size - s.kept) * share) for s in last}
    beside = {name: value for name, value in planning.items() if name in WITH_WIDTHS}
    to_widths = cast("AllPlanOptions", {**beside, "widths": widths})
    return make_plan(couplings, scores=scores, **to_widths)
