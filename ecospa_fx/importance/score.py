"""Scoring a model's couplings on calibration data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ecospa_fx.checks import check_data
from ecospa_fx.coupling.choice import nothing_offered
from ecospa_fx.coupling.couplings import Couplings, check_couplings
from ecospa_fx.errors import ScoreError
from ecospa_fx.importance.losses import Batch as Batch
from ecospa_fx.importance.losses import Loss as Loss
from ecospa_fx.importance.losses import NormalisedLoss, checked_value, no_slope
from ecospa_fx.importance.methods import Method, Statistic, UnitScores, method_named
from ecospa_fx.importance.output_distance import is_distance, needs_scales, or_distance, probes_of
from ecospa_fx.importance.samples import Splitter
from ecospa_fx.importance.scores import Scores
from ecospa_fx.importance.separable import copied
from ecospa_fx.module_modes import modes_restored
from ecospa_fx.progress import progress_bar, stage
from ecospa_fx.runtime.guards import leaves_untouched
from ecospa_fx.wrappers import unwrapped


@leaves_untouched(calls=True)
def score(
    model: nn.Module,
    couplings: Couplings,
    batches: Iterable[Batch] = (),
    *,
    loss: Loss | None = None,
    method: str = "gate-fisher",
    progress: bool = False,
) -> Scores:
    """Score every unit of every offered coupling: how much the loss depends on it.

    Scores are expectations over samples, not batches: a batch of several samples is cut along the first axis of its
    tensors, and scores the same as its samples do in batches of one. Where a batch cannot be cut, because its tensors
    have other leading sizes, or because the model or the loss mixes samples, as contrastive losses do, it counts as one
    sample and a UserWarning says why.

    The model runs in eval mode on its own device. Modes, gradients, hooks and batches are as before afterwards. Frozen
    parameters are scored too. Memory beyond the forward and the backward pass is one number per unit.

    Args:
        model: the ``nn.Module`` that the couplings were detected on, with its weights.
        couplings: `Couplings` that `detect` returned, or a selection of them.
        batches: iterable of (args, kwargs) pairs of calls of the model, tensors [samples, …]; by default none.
        loss: function (output, args, kwargs) to a scalar in any unit, as only its slope counts; it is called with one
            sample at a time. None, the default: how far the outputs are from what they are, of whose curvature the
            scores are; see `ecospa_fx.OutputDistance`.
        method: "gate-fisher", the default and recommended; "fisher"; "taylor"; or "magnitude", which reads no batches.
            Formulas are in `ecospa_fx.importance.methods`.
        progress: True shows a bar on stderr; False by default.

    Returns:
        `Scores`: by name of coupling a float64 CPU tensor [carriers, units], all in one currency. What has the least
        score per parameter is removed first.

    Raises:
        ScoreError: there are no batches; the loss is no finite scalar, does not depend on the coupled
            parameters or has no slope there; weights are on ``meta``, not finite or of another model; nothing is
            offered.

    Examples:
        >>> import torch, ecospa_fx as eco
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 8))
        >>> couplings = eco.detect(mlp, (torch.randn(2, 8),))
        >>> tuple(eco.score(mlp, couplings, method="magnitude")["ffn"].shape)
        (1, 32)

        By calibration data:

        >>> data = [((torch.randn(4, 8),), {}) for _ in range(8)]
        >>> scores = eco.score(mlp, couplings, data, loss=lambda output, args, kwargs: output.square().mean())
        >>> len(eco.plan(couplings, ratio=0.5, scores=scores)["ffn"].keep[0])
        16

        A language model that returns logits:

        >>> def loss(output, args, kwargs):
        ...     return cross_entropy(output.logits[:, :-1].flatten(0, 1), args[0][:, 1:].flatten())
        >>> scores = eco.score(model, couplings, [((ids,), {}) for ids in loader], loss=loss)  # doctest: +SKIP
    """
    check_data(batches, loss, ScoreError, progress)
    model = unwrapped(model)
    return score_samples(model, couplings, batches, splitter_of(model, loss), method, progress)


def splitter_of(model: nn.Module, loss: Loss | None) -> Splitter:
    """What takes batches of a model apart into samples, with the loss to differentiate."""
    return Splitter(lambda batch: _called(model, *batch), or_distance(loss), model.parameters())


def _called(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> object:
    """What the model returns; what it writes into are copies."""
    args, kwargs = copied((args, kwargs))
    return model(*args, **kwargs)


def score_samples(
    model: nn.Module, couplings: Couplings, batches: Iterable[Batch], splitter: Splitter, method: str, progress: bool
) -> Scores:
    """See `score`. splitter: of the same model, which may have been masked since it last looked at batches."""
    chosen = method_named(method)
    weights = _coupled_weights(model, couplings)
    if chosen.from_weights is not None:
        return Scores(method, chosen.from_weights(weights, couplings.offered))
    if chosen.degree == 1 and is_distance(splitter.loss):
        raise ScoreError(
            f"method {method!r} reads the mean slope of the loss, and that of a distance to the dense model's outputs "
            "is zero: use method='gate-fisher', or give a loss of the data"
        )
    statistic, number, samples = _statistic(chosen, weights, couplings), -1, 0
    with stage("scores"), _scoring(model, statistic):
        batches = _scaled(splitter, batches)
        unit = NormalisedLoss(splitter.loss) if chosen.degree else None
        for number, batch in enumerate(progress_bar(batches, method) if progress else batches):  # read below
            samples += _gather(model, statistic, splitter, arguments(batch, number), unit, number, samples)
    if number < 0:
        raise ScoreError(f"there are no batches to score with {method!r}: pass at least one (args, kwargs)")
    return Scores(method, _values(chosen, statistic, unit))


def _scaled(splitter: Splitter, batches: Iterable[Batch]) -> Iterable[Batch]:
    """The batches, which are read once more where the loss is measured in units of the model's answers."""
    if not needs_scales(splitter.loss):
        return batches
    kept = [arguments(batch, number) for number, batch in enumerate(batches)]
    splitter.scale(kept)
    return kept


