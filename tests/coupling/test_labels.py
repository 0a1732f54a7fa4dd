"""The label of every coupling, on literal small modules: attention, mixtures, gates, experts, however they are written.

Names in a module say what its dims are: `qk`, `vo`, `heads`, `ffn`, `pair` parameters carry a dim of that kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ecospa_fx as eco
from ecospa_fx.verify import masked_error

D = 10
Shapes = dict[str, tuple[int, ...]]
E = torch.einsum


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) / math.sqrt(shape[-1]))


class Block(nn.Module):
    """Parameters by name, and a function of them and the input [batch, places, D], between residual connections."""

    def __init__(self, forward: Callable[[Any, Any], Any], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, weight(*shape))
        self.inner = forward

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.inner(self, x)
        return result


def labels(model: nn.Module, *args: Tensor) -> dict[str, str]:
    """Every offered coupling as "size×carriers" in the order of the parameters, with its kind."""
    found: dict[str, str] = {}
    for c in eco.detect(model.double(), args).offered:
        found[f"{c.size}×{c.carriers}" if c.carriers > 1 else f"{c.size}"] = c.kind
    return found


def rows(x: Any, w: Tensor, *heads: int) -> Any:
    """x · wᵀ with its heads in front of the places."""
    y = x @ w.mT
    return y.unflatten(-1, heads).transpose(-3, -2) if heads else y


def merged(x: Any) -> Any:
    return x.transpose(-3, -2).flatten(-2)


def by_sdpa(m: Any, x: Any) -> Any:
    q, k, v = rows(x, m.q, 3, 4), rows(x, m.k, 3, 4), rows(x, m.v, 3, 5)
    return merged(F.scaled_dot_product_attention(q, k, v)) @ m.o.mT


def by_matmul(m: Any, x: Any) -> Any:
    q, k, v = rows(x, m.q, 3, 4), rows(x, m.k, 3, 4), rows(x, m.v, 3, 5)
    return merged((q @ k.mT).softmax(-1) @ v) @ m.o.mT


def by_einsum(m: Any, x: Any) -> Any:
    q, k, v = (E("btd,dhk->bhtk", x, w) for w in (m.q, m.k, m.v))
    return E("bhtk,hkd->btd", E("bhts,bhsk->bhtk", E("bhtk,bhsk->bhts", q, k).softmax(-1), v), m.o)


def by_sums(m: Any, x: Any) -> Any:
    """Products written out as multiplications and sums."""
    q, k, v = rows(x, m.q, 3, 4), rows(x, m.k, 3, 4), rows(x, m.v, 3, 5)
    scores = (q[..., :, None, :] * k[..., None, :, :]).sum(-1).softmax(-1)
    return merged((scores[..., None] * v[..., None, :, :]).sum(-2)) @ m.o.mT


def value_and_output_at_once(m: Any, x: Any) -> Any:
    q, k, v = (E("btd,dhk->bhtk", x, w) for w in (m.q, m.k, m.v))
    return E("bhts,bhsv,hvd->btd", E("bhtk,bhsk->bhts", q, k).softmax(-1), v, m.o)


def query_and_key_at_once(m: Any, x: Any) -> Any:
    scores = E("btd,dhk,bse,ehk->bhts", x, m.q, x, m.k).softmax(-1)
    return E("bhts,bhsv,hvd->btd", scores, E("btd,dhv->bhtv", x, m.v), m.o)


def shared_key_by_einsum(m: Any, x: Any) -> Any:
    q, k, v = E("btd,dhk->bthk", x, m.q), x @ m.k.mT, x @ m.v.mT
    mixed = E("bhts,bsv->bthv", E("bthk,bsk->bhts", q, k).softmax(-1), v)
    return E("bthv,hvd->btd", mixed, m.o)


def shared_key_by_matmul(m: Any, x: Any) -> Any:
    q, k, v = rows(x, m.q, 3, 4), rows(x, m.k)[:, None], rows(x, m.v)[:, None]
    return merged((q @ k.mT).softmax(-1) @ v) @ m.o.mT


def shared_key_by_sdpa(m: Any, x: Any) -> Any:
    q, k, v = rows(x, m.q, 3, 4), rows(x, m.k, 1, 4), rows(x, m.v, 1, 5)
    return merged(F.scaled_dot_product_attention(q, k, v, enable_gqa=True)) @ m.o.mT


def shared_key_fused(m: Any, x: Any) -> Any:
    q, k, v = (x @ m.qkv.mT).split([12, 4, 5], -1)
    q = q.unflatten(-1, (3, 4)).transpose(1, 2)
    return merged(F.scaled_dot_product_attention(q, k[:, None], v[:, None])) @ m.o.mT


def linear_attention(m: Any, x: Any) -> Any:
    q, k, v = rows(x, m.q, 3, 4).relu(), rows(x, m.k, 3, 4).relu(), rows(x, m.v, 3, 5)
    return merged(q @ (k.mT @ v) / (q @ k.mT + 1).sum(-1, keepdim=True)) @ m.o.mT


def linear_attention_of_one_key(m: Any, x: Any) -> Any:
    q, k, v = E("btd,dhk->bthk", x, m.q), x @ m.k.mT, x @ m.v.mT
    return E("bthv,hvd->btd", E("bthk,bkv->bthv", q, E("bsk,bsv->bkv", k, v)), m.o)


def retention(m: Any, x: Any) -> Any:
    q, k, v = rows(x, m.q, 3, 4), rows(x, m.k, 3, 4), rows(x, m.v, 3, 5)
    gate = (x @ m.g.mT).sigmoid()
    return (merged((q @ k.mT).tril() @ v) * gate) @ m.o.mT


def learnt_query(m: Any, x: Any) -> Any:
    q, k, v = rows(m.latents[None], m.q, 3, 4), rows(x, m.k, 3, 4), rows(x, m.v, 3, 5)
    return (merged((q @ k.mT).softmax(-1) @ v) @ m.o.mT).sum(1, keepdim=True)


def pooled_by_heads(m: Any, x: Any) -> Any:
    """Learnt scores per head; the values are mixed by them."""
    weights, v = (x @ m.s.mT).softmax(1), (x @ m.v.mT).unflatten(-1, (3, 5))
    return (E("bsh,bshv->bhv", weights, v).flatten(-2) @ m.o.mT)[:, None]


def latent_attention(m: Any, x: Any) -> Any:
    """Keys and values from a latent of rank 2."""
    c = x @ m.down.mT
    q, k, v = rows(x, m.q, 3, 4), rows(c, m.k, 3, 4), rows(c, m.v, 3, 5)
    return merged(F.scaled_dot_product_attention(q, k, v)) @ m.o.mT


MANY: Shapes = {"q": (12, D), "k": (12, D), "v": (15, D), "o": (D, 15)}
SPREAD: Shapes = {"q": (D, 3, 4), "k": (D, 3, 4), "v": (D, 3, 5), "o": (3, 5, D)}
ONE: Shapes = {"q": (12, D), "k": (4, D), "v": (5, D), "o": (D, 15)}
HEADS = {"4×3": "qk", "5×3": "vo", "3": "heads"}
SHARED = {"4": "qk", "5": "vo", "3": "heads"}

ATTENTION: list[tuple[Callable[[Any, Any], Any], dict[str, tuple[int, ...]], dict[str, str]]] = [
    (by_sdpa, MANY, HEADS),
    (by_matmul, MANY, HEADS),
    (by_sums, MANY, HEADS),
    (by_einsum, SPREAD, HEADS),
    (value_and_output_at_once, SPREAD, HEADS),
    (query_and_key_at_once, SPREAD, HEADS),
    (shared_key_by_einsum, {**SPREAD, "k": (4, D), "v": (5, D)}, SHARED),
    (shared_key_by_matmul, ONE, SHARED),
    (shared_key_by_sdpa, ONE, SHARED),
    (shared_key_fused, {"qkv": (21, D), "o": (D, 15)}, SHARED),
    (linear_attention, MANY, HEADS),
    (linear_attention_of_one_key, {**SPREAD, "k": (4, D), "v": (5, D)}, SHARED),
    (retention, {**MANY, "g": (15, D)}, HEADS),
    (learnt_query, {**MANY, "latents": (2, D)}, {**HEADS, "10": "pair"}),
    (pooled_by_heads, {"s": (3, D), "v": (15, D), "o": (D, 15)}, {"5×3": "vo", "3": "heads"}),
    (latent_attention, {**MANY, "k": (12, 2), "v": (15, 2), "down": (2, D)}, {**HEADS, "2": "pair"}),
]


@pytest.mark.parametrize(("forward", "shapes", "expected"), ATTENTION, ids=[c[0].__name__ for c in ATTENTION])
def test_attention(
    forward: Callable[[Any, Any], Any], shapes: dict[str, tuple[int, ...]], expected: dict[str, str]
) -> None:
    assert labels(Block(forward, **shapes), torch.randn(2, 6, D, dtype=torch.float64)) == expected


def squared(h: Any) -> Any:
    return h * (1 + h.square().sum(-1, keepdim=True)).rsqrt()


def dotted(h: Any) -> Any:
    return h * (1 + E("...f,...f->...", h, h)).rsqrt()[..., None]


def multiplied(h: Any) -> Any:
    return h * (1 + h[..., None, :] @ h[..., :, None])[..., 0].rsqrt()


def vecdot(h: Any) -> Any:
    return h * (1 + torch.linalg.vecdot(h, h.abs()))[..., None].rsqrt()


def shared_out(h: Any) -> Any:
    return h / (1 + h.abs().sum(-1, keepdim=True))


def after_up(f: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda m, x: f((x @ m.up.mT).relu()) @ m.down.mT


def after_gate(f: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda m, x: f(F.silu(x @ m.up.mT) * (x @ m.gate.mT)) @ m.down.mT


FFN: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "plain": (lambda m, x: (x @ m.up.mT).relu() @ m.down.mT, "ffn"),
    "gated": (lambda m, x: (F.silu(x @ m.up.mT) * (x @ m.gate.mT)) @ m.down.mT, "ffn"),
    "bilinear": (lambda m, x: ((x @ m.up.mT) * (x @ m.gate.mT)) @ m.down.mT, "ffn"),
    "einsum": (lambda m, x: E("btf,btf,df->btd", F.silu(x @ m.up.mT), x @ m.gate.mT, m.down), "ffn"),
    "scaled": (lambda m, x: (x @ m.up.mT * m.scale) @ m.down.mT, "pair"),
    "linear": (lambda m, x: (x @ m.up.mT) @ m.down.mT, "pair"),
    "summed-linear": (lambda m, x: shared_out(x @ m.up.mT * 1) @ m.down.mT, "ffn"),
    **{f"normalised-{f.__name__}": (after_up(f), "ffn") for f in (squared, dotted, multiplied, vecdot, shared_out)},
    **{f"gated-{f.__name__}": (after_gate(f), "ffn") for f in (squared, dotted, shared_out)},
    "of-a-product": (
        lambda m, x: (
            ((u := F.silu(x @ m.up.mT)) / (2 + (u * (x @ m.gate.mT)).sum(-1, keepdim=True).tanh())) @ m.down.mT
        ),
        "ffn",
    ),
    "pooled": (lambda m, x: ((x @ m.up.mT).relu().mean(1) @ m.down.mT)[:, None], "ffn"),
    "pooled-linear": (lambda m, x: ((x @ m.up.mT).mean(1) @ m.down.mT)[:, None], "pair"),
    "pooled-by-sum": (lambda m, x: ((x @ m.up.mT).relu().sum(1) @ m.down.mT)[:, None], "ffn"),
    "pooled-1d": (lambda m, x: F.avg_pool1d((x @ m.up.mT).relu().mT, 2).mT[:, :1] @ m.down.mT, "ffn"),
    "squeeze-excite": (
        lambda m, x: ((h := (x @ m.up.mT).relu()) * (h.mean(1, keepdim=True) @ m.square.mT).sigmoid()) @ m.down.mT,
        "ffn",
    ),
    "additive-scores": (
        lambda m, x: E(
            "bts,bsd->btd",
            ((x @ m.up.mT)[:, :, None] + (x @ m.gate.mT)[:, None]).tanh() @ m.scale,
            x,
        ),
        "ffn",
    ),
    "two-towers": (lambda m, x: E("btf,bsf->bts", x @ m.up.mT, x.cos() @ m.gate.mT).mean() * x, "qk"),
    "two-rows": (lambda m, x: ((x @ m.up.mT) * (x.cos() @ m.gate.mT)).sum(-1, keepdim=True) * x, "qk"),
}
SHAPES = {"up": (7, D), "gate": (7, D), "down": (D, 7), "scale": (7,), "square": (7, 7)}


@pytest.mark.parametrize("name", FFN)
def test_between_two_weights(name: str) -> None:
    forward, kind = FFN[name]
    used = {"up", "down", *forward.__code__.co_names, *(["gate"] if name.startswith("gated") else [])}
    model = Block(forward, **{n: s for n, s in SHAPES.items() if n in used})
    assert labels(model, torch.randn(2, 6, D, dtype=torch.float64)) == {"7": kind}


def chosen(m: Any, x: Any) -> Any:
    """The expert of each token, 0 to 2."""
    result: Tensor = (x.detach()[..., :3]).argmax(-1)
    return result


def by_index(m: Any, x: Any) -> Any:
    at = chosen(m, x)
    hidden = E("btd,btfd->btf", x, m.up[at]).relu()
    return E("btf,btdf->btd", hidden, m.down[at])


def weights_first(m: Any, x: Any) -> Any:
    at = chosen(m, x)
    hidden = (m.up[at] @ x[..., None]).relu()
    return (m.down[at] @ hidden)[..., 0]


def by_index_select(m: Any, x: Any) -> Any:
    at = chosen(m, x).flatten()
    hidden = E("nd,nfd->nf", x.flatten(0, 1), m.up.index_select(0, at)).relu()
    return E("nf,ndf->nd", hidden, m.down.index_select(0, at)).view_as(x)


def by_embedding(m: Any, x: Any) -> Any:
    at = chosen(m, x)
    up, down = (F.embedding(at, w.flatten(1)).view(*at.shape, *w.shape[1:]) for w in (m.up, m.down))
    return E("btf,btdf->btd", E("btd,btfd->btf", x, up).relu(), down)


def gated_experts(m: Any, x: Any) -> Any:
    """All experts of all tokens, weighed before their outputs are summed."""
    hidden = E("btd,efd->btef", x, m.up).relu() * (x @ m.router.mT).relu()[..., None]
    return E("btef,edf->btd", hidden, m.down)


def one_output(m: Any, x: Any) -> Any:
    """Hidden units of the experts are mixed before one matrix reads them."""
    hidden = E("btd,efd->btef", x, m.up).relu()
    return E("bte,btef->btf", (x @ m.router.mT).softmax(-1), hidden) @ m.out.mT


def averaged_weights(m: Any, x: Any) -> Any:
    """Each sample has the mean of the experts' matrices by its own gates."""
    gates = (x.mean(1) @ m.router.mT).softmax(-1)
    up, down = E("be,efd->bfd", gates, m.up), E("be,edf->bdf", gates, m.down)
    return E("btf,bdf->btd", E("btd,bfd->btf", x, up).relu(), down)


