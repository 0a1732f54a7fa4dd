"""The command line: what it takes, what it prints, and one sentence for everything that it refuses."""

from __future__ import annotations

import argparse
import json
import lzma
import math
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from ecospa_fx import cli, text
from ecospa_fx.cli import main
from ecospa_fx.storage import load

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

SURFACE = {
    "inspect": {"source", "--json", "--explain", "--allow", "-h/--help"},
    "compress": {
        *("source", "--ratio", "--calibration", "--output", "--method", "--eval", "--tokenizer", "--windows"),
        *("--passes", "--length", "--round-to", "--seed", "--allow", "--device", "-h/--help"),
    },
}
QK, FFN = "model.layers.0.self_attn.qk", "model.layers.1.mlp.ffn"

Capture = pytest.CaptureFixture[str]


def prose(words: int, seed: int) -> str:
    """Words of a small vocabulary in lines of ten."""
    chosen = random.Random(seed).choices(["the", "cat", "sat", "on", "a", "mat", "and", "purred", "softly"], k=words)
    return "\n".join(" ".join(chosen[at : at + 10]) for at in range(0, words, 10))


def tiny_config(**changes: Any) -> Any:
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaConfig(
        **{"num_hidden_layers": 2, "vocab_size": 64, "max_position_embeddings": 32, **sizes, **changes}
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder in bfloat16, its tokenizer and a text."""
    root = tmp_path_factory.mktemp("source")
    (root / "text.txt").write_text(prose(6000, seed=0))
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    tokenizer.train_from_iterator([prose(200, seed=1)], tokenizers.trainers.BpeTrainer(vocab_size=64))
    tokenizer.save(str(root / "tokenizer.json"))
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(tiny_config()).bfloat16().save_pretrained(root / "model")
    return root


def compress_arguments(folder: Path, output: Path, *more: str) -> list[str]:
    calibration = ["--calibration", str(folder / "text.txt"), "--output", str(output)]
    return ["compress", str(folder / "model"), "--ratio", "0.3", *calibration, "--windows", "4", *more]


def refused(capsys: Capture, arguments: Sequence[str]) -> str:
    """The one sentence of a refusal."""
    assert main(arguments) == 2
    sentence = capsys.readouterr().err.strip().splitlines()[-1]
    assert sentence.startswith("ecospa-fx: ")
    assert "Traceback" not in sentence
    return sentence


# -- surface -----------------------------------------------------------------------------------------------------


def test_the_surface_is_frozen() -> None:
    actions = [a for a in cli.parser()._actions if isinstance(a, argparse._SubParsersAction)]
    commands: dict[str, argparse.ArgumentParser] = dict(actions[0].choices)
    surface = {
        name: {"/".join(a.option_strings) or a.dest for a in command._actions} for name, command in commands.items()
    }
    assert surface == SURFACE


def test_help_and_version_end_well(capsys: Capture) -> None:
    for arguments in (["--help"], ["compress", "--help"], ["--version"]):
        with pytest.raises(SystemExit, match="0"):
            main(arguments)
    assert "ecospa-fx 0." in capsys.readouterr().out


# -- inspect -----------------------------------------------------------------------------------------------------


def test_inspect_prints_the_table(folder: Path, capsys: Capture) -> None:
    assert main(["inspect", str(folder / "model")]) == 0
    printed = capsys.readouterr().out
    assert "units × carriers" in printed
    assert "model.layers.{0..1}.mlp" in printed
    assert "blocked: " in printed
    assert "aten.embedding at node embedding" in printed
    assert "LlamaForCausalLM, detected in " in printed


def test_inspect_needs_no_weights(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    tiny_config(hidden_size=16384, intermediate_size=53248, vocab_size=128256, head_dim=128).save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path / "config.json"), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    found = {c["name"]: c for c in data["couplings"]}
    assert found[FFN]["size"] == 53248
    assert found[QK]["carriers"] == 2
    assert data["parameters"] > 4e9
    assert data["seconds"] > 0
    assert data["source"].endswith("config.json")


def test_explain_shows_the_path(folder: Path, capsys: Capture) -> None:
    assert main(["inspect", str(folder / "model"), "--explain", FFN]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{FFN}: ffn of model.layers.1.mlp, 64 units")
    assert "contracts" in printed
    assert "modeling_llama.py" in printed


def test_an_unknown_name_is_answered_with_near_ones(folder: Path, capsys: Capture) -> None:
    sentence = refused(capsys, ["inspect", str(folder / "model"), "--explain", "model.layers.0.attn.qk"])
    assert "there is no coupling 'model.layers.0.attn.qk'; near it: " in sentence
    assert QK in sentence


SMALL_CONFIGS = {
    "GPT2LMHeadModel": lambda: transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50, n_positions=32),
    "ViTForImageClassification": lambda: transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=8
    ),
    "T5ForConditionalGeneration": lambda: transformers.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=2, vocab_size=50
    ),
    "WhisperForConditionalGeneration": lambda: transformers.WhisperConfig(
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_mel_bins=8,
        max_source_positions=20,
        vocab_size=60,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 1),
    ),
}


@pytest.mark.parametrize("name", SMALL_CONFIGS)
def test_inspect_makes_inputs_for_text_images_and_sound(name: str, tmp_path: Path, capsys: Capture) -> None:
    config = SMALL_CONFIGS[name]()
    config.architectures = [name]
    config.save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path / "config.json"), "--json"]) == 0
    kinds = {c["kind"] for c in json.loads(capsys.readouterr().out)["couplings"] if c["blocked"] is None}
    assert {"ffn", "vo"} <= kinds


FACTORIES = """
import torch
from torch import nn

class Refuses(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x

class Bytes(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(256, 16), nn.Linear(16, 256)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, ids):
        x = self.embed(ids)
        return self.head(x + self.down(torch.relu(self.up(x))))

class Normed(Bytes):
    def __init__(self):
        super().__init__()
        self.norm, self.free, self.back = nn.LayerNorm(32), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, ids):
        x = self.embed(ids)
        x = x + self.back(torch.relu(self.free(x)))
        return self.head(x + self.down(self.norm(self.up(x)).relu()))

def good(): return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)), (torch.randn(2, 4),), {}
def lm(): return Bytes(), (torch.zeros(2, 16, dtype=torch.long),), {}
def normed(): return Normed(), (torch.zeros(2, 16, dtype=torch.long),), {}
def wrong(): return nn.Linear(4, 4)
def fails(): raise RuntimeError("no disk")
def branches(): return Refuses(), (torch.randn(2, 4),), {}
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the current folder, which is not on the path."""
    name = f"factories_{random.Random(str(tmp_path)).getrandbits(32)}"
    (tmp_path / f"{name}.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    return name


def test_inspect_takes_a_function(factories: str, capsys: Capture) -> None:
    assert main(["inspect", f"{factories}:good"]) == 0
    assert "8 × 1" in capsys.readouterr().out


def test_inspect_says_what_is_blocked_where_and_what_lifts_it(factories: str, capsys: Capture) -> None:
    assert main(["inspect", f"{factories}:normed"]) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "normalises over it" in x]
    assert line.startswith("blocked: ")
    assert "allow='renormalise' (--allow renormalise) offers it as inexact" in line
    assert "(aten.layer_norm at node layer_norm; " in line
    assert ".py:" in line


def test_what_is_allowed_is_offered_and_marked(factories: str, capsys: Capture) -> None:
    assert main(["inspect", f"{factories}:normed", "--allow", "renormalise"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [x for x in lines if "offered, inexact: aten.layer_norm at layer_norm" in x]
    (line,) = [x for x in lines if x.startswith("inexact: ")]
    assert "aten.layer_norm normalises over it: without an element the others change (" in line
    assert "lifts" not in line
    assert main(["inspect", f"{factories}:normed", "--allow", "renormalise", "--json"]) == 0
    couplings = json.loads(capsys.readouterr().out)["couplings"]
    assert [c["size"] for c in couplings if c.get("inexact")] == [32]
    sentence = refused(capsys, ["inspect", f"{factories}:normed", "--allow", "anything"])
    assert "--allow" in sentence
    assert "renormalise" in sentence


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        ("absent", "has no function 'absent': name one that returns (model, args, kwargs)"),
        ("wrong", "returned Linear: it must return (model, args, kwargs)"),
        ("fails", "failed: RuntimeError: no disk"),
        ("branches", "Refuses cannot be exported at "),
    ],
)
def test_functions_that_do_not_work(factories: str, function: str, sentence: str, capsys: Capture) -> None:
    assert sentence in refused(capsys, ["inspect", f"{factories}:{function}"])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "is not a readable config.json"),
        ("{}", "names no model_type"),
        ('{"model_type": "nothing-known"}', "is not a configuration that transformers knows"),
        ('{"model_type": "llama", "auto_map": {"AutoConfig": "evil.Evil"}, "hidden_size": "x"}', "config.json is not"),
    ],
)
def test_configurations_that_do_not_work(tmp_path: Path, content: str, sentence: str, capsys: Capture) -> None:
    (tmp_path / "config.json").write_text(content)
    assert sentence in refused(capsys, ["inspect", str(tmp_path / "config.json")])


def test_sources_that_are_not_there(tmp_path: Path, capsys: Capture) -> None:
    missing = str(tmp_path / "missing")
    assert f"there is no {missing!r}: name a Hugging Face folder" in refused(capsys, ["inspect", missing])
    assert "has no config.json" in refused(capsys, ["inspect", str(tmp_path)])
    assert "cannot be imported: ModuleNotFoundError" in refused(capsys, ["inspect", "no.such.module:build"])


# -- compress ----------------------------------------------------------------------------------------------------


def test_compress_does_what_it_prints(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    output = tmp_path / "small"
    tokenizer = str(folder / "tokenizer.json")
    assert main(compress_arguments(folder, output, "--tokenizer", tokenizer, "--length", "16")) == 0
    printed = capsys.readouterr()
    rows = {line.split("  ")[0]: line.split()[-3:] for line in printed.out.splitlines() if line.endswith("%")}
    assert rows.keys() == {"parameters", "bytes", "FLOPs per token", "perplexity"}
    assert f'ecospa_fx.load("{output}")' in printed.out
    assert "compress …" in printed.err
    assert "perplexity, small [########" in printed.err

    small = load(output, dtype=torch.float32)
    count = sum(p.numel() for p in small.parameters())
    assert rows["parameters"][1] == f"{count:,}"
    assert rows["bytes"][1] == f"{2 * count:,}"
    reader = text.Reader((), {"input_ids": torch.zeros(1, 2, dtype=torch.long), "use_cache": False})
    held_out = text.split(text.read_text(folder / "text.txt"))[1]
    windows = text.first_windows(text.tokens(held_out, text.read_tokenizer(Path(tokenizer))), 16, 64)
    assert float(rows["perplexity"][1]) == pytest.approx(text.perplexity(small, reader, windows), abs=0.01)
    assert {p.dtype for p in load(output).parameters()} == {torch.bfloat16}

    assert main(["inspect", str(output), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == count
    again = [
        str(output) if argument == str(folder / "model") else argument
        for argument in compress_arguments(folder, tmp_path / "again")
    ]
    assert "was compressed already: compress the original" in refused(capsys, [*again, "--tokenizer", tokenizer])


def test_compress_reads_xz_finds_the_tokenizer_and_takes_a_second_text(
    folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "text.txt.xz").write_bytes(lzma.compress((folder / "text.txt").read_bytes()))
    texts = ["--calibration", str(tmp_path / "text.txt.xz"), "--eval", str(folder / "text.txt")]
    more = ["--ratio", "0.4", "--windows", "2", "--method", "magnitude", "--round-to", "4"]
    assert main(["compress", str(folder / "model"), *texts, *more, "--output", str(tmp_path / "small")]) == 0
    widths = [p.shape[0] for n, p in load(tmp_path / "small").named_parameters() if "up_proj" in n]
    assert sum(widths) < 2 * 64
    assert all(width % 4 == 0 for width in widths)
    share = re.search(r"([\d.]+)% of what its couplings hold", capsys.readouterr().out)
    assert share is not None
    assert 35 < float(share[1]) < 45


def test_compress_takes_a_function_that_reads_bytes(
    folder: Path, tmp_path: Path, factories: str, capsys: Capture
) -> None:
    arguments = compress_arguments(folder, tmp_path / "small", "--tokenizer", "bytes", "--length", "32")
    arguments[1] = f"{factories}:lm"
    assert main(arguments) == 0
    assert "largest relative difference" in capsys.readouterr().out
    assert (tmp_path / "small" / "manifest.json").is_file()
    assert not (tmp_path / "small" / "config.json").exists()


def test_compress_says_what_is_inexact_and_checks_the_rest(
    folder: Path, tmp_path: Path, factories: str, capsys: Capture
) -> None:
    arguments = compress_arguments(folder, tmp_path / "small", "--tokenizer", "bytes", "--length", "32")
    arguments[1] = f"{factories}:normed"
    assert main([*arguments, "--allow", "renormalise"]) == 0
    printed = capsys.readouterr().out
    assert "ffn (inexact)" in printed
    assert "inexact: " in printed
    assert "without 1 inexact couplings (--allow renormalise)" in printed


Change = Callable[[list[str], Path], None]


def replaced(option: str, value: str) -> Change:
    """Another value for an option."""

    def change(arguments: list[str], _: Path) -> None:
        arguments[arguments.index(option) + 1] = value

    return change


def added(*more: str) -> Change:
    return lambda arguments, _: arguments.extend(more)


def calibrated_on(content: bytes) -> Change:
    def change(arguments: list[str], place: Path) -> None:
        (place / "other.txt").write_bytes(content)
        replaced("--calibration", str(place / "other.txt"))(arguments, place)

    return change


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (replaced("--ratio", "1.0"), "--ratio is 1 and must lie between 0 and 1, both excluded"),
        (replaced("--ratio", "nan"), "--ratio is nan and must lie"),
        (replaced("--ratio", "half"), "argument --ratio: invalid float value: 'half'"),
        (replaced("--ratio", "0.97"), "ratio=0.97 is out of reach"),
        (replaced("--windows", "0"), "--windows is 0 and must be at least 1"),
        (replaced("--calibration", "absent.txt"), "there is no text file absent.txt"),
        (calibrated_on(b" \n"), "other.txt is empty: pass a file with text"),
        (calibrated_on(b"\xff\xfe"), "other.txt is not a text in UTF-8"),
        (calibrated_on(b"the cat sat"), "tokens and one window needs"),
        (added("--method", "wishes"), "no scoring method is called 'wishes': use one of"),
        (added("--length", "64"), "--length is 64 and this model reads at most 32 tokens"),
        (added("--round-to", "0"), "--round-to is 0 and must be at least 1"),
        (added("--tokenizer", "absent.json"), "there is no tokenizer absent.json"),
        (added("--tokenizer", "bytes"), "and the model knows 64: pass the model's own tokenizer"),
        (added("--device", "abacus"), "--device abacus cannot be used here"),
        (added("--speed", "9"), "unrecognized arguments: --speed 9"),
    ],
)
def test_what_compress_refuses(folder: Path, tmp_path: Path, change: Change, sentence: str, capsys: Capture) -> None:
    arguments = compress_arguments(folder, tmp_path / "small", "--tokenizer", str(folder / "tokenizer.json"))
    change(arguments, tmp_path)
    assert sentence in refused(capsys, arguments)
    assert not [f for f in tmp_path.iterdir() if f.name != "other.txt"]


def test_a_tokenizer_that_is_nowhere_is_asked_for(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "text.txt").write_text(prose(50, seed=2))
    arguments = compress_arguments(folder, tmp_path / "small")
    replaced("--calibration", str(tmp_path / "text.txt"))(arguments, tmp_path)
    sentence = refused(capsys, arguments)
    assert f"there is no tokenizer.json in {folder / 'model'} or {tmp_path}: pass --tokenizer FILE" in sentence


def test_an_output_that_exists_is_refused_before_any_work(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "mine").write_text("kept")
    assert "exists already: choose a new folder" in refused(capsys, compress_arguments(folder, tmp_path / "small"))
    assert (tmp_path / "small" / "mine").read_text() == "kept"


def test_weights_that_are_not_numbers_are_named(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    model = transformers.LlamaForCausalLM.from_pretrained(folder / "model")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = math.nan
    model.save_pretrained(tmp_path / "broken")
    arguments = compress_arguments(folder, tmp_path / "small", "--tokenizer", str(folder / "tokenizer.json"))
    arguments[1] = str(tmp_path / "broken")
    assert "parameter 'model.layers.1.mlp.up_proj.weight' holds values that are not finite" in refused(
        capsys, arguments
    )


def test_only_causal_language_models_with_weights_are_measured(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    arguments = compress_arguments(folder, tmp_path / "small", "--tokenizer", str(folder / "tokenizer.json"))
    arguments[1] = str(folder / "model" / "config.json")
    assert "describes a model without its weights" in refused(capsys, arguments)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    transformers.BertModel(transformers.BertConfig(vocab_size=64, **sizes)).save_pretrained(tmp_path / "bert")
    arguments[1] = str(tmp_path / "bert")
    assert "BertModel is no causal language model" in refused(capsys, arguments)


def test_an_inexact_result_is_not_saved(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(cli, "masked_error", lambda *_: math.nan)
    arguments = compress_arguments(folder, tmp_path / "small", "--tokenizer", str(folder / "tokenizer.json"))
    assert "removing differs from masking by nan, so nothing was saved" in refused(capsys, arguments)
    assert not list(tmp_path.iterdir())


# -- text --------------------------------------------------------------------------------------------------------


def test_held_out_text_is_the_last_tenth() -> None:
    whole = prose(1000, seed=3)
    calibration, held_out = text.split(whole)
    assert calibration + held_out == whole
    assert 0.1 <= len(held_out) / len(whole) < 0.11
    assert held_out[0].isspace()


def test_windows_stay_inside_and_follow_the_seed() -> None:
    ids = torch.arange(100)
    drawn = text.drawn_windows(ids, 10, 50, seed=0)
    assert torch.equal(drawn, text.drawn_windows(ids, 10, 50, seed=0))
    assert not torch.equal(drawn, text.drawn_windows(ids, 10, 50, seed=1))
    assert (drawn.diff() == 1).all()
    assert text.first_windows(ids, 9, 64).flatten().tolist() == list(range(100))
    assert len(text.first_windows(ids, 9, 3)) == 3


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary() -> None:
    class Uniform(torch.nn.Module):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return torch.zeros(*ids.shape, 7)

    ids = torch.arange(22).remainder(7).view(2, 11)
    reader = text.Reader((ids[:, :-1],), {})
    assert text.perplexity(Uniform(), reader, ids) == pytest.approx(7)
    assert reader.loss(torch.zeros(2, 11, 7), (ids,), {}).item() == pytest.approx(math.log(7))
