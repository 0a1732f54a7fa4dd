"""Tiny models of well-known architectures: what is found, and that every random plan is exact."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

import ecospa_fx as eco
from ecospa_fx.snapshot import Snapshot
from ecospa_fx.verify import masked_error
from tests.support.outline import outline

transformers = pytest.importorskip("transformers")

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def ids(batch: int = 2, length: int = 7) -> torch.Tensor:
    return torch.randint(5, 60, (batch, length), generator=torch.Generator().manual_seed(0))


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def llama() -> tuple[nn.Module, Callable[[int], Inputs]]:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config), lambda n: ((ids(n),), {"use_cache": False})


def gpt2() -> tuple[nn.Module, Callable[[int], Inputs]]:
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=16)
    return transformers.GPT2LMHeadModel(config), lambda n: ((ids(n),), {"use_cache": False})


def bert() -> tuple[nn.Module, Callable[[int], Inputs]]:
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=16,
    )  # fmt: skip
    return transformers.BertModel(config), lambda n: ((ids(n),), {})


def vit() -> tuple[nn.Module, Callable[[int], Inputs]]:
    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4, image_size=16, patch_size=8
    )
    return transformers.ViTModel(config), lambda n: ((noise(n, 3, 16, 16),), {})


def t5() -> tuple[nn.Module, Callable[[int], Inputs]]:
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=40, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config)
    return model, lambda n: ((), {"input_ids": ids(n), "decoder_input_ids": ids(n, 5), "use_cache": False})


def whisper() -> tuple[nn.Module, Callable[[int], Inputs]]:
    config = transformers.WhisperConfig(
        vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, num_mel_bins=8,
        decoder_attention_heads=4, encoder_ffn_dim=40, decoder_ffn_dim=40, max_source_positions=10,
        max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config)
    return model, lambda n: (
        (),
        {"input_features": noise(n, 8, 20), "decoder_input_ids": ids(n, 5), "use_cache": False},
    )


def mixtral() -> tuple[nn.Module, Callable[[int], Inputs]]:
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config), lambda n: ((ids(n),), {"use_cache": False})


def falcon() -> tuple[nn.Module, Callable[[int], Inputs]]:
    """All query heads share one key and one value."""
    config = transformers.FalconConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, multi_query=True, alibi=False
    )
    return transformers.FalconForCausalLM(config), lambda n: ((ids(n),), {"use_cache": False})


SHAPES: dict[Callable[[], Any], Counter[tuple[str, int, int]]] = {
    llama: Counter({("ffn", 40, 1): 2, ("qk", 4, 2): 2, ("vo", 8, 2): 2, ("heads", 2, 1): 2, ("heads", 2, 2): 2}),
    gpt2: Counter({("ffn", 128, 1): 1, ("qk", 8, 4): 1, ("vo", 8, 4): 1, ("heads", 4, 1): 1}),
    bert: Counter({("ffn", 40, 1): 1, ("qk", 8, 4): 1, ("vo", 8, 4): 1, ("heads", 4, 1): 1}),
    vit: Counter({("ffn", 40, 1): 1, ("qk", 8, 4): 1, ("vo", 8, 4): 1, ("heads", 4, 1): 1}),
    # one position bias serves all layers of a stack, so their heads go together
    t5: Counter({("ffn", 40, 1): 4, ("qk", 8, 4): 6, ("vo", 8, 4): 6, ("heads", 4, 1): 3}),
    mixtral: Counter({("ffn", 40, 3): 1, ("qk", 4, 2): 1, ("vo", 8, 2): 1, ("heads", 2, 1): 1}),
    falcon: Counter({("ffn", 128, 1): 1, ("qk", 4, 1): 1, ("vo", 8, 1): 1, ("heads", 4, 1): 1}),
    whisper: Counter({("ffn", 40, 1): 2, ("qk", 8, 4): 3, ("vo", 8, 4): 3, ("heads", 4, 1): 3}),
}


@pytest.mark.slow
@pytest.mark.parametrize("make", SHAPES, ids=lambda make: make.__name__)
def test_what_is_found_and_that_it_is_exact(make: Callable[[], tuple[nn.Module, Callable[[int], Inputs]]]) -> None:
    torch.manual_seed(0)
    model, inputs = make()
    model = model.eval() if make is mixtral else model.double().eval()
    args, kwargs = inputs(2)
    before, snapshot = outline(model), Snapshot([model], traced=True)
    couplings = eco.detect(model, args, kwargs)
    found = Counter((c.kind, c.size, c.carriers) for c in couplings.offered)
    assert {shape: found[shape] for shape in SHAPES[make]} == dict(SHAPES[make])
    plan = eco.plan(couplings, 0.5, scores="random", seed=1)
    small = eco.shrink(model, plan, args, kwargs)
    limit = 2e-5 if make is mixtral else 1e-9  # products per expert exist in float32 only
    assert masked_error(model, small, plan, *inputs(2)) <= limit
    assert masked_error(model, small, plan, *inputs(4)) <= limit
    assert outline(model) == before
    assert snapshot.changes() == []
    kept = {n: int(mask.sum()) for n, mask in plan.masks(model).items()}
    assert {n: p.numel() for n, p in small.named_parameters() if n in kept} == kept
    assert {n for n, _ in small.named_parameters()} == {n for n, _ in model.named_parameters()}
    if make is llama:  # whose tied weights stay tied
        assert small.get_parameter("lm_head.weight") is small.get_parameter("model.embed_tokens.weight")


def llava() -> tuple[nn.Module, Callable[[int], Inputs]]:
    """A model of images and text."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    sees = transformers.CLIPVisionConfig(num_hidden_layers=2, image_size=16, patch_size=8, **sizes)
    reads = transformers.LlamaConfig(vocab_size=64, num_hidden_layers=1, **sizes)
    config = transformers.LlavaConfig(vision_config=sees, text_config=reads, image_token_id=63, vision_feature_layer=-2)

    def inputs(n: int) -> Inputs:
        tokens = ids(n)
        tokens[:, 1:5] = 63
        return (), {"input_ids": tokens, "pixel_values": noise(n, 3, 16, 16).float(), "use_cache": False}

    return transformers.LlavaForConditionalGeneration(config), inputs