EXPERTS: Shapes = {"up": (3, 7, D), "down": (3, D, 7)}
CASES: dict[Callable[[Any, Any], Any], tuple[dict[str, tuple[int, ...]], dict[str, str]]] = {
    by_index: (EXPERTS, {"7×3": "ffn"}),
    weights_first: (EXPERTS, {"7×3": "ffn"}),
    by_index_select: (EXPERTS, {"7×3": "ffn"}),
    by_embedding: (EXPERTS, {"7×3": "ffn"}),
    gated_experts: ({**EXPERTS, "router": (3, D)}, {"7×3": "ffn", "3": "ffn"}),
    one_output: ({**EXPERTS, "router": (3, D), "out": (D, 7)}, {"7": "ffn"}),
    averaged_weights: ({**EXPERTS, "router": (3, D)}, {"7": "ffn"}),
}


@pytest.mark.parametrize("forward", CASES, ids=lambda f: f.__name__)
def test_experts(forward: Callable[[Any, Any], Any]) -> None:
    shapes, expected = CASES[forward]
    found = labels(Block(forward, **shapes), torch.randn(2, 6, D, dtype=torch.float64))
    assert set(found.values()) == set(expected.values())
    assert {name.partition("×")[0] for name in found} == {name.partition("×")[0] for name in expected}


