"""The command line: what it takes, what it prints, and one sentence for everything that it refuses."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import pytest
import torch

from ecospa_fx.cli import main as cli
from ecospa_fx.cli import text
from ecospa_fx.cli.main import main
from tests.support.cli import Capture, prose, refused, tiny_config

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

SURFACE = {
    "inspect": {"source", "--json", "--explain", "--html", "--allow", "-h/--help"},
    "compress": {
        *("source", "--ratio", "--calibration", "--output", "--method", "--eval", "--tokenizer", "--windows"),
        *("--passes", "--length", "--round-to", "--seed", "--allow", "--device", "-h/--help"),
        *("--exclude", "--limit", "--html"),
    },
    "report": {"source", "--plan", "--output", "--allow", "-h/--help"},
    "export": {"folder", "--format", "--output", "--dtype", "--tokenizer", "-h/--help"},
    "verify": {"path", "-h/--help"},
}
QK, FFN = "model.layers.0.self_attn.qk", "model.layers.1.mlp.ffn"


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


@pytest.mark.parametrize("command", SURFACE)
def test_every_option_is_one_line_of_the_help(command: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    options = capsys.readouterr().out.partition("options:\n")[2].partition("\n\n")[0].splitlines()
    assert all(line.startswith("  -") for line in options)
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    assert all(" ".join(line.split()) in " ".join(readme.split()) for line in options[1:])


# -- inspect -----------------------------------------------------------------------------------------------------


def test_inspect_prints_the_table(folder: Path, capsys: Capture) -> None:
    assert main(["inspect", str(folder / "model")]) == 0
    printed = capsys.readouterr().out
    assert "units × carriers" in printed
    assert "model.layers.{0..1}.mlp" in printed
    assert "blocked: " in printed
    assert "it is part of the model's output" in printed
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


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL_CONFIGS)
def test_inspect_makes_inputs_for_text_images_and_sound(name: str, tmp_path: Path, capsys: Capture) -> None:
    config = SMALL_CONFIGS[name]()
    config.architectures = [name]
    config.save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path / "config.json"), "--json"]) == 0
    kinds = {c["kind"] for c in json.loads(capsys.readouterr().out)["couplings"] if c["blocked"] is None}
    assert {"ffn", "vo"} <= kinds


def test_inspect_takes_a_function(factories: str, capsys: Capture) -> None:
    assert main(["inspect", f"{factories}:good"]) == 0
    assert "8 × 1" in capsys.readouterr().out


def test_inspect_says_what_is_blocked_where_and_what_lifts_it(factories: str, capsys: Capture) -> None:
    assert main(["inspect", f"{factories}:normed"]) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "is taken over it" in x]
    assert line.startswith("blocked: ")
    assert "allow='renormalise' (--allow renormalise) offers it as inexact" in line
    assert "(aten.layer_norm at node layer_norm; " in line
    assert ".py:" in line


def test_what_is_allowed_is_offered_and_marked(factories: str, capsys: Capture) -> None:
    assert main(["inspect", f"{factories}:normed", "--allow", "renormalise"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [x for x in lines if "offered, inexact: aten.layer_norm at layer_norm" in x]
    (line,) = [x for x in lines if x.startswith("inexact: ")]
    assert "aten.layer_norm runs over what is kept of it (" in line
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


# -- text --------------------------------------------------------------------------------------------------------


def test_held_out_text_is_the_last_tenth() -> None:
    whole = prose(1000, seed=3)
    calibration, held_out = text.split(whole)
    assert calibration + held_out == whole
    assert 0.1 <= len(held_out) / len(whole) < 0.11
    assert held_out[0].isspace()


def test_windows_stay_inside_and_follow_the_seed() -> None:
    ids = torch.arange(100)
    drawn = text.random_windows(ids, 10, 50, seed=0)
    assert torch.equal(drawn, text.random_windows(ids, 10, 50, seed=0))
    assert not torch.equal(drawn, text.random_windows(ids, 10, 50, seed=1))
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