def _values(method: Method, statistic: Statistic, unit: NormalisedLoss | None) -> UnitScores:
    """Scores of the loss itself, in whose unit they were not gathered. Raises ScoreError where they say nothing."""
    factor = 1.0 if unit is None else unit.unit**method.degree
    values = {name: value / factor for name, value in statistic.result().items()}
    if (unit is not None and unit.is_rounding) or not any(value.any() for value in values.values()):
        raise no_slope(f"the score {method.name!r}")
    return values


def _gather(
    model: nn.Module, statistic: Statistic, splitter: Splitter, batch: Batch, unit: NormalisedLoss | None, number: int,
    begun: int,
) -> int:  # fmt: skip
    """Let the statistic see the samples of one batch, but for those that have no finite loss of their own.

    begun: how many samples it has seen; returns how many more these are.
    """

    def forward(*args: object, **kwargs: object) -> object:
        return _called(model, args, kwargs)

    def seen(sample: Batch, place: int, strict: bool) -> bool:
        for probe in probes_of(splitter.loss, place):
            loss = probe if unit is None else unit.of(probe)
            if not one_batch(forward, lambda: statistic.inputs, sample, loss, number, strict=strict):
                return False
            statistic.end_batch(number)
        return True

    samples, count = splitter.split(batch, number), 0
    for place, sample in enumerate(samples, begun):
        count += seen(sample, place, len(samples) == 1)
    if count == 0 and len(samples) > 1:
        seen(batch, begun, True)
    elif count < len(samples):
        splitter.left_out(number)
    return len(samples)


def magnitudes(couplings: Couplings) -> Scores:
    """The scores that need no data, from the weights of the model that was inspected."""
    return score(couplings.model, couplings, method="magnitude")


def _coupled_weights(model: nn.Module, couplings: Couplings) -> dict[str, nn.Parameter]:
    """Every parameter of an offered coupling, checked to be the one detected, with finite values."""
    check_couplings(couplings, ScoreError)
    if not couplings.offered:
        raise ScoreError(nothing_offered(couplings, "score"))
    if not isinstance(model, nn.Module):
        raise ScoreError(f"{type(model).__name__} is not an nn.Module: pass the model that the couplings are of")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = dict.fromkeys(m.parameter for c in couplings.offered for m in c.members)
    for name in names:
        weight = parameters.get(name)
        if weight is None or tuple(weight.shape) != couplings.shapes[name]:
            raise ScoreError(f"parameter {name!r} is not the one the couplings were detected on: detect on this model")
        if weight.is_meta:
            raise ScoreError(f"parameter {name!r} is on meta and has no values to score: load the weights first")
        if not weight.isfinite().all():
            raise ScoreError(f"parameter {name!r} holds values that are not finite: repair the weights first")
    return {name: parameters[name] for name in names}


def _statistic(method: Method, weights: Mapping[str, nn.Parameter], couplings: Couplings) -> Statistic:
    for name, weight in weights.items():
        if not weight.is_floating_point():
            raise ScoreError(f"parameter {name!r} of type {weight.dtype} has no gradient: score before quantising")
    if method.from_batches is None:
        raise ScoreError(f"method {method.name!r} cannot score from batches: register it with from_batches")
    with torch.inference_mode(False):  # its sums are updated outside of the caller's inference mode
        return method.from_batches(weights, couplings.offered)


@contextmanager
def _scoring(model: nn.Module, statistic: Statistic) -> Iterator[None]:
    """Eval mode, gradients for the statistic's inputs only; everything as before afterwards."""
    needed = {id(tensor) for tensor in statistic.inputs}
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        with modes_restored(model), torch.inference_mode(False), torch.enable_grad():
            model.eval()
            for parameter in flags:
                parameter.requires_grad_(id(parameter) in needed)
            with statistic.watching():
                yield
    finally:
        for parameter, required in flags.items():
            parameter.requires_grad_(required)


def one_batch(
    forward: Callable[..., object], inputs: Callable[[], Sequence[Tensor]], batch: object, loss: Loss, number: int,
    *, strict: bool = True,
) -> bool:  # fmt: skip
    """Differentiate the loss of one batch by `inputs`, asked for after the forward pass; hooks do the rest.

    Raises ScoreError for what is no batch, and for a loss that is not a finite scalar that depends on the model. Unless
    `strict`, one that is not finite is not differentiated; returns whether it was.
    """
    args, kwargs = arguments(batch, number)
    value = loss(forward(*args, **kwargs), args, kwargs)
    if not strict and isinstance(value, Tensor) and value.numel() == 1 and not value.isfinite():
        return False
    value = checked_value(value, f"batch {number}")
    torch.autograd.grad(value.reshape(()), list(inputs()), allow_unused=True)
    return True


def arguments(batch: object, number: int) -> Batch:
    """The batch as (args, kwargs); a lone tensor in place of `args` would be unpacked row by row, so it is refused."""
    if isinstance(batch, tuple | list) and len(batch) == 2:
        args, kwargs = batch
        if isinstance(args, tuple | list) and isinstance(kwargs, Mapping):
            return args, kwargs
    raise ScoreError(f"batch {number} is not a pair (args, kwargs): pass for example ((ids,), {{}})")