@pytest.mark.slow
@pytest.mark.parametrize("make", [bert, llava], ids=lambda make: make.__name__)
def test_recorded_hidden_states_are_as_many_in_a_model_that_was_looked_at(
    make: Callable[[], tuple[nn.Module, Callable[[int], Inputs]]],
) -> None:
    """Hooks that record them are put in place when a model is called first, which tracing must not do for it."""
    model, inputs = make()
    args, kwargs = inputs(2)
    kwargs = {**kwargs, "output_hidden_states": True}
    model.eval()
    twin = deepcopy(model)
    before = outline(model)
    plan = eco.plan(eco.detect(model, args, kwargs), 0.3, scores="magnitude")
    assert outline(model) == before
    small = eco.shrink(model, plan, args, kwargs) if make is bert else None
    assert outline(model) == before
    with torch.no_grad():
        want, got = (m(*args, **kwargs).hidden_states for m in (twin, model))
        assert len(got) == len(want)
        assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
        assert small is None or len(small(*args, **kwargs).hidden_states) == len(want)


def test_query_heads_of_one_key_are_reached_by_their_kind() -> None:
    model, inputs = falcon()
    couplings = eco.detect(model, *inputs(2))
    plan = eco.plan(couplings, 0.1, kinds=["heads"], scores="magnitude")
    assert {(s.kind, s.size) for s in plan} == {("heads", 4)}
    assert all(len(c.contains) == 2 for c in couplings.offered if c.kind == "heads")


def test_detection_on_meta_costs_no_memory() -> None:
    with torch.device("meta"):
        model, inputs = llama()
        couplings = eco.detect(model, *inputs(2))
    assert {c.kind for c in couplings.offered} == {"ffn", "qk", "vo", "heads", "residual"}


def test_refusals_name_operator_node_and_line() -> None:
    model, inputs = gpt2()
    refused = [c.blocked for c in eco.detect(model, *inputs(2)).blocked if c.blocked is not None]
    chosen = next(r for r in refused if r.operator == "aten.embedding")
    assert "chooses its positions" in chosen.message
    assert chosen.node.startswith("embedding")
    assert ".py:" in chosen.source


def test_the_path_leads_from_the_producer_to_the_contraction() -> None:
    model, inputs = llama()
    path = eco.detect(model, *inputs(2))["model.layers.0.self_attn.vo"].path
    assert (path[0].operator, path[0].action) == ("aten.linear", "produced")
    assert path[0].module.endswith("v_proj")
    assert (path[-1].operator, path[-1].action) == ("aten.linear", "contracts parameter")
    assert all(".py:" in step.source for step in path)
