"""The logits of the next token, step by step: by the model's cache where it has one that is right, else anew each time.

A cache is whatever a model returns beside its logits and takes back: which output that is, and which argument, is found
by trying, and believed only where it gives the logits of a call without it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ecospa_fx.calibration.causal import CausalModel, answer, parameters_of
from ecospa_fx.importance.losses import Batch

PREFIX, SINGLE = 8, 4
"""Tokens on which a cache is tried, of which the last ones are read one by one."""


class Decoder(Protocol):
    """Reads tokens of growing sequences."""

    def next_logits(self, ids: Tensor) -> Tensor:
        """Logits [rows, vocabulary] of the token after ids [rows, positions], which begin with those read before."""


class Recompute:
    """All tokens anew at every step."""

    def __init__(self, causal: CausalModel) -> None:
        self._causal = causal

    def next_logits(self, ids: Tensor) -> Tensor:
        return self._causal.read(ids)[:, -1]


@dataclass(frozen=True, slots=True)
class Cache:
    """Where a model returns its cache, and where it takes it back."""

    output: int | str
    """Index, key or attribute of the output."""
    argument: str
    """Name of the argument."""

    def of(self, output: object) -> object:
        """The cache in an output."""
        return dict(_parts(output))[self.output]


class WithCache:
    """Only the tokens that have not been read, beside the cache of those that have."""

    def __init__(self, causal: CausalModel, cache: Cache) -> None:
        self._causal, self._cache = causal, cache
        self._past: dict[str, object] = {}
        self._read = 0

    def next_logits(self, ids: Tensor) -> Tensor:
        args, kwargs = _returning_cache(self._causal, self._causal.call.batch(ids[:, self._read :], self._read))
        output = answer(self._causal.model, (args, {**kwargs, **self._past}))
        self._past, self._read = {self._cache.argument: self._cache.of(output)}, ids.shape[1]
        return self._causal.logits(output)[:, -1]


def cache_of(causal: CausalModel) -> Cache | None:
    """Where the model's cache is, proven on a short prefix; None where there is none that is right."""
    rows = torch.arange(2)[:, None]
    ids = causal.valid[(torch.arange(PREFIX) * 7 + 3 * rows).remainder(len(causal.valid)).to(causal.valid.device)]
    args, kwargs = _returning_cache(causal, causal.call.batch(ids[:, :1]))
    try:
        parts = list(_parts(answer(causal.model, (args, kwargs))))
        whole = [causal.read(ids[:, :positions])[:, -1] for positions in range(PREFIX - SINGLE, PREFIX + 1)]
    except Exception:  # whatever a model says to being asked for a cache
        return None
    for cache in _candidates(parts, causal, set(kwargs)):
        if _is_right(WithCache(causal, cache), ids, whole):
            return cache
    return None


def is_close(logits: Tensor, expected: Tensor) -> bool:
    """Whether two ways to compute logits agree but for rounding: to half of the digits of their type."""
    finite = expected.isfinite()
    difference, size = (logits - expected)[finite].abs(), expected[finite].abs()
    return bool(difference.max() <= math.sqrt(torch.finfo(expected.dtype).eps) * size.max())  # False for NaN


def _returning_cache(causal: CausalModel, batch: Batch) -> tuple[tuple[object, ...], dict[str, object]]:
    """A call for which the model returns its cache, where it has to be asked."""
    args, kwargs = batch
    asked = {"use_cache": True} if "use_cache" in parameters_of(causal.model) else {}
    return tuple(args), {**kwargs, **asked}


def _parts(output: object) -> Iterator[tuple[int | str, object]]:
    """The entries of an output by index, key or attribute."""
    if isinstance(output, Mapping):
        yield from output.items()
    elif isinstance(output, tuple | list):
        yield from enumerate(output)
    elif not isinstance(output, Tensor):
        yield from getattr(output, "__dict__", {}).items()


def _candidates(parts: list[tuple[int | str, object]], causal: CausalModel, taken: set[str]) -> Iterator[Cache]:
    """Outputs that arguments of their name take; of outputs without names, any optional argument."""
    optional = [
        name for name, p in parameters_of(causal.model).items()
        if p.default is None and name not in taken and p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]  # fmt: skip
    for place, part in parts:
        if part is not None and not isinstance(part, bool | int | float | str):
            yield from (Cache(place, name) for name in optional if place == name or isinstance(place, int))


def _is_right(decoder: WithCache, ids: Tensor, whole: list[Tensor]) -> bool:
    """Whether the logits after each prefix are those of a call without a cache."""
    try:
        lengths = range(PREFIX - SINGLE, PREFIX + 1)
        return all(is_close(decoder.next_logits(ids[:, :n]), e) for n, e in zip(lengths, whole, strict=True))
    except Exception:  # whatever a model says to what is no cache
        return False
