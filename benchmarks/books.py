"""Books as tokens, and a LLaMA to train on them: what the training benchmarks share.

The folder holds train-*.txt.xz, valid.txt.xz (plain text, books separated by two blank lines) and tokenizer.json. Text
is tokenised once, in pieces of at most 50,000 characters, and kept as uint16 in `cache`; where that is there already,
the folder is not needed.
"""

from __future__ import annotations

import lzma
import math
import os
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, scaled_dot_product_attention, silu

PIECE = 50_000


def tokens(folder: Path | None, cache: Path, shards: int) -> tuple[Tensor, Tensor]:
    """Int16 tokens of the first `shards` training shards, and of the validation text."""
    found = []
    for name, count in (("train", shards), ("valid", 1)):
        file = cache / f"{name}.uint16"
        if not file.exists():
            if folder is None:
                raise SystemExit(f"{file} is not there: give --data, the folder with the text")
            _write(file, folder, name, count)
        size = file.stat().st_size // 2
        found.append(torch.from_file(str(file), size=size, dtype=torch.int16))
    return found[0], found[1]


def _write(file: Path, folder: Path, name: str, shards: int) -> None:
    paths = sorted(folder.glob(f"{name}*.txt.xz"))[:shards]
    workers = min(32, os.cpu_count() or 1)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    with ProcessPoolExecutor(workers) as pool, partial.open("wb") as out:
        texts = list(pool.map(_text, paths))
        pieces = [b[i : i + PIECE] for t in texts for b in t.split("\n\n\n") for i in range(0, len(b), PIECE)]
        parts = [pieces[i : i + 64] for i in range(0, len(pieces), 64)]
        for ids in pool.map(_encoded, [folder / "tokenizer.json"] * len(parts), parts):
            out.write(ids)
    partial.rename(file)


def _text(path: Path) -> str:
    return lzma.decompress(path.read_bytes()).decode()


def _encoded(tokenizer: Path, pieces: Sequence[str]) -> bytes:
    """The uint16 tokens of some pieces; one thread, because there is a process per core."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from tokenizers import Tokenizer

    encoded = Tokenizer.from_file(str(tokenizer)).encode_batch_fast(list(pieces))
    return array("H", [i for e in encoded for i in e.ids]).tobytes()


class Windows:
    """Windows of `length` + 1 tokens in a random order without repetition, epoch after epoch."""

    def __init__(self, data: Tensor, length: int, batch: int, seed: int) -> None:
        self.data, self.length, self.batch = data, length, batch
        self.count = (len(data) - 1) // length
        self._source, self._order = torch.Generator().manual_seed(seed), torch.zeros(0, dtype=torch.long)

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            while len(self._order) < self.batch:
                self._order = torch.cat([self._order, torch.randperm(self.count, generator=self._source)])
            taken, self._order = self._order[: self.batch], self._order[self.batch :]
            yield self.at(taken)

    def state_dict(self) -> dict[str, Tensor]:
        """Where in the order it is."""
        return {"source": self._source.get_state(), "order": self._order}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from there."""
        self._source.set_state(state["source"].cpu())
        self._order = state["order"].cpu()

    def at(self, numbers: Tensor) -> Tensor:
        """LongTensor [n, length + 1]."""
        starts = (numbers * self.length).to(self.data.device)[:, None]
        return self.data[starts + torch.arange(self.length + 1, device=self.data.device)].long()


# -- the model -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Shape:
    """Widths of a transformer; gated: of a `Llama`, otherwise of a `Gpt`."""

    vocabulary: int = 8192
    hidden: int = 512
    layers: int = 8
    heads: int = 8
    head_dim: int = 64
    ffn: int = 1408
    gated: bool = True

    def at(self, head_dim: int, ffn: int) -> Shape:
        """The same with other widths."""
        return replace(self, head_dim=head_dim, ffn=ffn)

    @property
    def block_parameters(self) -> int:
        """Elements of the matrices of all layers."""
        return self.layers * self.hidden * (4 * self.heads * self.head_dim + (3 if self.gated else 2) * self.ffn)


