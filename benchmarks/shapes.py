"""The shapes whose speed is measured: dense modules, plans at smaller widths, modules written by hand at these."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ecospa_fx.coupling.couplings import Couplings
from ecospa_fx.plan import Plan, Selection

MODELS: dict[str, dict[str, Any]] = {
    "llama-1b": {
        "family": "llama", "hidden": 2048, "layers": 24, "heads": 32, "ffn": 5461, "vocabulary": 32000,
        "head_dim": 64, "small": {"head_dim": 32, "ffn": 2752}, "train": (64, 256), "prefill": (8, 2048),
        "decode": (8, 2048),
    },
    "gpt2-medium": {
        "family": "gpt2", "hidden": 1024, "layers": 24, "heads": 16, "ffn": 4096, "vocabulary": 50257,
        "head_dim": 64, "small": {"head_dim": 32, "ffn": 2048}, "train": (32, 512), "prefill": (8, 1024),
    },
    "llama-tiny": {
        "family": "llama", "hidden": 256, "layers": 4, "heads": 4, "ffn": 688, "vocabulary": 1000,
        "head_dim": 64, "small": {"head_dim": 32, "ffn": 344}, "train": (4, 128), "prefill": (4, 256),
        "decode": (4, 256),
    },
    "gpt2-tiny": {
        "family": "gpt2", "hidden": 256, "layers": 4, "heads": 4, "ffn": 1024, "vocabulary": 1000,
        "head_dim": 64, "small": {"head_dim": 32, "ffn": 512}, "train": (4, 128), "prefill": (4, 256),
    },
}  # fmt: skip


class Block(nn.Module):
    """A GPT-2 block whose heads may be narrower than its residual width."""

    def __init__(self, hidden: int, heads: int, head_dim: int, ffn: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, 1 / 8
        self.before, self.after = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv, self.out = nn.Linear(hidden, 3 * heads * head_dim), nn.Linear(heads * head_dim, hidden)
        self.up, self.down = nn.Linear(hidden, ffn), nn.Linear(ffn, hidden)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(self.before(x)).chunk(3, -1))
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        result: Tensor = x + self.down(nn.functional.gelu(self.up(self.after(x)), approximate="tanh"))
        return result


class HandGpt2(nn.Module):
    """A GPT-2 written by hand."""

    def __init__(self, shape: dict[str, Any]) -> None:
        super().__init__()
        hidden = shape["hidden"]
        self.tokens, self.places = nn.Embedding(shape["vocabulary"], hidden), nn.Embedding(2048, hidden)
        self.layers = nn.ModuleList(
            Block(hidden, shape["heads"], shape["head_dim"], shape["ffn"]) for _ in range(shape["layers"])
        )
        self.norm = nn.LayerNorm(hidden)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        x = self.tokens(input_ids) + self.places(torch.arange(input_ids.shape[1], device=input_ids.device))
        for layer in self.layers:
            x = layer(x)
        return argparse.Namespace(logits=self.norm(x) @ self.tokens.weight.T)


def dense(shape: dict[str, Any]) -> nn.Module:
    """The transformers module of a shape."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    if shape["family"] == "llama":
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=shape["vocabulary"], hidden_size=shape["hidden"], intermediate_size=shape["ffn"],
                num_hidden_layers=shape["layers"], num_attention_heads=shape["heads"], head_dim=shape["head_dim"],
                num_key_value_heads=shape["heads"], attn_implementation="sdpa", max_position_embeddings=4096,
            )
        )  # fmt: skip
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=shape["vocabulary"], n_embd=shape["hidden"], n_layer=shape["layers"], n_head=shape["heads"],
            n_inner=shape["ffn"], n_positions=2048, attn_implementation="sdpa", bos_token_id=0, eos_token_id=0,
            attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0,
        )
    )  # fmt: skip


def by_hand(shape: dict[str, Any]) -> nn.Module:
    """A module at the shrunk widths."""
    small = {**shape, **shape["small"]}
    return dense(small) if shape["family"] == "llama" else HandGpt2(small)


def half(couplings: Couplings, shape: dict[str, Any], kinds: Sequence[str] = ("qk", "vo", "ffn")) -> Plan:
    """A plan with the small widths everywhere; which units stay is drawn per carrier."""
    generator = torch.Generator().manual_seed(0)
    share = shape["small"]["head_dim"] / shape["head_dim"]
    selections = []
    for c in couplings.offered:
        if c.kind not in kinds:
            continue
        keep = torch.zeros(c.carriers, c.size, dtype=torch.bool)
        for units in keep:
            kept = shape["small"]["ffn"] if c.kind == "ffn" else int(c.size * share)
            units[torch.randperm(c.size, generator=generator)[:kept]] = True
        selections.append(Selection.of(c, keep))
    return Plan(tuple(selections), tuple(couplings.shapes.items()))


def layers_of(module: nn.Module) -> list[nn.Module]:
    """The modules of the longest list in a model."""
    lists = [m for m in module.modules() if isinstance(m, nn.ModuleList)]
    return list(max(lists, key=len))
