"""Scoring a model's couplings on calibration data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ecospa_fx.coupling.couplings import Couplings
from ecospa_fx.errors import ScoreError
from ecospa_fx.graph.wrappers import unwrapped
from ecospa_fx.importance.methods import Method, Statistic, method_named
from ecospa_fx.importance.progress import watched
from ecospa_fx.importance.scores import Scores

Batch = tuple[Sequence[Any], Mapping[str, Any]]
"""Positional and keyword arguments of one call of the model."""

Loss = Callable[[Any, Sequence[Any], Mapping[str, Any]], Tensor]
"""(output, args, kwargs) to a scalar."""


def score(
    model: nn.Module,
    couplings: Couplings,
    batches: Iterable[Batch] = (),
    *,
    loss: Loss | None = None,
    method: str = "gate-fisher",
    progress: bool = False,
) -> Scores:
    """Score every unit of every offered coupling.

    method: "gate-fisher" (recommended), "fisher", "taylor", or "magnitude", which reads no batches; formulas in
    `ecospa_fx.importance.methods`. A batch is one sample of the expectation over the data, so the Fisher methods
    tell more from many small batches (one sequence each) than from few large ones. The model runs in eval mode on
    its own device; frozen parameters are scored too; modes, gradients and hooks are as before afterwards. Memory
    beyond the forward and backward pass is one number per unit. `progress` shows a bar on stderr: batches
    done, of how many where `batches` has a length, and the time left.

    Raises ScoreError for empty batches, a loss that is not a scalar or does not depend on the coupled parameters,
    values that are not finite, and weights without values (``meta``).

    >>> loss = lambda output, args, kwargs: output.square().mean()
    >>> scores = score(model, couplings, [((x,), {}) for x in data], loss=loss)  # doctest: +SKIP
    >>> scores[couplings[0].name].shape == (couplings[0].carriers, couplings[0].size)  # doctest: +SKIP
    True
    """
    chosen, model = method_named(method), unwrapped(model)
    weights = _coupled_weights(model, couplings)
    if chosen.from_weights is not None:
        return Scores(method, chosen.from_weights(weights, couplings.offered))
    if loss is None:
        raise ScoreError(f"method {method!r} needs a loss: pass loss=, a function (output, args, kwargs) -> scalar")
    statistic, count = _statistic(chosen, weights, couplings), 0
    with _scoring(model, statistic):
        for count, batch in enumerate(watched(batches, method) if progress else batches, 1):  # read below
            one_batch(model, lambda: statistic.inputs, batch, loss, count - 1)
            statistic.end_batch(count - 1)
    if count == 0:
        raise ScoreError(f"there are no batches to score with {method!r}: pass at least one (args, kwargs)")
    return Scores(method, statistic.result())


def magnitudes(couplings: Couplings) -> Scores:
    """The scores that need no data, from the weights of the model that was inspected."""
    return score(couplings.model, couplings, method="magnitude")


def _coupled_weights(model: nn.Module, couplings: Couplings) -> dict[str, nn.Parameter]:
    """Every parameter of an offered coupling, checked to be the one detected, with finite values."""
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
    if not couplings.offered:
        raise ScoreError("there is nothing to score because no coupling is offered: print(couplings) shows the reasons")
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
    modes = {module: module.training for module in model.modules()}
    needed = {id(tensor) for tensor in statistic.inputs}
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.eval()
        for parameter in flags:
            parameter.requires_grad_(id(parameter) in needed)
        with torch.inference_mode(False), torch.enable_grad(), statistic.watching():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        for parameter, required in flags.items():
            parameter.requires_grad_(required)


def one_batch(
    forward: Callable[..., Any], inputs: Callable[[], Sequence[Tensor]], batch: object, loss: Loss, number: int
) -> None:
    """Differentiate the loss of one batch by `inputs`, asked for after the forward pass; hooks do the rest.

    Raises ScoreError for what is no batch, and for a loss that is not a finite scalar that depends on the model.
    """
    args, kwargs = arguments(batch, number)
    value = loss(forward(*args, **kwargs), args, kwargs)
    if not isinstance(value, Tensor) or value.numel() != 1:
        told = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
        raise ScoreError(f"the loss of batch {number} is not a scalar but of {told}: return its mean or sum")
    if not value.requires_grad:
        raise ScoreError(
            f"the loss of batch {number} does not depend on the model: return the loss of the model's output"
        )
    if not value.isfinite():
        raise ScoreError(f"the loss of batch {number} is {value.item()}: leave the batch out or repair the weights")
    torch.autograd.grad(value.reshape(()), list(inputs()), allow_unused=True)


def arguments(batch: object, number: int) -> Batch:
    """The batch as (args, kwargs); a lone tensor in place of `args` would be unpacked row by row, so it is refused."""
    if isinstance(batch, tuple | list) and len(batch) == 2:
        args, kwargs = batch
        if isinstance(args, tuple | list) and isinstance(kwargs, Mapping):
            return args, kwargs
    raise ScoreError(f"batch {number} is not a pair (args, kwargs): pass for example ((ids,), {{}})")
