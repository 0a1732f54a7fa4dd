"""Windows of text that a causal language model writes itself: calibration data without data, as much as is wanted.

A random first token, three greedy ones, then sampling (Liu et al., "LLM-QAT: Data-Free Quantization Aware Training for
Large Language Models", 2024, section 3.1). What a model writes is spread as what it was trained on, as far as it has
learnt that, so that a model calibrated on it keeps every kind of text and not the one that somebody had at hand.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import count as count_from

import torch
from torch import Tensor, nn

from ecospa_fx.calibration.causal import CausalModel, causal_model, evaluating
from ecospa_fx.calibration.decoding import Cache, Decoder, Recompute, WithCache, cache_of, is_close
from ecospa_fx.calibration.token_call import NotCausalError
from ecospa_fx.checks import check_flag, check_whole, is_number
from ecospa_fx.errors import ScoreError
from ecospa_fx.importance.losses import Batch
from ecospa_fx.importance.unit_reduction import accumulator_dtype
from ecospa_fx.progress import progress_bar
from ecospa_fx.runtime.guards import leaves_untouched
from ecospa_fx.wrappers import unwrapped

COUNT, LENGTH = 128, 512
"""Windows, and tokens of each, by default."""
GREEDY = 3
"""Tokens after the first that are the most likely ones."""
BATCH_SIZE = 32
"""Windows that are written side by side, by default."""
DEGENERATE = 0.9
"""Share of the positions of its window that a token may have, in the mean over windows."""


def generated(  # noqa: PLR0913  # what is written, and how
    model: nn.Module,
    args: Sequence[object] = (),
    kwargs: Mapping[str, object] | None = None,
    *,
    count: int = COUNT,
    length: int = LENGTH,
    seed: int = 0,
    temperature: float = 1.0,
    batch_size: int = BATCH_SIZE,
    progress: bool = False,
) -> list[Batch]:
    """Calibration text that a causal language model writes itself.

    Any module will do that reads token ids [rows, positions] and returns logits [rows, positions, vocabulary] among
    whatever else, where later tokens move no earlier logits: that is tried. Where it returns a cache and takes it back,
    and the cache gives the same logits, it is used. The model, its modes and all random numbers stay as they are.

    Window i of a seed is drawn from random numbers of its own, so that it is the same whatever `count` and `batch_size`
    are, as long as rounding does not move a draw; a longer window begins with the shorter one.

    Args:
        model: an ``nn.Module`` with its weights, on any device but ``meta``.
        args: tuple of positional example inputs, by default (); the call that they are of is kept, with other ids.
        kwargs: mapping of example inputs by name, by default none. Without any, the ids are the first argument.
        count: how many windows to write, at least 1.
        length: tokens per window, at least 2; fewer where the model reads fewer.
        seed: what the windows are drawn from, at least 0.
        temperature: that of sampling, above 0; 1 is the model's own distribution.
        batch_size: how many windows are written side by side.
        progress: True for a bar on stderr.

    Returns:
        A list of `count` batches (args, kwargs), each with ids [1, length]: what `batches` of `compress` takes.

    Raises:
        ScoreError: an option is out of range, the model is no causal language model, or it writes one token for ever.
        CaptureError: the model is no module.

    Examples:
        A model of bigrams, whose logits after a token are a row of its table:

        >>> import torch, ecospa_fx as eco
        >>> _ = torch.manual_seed(0)
        >>> bigrams = torch.nn.Embedding(50, 50)
        >>> batches = eco.calibration.generated(bigrams, count=4, length=16)
        >>> [tuple(args[0].shape) for args, kwargs in batches]
        [(1, 16), (1, 16), (1, 16), (1, 16)]

        The same text, however much of it:

        >>> first = eco.calibration.generated(bigrams, count=1, length=16)
        >>> first[0][0][0].equal(batches[0][0][0])
        True

        More text than anyone asks for, written while it is read:

        >>> from itertools import islice
        >>> fresh = eco.calibration.stream(bigrams, start=4, length=16)
        >>> len(list(islice(fresh, 6)))
        6

        Data for `compress`, of a model of transformers:

        >>> own = eco.calibration.generated(model, count=256, progress=True)  # doctest: +SKIP
        >>> small = eco.compress(model, ratio=0.2, batches=own)  # doctest: +SKIP
    """
    check_whole("count", count, 1, ScoreError, "a number of windows")
    check_flag("progress", progress, ScoreError)
    text = GeneratedText(model, args, kwargs, length, seed, temperature, batch_size)
    return text.windows(0, count, progress=progress)


def stream(
    model: nn.Module,
    args: Sequence[object] = (),
    kwargs: Mapping[str, object] | None = None,
    *,
    start: int = 0,
    length: int = LENGTH,
    seed: int = 0,
    temperature: float = 1.0,
    batch_size: int = BATCH_SIZE,
) -> Iterator[Batch]:
    """The windows of `generated` from number `start` on, without an end: each is written when it is asked for.

    They are written `batch_size` at a time, none twice. The other arguments, and what is raised, are as of `generated`.
    """
    check_whole("start", start, 0, ScoreError, "the number of a window")
    text = GeneratedText(model, args, kwargs, length, seed, temperature, batch_size)
    return (batch for first in count_from(start, batch_size) for batch in text.windows(first, first + batch_size))


class GeneratedText:
    """What a model writes, by the number of the window. Raises ScoreError for a model that writes nothing of use."""

    def __init__(
        self, model: nn.Module, args: Sequence[object] = (), kwargs: Mapping[str, object] | None = None,
        length: int = LENGTH, seed: int = 0, temperature: float = 1.0, batch_size: int = BATCH_SIZE,
    ) -> None:  # fmt: skip
        check_whole("length", length, 2, ScoreError, "a number of tokens")
        check_whole("seed", seed, 0, ScoreError, "a seed")
        check_whole("batch_size", batch_size, 1, ScoreError, "a number of windows")
        if not is_number(temperature) or not 0 < temperature < float("inf"):
            raise ScoreError(f"temperature={temperature!r:.60} is none to sample at: give a positive number")
        self._seed, self._temperature, self._batch_size = seed, temperature, batch_size
        self.causal, self.length, self._cache = _prepared(model, args, kwargs, length)

    def windows(self, start: int, stop: int, *, progress: bool = False) -> list[Batch]:
        """Windows `start` to `stop`, the latter excluded."""
        groups = [range(i, min(i + self._batch_size, stop)) for i in range(start, stop, self._batch_size)]
        steps: Iterator[int] = iter(range(len(groups) * (self.length - 1)))
        if progress:
            steps = iter(progress_bar(range(len(groups) * (self.length - 1)), "generate"))
        texts = [_written(self.causal.model, self, numbers, steps) for numbers in groups]
        next(steps, None)  # so that a bar ends
        with torch.inference_mode(False):  # whatever the caller's mode, what is calibrated on goes where gradients are
            ids = torch.cat(texts)
            self._check_varied(ids)
            return [self.causal.call.batch(row[None]) for row in ids]

    def write(self, numbers: range, steps: Iterator[int]) -> Tensor:
        """The ids [windows, length] of some windows; a step is taken from `steps` for every token after the first."""
        if self._cache is None:
            return self._decoded(Recompute(self.causal), numbers, steps)[0]
        ids, logits = self._decoded(WithCache(self.causal, self._cache), numbers, steps)
        if not is_close(logits[:1], self.causal.read(ids[:1, :-1])[:, -1]):
            self._cache = None  # right on a prefix, but not as far as this
            return self.write(numbers, count_from())
        return ids

    def _decoded(self, decoder: Decoder, numbers: range, steps: Iterator[int]) -> tuple[Tensor, Tensor]:
        """(ids [windows, length], the logits that the last ones were drawn from)."""
        valid = self.causal.valid
        drawn = torch.stack([_uniform(self._seed, number, self.length) for number in numbers])
        drawn = drawn.to(valid.device, accumulator_dtype(valid.device))
        ids = valid[(drawn[:, :1] * len(valid)).long()]
        logits = torch.empty(0)
        for position in range(1, self.length):
            next(steps, None)
            logits = decoder.next_logits(ids)
            if position <= GREEDY:
                chosen = logits[:, valid].argmax(-1)
            else:
                chosen = _sampled(logits[:, valid] / self._temperature, drawn[:, position])
            ids = torch.cat([ids, valid[chosen][:, None]], 1)
        return ids, logits

    def _check_varied(self, ids: Tensor) -> None:
        """Raise ScoreError where windows hold little but one token each."""
        if ids.shape[1] <= GREEDY + 2:
            return
        tail = ids[:, GREEDY + 1 :]
        modes = tail.mode(1).values
        share = float((tail == modes[:, None]).double().mean())
        if share > DEGENERATE:
            raise ScoreError(
                f"{type(self.causal.model).__name__} writes one token for ever: {share:.0%} of its own text is one and "
                f"the same token in each window, such as {int(modes[0])}, which is no text to calibrate on: "
                "pass data with batches=, and generated_share=0"
            )


@leaves_untouched(calls=True)
def _prepared(
    model: nn.Module, args: Sequence[object], kwargs: Mapping[str, object] | None, length: int
) -> tuple[CausalModel, int, Cache | None]:
    """(the model as a causal one, the tokens per window that it reads, its cache). Raises ScoreError for another."""
    try:
        causal = causal_model(model, args, kwargs)
    except NotCausalError as reason:
        name = type(unwrapped(model)).__name__
        raise ScoreError(f"{name} cannot write calibration text because {reason}: pass data with batches=") from reason
    most = causal.length(length)
    if most < min(length, GREEDY + 2):
        raise ScoreError(f"{type(causal.model).__name__} reads only {most} tokens at a time: pass data with batches=")
    with evaluating(causal.model):
        return causal, most, cache_of(causal)


@leaves_untouched(calls=True)
def _written(model: nn.Module, text: GeneratedText, numbers: range, steps: Iterator[int]) -> Tensor:
    """Some windows of a text of the model's, which is left as it was."""
    with evaluating(model):
        return text.write(numbers, steps)


def _uniform(seed: int, number: int, length: int) -> Tensor:
    """float64 [length], from 0 to below 1, of a source of this window's own, whose state depends on both numbers."""
    source = random.Random(f"{seed} {number}")
    return torch.tensor([source.random() for _ in range(length)], dtype=torch.float64)


def _sampled(logits: Tensor, uniform: Tensor) -> Tensor:
    """[rows] classes of logits [rows, classes], each where a uniform number falls among the sums of probabilities."""
    sums = logits.to(uniform.dtype).softmax(-1).cumsum(-1)
    total = sums[:, -1:]
    below = torch.minimum(uniform[:, None] * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(sums, below, right=True).squeeze(1)
