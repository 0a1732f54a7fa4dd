"""A hand-written transformer layer or two with its couplings written by hand, for tests that need no detection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from ecospa_fx.coupling.couplings import Couplings
from ecospa_fx.coupling.types import Box, Coupling, EvidenceStep, Member, Refusal, Role, Symmetry
from tests.support.rotary import rotated

HIDDEN, FFN, KV_HEADS, GROUP, HEAD_DIM, VOCABULARY = 8, 12, 2, 2, 4, 11


class Attention(nn.Module):
    """Grouped-query attention with rotary embedding by halves; query head ``kv * GROUP + g`` reads KV head ``kv``."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(HIDDEN, KV_HEADS * GROUP * HEAD_DIM)
        self.k = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM)
        self.v = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM)
        self.o = nn.Linear(KV_HEADS * GROUP * HEAD_DIM, HIDDEN, bias=False)
        self.gates: dict[str, Tensor] = {}
        """Gates [carriers, units] by kind, multiplied onto the activations; set by the tests of gate-fisher."""

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = turned(self.q(x).view(batch, length, KV_HEADS, GROUP, HEAD_DIM))
        k = turned(self.k(x).view(batch, length, KV_HEADS, 1, HEAD_DIM))
        v = self.v(x).view(batch, length, KV_HEADS, 1, HEAD_DIM)
        if "qk" in self.gates:
            k = k * self.gates["qk"].repeat(1, 2)[:, None]
        if "vo" in self.gates:
            v = v * self.gates["vo"][:, None]
        weights = torch.einsum("blkgd,bmkgd->bkglm", q, k.expand_as(q)).div(HEAD_DIM**0.5).softmax(-1)
        mixed = torch.einsum("bkglm,bmkgd->blkgd", weights, v.expand_as(q))
        out: Tensor = self.o(mixed.reshape(batch, length, -1))
        return out


def turned(x: Tensor) -> Tensor:
    """Rotary embedding of [batch, length, heads, group, head_dim]: dim i turns with dim i + head_dim / 2."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None] / 3.0 ** torch.arange(half, dtype=x.dtype)
    cos, sin = (part.repeat(1, 2)[:, None, None] for part in (angle.cos(), angle.sin()))
    return rotated(x, cos, sin)


class FeedForward(nn.Module):
    """SwiGLU with gate and up in one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = nn.Linear(HIDDEN, 2 * FFN)
        self.down = nn.Linear(FFN, HIDDEN)
        self.gates: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.fused(x).chunk(2, -1)
        hidden = silu(gate) * up
        out: Tensor = self.down(hidden * self.gates["ffn"][0] if "ffn" in self.gates else hidden)
        return out


class Experts(nn.Module):
    """Two packed experts, each applied to every token; dropout, so that modes matter."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(2, HIDDEN, 6) / 3)
        self.down = nn.Parameter(torch.randn(2, 6, HIDDEN) / 3)
        self.dropout = nn.Dropout(0.5)
        self.gates: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("bld,edf->blef", x, self.up).relu()
        if "experts" in self.gates:
            hidden = hidden * self.gates["experts"]
        out: Tensor = self.dropout(torch.einsum("blef,efd->bld", hidden, self.down))
        return out


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.ffn, self.experts = Attention(), FeedForward(), Experts()
        self.norm = nn.LayerNorm(HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        out: Tensor = x + self.ffn(x) + self.experts(x)
        return out


class Tiny(nn.Module):
    """A language model whose head is tied to its embedding."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(x)
        return logits


