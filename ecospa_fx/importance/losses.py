"""What a loss must be, and a unit for it in which nothing over- or underflows.

Whatever is measured of a loss L is measured of its slope ∂L/∂y at the model's output y. An additive constant therefore
changes nothing, and a loss may be negative. Its unit must change nothing either, so L is multiplied by a power of two,
which rounds nothing, that brings the length of its slope to between 1 and 2; where gradients are compared with a
constant, as by the steps of distillation, by the number that makes it 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ecospa_fx.errors import ScoreError
from ecospa_fx.importance.unit_reduction import accumulator_dtype
from ecospa_fx.ir.pytrees import closed, opened

Batch = tuple[Sequence[Any], Mapping[str, Any]]
"""Positional and keyword arguments of one call of the model."""

Loss = Callable[[Any, Sequence[Any], Mapping[str, Any]], Tensor]
"""(output, args, kwargs) to a scalar."""

Slopes = list[Tensor | None]
"""The loss's gradient at each leaf of an output; None where the loss does not depend on it."""

STEP = 0.01
"""How far an output is moved, in its root mean squares, to see whether the loss's slope there was none but rounding."""

ROUNDING = 1e-5
"""What rounding moves an output, in its root mean squares, at most: float32 through many layers."""

EXPONENTS = 0, *(sign * size for size in range(12, 109, 12) for sign in (1, -1))
"""Powers of two that are tried in turn until a slope can be represented: half precision has few, float32 these."""

REMEDY = "give a loss of the data, such as the one that the model was trained with, or use method='magnitude'"
"""What helps where a loss has no slope."""


def checked_value(value: object, name: str) -> Tensor:
    """What a loss returned, if it is a finite scalar that has a gradient. name: of the batch, for the ScoreError."""
    if not isinstance(value, Tensor) or value.numel() != 1:
        kind = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
        raise ScoreError(f"the loss of {name} is not a scalar but of {kind}: return its mean or sum")
    if not value.is_floating_point():
        raise ScoreError(f"the loss of {name} is of type {value.dtype}, which has no gradient: return a floating one")
    if not value.requires_grad:
        raise ScoreError(
            f"the loss of {name} does not depend on the model: return the loss of the model's output, without "
            "detach(), item() or no_grad()"
        )
    if not value.isfinite():
        raise ScoreError(f"the loss of {name} is {value.item()}: leave the batch out or repair the weights")
    return value


def parts_of(output: object) -> tuple[list[Any], Callable[[Sequence[object]], object]]:
    """The leaves of an output, those within its objects too, and what makes an output of as many others."""
    leaves, spec = pytree.tree_flatten(opened(output))
    return leaves, lambda others: closed(pytree.tree_unflatten(others, spec))[0]


def leaves_of(output: object) -> list[Any]:
    """The leaves of an output alone."""
    return parts_of(output)[0]


def slopes_of(loss: Loss, output: object, batch: Batch, name: str | None = None) -> Slopes:
    """The loss's gradient at each leaf of an output, which stays as it is.

    name: of the batch, for the ScoreError of a loss that is no finite scalar with a gradient; by default none is raised
    for what is not finite.
    """
    leaves, rebuilt = parts_of(output)
    with torch.inference_mode(False), torch.enable_grad():
        seen = [_watched(leaf) for leaf in leaves]
        value = loss(rebuilt(seen), *batch)
        return _gradients(value if name is None else checked_value(value, name), seen)


def is_floating(leaf: object) -> TypeGuard[Tensor]:
    """Whether a leaf of an output is a tensor that a loss may have a slope at."""
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.layout is torch.strided and not leaf.is_nested


def _watched(leaf: object, *, view: bool = False) -> object:
    """A leaf of its own for the gradient; with `view`, a view of one that has a history, which goes on."""
    if not is_floating(leaf):
        return leaf
    if view and leaf.requires_grad:
        return leaf.view_as(leaf)
    own_leaf = leaf.clone() if leaf.is_inference() else leaf
    return own_leaf.detach().requires_grad_()