def lora(m: Any, x: Any) -> Any:
    return x @ (m.w + m.b @ m.a).mT.relu() + x @ m.c.mT @ m.e.mT


def lora_on_queries(m: Any, x: Any) -> Any:
    q = (x @ m.q.mT + x @ m.a.mT @ m.b.mT).unflatten(-1, (3, 4)).transpose(1, 2)
    k, v = rows(x, m.k, 3, 4), rows(x, m.v, 3, 5)
    return merged(F.scaled_dot_product_attention(q, k, v)) @ m.o.mT


def merged_lora(m: Any, x: Any) -> Any:
    """The adapter is multiplied out first."""
    hidden = (x @ m.up.mT).relu()
    return hidden @ (m.down + m.b @ m.a).mT


def state_space(m: Any, x: Any) -> Any:
    """A selective state: each channel keeps 4 numbers, written by one row and read by another."""
    u = F.silu(x @ m.inside.mT)
    write, read = u @ m.write.mT, u @ m.read.mT
    step = F.softplus(u @ m.step.mT)
    state = torch.zeros(x.shape[0], 7, 4, dtype=x.dtype)
    outputs = []
    for t in range(3):
        state = state * (-step[:, t, :, None]).exp() + u[:, t, :, None] * write[:, t, None, :]
        outputs.append(E("bcn,bn->bc", state, read[:, t]))
    gate = F.silu(x[:, :3] @ m.gate.mT)
    return F.pad((torch.stack(outputs, 1) * gate) @ m.out.mT, (0, 0, 0, 3))


