"""What counts as a sample: batches are taken apart along their leading axis, so that each sample has a loss of its own.

Scores are expectations over samples, so a batch of several must give what its samples give one by one. The loss of a
sample is the loss function on the sample's part of the arguments and the model's output for it. That takes a model that
treats samples apart and a loss that is made of theirs, a sum or any weighted mean. Both are checked on the first batch
of several: outputs against their parts, and the loss's gradient at a sample's output against that of the sample's own
loss, which must be the same up to a factor. A contrastive loss, a norm over the batch or a graph of one batch size does
not pass: every batch is one sample then, and one warning says why.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from copy import copy
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ecospa_fx.errors import warn_caller
from ecospa_fx.importance.losses import Batch, Loss, NormalisedLoss, times
from ecospa_fx.importance.output_distance import needs_scales, scaled_loss
from ecospa_fx.importance.separable import Comparison, Output, closed_again, open_tensors
from ecospa_fx.runtime.interpreter import PartialInterpreter

Answer = Callable[[Batch], object]
"""What the model returns for some arguments."""


class Splitter:
    """Takes batches apart into samples, all in the same way.

    answer: runs the model, with `weights`, whose types say how exact it is.
    """

    def __init__(self, answer: Answer, loss: Loss, weights: Iterable[Tensor]) -> None:
        self._answer, self.loss = answer, loss
        self._types = {weight.dtype for weight in weights}
        self._checked = self._whole = self._warned = self._warned_empty = False

    def split(self, batch: Batch, number: int) -> list[Batch]:
        """The samples of batch `number`, as views of its tensors; the batch itself where it is one or counts as one."""
        try:
            parts = [batch] if self._whole else parts_of(batch)
        except Indivisible as reason:
            self._warn(f"batch {number} counts as one sample, because {reason}")
            return [batch]
        if len(parts) > 1 and not self._checked:
            obstacle = self._obstacle(batch, parts)
            self._checked, self._whole = True, obstacle is not None
            if obstacle:
                self._warn(f"every batch counts as one sample, because {obstacle}")
        return [batch] if self._whole else parts

    def all_of(self, batches: Iterable[Batch]) -> list[Batch]:
        """The samples of all batches, without those that have no finite loss where others of their batch have one."""
        samples: list[Batch] = []
        for number, batch in enumerate(batches):
            parts = self.split(batch, number)
            kept = parts if len(parts) == 1 else [part for part in parts if self._is_finite(part)]
            if len(kept) < len(parts):
                self.left_out(number)
            samples += kept or [batch]
        return samples

    def scale(self, batches: Sequence[Batch]) -> None:
        """Give a distance without scales those of the answers, for good."""
        if needs_scales(self.loss):
            samples = (part for number, batch in enumerate(batches) for part in self.split(batch, number))
            with torch.no_grad():
                self.loss = scaled_loss(self.loss, (self._answer(sample) for sample in samples))

    def left_out(self, number: int) -> None:
        """Say that a sample of batch `number` has no finite loss, though the batch may have."""
        if not self._warned_empty:
            warn_caller(
                f"a sample of batch {number} is left out because its own loss is not finite: check that it has labels"
            )
        self._warned_empty = True

    def _warn(self, reason: str) -> None:
        if not self._warned:
            warn_caller(f"{reason}: where it holds several, pass each as a batch of its own")
        self._warned = True

    def _is_finite(self, part: Batch) -> bool:
        with torch.no_grad():
            return bool(torch.as_tensor(self.loss(self._answer(part), *part)).isfinite().all())

    def fits(self, batch: Batch, parts: Sequence[Batch]) -> bool:
        """Whether a batch is made of these samples."""
        try:
            return self._obstacle(batch, parts) is None
        except Exception:  # as of a graph of one batch size
            return False

    def _obstacle(self, batch: Batch, parts: Sequence[Batch]) -> str | None:
        """Why a batch is not made of its samples; None where it is, "" where the whole batch will show an error."""
        with torch.no_grad():
            whole = Output.of(self._answer(batch))
        unit = NormalisedLoss(self.loss)  # of which slopes neither over- nor underflow
        slopes = whole.slopes(batch, unit)
        if slopes is None or not isfinite(slopes[0]):
            return ""
        if all(slope is None for slope in slopes[1]):
            return "its loss is no function of what the model returns"
        comparison, loss = Comparison(whole, *slopes, len(parts), self._types), times(self.loss, unit.unit)
        for place, part in enumerate(parts):
            try:
                with torch.no_grad(), warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of what a single sample may not be meant for
                    reason = comparison.add(place, Output.of(self._answer(part)), part, loss)
            except Exception as error:  # whatever a model, a graph or a loss says to what it was not written for
                first = next(iter(str(error).splitlines()), type(error).__name__)
                return f"a single sample of it cannot be computed ({first[:200]})"
            if reason is not None:
                return reason
        return comparison.conclusion()


def samples_of(batches: Iterable[Batch], evaluator: PartialInterpreter, loss: Loss) -> list[Batch]:
    """The samples of all batches, by a program that runs them. Raises what a batch that cannot be run raises."""
    weights = evaluator.program.values.values()
    return Splitter(lambda batch: evaluator.answer(*batch), loss, weights).all_of(batches)


def grouped(samples: Sequence[Batch], size: int, evaluator: PartialInterpreter, loss: Loss) -> list[Batch]:
    """The samples in batches of so many, to be read at once; one by one where model or loss do not take them so."""
    if size < 2 or len(samples) < 2:
        return list(samples)
    groups = [samples[i : i + size] for i in range(0, len(samples), size)]
    batches = [batch for group in groups if (batch := joined(group)) is not None]
    if len(batches) < len(groups):
        return list(samples)
    splitter = Splitter(lambda batch: evaluator.answer(*batch), loss, evaluator.program.values.values())
    return batches if splitter.fits(batches[0], groups[0]) else list(samples)


def joined(samples: Sequence[Batch]) -> Batch | None:
    """One batch of several, each with tensors of leading size 1; None where they do not fit together."""
    trees = [pytree.tree_flatten(open_tensors((tuple(args), dict(kwargs)))) for args, kwargs in samples]
    if any(spec != trees[0][1] for _, spec in trees):
        return None
    leaves = []
    for column in zip(*(flat for flat, _ in trees), strict=True):
        if isinstance(column[0], Tensor) and len({(_shape(leaf), getattr(leaf, "dtype", None)) for leaf in column}) > 1:
            return None
        if _shape(column[0])[:1] == (1,) and isinstance(column[0], Tensor):
            leaves.append(torch.cat(column))
        elif all(_is_same(leaf, column[0]) for leaf in column):
            leaves.append(column[0])
        else:
            return None
    args, kwargs = closed_again(leaves, trees[0][1])
    return args, _like(samples[0][1], kwargs)


def _is_same(leaf: object, other: object) -> bool:
    if isinstance(leaf, Tensor) and isinstance(other, Tensor):
        return leaf is other or (leaf.dim() == 0 and leaf.equal(other))
    return leaf is other or (type(leaf) is type(other) and not _shape(leaf) and bool(leaf == other))


# -- arguments ---------------------------------------------------------------------------------------------------


class Indivisible(Exception):
    """A batch that cannot be cut into samples; the message says why."""


def parts_of(batch: Batch) -> list[Batch]:
    """One batch per sample, of leading size 1. Raises Indivisible naming what has another leading size than the rest.

    The first tensor tells how many samples there are. Tensors without axes or of leading size 1 belong to all of them,
    and so does what is no tensor, but for lists with an element per sample.
    """
    args, kwargs = batch
    tree = open_tensors((tuple(args), dict(kwargs)))
    count = next((shape[0] for leaf in pytree.tree_leaves(tree) if (shape := _shape(leaf))), 1)
    if count <= 1:
        return [batch]
    pairs, spec = pytree.tree_flatten_with_path(tree, is_leaf=lambda value: _is_listed(value, count))
    for path, leaf in pairs:
        if not _belongs(leaf, count):
            described = f"{_named(path)} of shape {list(leaf.shape)}"
            raise Indivisible(f"{described} has not the {count} samples of the first tensor along its first axis")
    leaves = [leaf for _, leaf in pairs]
    parts = (closed_again([_part(leaf, count, place) for leaf in leaves], spec) for place in range(count))
    return [(own_args, _like(kwargs, own_kwargs)) for own_args, own_kwargs in parts]


def _like(kwargs: Mapping[str, Any], values: dict[str, Any]) -> Mapping[str, Any]:
    """The values in a mapping of the same type, such as what a tokenizer returns, if one can be had."""
    if isinstance(kwargs, dict) or not isinstance(kwargs, MutableMapping):
        return values
    result = copy(kwargs)
    result.update(values)
    return result


def _shape(leaf: object) -> tuple[int, ...]:
    """Of an array with at least one axis; of anything else, parameters included, there is none."""
    shape = getattr(leaf, "shape", None)
    return tuple(shape) if isinstance(shape, tuple) and not isinstance(leaf, nn.Parameter) else ()


def _belongs(leaf: object, count: int) -> bool:
    shape = _shape(leaf)
    return not shape or shape[0] in (0, 1, count)


def _is_listed(value: object, count: int) -> bool:
    """Whether a list has an element per sample, and no tensors of all samples."""
    if type(value) is not list or len(value) != count:
        return False
    sizes = [shape[0] for leaf in pytree.tree_leaves(value) if (shape := _shape(leaf))]
    return count not in sizes or not {*sizes} <= {0, 1, count}


def _part(leaf: Any, count: int, place: int) -> Any:
    if type(leaf) is not list and _shape(leaf)[:1] != (count,):
        return leaf
    part = leaf[place : place + 1]
    # Of inference tensors, losses often copy several rows, and look at a single one, which autograd cannot keep.
    return part.clone() if isinstance(part, Tensor) and part.is_inference() else part


def _named(path: Sequence[Any]) -> str:
    return f"{'kwargs' if path[0].idx else 'args'}{pytree.keystr(tuple(path[1:]))}"
