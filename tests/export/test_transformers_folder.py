"""Smaller models as checkpoints of transformers, loaded where this library is not."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ecospa_fx as eco
from ecospa_fx.errors import InputError, StorageError
from ecospa_fx.export import modeling_per_layer, verb
from ecospa_fx.export.transformers_folder import reread
from ecospa_fx.huggingface import example_inputs
from tests.support import reloading
from tests.support.hugging import couplings_of, tiny
from tests.support.inplace import assert_same, plan_of, state, uneven
from tests.support.narrow import NARROW, narrow

CODE = "modeling_per_layer.py"
AUTO = {"bert": "AutoModelForMaskedLM", "vit": "AutoModelForImageClassification"}


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder with an export of every model in the table, and what another process made of each."""
    root = tmp_path_factory.mktemp("exports")
    for name in NARROW:
        model = narrow(name)
        eco.export(model, root / name, format="transformers")
        call = example_inputs(model)
        with torch.no_grad():
            auto, logits = AUTO.get(name, "AutoModelForCausalLM"), model(**call).logits
        torch.save((auto, call, logits, model.state_dict()), root / f"{name}.pt")
    command = [sys.executable, "-W", "ignore", reloading.__file__, *(str(root / name) for name in NARROW)]
    environment = {**os.environ, "HF_HOME": str(root / "home"), "PYTHONPATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr
    return root, json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("name", NARROW)
def test_a_process_without_this_library_gets_the_same_numbers(name: str, exports: tuple[Path, dict[str, Any]]) -> None:
    root, results = exports
    result = results[name]
    assert (result["error"], result["error_again"]) == (0.0, 0.0)
    assert result["same_weights"]
    assert result["same_tokens"]
    assert result["kind"] == NARROW[name].kind
    assert result["base"].endswith("Model")
    config = json.loads((root / name / "config.json").read_text())
    assert config["per_layer_config"] == {"1": {n: v for n, v in NARROW[name].second.items() if n in carried(name)}}
    assert config["allow_global_per_layer_attribute_access"] is True
    assert (root / name / CODE).read_bytes() == Path(str(modeling_per_layer.__file__)).read_bytes()
    assert (root / f"{name}-again" / CODE).read_bytes() == (root / name / CODE).read_bytes()


def carried(name: str) -> set[str]:
    """The fields that change anything: of a mixture of experts, the width of its dense layers does not."""
    return set(NARROW[name].second) - ({"intermediate_size"} if name == "qwen3-moe" else set())


def test_the_modelling_file_names_no_architecture() -> None:
    text = Path(str(modeling_per_layer.__file__)).read_text().lower()
    assert not [word for word in ("llama", "qwen", "gpt", "bert", "vit", "gemma", "forcausallm") if word in text]


@pytest.mark.slow
def test_what_shrink_made(tmp_path: Path) -> None:
    """From the plan to the folder, whose certificate says how exact the module is."""
    model: Any
    model, kwargs = tiny("llama")
    dense = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="cannot say how wide the layers"):
        eco.shrink_(model, plan_of(couplings_of("llama"), ["ffn", "heads"], uneven), (), kwargs)
    before = model.config.to_dict()
    certificate = eco.export(model, tmp_path / "small", format="transformers", dense=dense)
    assert model.config.to_dict() == before
    assert certificate.exactness is not None
    assert certificate.exactness.against == "masking"
    assert certificate.exactness.dtype == "float64"
    assert certificate.exactness.error < 1e-9
    assert certificate.engine is not None
    assert certificate.engine.largest_error == 0.0
    with torch.no_grad():
        model.lm_head.weight.mul_(1.1)  # what stays was changed too
    certificate = eco.export(model, tmp_path / "changed", format="transformers", dense=dense)
    assert certificate.exactness is not None
    assert certificate.exactness.against == "graph"
    assert certificate.exactness.error < 1e-9