def cross_attention(m: Any, x: Any) -> Any:
    other = x.cos()[:, :4]
    q, k, v = rows(x, m.q, 3, 4), rows(other, m.k, 3, 4), rows(other, m.v, 3, 5)
    return merged(F.scaled_dot_product_attention(q, k, v)) @ m.o.mT


def pooled_by_attention(m: Any, x: Any) -> Any:
    weights = ((x @ m.up.mT).tanh() @ m.score).softmax(1)
    return (E("bs,bsv->bv", weights, x @ m.v.mT) @ m.o.mT)[:, None]


def pooled_by_mask(m: Any, x: Any) -> Any:
    mask = (x[..., 0] > 0).to(x.dtype)
    hidden = (x @ m.up.mT).relu()
    return (E("bs,bsf->bf", mask, hidden) @ m.down.mT)[:, None]


def normalised_queries(m: Any, x: Any) -> Any:
    q, k, v = squared(rows(x, m.q, 3, 4)), dotted(rows(x, m.k, 3, 4)), squared(rows(x, m.v, 3, 5))
    return merged((q @ k.mT).softmax(-1) @ v) @ m.o.mT


OTHERS: list[tuple[Callable[[Any, Any], Any], dict[str, tuple[int, ...]], dict[str, str]]] = [
    (lora, {"w": (D, D), "a": (2, D), "b": (D, 2), "c": (4, D), "e": (D, 4)}, {"2": "pair", "4": "pair"}),
    (lora_on_queries, {**MANY, "a": (2, D), "b": (12, 2)}, {**HEADS, "2": "pair"}),
    (merged_lora, {"up": (7, D), "down": (D, 7), "a": (2, 7), "b": (D, 2)}, {"7": "ffn", "2": "pair"}),
    (
        state_space,
        {"inside": (7, D), "gate": (7, D), "write": (4, 7), "read": (4, 7), "step": (7, 7), "out": (D, 7)},
        {"7": "vo", "4": "qk"},
    ),
    (cross_attention, MANY, HEADS),
    (pooled_by_attention, {"up": (7, D), "score": (7,), "v": (5, D), "o": (D, 5)}, {"7": "ffn", "5": "vo"}),
    (pooled_by_mask, {"up": (7, D), "down": (D, 7)}, {"7": "ffn"}),
    (normalised_queries, MANY, HEADS),
]


