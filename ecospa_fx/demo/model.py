"""A byte-level LLaMA in plain torch: rotary embedding, grouped queries, SwiGLU, tied head.

Nothing here knows of compression. `benchmarks/train_demo.py` trained the weights and cut the texts.
Shapes: B batch, T sequence, D hidden, H query heads, K key and value heads, C head dimension, F inner width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.resources import as_file, files

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY = 256
HIDDEN = 192
LAYERS = 5
HEADS = 8
KV_HEADS = 2
HEAD_DIM = 24
INNER = 448
ROTARY_BASE = 10_000.0


def rotate_half(x: Tensor) -> Tensor:
    """[..., C] with its halves swapped and the new first one negated."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


class Rotary(nn.Module):
    """cos and sin tables [T, C] of the positions 0 to T-1."""

    def __init__(self) -> None:
        super().__init__()
        frequencies = ROTARY_BASE ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        self.inv_freq: Tensor
        self.register_buffer("inv_freq", frequencies, persistent=False)

    def forward(self, length: int) -> tuple[Tensor, Tensor]:
        angles = torch.arange(length, device=self.inv_freq.device)[:, None] * self.inv_freq
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()


class Attention(nn.Module):
    """Causal self-attention, [B, T, D] to [B, T, D]; H / K query heads share one key and value head."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(HIDDEN, HEADS * HEAD_DIM, bias=False)
        self.k_proj = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM, bias=False)
        self.v_proj = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM, bias=False)
        self.o_proj = nn.Linear(HEADS * HEAD_DIM, HIDDEN, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q_proj(x).view(batch, length, HEADS, HEAD_DIM).transpose(1, 2)
        k = self.k_proj(x).view(batch, length, KV_HEADS, HEAD_DIM).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, KV_HEADS, HEAD_DIM).transpose(1, 2)
        q = q * cos + rotate_half(q) * sin
        k = k * cos + rotate_half(k) * sin
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        output: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(batch, length, HEADS * HEAD_DIM))
        return output


class FeedForward(nn.Module):
    """SwiGLU, [B, T, D] to [B, T, D] through F neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, INNER, bias=False)
        self.up_proj = nn.Linear(HIDDEN, INNER, bias=False)
        self.down_proj = nn.Linear(INNER, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return output


class Block(nn.Module):
    """One decoder layer, [B, T, D] to [B, T, D], with the norms before attention and feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(HIDDEN, eps=1e-6)
        self.attention = Attention()
        self.feed_forward_norm = nn.RMSNorm(HIDDEN, eps=1e-6)
        self.feed_forward = FeedForward()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        output: Tensor = x + self.feed_forward(self.feed_forward_norm(x))
        return output


class ByteLM(nn.Module):
    """Byte values [B, T] to next-byte logits [B, T, 256]. The head is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.rotary = Rotary()
        self.layers = nn.ModuleList([Block() for _ in range(LAYERS)])
        self.norm = nn.RMSNorm(HIDDEN, eps=1e-6)
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        cos, sin = self.rotary(ids.shape[1])
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        logits: Tensor = self.head(self.norm(x))
        return logits


def load() -> ByteLM:
    """The trained model, float32 on the CPU, in eval mode.

    Example:
        >>> from ecospa_fx import demo
        >>> demo.load()(demo.encode("Once upon a time")[None]).shape
        torch.Size([1, 16, 256])
    """
    with as_file(files("ecospa_fx.demo") / "weights.pt") as path:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    model = ByteLM()
    model.load_state_dict(weights)
    return model.eval()


def texts() -> tuple[str, str]:
    """(calibration, valid): prose from the training books, and from books by authors whom the model never read."""
    folder = files("ecospa_fx.demo")
    calibration, valid = (folder / f"{name}.txt" for name in ("calibration", "valid"))
    return calibration.read_text(encoding="utf-8"), valid.read_text(encoding="utf-8")


def encode(text: str) -> Tensor:
    """LongTensor [n] of the text's UTF-8 bytes."""
    return torch.tensor(list(text.encode("utf-8")), dtype=torch.long)


def windows(text: str, length: int, count: int) -> Tensor:
    """LongTensor [count, length + 1]: disjoint pieces, spread evenly over the text; input and target overlap by all
    but one byte. Raises ValueError where the text is too short for so many."""
    ids = encode(text)
    if length < 1 or count < 1 or count * (length + 1) > len(ids):
        raise ValueError(
            f"{count} windows of {length} + 1 bytes do not fit into a text of {len(ids)} bytes: ask for fewer"
        )
    stride = len(ids) // count
    return torch.stack([ids[i * stride : i * stride + length + 1] for i in range(count)])


def next_byte_loss(output: Tensor, args: Sequence[Tensor], kwargs: Mapping[str, object]) -> Tensor:
    """Mean cross-entropy in nats of logits [B, T, 256] against the input's own next bytes, for `eco.score`."""
    return F.cross_entropy(output[:, :-1].flatten(0, 1), args[0][:, 1:].flatten())


@torch.no_grad()
def perplexity(model: nn.Module, windows: Tensor) -> float:
    """exp of the mean next-byte cross-entropy over windows [n, T + 1]; log2 of it is bits per byte."""
    total = 0.0
    for start in range(0, len(windows), 8):
        window = windows[start : start + 8]
        logits = model(window[:, :-1])
        total += F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten(), reduction="sum").item()
    return math.exp(total / windows[:, 1:].numel())