def tiny(layers: int = 2, seed: int = 0) -> Tiny:
    """The model in float64, of fixed weights, in training mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Tiny(layers).double()


def batches(count: int = 3, seed: int = 1) -> list[tuple[tuple[Tensor], dict[str, Tensor]]]:
    """Token ids [2, 5] per batch."""
    source = torch.Generator().manual_seed(seed)
    return [((torch.randint(0, VOCABULARY, (2, 5), generator=source),), {}) for _ in range(count)]


def samples(count: int = 3, seed: int = 1) -> list[tuple[tuple[Tensor], dict[str, Tensor]]]:
    """The same token ids, [1, 5] per batch."""
    return [((row[None],), {}) for (ids,), _ in batches(count, seed) for row in ids]


def loss(output: Tensor, args: Sequence[Tensor], kwargs: object) -> Tensor:
    """Cross-entropy of the next token."""
    return nn.functional.cross_entropy(output[:, :-1].flatten(0, 1), args[0][:, 1:].flatten())


def box(offset: int = 0, carriers: Sequence[tuple[int, int]] = (), width: Sequence[tuple[int, int]] = ()) -> Box:
    """A box whose neighbouring units are neighbours."""
    return Box(offset, tuple(carriers), 1, tuple(width))


def member(parameter: str, axis: int, role: Role, boxes: Sequence[Box], carriers: int, units: int) -> Member:
    return Member(parameter, axis, role, None, tuple(boxes), carriers, units)


def coupling(name: str, members: Sequence[Member], parameters: int, symmetry: Symmetry = "permutation") -> Coupling:
    """An offered coupling named ``layer:kind``; sizes are those of its members."""
    layer, kind = name.split(":")
    first = members[0]
    return Coupling(name, kind, layer, first.units, first.carriers, symmetry, tuple(members), parameters)


def attention_couplings(prefix: str) -> list[Coupling]:
    """Q with K (rotary pairs), V with O, and whole KV heads, which contain both."""
    dims, group = KV_HEADS * HEAD_DIM, GROUP * HEAD_DIM
    half, layer = HEAD_DIM // 2, f"{prefix}.attention"
    q = box(0, [(KV_HEADS, group)], [(GROUP, HEAD_DIM), (2, half)])
    k = box(0, [(KV_HEADS, HEAD_DIM)], [(2, half)])
    v, o = box(0, [(KV_HEADS, HEAD_DIM)]), box(0, [(KV_HEADS, group)], [(GROUP, HEAD_DIM)])

    def of(name: str, axis: int, role: Role, at: Box, units: int, carriers: int = KV_HEADS) -> Member:
        return member(f"{layer}.{name}", axis, role, [at], carriers, units)

    def rows(name: str, role: Role, at: Box, units: int, carriers: int = KV_HEADS) -> list[Member]:
        return [of(f"{name}.{kind}", 0, role, at, units, carriers) for kind in ("weight", "bias")]

    qk = [*rows("q", "producer", q, half), *rows("k", "consumer", k, half)]
    vo = [*rows("v", "producer", v, HEAD_DIM), of("o.weight", 1, "consumer", o, HEAD_DIM)]
    wide, narrow = Box(0, (), group, ((group, 1),)), Box(0, (), HEAD_DIM, ((HEAD_DIM, 1),))
    heads = [
        *rows("q", "producer", wide, KV_HEADS, 1),
        *rows("k", "producer", narrow, KV_HEADS, 1),
        *rows("v", "producer", narrow, KV_HEADS, 1),
        of("o.weight", 1, "consumer", wide, KV_HEADS, 1),
    ]
    size = dims * (GROUP + 1) * (HIDDEN + 1), dims * (HIDDEN + 1) + dims * GROUP * HIDDEN
    inside = (f"{layer}:qk", f"{layer}:vo")
    return [
        coupling(inside[0], qk, size[0], "rotary"),
        coupling(inside[1], vo, size[1], "linear"),
        replace(coupling(f"{layer}:heads", heads, sum(size)), contains=inside),
    ]


def ffn_coupling(prefix: str) -> Coupling:
    layer, both = f"{prefix}.ffn", [box(0), box(FFN)]
    members = [
        member(f"{layer}.fused.weight", 0, "producer", both, 1, FFN),
        member(f"{layer}.fused.bias", 0, "producer", both, 1, FFN),
        member(f"{layer}.down.weight", 1, "consumer", [box()], 1, FFN),
    ]
    path = (
        EvidenceStep(
            "linear_4", "aten.linear.default", "creates", "gate, up = self.fused(x).chunk(2, -1)", f"{layer}.fused"
        ),
        EvidenceStep("mul_3", "aten.mul.Tensor", "passes", "hidden = silu(gate) * up", layer),
        EvidenceStep("linear_5", "aten.linear.default", "contracts", "", f"{layer}.down"),
    )
    return replace(coupling(f"{layer}:ffn", members, FFN * (3 * HIDDEN + 2)), path=path)


def expert_coupling(prefix: str) -> Coupling:
    layer = f"{prefix}.experts"
    up = Member(f"{layer}.up", 2, "producer", 0, (box(),), 2, 6)
    down = Member(f"{layer}.down", 1, "consumer", 0, (box(),), 2, 6)
    return coupling(f"{layer}:experts", [up, down], 2 * 2 * 6 * HIDDEN)


def refused_coupling(model: Tiny) -> Coupling:
    """The residual width, which the layer norms of all layers hold together."""
    refusal = Refusal(
        "layer_norm takes statistics over this dim, so dropping an element changes the others",
        "layer_norm",
        "aten.layer_norm.default",
        "x = x + self.attention(self.norm(x))",
    )
    members = (member("embed.weight", 1, "producer", [box()], 1, HIDDEN),)
    return replace(coupling(":hidden", members, VOCABULARY * HIDDEN), blocked=refusal)


def tiny_couplings(model: Tiny, heads: bool = True) -> Couplings:
    """Every coupling of the model, layer by layer, and the refusal of its residual width."""
    found = []
    for i in range(len(model.layers)):
        found += attention_couplings(f"layers.{i}")[: 3 if heads else 2]
        found += [ffn_coupling(f"layers.{i}"), expert_coupling(f"layers.{i}")]
    return Couplings([*found, refused_coupling(model)], model)