@pytest.mark.slow
def test_what_compress_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that were solved anew are compared with the graph's, and the folder gives the same numbers and tokens."""
    transformers: Any = pytest.importorskip("transformers")
    model: Any
    model, kwargs = tiny("llama")
    dense, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    ids = [torch.randint(model.config.vocab_size, (2, 8), generator=generator) for _ in range(4)]
    batches = [((), {"input_ids": row, "use_cache": False}) for row in ids]
    with pytest.warns(UserWarning, match="cannot say how wide the layers"):
        eco.compress_(model, (), kwargs, ratio=0.3, batches=batches, loss=next_token, kinds=["ffn"], distillation=0)
    certificate = eco.export(model, tmp_path / "small", format="transformers", dense=dense)
    assert certificate.exactness is not None
    assert certificate.exactness.against == "graph"
    assert certificate.exactness.error < 1e-9
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small", trust_remote_code=True, dtype="auto")
    for tensor in (*read.parameters(), *read.buffers()):
        tensor.data = tensor.data.clone()  # they may be a map of the file, at odd addresses
    with torch.no_grad():
        assert torch.equal(read(ids[0]).logits, model(ids[0]).logits)
    tokens, want = (m.generate(ids[0], max_new_tokens=4, do_sample=False) for m in (read, model))
    assert tokens.shape[1] > ids[0].shape[1]
    assert torch.equal(tokens, want)


def next_token(output: Any, args: Any, kwargs: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), kwargs["input_ids"][:, 1:].flatten())


def test_equal_layers_are_plain_fields(tmp_path: Path) -> None:
    model = narrow("llama", second={})
    wide = narrow("llama", second={}, intermediate_size=96, num_attention_heads=2, num_key_value_heads=1, head_dim=12)
    wide.config = model.config
    eco.export(wide, tmp_path / "plain", format="transformers")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert (config["intermediate_size"], config["num_attention_heads"], config["num_key_value_heads"]) == (96, 2, 1)
    assert "per_layer_config" not in config
    assert "auto_map" not in config
    assert not (tmp_path / "plain" / CODE).exists()


# -- refusals ----------------------------------------------------------------------------------------------------


def refused(model: nn.Module, path: Path, **options: Any) -> str:
    """The sentence of a refusal that left nothing behind."""
    with pytest.raises((StorageError, InputError)) as error:
        eco.export(model, path, **{"format": "transformers", **options})
    assert not list(path.parent.glob(f"*{path.name}*"))
    return str(error.value)


def test_what_no_field_gives_is_named(tmp_path: Path) -> None:
    model = narrow("bert")
    model.bert.encoder.layer[1].attention.output.dense = nn.Linear(35, 48)
    sentence = refused(model, tmp_path / "small")
    assert "bert.encoder.layer.1.attention.output.dense.weight has the shape (48, 35) in place of (48, 48)" in sentence
    assert "no field of BertConfig" in sentence


def test_widths_outside_of_layers_are_named(tmp_path: Path) -> None:
    model = narrow("llama")
    model.lm_head = nn.Linear(48, 60, bias=False)
    assert "lm_head.weight of this LlamaForCausalLM has another shape" in refused(model, tmp_path / "small")


def test_an_attribute_that_no_configuration_gives_is_named(tmp_path: Path) -> None:
    model = narrow("llama")
    model.model.layers[1].self_attn.scaling = 0.5
    assert "model.layers.1.self_attn.scaling is 0.5, and 0.288675 by its configuration" in refused(
        model, tmp_path / "small"
    )
    model = narrow("llama")
    model.model.rotary_emb.inv_freq.mul_(2)
    assert "buffer model.rotary_emb.inv_freq holds other values" in refused(model, tmp_path / "small")
    model = narrow("llama")
    model.model.layers[0].mlp.act_fn = nn.ReLU()
    assert "the model gives other numbers" in refused(model, tmp_path / "small")