def _gradients(value: Tensor, seen: Sequence[object], factor: float = 1.0, keep: bool = False) -> Slopes:
    watched = [leaf for leaf in seen if is_floating(leaf) and leaf.requires_grad]
    if not watched or not value.requires_grad:
        return [None for _ in seen]
    value = value.reshape(())
    scale = torch.full_like(value, factor)
    gradients = iter(torch.autograd.grad(value, watched, scale, retain_graph=keep, allow_unused=True))
    return [next(gradients) if is_floating(leaf) and leaf.requires_grad else None for leaf in seen]


def length(tensors: Iterable[Tensor | None]) -> float:
    """The norm of all tensors together, as float64 where the device has it."""
    norms = (torch.linalg.vector_norm(t.detach(), dtype=accumulator_dtype(t.device)) for t in tensors if t is not None)
    return math.hypot(*map(float, norms))


class NormalisedLoss:
    """A loss times a number, `factor`, that brings the length of its slope to between 1 and 2; with `exact`, to 1.

    Powers of two round nothing, so that what several processes measure in units of their own adds up to what one
    measures; where it is learnt by steps that have a size of their own, the length has to be the same in all units.
    The factor is that of the first output at which there is a slope, and None until then. What is measured of the loss
    is to be divided by `unit`, which is the factor, or 1.
    """

    def __init__(self, loss: Loss, *, exact: bool = False) -> None:
        self._exact = exact
        self.factor: float | None = None
        self.is_flat = False
        """Whether there were outputs, and no slope but rounding at any so far."""
        self._loss = loss

    @property
    def unit(self) -> float:
        return 1.0 if self.factor is None else self.factor

    @property
    def is_rounding(self) -> bool:
        """Whether all slopes so far were rounding, and some were there."""
        return self.is_flat and self.factor is not None

    def __call__(self, output: object, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        return self._in_unit(self._loss, output, args, kwargs)

    def of(self, loss: Loss) -> Loss:
        """Another loss in the same unit, such as a probe, which is that of the first of all."""
        return partial(self._in_unit, loss)

    def _in_unit(self, loss: Loss, output: object, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        if self.factor is None or self.is_flat:
            return self._measured(loss, output, (args, kwargs))
        return _scaled(loss(output, args, kwargs), self.factor)

    def _measured(self, loss: Loss, output: object, batch: Batch) -> Tensor:
        """The loss at an output, whose slope there decides on the factor. One call of the loss tells both."""
        leaves, rebuilt = parts_of(output)
        graded = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.enable_grad():
            # Views, so that hooks on the outputs themselves see the backward pass proper alone.
            seen = [_watched(leaf, view=True) for leaf in leaves]
            value = loss(rebuilt(seen), *batch)
            if isinstance(value, Tensor) and value.numel() == 1 and value.requires_grad and bool(value.isfinite()):
                self._decide(loss, value, seen, output, batch)
        value = _scaled(value, self.unit)
        return value if graded or not isinstance(value, Tensor) else value.detach()

    def _decide(self, loss: Loss, value: Tensor, seen: Sequence[object], output: object, batch: Batch) -> None:
        factor, slopes = _factor(value, seen, self._exact)
        if not length(slopes) > 0:
            self.is_flat |= any(map(is_floating, seen)) and self.factor is None
            return
        self.factor = self.factor or factor
        # Of a distance so small that the slope may be rounding. Other losses are called once per batch.
        reach = length(slopes) * length(leaf for leaf in seen if is_floating(leaf))
        small = abs(float(value.detach())) * factor < ROUNDING * reach
        self.is_flat = small and _is_rounding(times(loss, factor), output, slopes, batch)


def times(loss: Loss, factor: float) -> Loss:
    """The loss in another unit, in at least float32."""
    return lambda output, args, kwargs: _scaled(loss(output, args, kwargs), factor)


def _scaled(value: Tensor, factor: float) -> Tensor:
    """value · factor, in at least float32; what is no floating tensor is left for others to refuse."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.to(torch.promote_types(value.dtype, torch.float32)) * factor


def _factor(value: Tensor, seen: Sequence[object], exact: bool) -> tuple[float, Slopes]:
    """The number by which the slope has a length from 1 to 2, or of 1, and that slope; 1 where it has none."""
    value, slopes = _scaled(value, 1.0), list[Tensor | None]()
    for exponent in EXPONENTS:
        slopes = _gradients(value, seen, 2.0**exponent, keep=True)
        size = length(slopes)
        if 0 < size < math.inf:
            factor = 2.0**exponent
            # Twice each, for half precision may have lost most of it at first, and rounds what is left.
            for whole in (False, False, True, True)[: 4 if exact else 2]:
                factor /= size if whole else 2.0 ** math.floor(math.log2(size))
                slopes = _gradients(value, seen, factor, keep=True)
                size = length(slopes)
            return factor, slopes
    return 1.0, slopes


def no_slope(what: str) -> ScoreError:
    """The refusal of a loss that says nothing of any unit."""
    return ScoreError(
        f"{what} would be zero for every unit because the loss has no slope at the dense model in any batch, as if it "
        f"were constant, or a distance to the dense model's own answers: {REMEDY}"
    )


def check_slope(loss: Loss, answers: Iterable[tuple[Batch, object]]) -> tuple[Batch, object]:
    """The first batch, with its answer, at which a loss has a slope. answers: the dense model's, one per batch.

    Raises ScoreError for a loss whose slope is zero in all of them, or no more than rounding. The loss is called for
    each, until there is a slope, and once more for an answer that is moved a little.
    """
    unit = NormalisedLoss(loss)
    for number, (batch, output) in enumerate(answers):
        if not any(map(is_floating, leaves_of(output))):
            return batch, output  # in parts that nobody knows
        slopes = slopes_of(unit, output, batch, f"batch {number}")
        if all(slope is None for slope in slopes):
            raise ScoreError(f"the loss of batch {number} does not depend on what the model returns: return its loss")
        if not math.isfinite(length(slopes)):
            raise ScoreError(
                f"the loss of batch {number} is finite, but its slope at the model's output is not, as that of a root "
                "is at zero: return its square, or leave the batch out"
            )
        if length(slopes) > 0 and not (unit.is_flat or _is_rounding(unit, output, slopes, batch)):
            return batch, output
    raise no_slope("all scores")


def _is_rounding(loss: Loss, output: object, slopes: Slopes, batch: Batch) -> bool:
    """Whether moving the output by what rounding is takes the loss to where its slope is none.

    The slope that a small step brings, divided by the step, is how fast the slope grows; the slope at the output itself
    divided by that is how far its zero is away, in root mean squares of the output.
    """
    there = slopes_of(loss, moved(output, slopes, STEP), batch)
    grown = length(b - a for a, b in zip(slopes, there, strict=True) if a is not None and b is not None)
    noise = max(ROUNDING, *(torch.finfo(slope.dtype).eps for slope in slopes if slope is not None))
    return math.isfinite(grown) and STEP * length(slopes) < noise * grown


def moved(output: object, slopes: Slopes, step: float) -> object:
    """An output moved at random, by so many root mean squares, where there are slopes; the same one every time."""
    leaves, rebuilt = parts_of(output)
    source = torch.Generator().manual_seed(0)
    for i, (leaf, slope) in enumerate(zip(leaves, slopes, strict=True)):
        if slope is not None:
            values = leaf.detach()
            drawn = torch.randn(leaf.shape, generator=source).to(values)
            leaves[i] = values + step * values.float().square().mean().sqrt().to(values) * drawn
    return rebuilt(leaves)
