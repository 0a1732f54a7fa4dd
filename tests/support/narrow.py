"""Tiny models of transformers with a narrower second layer, as `shrink_` leaves them: their configurations are old."""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

import pytest
import torch

SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 112}
TOKENS = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64}
GROUPED = {**SIZES, **TOKENS, "num_key_value_heads": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 40}
FFN = {"intermediate_size": 40}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
GPT2 = {
    "n_embd": 48,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "vocab_size": 61,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class Narrow(NamedTuple):
    """A class of transformers, the fields of its dense configuration, and those of the second layer."""

    kind: str
    fields: dict[str, Any]
    second: dict[str, Any]


NARROW = {
    "llama": Narrow("LlamaForCausalLM", GROUPED, HEADS),
    "qwen2": Narrow("Qwen2ForCausalLM", GROUPED, HEADS),
    "qwen3": Narrow("Qwen3ForCausalLM", {**GROUPED, "head_dim": 16}, HEADS),
    "qwen3-moe": Narrow(
        "Qwen3MoeForCausalLM",
        {**GROUPED, "head_dim": 16, **EXPERTS},
        {**HEADS, "num_experts": 3, "moe_intermediate_size": 32},
    ),
    "mistral": Narrow("MistralForCausalLM", GROUPED, HEADS),
    "olmo": Narrow("OlmoForCausalLM", GROUPED, HEADS),
    "smollm3": Narrow("SmolLM3ForCausalLM", GROUPED, HEADS),
    "gemma3": Narrow("Gemma3ForCausalLM", {**GROUPED, "head_dim": 16}, HEADS),
    "phi3": Narrow("Phi3ForCausalLM", GROUPED, HEADS),
    "gpt2": Narrow("GPT2LMHeadModel", GPT2, {"n_inner": 40}),
    "gpt-neox": Narrow("GPTNeoXForCausalLM", {**SIZES, **TOKENS}, FFN),
    "bert": Narrow("BertForMaskedLM", {**SIZES, **TOKENS}, FFN),
    "vit": Narrow("ViTForImageClassification", {**SIZES, "image_size": 16, "patch_size": 8, "num_labels": 5}, FFN),
}


def narrow(name: str, second: dict[str, Any] | None = None, **options: Any) -> Any:
    """A model with random weights; second: the fields of its second layer, in place of those in the table."""
    transformers = pytest.importorskip("transformers")
    modeling_per_layer = import_module("ecospa_fx.export.modeling_per_layer")
    kind, fields, fields_of_second = NARROW[name]
    stock = getattr(transformers, kind)
    config_class = transformers.Gemma3TextConfig if name == "gemma3" else stock.config_class
    fields = {**fields, **options}
    config = config_class(**fields, allow_global_per_layer_attribute_access=True)
    computed = "num_key_value_heads" in fields and not hasattr(config, "head_dim")
    if computed:
        config.head_dim = fields["hidden_size"] // fields["num_attention_heads"]
    config.per_layer_config = {1: fields_of_second if second is None else second}
    torch.manual_seed(0)
    model = getattr(modeling_per_layer, kind)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.__class__ = stock
    model.config.per_layer_config = None
    for field in ("allow_global_per_layer_attribute_access", *(["head_dim"] if computed else [])):
        del vars(model.config)[field]
    return model.eval()
