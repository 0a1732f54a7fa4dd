"""Calibration and evaluation text: reading files, tokenising, windows, and a language model's loss and perplexity."""

from __future__ import annotations

import lzma
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ecospa_fx.errors import ScoreError, StorageError

BOOKS = "\n\n\n"
PIECE = 50_000
MOST_CHARACTERS = 20_000_000
"""A text is tokenised up to here; more would take minutes and add nothing to a few hundred windows."""

Encoder = Callable[[str], list[int]]


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, plain or compressed with xz. Raises StorageError where it is unreadable or empty."""
    if not path.is_file():
        raise StorageError(f"there is no text file {path}")
    try:
        content = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
        text = content.decode("utf-8")
    except (OSError, ValueError, EOFError, lzma.LZMAError) as error:
        raise StorageError(f"{path} is not a text in UTF-8, plain or as .xz: {error}") from error
    if not text.strip():
        raise StorageError(f"{path} is empty: pass a file with text")
    return text


def split(text: str, share: float = 0.1) -> tuple[str, str]:
    """The text without its last characters, and these: `share` of all, cut at white space."""
    end = len(text) - round(len(text) * share)
    while 0 < end < len(text) and not text[end].isspace():
        end -= 1
    return text[:end], text[end:]


def bytes_encoder(text: str) -> list[int]:
    """Tokens of a model that reads bytes."""
    return list(text.encode("utf-8"))


def read_tokenizer(path: Path) -> Encoder:
    """The encoder in a ``tokenizer.json``, without special tokens. Raises StorageError where there is none."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise StorageError('the package tokenizers is not installed: pip install "ecospa-fx[hf]"') from error
    if not path.is_file():
        raise StorageError(f"there is no tokenizer {path}")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises bare Exception
        raise StorageError(f"{path} is not a tokenizer.json: {error}") from error

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    return encode


def tokens(text: str, encode: Encoder) -> Tensor:
    """LongTensor [n] of the text's tokens, piece by piece: books apart, then every 50,000 characters."""
    books = text[:MOST_CHARACTERS].split(BOOKS)
    pieces = (book[start : start + PIECE] for book in books for start in range(0, len(book), PIECE))
    return torch.tensor([token for piece in pieces for token in encode(piece)], dtype=torch.long)


def first_windows(ids: Tensor, length: int, most: int) -> Tensor:
    """LongTensor [n, length + 1]: neighbouring windows from the start, at most `most`. Raises StorageError for none."""
    count = min(most, len(ids) // (length + 1))
    _check_length(count, ids, length, "held-out")
    return ids[: count * (length + 1)].view(count, length + 1)


def random_windows(ids: Tensor, length: int, count: int, seed: int) -> Tensor:
    """LongTensor [count, length] drawn anywhere in the text. Raises StorageError where not even one fits."""
    _check_length(len(ids) // (length + 1), ids, length, "calibration")
    starts = torch.randint(0, len(ids) - length, (count,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([ids[start : start + length] for start in starts.tolist()])


def _check_length(count: int, ids: Tensor, length: int, which: str) -> None:
    if count < 1:
        raise StorageError(
            f"the {which} text has {len(ids):,} tokens and one window needs {length + 1:,}: "
            "pass a longer text or a shorter --length"
        )


@dataclass(frozen=True, slots=True)
class Reader:
    """Calls a causal language model on token ids: its example inputs with the ids put in their place.

    Raises ScoreError where the example has not exactly one tensor of token ids [batch, length].
    """

    args: tuple[object, ...]
    """Example inputs by position."""
    kwargs: Mapping[str, object]
    """Example inputs by name."""

    def __post_init__(self) -> None:
        if len([v for v in (*self.args, *self.kwargs.values()) if _is_ids(v)]) != 1:
            raise ScoreError(
                "the example inputs do not hold exactly one tensor of token ids [batch, length]: "
                "call eco.compress with batches and a loss of your own"
            )

    def batch(self, ids: Tensor) -> tuple[tuple[object, ...], dict[str, object]]:
        """(args, kwargs) for token ids [batch, length]."""
        args = tuple(ids if _is_ids(value) else value for value in self.args)
        return args, {name: ids if _is_ids(value) else value for name, value in self.kwargs.items()}

    def ids(self, args: Sequence[object], kwargs: Mapping[str, object]) -> Tensor:
        """The token ids [batch, length] of a call."""
        return next(v for v in (*args, *kwargs.values()) if _is_ids(v))

    def logits(self, model: nn.Module, ids: Tensor) -> Tensor:
        """[batch, length, vocabulary]."""
        args, kwargs = self.batch(ids)
        return logits_of(model(*args, **kwargs), ids)

    def loss(self, output: object, args: Sequence[object], kwargs: Mapping[str, object]) -> Tensor:
        """Mean cross-entropy in nats of the next tokens within the window, for `ecospa_fx.score`."""
        ids = self.ids(args, kwargs)
        return F.cross_entropy(logits_of(output, ids)[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def _is_ids(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.dtype == torch.long and value.dim() == 2


def logits_of(output: object, ids: Tensor) -> Tensor:
    """The logits in a model's output: itself, its ``logits`` or its first entry. Raises ScoreError for none."""
    logits = getattr(output, "logits", output)
    logits = logits[0] if isinstance(logits, tuple | list) and logits else logits
    if not isinstance(logits, Tensor) or logits.shape[:-1] != ids.shape:
        kind = f"a tensor of shape {list(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ScoreError(f"the model returns {kind} and not logits of every token: it is no causal language model")
    return logits


@torch.no_grad()
def perplexity(model: nn.Module, reader: Reader, windows: Iterable[Tensor]) -> float:
    """exp of the mean next-token cross-entropy over windows [length + 1], one at a time."""
    total, count = 0.0, 0
    for window in windows:
        logits = reader.logits(model, window[None, :-1])[0].float()
        total += F.cross_entropy(logits, window[1:], reduction="sum").item()
        count += len(window) - 1
    return math.exp(min(total / count, 700.0))
