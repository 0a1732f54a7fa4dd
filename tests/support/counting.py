"""A small language model that is trained in a second, on sequences that count, and what second-order tests look at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import ecospa_fx as eco
from ecospa_fx.budget.allocate import choose
from ecospa_fx.capture.export import capture
from ecospa_fx.importance.linear_views import CouplingViews, views_of
from ecospa_fx.importance.score import Batch
from ecospa_fx.ir.linears import linear_uses
from ecospa_fx.ir.program import ExportedForm
from ecospa_fx.passes.shrink.shrink_couplings import shrink_program
from ecospa_fx.runtime.interpreter import PartialInterpreter
from tests.support.rotary import rotated

VOCABULARY = 29


class Tokens(nn.Module):
    """A language model of one's own: grouped heads, rotary or not, separate or fused projections, two layers."""

    def __init__(self, *, rotary: bool = True, fused: bool = False, bias: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.layers = nn.ModuleList(Layer(rotary, fused, bias, dropout) for _ in range(2))
        self.head = nn.Linear(16, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.head(x)
        return out


class Layer(nn.Module):
    def __init__(self, rotary: bool, fused: bool, bias: bool, dropout: float) -> None:
        super().__init__()
        self.rotary, self.fused, self.repeats = rotary, fused, 1 if fused else 2
        self.norm, self.norm2, self.drop = nn.LayerNorm(16), nn.LayerNorm(16), nn.Dropout(dropout)
        if fused:
            self.qkv = nn.Linear(16, 3 * 16, bias=bias)
        else:
            self.q, self.k, self.v = (
                nn.Linear(16, 32, bias=bias),
                nn.Linear(16, 16, bias=bias),
                nn.Linear(16, 16, bias=bias),
            )
        self.o = nn.Linear(16 * self.repeats, 16, bias=bias)
        self.up, self.gate, self.down = nn.Linear(16, 24, bias=bias), nn.Linear(16, 24), nn.Linear(24, 16, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = self.qkv(h).chunk(3, -1) if self.fused else (self.q(h), self.k(h), self.v(h))
        q, k, v = (t.unflatten(-1, (-1, 8)).transpose(1, 2) for t in (q, k, v))
        if self.rotary:
            q, k = turned(q), turned(k)
        k, v = (t.repeat_interleave(self.repeats, 1) for t in (k, v))
        z = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.drop(self.o(z.transpose(1, 2).flatten(2)))
        h = self.norm2(x)
        out: Tensor = x + self.drop(self.down(nn.functional.silu(self.gate(h)) * self.up(h)))
        return out


def turned(x: Tensor) -> Tensor:
    angle = torch.arange(x.shape[2], dtype=x.dtype)[:, None] / 10.0 ** (torch.arange(4, dtype=x.dtype) / 4)
    cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
    return rotated(x, cos, sin)


def loss_of(output: Tensor, args: Sequence[Any], kwargs: Any) -> Tensor:
    return cross_entropy(output[:, :-1].flatten(0, 1), args[0][:, 1:].flatten())


def data(count: int = 12, length: int = 16) -> list[Batch]:
    source = torch.Generator().manual_seed(1)
    starts = torch.randint(0, VOCABULARY, (count, 1), generator=source)
    steps = torch.randint(1, 4, (count, 1), generator=source)
    ids = (starts + steps * torch.arange(length)) % VOCABULARY
    return [((row[None],), {}) for row in ids]


def learnt(model: nn.Module, steps: int = 60) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    batches = data(32)
    for step in range(steps):
        args, _ = batches[step % len(batches)]
        optimizer.zero_grad()
        torch.autograd.backward(loss_of(model(*args), args, {}))
        optimizer.step()
    return model.eval()


def mean_loss(model: nn.Module, batches: Sequence[Batch]) -> float:
    with torch.no_grad():
        return sum(loss_of(model(*args), args, {}).item() for args, _ in batches) / len(batches)


def looked_at(model: nn.Module) -> tuple[ExportedForm, PartialInterpreter, CouplingViews]:
    """A captured model, what runs it, and how its couplings look."""
    example = (data(2)[0][0][0].repeat(2, 1),)
    program = capture(model, example, {}, dynamic=True)
    couplings = choose(eco.detect(model, example), None, containers=False)
    return program, PartialInterpreter(program, model, example, {}), views_of(couplings, linear_uses(program))


def pair(model: nn.Module, ratio: float) -> tuple[PartialInterpreter, PartialInterpreter]:
    """A program and what is left of it without some FFN units."""
    example = (data(2)[0][0][0].repeat(2, 1),)
    program, couplings = capture(model, example, {}, dynamic=True), eco.detect(model, example)
    dense = PartialInterpreter(program.frozen(), model, example, {})
    shrink_program(program, eco.plan(couplings, ratio, kinds=["ffn"], scores="magnitude"))
    return dense, PartialInterpreter(program, model, example, {})
