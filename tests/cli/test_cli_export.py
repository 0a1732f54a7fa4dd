"""``ecospa-fx export`` and ``ecospa-fx verify``: from a saved model to another engine's files, and what is refused."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import ecospa_fx as eco
from ecospa_fx.cli.main import main
from ecospa_fx.export import llama_cpp
from tests.support.cli import Capture, refused
from tests.support.narrow import narrow


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that an earlier export wrote."""
    path = tmp_path_factory.mktemp("cli-export") / "smaller"
    eco.export(narrow("llama"), path, format="transformers")
    return path


def test_an_export_is_exported_again_and_verified(exported: Path, tmp_path: Path, capsys: Capture) -> None:
    target = tmp_path / "again"
    arguments = ["--format", "transformers", "--output", str(target), "--dtype", "bfloat16"]
    assert main(["export", str(exported), *arguments]) == 0
    printed = capsys.readouterr().out
    assert f"exported: {target}" in printed
    assert "largest error" in printed
    assert main(["verify", str(target)]) == 0
    printed = capsys.readouterr().out
    assert "4 files have their digests" in printed
    assert "run again: largest difference 0.0e+00 of the largest number" in printed
    assert "not checked" not in printed
    assert next(narrow("llama").parameters()).dtype is torch.float32
    assert '"dtype": "bfloat16"' in (target / "config.json").read_text()


def test_gguf_from_the_command_line(exported: Path, tmp_path: Path, capsys: Capture) -> None:
    pytest.importorskip("gguf")
    target = tmp_path / "smaller.gguf"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "there is no tokenizer beside the model")
        assert main(["export", str(exported), "--format", "gguf", "--output", str(target)]) == 0
    assert target.is_file()
    printed = capsys.readouterr().out
    assert ("xllamacpp" in printed) if llama_cpp.is_installed() else ("the engine is not installed" in printed)
    assert main(["verify", str(target)]) == 0
    assert "1 files have their digests" in capsys.readouterr().out


@pytest.mark.slow
def test_what_shrink_saved_is_exported(tmp_path: Path, capsys: Capture) -> None:
    model = narrow("vit", second={})
    call = {"pixel_values": torch.randn(2, 3, 16, 16)}
    plan = eco.plan(eco.detect(model, (), call), 0.3, "magnitude", kinds=["ffn"], uniform=True, expressible_in="module")
    eco.shrink_(model, plan, (), call)
    eco.save(model, tmp_path / "saved")
    arguments = ["--format", "transformers", "--output", str(tmp_path / "exported")]
    assert main(["export", str(tmp_path / "saved"), *arguments]) == 0
    assert (tmp_path / "exported" / "model.safetensors").is_file()
    assert '"plan": {' in (tmp_path / "exported" / "certificate.json").read_text()


def test_what_is_refused(exported: Path, tmp_path: Path, capsys: Capture) -> None:
    options = ["--format", "transformers", "--output"]
    assert "exists already" in refused(capsys, ["export", str(exported), *options, str(exported)])
    target = [*options, str(tmp_path / "new")]
    assert "name a folder with a saved model" in refused(capsys, ["export", str(tmp_path), *target])
    for name in ("int33", "cat"):
        sentence = refused(capsys, ["export", str(exported), *target, "--dtype", name])
        assert f"dtype='{name}' is no floating type" in sentence
    assert "invalid choice: 'pdf'" in refused(capsys, ["export", str(exported), "--format", "pdf", "--output", "x"])
    (tmp_path / "config.json").write_text('{"architectures": ["Nothing"]}')
    assert "is not a model that transformers can read" in refused(capsys, ["export", str(tmp_path), *target])
    assert "there is no " in refused(capsys, ["verify", str(tmp_path)])
    assert not (tmp_path / "new").exists()


def test_a_graph_is_no_model_of_another_engine(tmp_path: Path, capsys: Capture) -> None:
    mlp, args = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)), (torch.randn(2, 4),)
    plan = eco.plan(eco.detect(mlp, args), 0.5, "magnitude")
    eco.save(eco.shrink(mlp, plan, args), tmp_path / "graph")
    arguments = ["export", str(tmp_path / "graph"), "--format", "transformers", "--output", str(tmp_path / "new")]
    assert "holds a graph, which engines other than torch do not read" in refused(capsys, arguments)