class Layer(nn.Module):
    """Attention with rotary embedding, and a gated FFN."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        hidden, inner = shape.hidden, shape.heads * shape.head_dim
        self.heads, self.scale = shape.heads, shape.head_dim**-0.5
        self.before, self.after = nn.RMSNorm(hidden, eps=1e-6), nn.RMSNorm(hidden, eps=1e-6)
        self.q, self.k, self.v = (nn.Linear(hidden, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, hidden, bias=False)
        self.gate, self.up = (nn.Linear(hidden, shape.ffn, bias=False) for _ in range(2))
        self.down = nn.Linear(shape.ffn, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y = self.before(x)
        q, k, v = (p(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        q, k = _turned(q, cos, sin), _turned(k, cos, sin)
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        y = self.after(x)
        result: Tensor = x + self.down(silu(self.gate(y)) * self.up(y))
        return result


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class Llama(nn.Module):
    """From tokens [batch, length] to normed hidden states, which `embed.weight` turns into logits."""

    def __init__(self, shape: Shape, length: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(shape.vocabulary, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, eps=1e-6)
        rates = 10_000 ** (-torch.arange(0, shape.head_dim, 2) / shape.head_dim)
        angles = torch.outer(torch.arange(length), rates).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        _initialised(self, shape)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        cos, sin = self.get_buffer("cos"), self.get_buffer("sin")
        for layer in self.layers:
            x = layer(x, cos, sin)
        result: Tensor = self.norm(x)
        return result


def _initialised(model: nn.Module, shape: Shape) -> None:
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            deep = name.endswith(("o.weight", "down.weight"))
            nn.init.normal_(weight, std=0.02 / math.sqrt(2 * shape.layers) if deep else 0.02)


class GptLayer(nn.Module):
    """Attention and an FFN with GELU, biases everywhere."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        hidden, inner = shape.hidden, shape.heads * shape.head_dim
        self.heads = shape.heads
        self.before, self.after = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.q, self.k, self.v = (nn.Linear(hidden, inner) for _ in range(3))
        self.o = nn.Linear(inner, hidden)
        self.up, self.down = nn.Linear(hidden, shape.ffn), nn.Linear(shape.ffn, hidden)
        for layer in (self.q, self.k, self.v, self.o, self.up, self.down):
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        q, k, v = (p(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        result: Tensor = x + self.down(gelu(self.up(self.after(x)), approximate="tanh"))
        return result


class Gpt(nn.Module):
    """As `Llama`, with the parts of a GPT-2."""

    def __init__(self, shape: Shape, length: int) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(shape.vocabulary, shape.hidden), nn.Embedding(length, shape.hidden)
        self.layers = nn.ModuleList(GptLayer(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.hidden)
        _initialised(self, shape)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.place.weight[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        result: Tensor = self.norm(x)
        return result


def head_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats, logits in float32."""
    logits = linear(hidden, weight).float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def taught_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, teacher: tuple[Tensor, Tensor], share: float
) -> Tensor:
    """Cross-entropy with the data and with what a teacher (hidden states, weight) expects, 1 - share to share."""
    logits = linear(hidden, weight).float().log_softmax(-1)
    with torch.no_grad():
        expected = linear(*teacher).float().softmax(-1)
    data = nn.functional.nll_loss(logits.flatten(0, 1), targets.flatten())
    return (1 - share) * data - share * (expected * logits).sum(-1).mean()


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Run layers as they are: evaluation in another mode and type would have to be compiled for one use."""
    compiled = {m: m._compiled_call_impl for m in model.modules() if m._compiled_call_impl is not None}
    for module in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in compiled.items():
            module._compiled_call_impl = call


@torch.no_grad()
def evaluate(model: nn.Module, weight: Tensor, windows: Tensor, batch: int = 16) -> float:
    """Mean loss in nats over windows [n, length + 1], in float32."""
    with uncompiled(model):
        parts = [head_loss(model(w[:, :-1]), weight, w[:, 1:]) * len(w) for w in windows.split(batch)]
    return float(torch.stack(parts).sum() / len(windows))


def first_windows(data: Tensor, length: int, count: int) -> Tensor:
    """LongTensor [count, length + 1]: the first windows, side by side."""
    return torch.stack([data[i * length : (i + 1) * length + 1] for i in range(count)]).long()


def spread(data: Tensor, length: int, count: int, of: Sequence[int] = ()) -> Tensor:
    """LongTensor [count, length + 1]: windows evenly over the data."""
    starts = of or [i * ((len(data) - length - 1) // count) for i in range(count)]
    return torch.stack([data[s : s + length + 1] for s in starts]).long()