class Adapted(nn.Module):
    """A module around one of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.scale = narrow("llama", second={}), nn.Parameter(torch.ones(1))


def test_what_is_no_model_of_transformers(tmp_path: Path) -> None:
    assert "a Adapted is no model of transformers" in refused(Adapted(), tmp_path / "small")
    assert "a Linear is no model of transformers" in refused(nn.Linear(2, 3), tmp_path / "small")


def test_what_exists_stays(tmp_path: Path) -> None:
    model = narrow("llama")
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("mine")
    for name in ("there", "file"):
        with pytest.raises(StorageError, match="exists already"):
            eco.export(model, tmp_path / name, format="transformers")
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(StorageError, match="is not a folder: make it first"):
        eco.export(model, tmp_path / "none" / "small", format="transformers")


def test_options_that_mean_nothing(tmp_path: Path) -> None:
    model, path = narrow("llama", second={}), tmp_path / "small"
    assert "format='pdf' is unknown: give 'transformers'" in refused(model, path, format="pdf")
    assert "dtype=torch.int8 is no floating type" in refused(model, path, dtype=torch.int8)
    assert "dtype='q8_0' is no floating type" in refused(model, path, dtype="q8_0")
    assert "is no folder with one of tokenizer.json" in refused(model, path, tokenizer=tmp_path)
    assert "tokenizer=3 is no tokenizer" in refused(model, path, tokenizer=3)
    assert "is on meta and has no values" in refused(narrow("llama", second={}).to("meta"), path)


def test_nothing_stays_where_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(verb, "write_certificate", fails)
    assert "cannot be written: no space left on device" in refused(narrow("vit"), tmp_path / "small")


def test_a_checkpoint_that_is_off_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: Any, **options: Any) -> nn.Module:
        model = reread(*args, **options)
        with torch.no_grad():
            dict(model.named_parameters())["classifier.bias"].add_(1)
        return model

    monkeypatch.setattr(verb, "reread", wrong)
    assert "loaded again, is off by 1.0e+00, so it was not kept" in refused(narrow("vit"), tmp_path / "small")


def test_older_transformers_take_equal_widths_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = narrow("vit")
    monkeypatch.delattr("transformers.configuration_utils.HeterogeneousConfigMixin.is_heterogeneous")
    with pytest.raises(ImportError, match=r"need transformers 5.14 or newer"):
        exec(compile(Path(str(modeling_per_layer.__file__)).read_text(), CODE, "exec"), {"__name__": "code"})
    monkeypatch.delitem(sys.modules, modeling_per_layer.__name__)
    monkeypatch.delattr(sys.modules["ecospa_fx.export"], "modeling_per_layer")
    sentence = refused(model, tmp_path / "small")
    assert "need transformers 5.14 or newer" in sentence
    assert "plan with uniform=True" in sentence


# -- what travels along ------------------------------------------------------------------------------------------


def test_types_tokenizer_and_generation_settings(tmp_path: Path) -> None:
    model = narrow("llama")
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    (tmp_path / "source" / "notes.txt").write_text("stay")
    model.config._name_or_path = str(tmp_path / "source")
    model.generation_config.max_new_tokens = 7
    certificate = eco.export(model, tmp_path / "half", format="transformers", dtype=torch.bfloat16)
    names = {path.name for path in (tmp_path / "half").iterdir()}
    assert names == {*certificate.files, "certificate.json"}
    assert {"tokenizer.json", CODE, "model.safetensors", "generation_config.json"} < names
    assert "notes.txt" not in names
    assert json.loads((tmp_path / "half" / "generation_config.json").read_text())["max_new_tokens"] == 7
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert next(model.parameters()).dtype is torch.float32
    assert certificate.engine is not None
    assert 0 < certificate.engine.largest_error < 0.1 * certificate.engine.largest_output


def test_a_tokenizer_that_saves_itself(tmp_path: Path) -> None:
    class Saving:
        def save_pretrained(self, folder: Path) -> None:
            (folder / "tokenizer.json").write_text("its own")

    eco.export(narrow("vit"), tmp_path / "small", format="transformers", tokenizer=Saving())
    assert (tmp_path / "small" / "tokenizer.json").read_text() == "its own"
    eco.export(narrow("vit"), tmp_path / "again", format="transformers", tokenizer=tmp_path / "small")
    assert (tmp_path / "again" / "tokenizer.json").read_text() == "its own"


def test_modes_and_attributes_of_the_model_stay(tmp_path: Path) -> None:
    model = narrow("llama").train()
    model.model.layers[0].eval()
    before = state(model)
    eco.export(model, tmp_path / "small", format="transformers")
    assert_same(model, before)
    assert not hasattr(model.config, "auto_map")
    assert not model.config.is_heterogeneous
