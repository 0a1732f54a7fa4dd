"""Vision-language models and mixtures of transformers: the part that can be exported is made smaller in the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import ecospa_fx as eco
from ecospa_fx.errors import CaptureError
from ecospa_fx.verify import masked, masked_error

TEXT: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "vocab_size": 80, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "num_attention_heads": 2, "patch_size": 4,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 32,
}  # fmt: skip
SECTIONS = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
IMAGE = 70
TOKENS = {"image_token_id": IMAGE, "video_token_id": 71}
IDS = torch.tensor([[5, 6, 72, *[IMAGE] * 4, 73, 9, 10, 11]]).repeat(2, 1)
PATCHES = {"image_grid_thw": torch.tensor([[1, 4, 4]] * 2), "mm_token_type_ids": (IDS == IMAGE).long()}


def build(name: str) -> tuple[nn.Module, dict[str, Any], str]:
    """A model by the type of transformers, in float64, its example inputs, and the path of the part."""
    t = pytest.importorskip("transformers")
    torch.manual_seed(0)
    language, images = "model.language_model", {"pixel_values": torch.randn(2, 3, 16, 16)}
    inputs: dict[str, Any] = {**images, "image_sizes": torch.tensor([[16, 16]] * 2)}
    if name in ("Qwen2_5_VL", "Qwen3VL", "Glm4v"):
        inputs = {"pixel_values": torch.randn(32, 96), **PATCHES}
        kinds: dict[str, dict[str, Any]] = {
            "Qwen2_5_VL": {"depth": 1, "window_size": 16, "fullatt_block_indexes": [0]},
            "Qwen3VL": {"depth": 2, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
            "Glm4v": {"depth": 1, "image_size": 16},
        }
        text = {**TEXT, "head_dim": 8, "rope_parameters": {**SECTIONS, "partial_rotary_factor": 1.0}}
        config = getattr(t, f"{name}Config")(text_config=text, vision_config={**VISION, **kinds[name]}, **TOKENS)
    elif name == "Mistral3":
        vision = {**VISION, "model_type": "pixtral", "num_hidden_layers": 1, "head_dim": 8, "image_size": 16}
        text = {**TEXT, "model_type": "mistral", "head_dim": 8}
        config = t.Mistral3Config(text_config=text, vision_config=vision, image_token_id=IMAGE, spatial_merge_size=2)
    elif name == "Idefics2":
        language, inputs = "model.text_model", {"pixel_values": torch.randn(2, 1, 3, 8, 8)}
        seen = {"resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2, "num_key_value_heads": 1}
        seen |= {"resampler_head_dim": 8, "hidden_size": 32}
        vision = {**VISION, "num_hidden_layers": 1, "image_size": 8}
        text = {**TEXT, "model_type": "mistral"}
        config = t.Idefics2Config(text_config=text, vision_config=vision, perceiver_config=seen, image_token_id=IMAGE)
    else:
        language, inputs = "model.layers.0.self_attn", {}
        config = t.MixtralConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2)
    causal = name == "Mixtral"
    model: Any = getattr(t, f"{name}{'ForCausalLM' if causal else 'ForConditionalGeneration'}")(config)
    if causal:
        model.set_experts_implementation("eager")  # which loops over the experts that were chosen
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    inputs = {n: v.double() if v.is_floating_point() else v for n, v in inputs.items()}
    return model.double().eval(), {"input_ids": IDS, **inputs, "use_cache": False}, language


def check(model: nn.Module, kwargs: dict[str, Any], part: str, *, exports: bool = False) -> nn.Module:
    """The whole with the smaller part equals the masked whole; returns it.

    exports: whether it does as a whole, or that is not asked.
    """
    if not exports:
        with pytest.raises(CaptureError, match="cannot be exported"):
            eco.detect(model, (), kwargs)
    couplings = eco.detect(model, (), kwargs, part=part)
    assert couplings.offered
    assert all(c.layer.startswith(part) for c in couplings.offered)
    plan = eco.plan(couplings, 0.3, "random")
    small = eco.shrink(model, plan, (), kwargs, part=part)
    assert masked_error(model, small, plan, (), kwargs) < 1e-12
    assert set(small.state_dict()) == set(model.state_dict())
    removed = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in small.parameters())
    assert removed == plan.removed_parameters > 0
    dense, logits = model(**kwargs).logits, small(**kwargs).logits
    assert (dense - logits).abs().max() > 1e-3 * dense.abs().max()
    return small


def test_qwen2_5_vl() -> None:
    model, kwargs, part = build("Qwen2_5_VL")
    small: Any = check(model, kwargs, part, exports=True)
    assert type(small.model.language_model).__name__ == "Qwen2_5_VLTextModel"
    assert small.get_input_embeddings() is small.model.language_model.embed_tokens
    assert small.model.language_model.dtype == torch.float64


def test_a_layer_of_a_mixture_that_loops_over_the_chosen_experts() -> None:
    check(*build("Mixtral"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Qwen3VL", "Glm4v", "Mistral3", "Idefics2"])
def test_other_vision_language_models(name: str) -> None:
    check(*build(name), exports=name == "Idefics2")


@pytest.mark.slow
def test_in_place_it_generates() -> None:
    model: Any
    model, kwargs, part = build("Qwen2_5_VL")
    plan = eco.plan(eco.detect(model, (), kwargs, part=part), 0.3, "random").even()
    plan = eco.Plan(tuple(s for s in plan if s.kind == "ffn"), plan.shapes)
    with masked(model, plan):
        want = model(**kwargs).logits
        tokens = model.generate(**{**kwargs, "use_cache": True}, max_new_tokens=4, do_sample=False)
    eco.shrink_(model, plan, (), kwargs, part=part)
    assert torch.allclose(model(**kwargs).logits, want, rtol=1e-9, atol=1e-9)
    assert torch.equal(model.generate(**{**kwargs, "use_cache": True}, max_new_tokens=4, do_sample=False), tokens)
