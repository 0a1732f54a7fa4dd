"""Smaller models as GGUF files, run by llama.cpp itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ecospa_fx as eco
from ecospa_fx.errors import InputError, StorageError
from ecospa_fx.export import gguf_parts, gguf_tokenizer, llama_cpp, verb
from ecospa_fx.export.check import check_export
from ecospa_fx.export.gguf_file import (
    READERS,
    GgufReader,
    as_stored,
    frequency_base,
    frequency_factors,
    interleaved,
    reader_for,
)
from ecospa_fx.export.gguf_parts import Parts, computed, parts_of
from tests.support.narrow import narrow

gguf = pytest.importorskip("gguf")
needs_llama_cpp = pytest.mark.skipif(not llama_cpp.is_installed(), reason="llama.cpp: pip install xllamacpp")
NO_TOKENIZER = pytest.mark.filterwarnings("ignore:there is no tokenizer beside the model")
pytestmark = NO_TOKENIZER


def architecture(path: Path) -> str:
    field = gguf.GGUFReader(path).fields["general.architecture"]
    return str(field.contents())


@needs_llama_cpp
@pytest.mark.parametrize(
    ("name", "second", "options", "reader"),
    [
        ("llama", {}, {}, "llama"),
        ("llama", None, {}, "deci"),
        ("qwen2", None, {"tie_word_embeddings": True}, "deci"),
        ("phi3", None, {}, "deci"),
        ("qwen3", {}, {}, "qwen3"),
        ("qwen3", None, {"tie_word_embeddings": True}, "openelm"),
    ],
)
def test_llama_cpp_gives_the_numbers_of_the_model(
    name: str, second: dict[str, Any] | None, options: dict[str, Any], reader: str, tmp_path: Path
) -> None:
    path = tmp_path / "small.gguf"
    model = narrow(name, second, **options)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):
            nn.init.normal_(parameter)
    certificate = eco.export(model, path, format="gguf")
    assert architecture(path) == reader
    assert certificate.engine is not None
    assert certificate.engine.largest_error < 0.01 * certificate.engine.largest_output
    assert {file.name for file in tmp_path.iterdir()} == {"small.gguf", "small.gguf.certificate.json"}


@needs_llama_cpp
def test_ragged_layers_are_as_near_as_dense_ones(tmp_path: Path) -> None:
    errors = []
    for name, second in (("dense", {}), ("ragged", None)):
        engine = eco.export(narrow("llama", second), tmp_path / f"{name}.gguf", format="gguf").engine
        assert engine is not None
        errors.append(engine.largest_error / engine.largest_output)
    assert errors[1] < 1.5 * errors[0]
    again = check_export(tmp_path / "ragged.gguf")
    assert again.error is not None
    assert again.error < 1e-6


@needs_llama_cpp
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, "q8_0"])
def test_shorter_types(dtype: torch.dtype | str, tmp_path: Path) -> None:
    model = narrow(
        "llama", second={"intermediate_size": 40, "num_attention_heads": 2, "num_key_value_heads": 1}, hidden_size=64
    )
    model = model if dtype == "q8_0" else model.to(dtype)
    certificate = eco.export(model, tmp_path / "small.gguf", format="gguf", dtype=dtype if dtype == "q8_0" else None)
    stored = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "small.gguf").tensors}
    kind = {"torch.float16": "F16", "torch.bfloat16": "BF16"}.get(str(dtype), "Q8_0")
    assert stored["blk.0.attn_q.weight"] == kind
    assert stored["blk.1.ffn_down.weight"] == ("F16" if kind == "Q8_0" else kind)  # 40 is no multiple of 32
    assert stored["blk.0.attn_norm.weight"] == "F32"
    assert certificate.engine is not None
    assert 0 < certificate.engine.largest_error < 0.1 * certificate.engine.largest_output


@needs_llama_cpp
def test_an_ffn_without_units_keeps_its_attention(tmp_path: Path) -> None:
    model = narrow("llama")
    mlp = model.model.layers[1].mlp
    for name, shape in (("gate_proj", (0, 48)), ("up_proj", (0, 48)), ("down_proj", (48, 0))):
        getattr(mlp, name).weight = nn.Parameter(torch.zeros(shape))
    engine = eco.export(model, tmp_path / "small.gguf", format="gguf").engine
    assert engine is not None
    assert engine.largest_error < 0.01 * engine.largest_output
    shapes = {t.name: list(t.shape) for t in gguf.GGUFReader(tmp_path / "small.gguf").tensors}
    assert shapes["blk.1.ffn_down.weight"] == [32, 48]


@needs_llama_cpp
def test_scaled_frequencies(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "rope_theta": 100.0,
    }
    model = narrow("llama", rope_parameters={**scaling, "original_max_position_embeddings": 32})
    engine = eco.export(model, tmp_path / "small.gguf", format="gguf").engine
    assert engine is not None
    assert engine.largest_error < 0.01 * engine.largest_output
    assert "rope_freqs.weight" in {t.name for t in gguf.GGUFReader(tmp_path / "small.gguf").tensors}


# -- refusals ----------------------------------------------------------------------------------------------------


def refused(model: nn.Module, path: Path, **options: Any) -> str:
    with pytest.raises((StorageError, InputError)) as error:
        eco.export(model, path, **{"format": "gguf", **options})
    assert not list(path.parent.glob("*small*"))
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("qwen3", {}, r"deci: queries and keys are normed; openelm: its output is not tied to its embedding"),
        ("gemma3", {}, "have no place for model.layers.0.pre_feedforward_layernorm.weight"),
        ("gpt2", {}, "have no place for transformer.wpe.weight"),
        ("qwen3-moe", {}, "have no place for model.layers.0.mlp.experts.gate_up_proj"),
        ("olmo", {}, "no model that computes as this OlmoForCausalLM does"),
        ("llama", {"hidden_act": "gelu"}, r"a gated FFN with SiLU\) differs from it by"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "in long sequences"),
    ],
)
def test_what_no_reader_computes(name: str, options: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    import re

    assert re.search(sentence, refused(narrow(name, **options), tmp_path / "small.gguf"))


def test_options_that_mean_nothing(tmp_path: Path) -> None:
    path = tmp_path / "small.gguf"
    assert "dtype='q4_k' is no type of GGUF files" in refused(narrow("llama"), path, dtype="q4_k")
    assert "a Linear has no configuration" in refused(nn.Linear(2, 2), path)
    path.with_name("small.gguf.certificate.json").write_text("mine")
    with pytest.raises(StorageError, match="exists already"):
        eco.export(narrow("llama"), path, format="gguf")
    assert not path.exists()


def test_a_file_that_llama_cpp_reads_otherwise_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "run", lambda *_: (torch.zeros(64, 61), []))
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: True)
    assert "llama.cpp gives other numbers, by" in refused(narrow("llama"), tmp_path / "small.gguf")


def test_without_llama_cpp_nothing_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    assert eco.export(narrow("llama"), tmp_path / "small.gguf", format="gguf").engine is None
    assert check_export(tmp_path / "small.gguf").notes == ("the engine was not run when this was exported",)


@needs_llama_cpp
def test_what_is_no_file_of_llama_cpp(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_text("no")
    with pytest.raises(StorageError, match=r"llama.cpp does not read x.gguf"):
        llama_cpp.run(tmp_path / "x.gguf")


@pytest.mark.filterwarnings("default:there is no tokenizer beside the model")
def test_a_missing_tokenizer_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    with pytest.warns(UserWarning, match="there is no tokenizer beside the model") as caught:
        eco.export(narrow("llama"), tmp_path / "small.gguf", format="gguf")
    assert caught[0].filename == __file__


# -- readers -----------------------------------------------------------------------------------------------------


def example_parts(name: str = "llama", **options: Any) -> Parts:
    model, ids = narrow(name, **options), torch.arange(12)[None]
    with torch.no_grad():
        return parts_of(model, ids, model(input_ids=ids).logits)


def test_parts_of_a_model() -> None:
    parts = example_parts()
    assert (parts.layers, parts.heads, parts.kv_heads, parts.ffn) == (2, [4, 2], [2, 1], [112, 40])
    assert (parts.head_dim, parts.epsilon) == (12, 1e-6)
    assert frequency_base(parts) == pytest.approx(1e4, rel=1e-4)
    assert torch.allclose(frequency_factors(parts), torch.ones(6), atol=1e-5)
    packed = example_parts("phi3")
    assert (packed.heads, packed.kv_heads, packed.ffn) == ([4, 2], [2, 1], [112, 40])


def test_readers_and_what_does_not_fit_them() -> None:
    parts = example_parts()
    assert reader_for(parts).name == "deci"
    plain: GgufReader = READERS[0]
    assert plain.misfit(parts) == "its layers differ in heads"
    kept = {name: t for name, t in parts.tensors.items() if ".attn_" not in name}
    assert replace(plain, ragged=True).misfit(replace(parts, tensors=kept)) == "a layer has no attention"
    scaled = replace(parts, frequencies=parts.frequencies * torch.linspace(1, 2, 6))
    assert replace(plain, ragged=True, scaled=False).misfit(scaled) == "its rotary frequencies are scaled"
    biased = {**parts.tensors, "blk.0.attn_q.bias": torch.zeros(48)}
    assert replace(plain, ragged=True, biased=False).misfit(replace(parts, tensors=biased)) == "it has biases"
    assert replace(plain, ragged=True, normed=True).misfit(parts) == "queries and keys are not normed"


def test_weights_as_they_are_stored() -> None:
    parts, ids = example_parts(hidden_size=64), torch.arange(12)[None]
    exact, halves = computed(parts, ids), computed(parts, ids, half_cache=True)
    assert 0 < float((exact - halves).abs().max()) < 0.01
    assert torch.equal(computed(as_stored(parts, "F32"), ids), exact)
    for kind, most in (("F16", 0.02), ("BF16", 0.2), ("Q8_0", 0.3)):
        stored = as_stored(parts, kind)
        assert 0 < float((computed(stored, ids) - exact).abs().max()) < most
        assert torch.equal(stored.tensors["output_norm.weight"], parts.tensors["output_norm.weight"])


def test_pairs_that_are_turned_stand_beside_each_other() -> None:
    parts = replace(example_parts(), head_dim=6, frequencies=torch.ones(2))
    assert interleaved(torch.arange(12), parts).tolist() == [0, 2, 1, 3, 4, 5, 6, 8, 7, 9, 10, 11]
    assert interleaved(torch.arange(12)[:, None], parts).shape == (12, 1)


# -- tokenizers --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with byte-level BPE of 300 tokens, whose digits stand alone."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("tokenizer")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    made.pre_tokenizer = level
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    made.train_from_iterator(["the cat sat on 1234 mats, isn't it  so\n\n 12345"] * 9, trainer)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([digits, level])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    return folder


@needs_llama_cpp
def test_the_tokenizer_goes_along(tokenizer: Path, tmp_path: Path) -> None:
    path = tmp_path / "small.gguf"
    eco.export(narrow("llama", vocab_size=310), path, format="gguf", tokenizer=tokenizer)
    fields = gguf.GGUFReader(path).fields
    assert fields["tokenizer.ggml.pre"].contents() == "smollm"
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert (len(tokens), tokens[0], tokens[-1]) == (310, "<|end|>", "[PAD309]")
    kinds = fields["tokenizer.ggml.token_type"].contents()
    assert (kinds[0], kinds[1], kinds[-1]) == (3, 1, 5)
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 0
    assert llama_cpp.run(path, texts=["the cat 12"])[1] == [wanted(tokenizer, "the cat 12")]


def wanted(folder: Path, text: str) -> list[int]:
    tokenizers = pytest.importorskip("tokenizers")
    return list(tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids)


def test_tokenizers_that_are_not_written(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, other = tmp_path / "small.gguf", tmp_path / "tokenizer"
    model = narrow("llama", vocab_size=310)
    other.mkdir()
    entries = json.loads((tokenizer / "tokenizer.json").read_text())
    for changed, sentence in (
        ({"model": {**entries["model"], "type": "Unigram"}}, "a tokenizer of kind Unigram that is not written"),
        ({"pre_tokenizer": None, "decoder": None}, "only byte-level BPE is"),
    ):
        (other / "tokenizer.json").write_text(json.dumps({**entries, **changed}))
        assert sentence in refused(model, path, tokenizer=other)
    (other / "tokenizer.json").write_text("{")
    assert "is no tokenizer that can be read" in refused(model, path, tokenizer=other)
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    assert "xllamacpp is not installed" in refused(model, path, tokenizer=tokenizer)
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: True)
    monkeypatch.setattr(llama_cpp, "run", lambda *_, **__: (torch.zeros(0), [[1]]))
    assert "llama.cpp splits text in no way" in refused(model, path, tokenizer=tokenizer)
    monkeypatch.setattr(gguf_tokenizer, "_split", lambda *_: "smollm")
    assert "has token 61 and the model 61" in refused(narrow("llama"), path, tokenizer=tokenizer)
    monkeypatch.setattr(llama_cpp, "run", lambda *_: (torch.zeros(64, 310), [[1]]))
    assert "llama.cpp gives other tokens" in refused(model, path, tokenizer=tokenizer)
    assert verb.LENGTH == 64


def test_names_of_one_architecture_are_not_those_of_the_next() -> None:
    """The package writes what an architecture has for itself over what all share."""
    gguf = pytest.importorskip("gguf")
    before = {name: tuple(names) for name, names in gguf.TensorNameMap.block_mappings_cfg.items()}
    model = narrow("qwen3")
    ways = gguf_parts._by_role(model, 2)
    assert {name: tuple(names) for name, names in gguf.TensorNameMap.block_mappings_cfg.items()} == before
    roles = {role.split(".")[-2] for role in ways[0]}
    assert len(ways) == 1
    assert roles >= {"ffn_norm", "attn_q_norm"}
    assert roles <= set(gguf_parts.PLACES)