@pytest.mark.parametrize(("forward", "shapes", "expected"), OTHERS, ids=[c[0].__name__ for c in OTHERS])
def test_others(
    forward: Callable[[Any, Any], Any], shapes: dict[str, tuple[int, ...]], expected: dict[str, str]
) -> None:
    assert labels(Block(forward, **shapes), torch.randn(2, 6, D, dtype=torch.float64)) == expected


def experts_of_experts(m: Any, x: Any) -> Any:
    hidden = E("btx,xgrf->btgrf", x, m.up).relu() * m.s[:, None]
    return E("btgrf,grfx->btx", hidden, m.down)


def test_a_carrier_whose_choice_differs_along_another_dim_carries_only_what_that_carries() -> None:
    """Groups differ per row, which comes first in `s`, and units cannot follow both, for `up` has them on two axes."""
    torch.manual_seed(0)
    model = Block(experts_of_experts, s=(3,), up=(D, 2, 3, 5), down=(2, 3, 5, D)).double()
    args = (torch.randn(2, 4, D, dtype=torch.float64),)
    couplings = eco.detect(model, args)
    assert {(c.size, c.carriers) for c in couplings.offered} == {(3, 1), (2, 3), (5, 1)}
    for seed in range(3):
        plan = eco.plan(couplings, 0.6, scores="random", seed=seed)
        assert masked_error(model, eco.shrink(model, plan, args), plan, args, {}) <= 1e-12


