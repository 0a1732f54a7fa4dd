"""Tiny models of transformers with random weights, in float64."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

import ecospa_fx as eco
from ecospa_fx.coupling.couplings import Couplings

SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64}


def tiny(name: str, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    """A model by name, with example arguments."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    tokens: dict[str, Any] = {"input_ids": torch.randint(3, 61, (2, 9))}
    cached = {**tokens, "use_cache": False}
    if name in ("llama", "qwen3"):
        kind = {"llama": "Llama", "qwen3": "Qwen3"}[name]
        sizes = {**SIZES, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 112}
        config = getattr(transformers, f"{kind}Config")(**{**sizes, **TOKENS, **options})
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
    elif name == "gpt2":
        sizes = {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_inner": 112, "n_positions": 64}
        known = {n: TOKENS[n] for n in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**sizes, **known, **options}))
    elif name == "bert":
        cached = tokens
        known = {"vocab_size": 61, "intermediate_size": 112, "max_position_embeddings": 64}
        model = transformers.BertForMaskedLM(transformers.BertConfig(**{**SIZES, **known, **options}))
    else:
        cached = {"pixel_values": torch.randn(2, 3, 16, 16, dtype=torch.float64)}
        known = {"intermediate_size": 112, "image_size": 16, "patch_size": 8, "num_labels": 5}
        model = transformers.ViTForImageClassification(transformers.ViTConfig(**{**SIZES, **known, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.double().eval(), cached


@cache
def couplings_of(name: str) -> Couplings:
    """What is found in a model by its name; every call of `tiny` makes the same one."""
    model, kwargs = tiny(name)
    return eco.detect(model, (), kwargs)
