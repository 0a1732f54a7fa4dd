"""The command line's `compress`: what it writes and prints, and one sentence for everything that it refuses."""

from __future__ import annotations

import json
import lzma
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ecospa_fx.cli import main as cli
from ecospa_fx.cli import text
from ecospa_fx.cli.main import main
from ecospa_fx.plan import Plan
from ecospa_fx.storage.models import load
from tests.support.cli import Capture, compress_arguments, prose, refused

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

QK, FFN = "model.layers.0.self_attn.qk", "model.layers.1.mlp.ffn"


@pytest.mark.slow
@pytest.mark.usefixtures("brief")
def test_compress_does_what_it_prints(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    output = tmp_path / "small"
    tokenizer = str(folder / "tokenizer.json")
    assert main(compress_arguments(folder, output, "--tokenizer", tokenizer, "--length", "16")) == 0
    printed = capsys.readouterr()
    rows = {line.split("  ")[0]: line.split()[-3:] for line in printed.out.splitlines() if line.endswith("%")}
    assert rows.keys() == {"parameters", "bytes", "FLOPs per token", "perplexity"}
    assert f'ecospa_fx.load("{output}")' in printed.out
    assert "compress …" in printed.err
    assert re.search(r"^perplexity, small: 100%\|#+\| 38/38 \[", printed.err, re.MULTILINE)
    assert not set("\r\x1b") & set(printed.err)  # lines without colours, where stderr is no terminal

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


@pytest.mark.slow
def test_compress_reads_xz_finds_the_tokenizer_and_takes_a_second_text(
    folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "text.txt.xz").write_bytes(lzma.compress((folder / "text.txt").read_bytes()))
    (tmp_path / "other.txt").write_text(prose(300, seed=2))
    texts = ["--calibration", str(tmp_path / "text.txt.xz"), "--eval", str(tmp_path / "other.txt")]
    more = ["--ratio", "0.4", "--windows", "2", "--method", "magnitude", "--round-to", "4"]
    assert main(["compress", str(folder / "model"), *texts, *more, "--output", str(tmp_path / "small")]) == 0
    widths = [p.shape[0] for n, p in load(tmp_path / "small").named_parameters() if "up_proj" in n]
    assert sum(widths) < 2 * 64
    assert all(width % 4 == 0 for width in widths)
    share = re.search(r"([\d.]+)% of what its couplings hold", capsys.readouterr().out)
    assert share is not None
    assert 35 < float(share[1]) < 45


@pytest.mark.usefixtures("brief")
def test_compress_takes_a_function_that_reads_bytes(
    folder: Path, tmp_path: Path, factories: str, capsys: Capture
) -> None:
    arguments = compress_arguments(folder, tmp_path / "small", "--tokenizer", "bytes", "--length", "32")
    arguments[1] = f"{factories}:lm"
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "largest relative difference" in printed
    said = (
        r"nats per token from the dense model: 0\.\d{3} on text that the dense model wrote, 0\.\d{3} on the batches\n"
    )
    assert re.search(said, printed)
    assert (tmp_path / "small" / "manifest.json").is_file()
    assert not (tmp_path / "small" / "config.json").exists()


def without_text(factories: str, name: str, output: Path, *more: str) -> list[str]:
    shortly = ["--windows", "4", "--length", "32"]
    return ["compress", f"{factories}:{name}", "--ratio", "0.3", "--output", str(output), *shortly, *more]


@pytest.mark.usefixtures("brief")
def test_compress_needs_no_text(tmp_path: Path, factories: str, capsys: Capture) -> None:
    assert main(without_text(factories, "lm", tmp_path / "small", "--seed", "3")) == 0
    printed = capsys.readouterr()
    assert re.search(r"^perplexity, own text +\d+\.\d\d ", printed.out, re.MULTILINE)
    assert re.search(r"from the dense model: 0\.\d{3} on text that the dense model wrote\n", printed.out)
    assert "generate: 100%" in printed.err
    assert re.search(r"^perplexity, small: 100%\|#+\| 8/8 ", printed.err, re.MULTILINE)
    assert (tmp_path / "small" / "manifest.json").is_file()


@pytest.mark.usefixtures("brief")
def test_compress_without_calibration_measures_on_another_text(
    folder: Path, tmp_path: Path, factories: str, capsys: Capture
) -> None:
    more = ["--eval", str(folder / "text.txt"), "--tokenizer", "bytes", "--method", "magnitude"]
    assert main(without_text(factories, "lm", tmp_path / "small", *more)) == 0
    assert re.search(r"^perplexity +\d", capsys.readouterr().out, re.MULTILINE)


def test_what_does_not_write_is_asked_for_a_text(folder: Path, tmp_path: Path, factories: str, capsys: Capture) -> None:
    sentence = refused(capsys, without_text(factories, "both", tmp_path / "small"))
    assert "Both cannot write calibration text because later tokens move earlier logits" in sentence
    assert sentence.endswith(": pass --calibration FILE")
    more = [
        "--calibration",
        str(folder / "text.txt"),
        "--tokenizer",
        "bytes",
        "--method",
        "gate-fisher",
        "--passes",
        "1",
    ]
    assert main(without_text(factories, "both", tmp_path / "small", *more)) == 0
    assert "nats per token" not in capsys.readouterr().out


@pytest.mark.usefixtures("brief")
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


@pytest.mark.slow
def test_compress_leaves_modules_out_and_keeps_to_limits(folder: Path, tmp_path: Path) -> None:
    tokenizer = str(folder / "tokenizer.json")
    arguments = compress_arguments(folder, tmp_path / "small", "--tokenizer", tokenizer, "--length", "16")
    arguments[arguments.index("--ratio") + 1] = "0.1"
    more = ["--method", "magnitude", "--exclude", "model.layers.0.self_attn", "--limit", "model.layers.1=0.25"]
    assert main([*arguments, *more, "--limit", "ffn=0.5"]) == 0
    plan = Plan.from_json((tmp_path / "small" / "plan.json").read_text())
    assert not [s for s in plan if s.layer.startswith("model.layers.0.self_attn")]
    assert plan.removed_parameters > 0
    for s in plan:
        assert s.size - s.kept <= s.size * (0.25 if s.layer.startswith("model.layers.1") else 0.5)


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
        (
            added("--exclude", "model.layer.0"),
            "exclude='model.layer.0' matches no module and no parameter of the model",
        ),
        (added("--exclude", "*"), "there is nothing to remove because exclude=['*'] matches all"),
        (added("--limit", "ffn"), "--limit ffn is no PATTERN=SHARE with a share from 0 to 1, such as ffn=0.5"),
        (added("--limit", "=0.5"), "--limit =0.5 is no PATTERN=SHARE"),
        (added("--limit", "ffn=1.5"), "--limit ffn=1.5 is no PATTERN=SHARE"),
        (added("--limit", "ffn=half"), "--limit ffn=half is no PATTERN=SHARE"),
        (
            added("--limit", "fnn=0.5"),
            "limits names 'fnn', which is no kind that is chosen (ffn, qk, vo) and matches no",
        ),
        (added("--limit", "ffn=0.1", "--limit", "model.layers.*=0.2"), "ratio=0.3 is out of reach because floor=0.05"),
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


@pytest.mark.usefixtures("brief")
def test_an_inexact_result_is_not_saved(
    folder: Path, tmp_path: Path, factories: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(cli, "masked_error", lambda *_: math.nan)
    arguments = compress_arguments(folder, tmp_path / "small", "--tokenizer", "bytes", "--length", "32")
    arguments[1] = f"{factories}:lm"
    assert "removing differs from masking by nan, so nothing was saved" in refused(capsys, arguments)
    assert not (tmp_path / "small").exists()