def image(m: Any, x: Any) -> Any:
    """Convolutions, a gate of channels, a pool and a head."""
    h = F.conv2d(x.unflatten(-1, (2, 5)), m.up, padding=1).relu()
    h = h * (h.mean((2, 3)) @ m.gate.mT).sigmoid()[:, :, None, None]
    h = F.conv2d(h, m.middle, padding=1).relu()
    return (F.adaptive_avg_pool2d(h, 1).flatten(1) @ m.down.mT)[:, None]


def test_a_network_of_convolutions_has_no_lines_for_the_taps_of_its_kernels() -> None:
    model = Block(image, up=(7, 6, 3, 3), gate=(7, 7), middle=(5, 7, 3, 3), down=(D, 5)).double()
    couplings = eco.detect(model, (torch.randn(2, 6, D, dtype=torch.float64),))
    assert {(c.size, c.kind) for c in couplings.offered} == {(7, "ffn"), (5, "ffn")}
    taps = {(m.parameter, m.axis) for c in couplings for m in c.members if m.parameter in ("up", "middle")}
    assert taps <= {("up", 0), ("up", 1), ("middle", 0), ("middle", 1)}


def test_taps_that_a_weight_makes_are_listed_with_their_reason() -> None:
    """A kernel made by a linear layer: its taps are rows of that, and somebody may ask for them."""

    def dynamic(m: Any, x: Any) -> Any:
        kernel = (x.mean((0, 1)) @ m.taps.mT)[None, None].expand(D, 1, 3)
        return F.conv1d(x.mT, kernel, padding=1, groups=D).mT

    model = Block(dynamic, taps=(3, D)).double()
    couplings = eco.detect(model, (torch.randn(2, 6, D, dtype=torch.float64),))
    (taps,) = (c for c in couplings if ("taps", 0) in {(m.parameter, m.axis) for m in c.members})
    assert taps.blocked is not None
    assert "window" in taps.blocked.message
