"""Smaller models as ONNX files, run by ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ecospa_fx as eco
from ecospa_fx.errors import CaptureError, InputError, StorageError
from ecospa_fx.export import onnx_file, verb
from ecospa_fx.export.check import check_export
from tests.support.narrow import narrow

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package)


@pytest.fixture(scope="module")
def graph() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    mlp, x = nn.Sequential(nn.Linear(4, 12), nn.GELU(), nn.Linear(12, 4)), torch.randn(5, 4)
    plan = eco.plan(eco.detect(mlp, (x,)), 0.5, "magnitude")
    return eco.shrink(mlp, plan, (x,)), x


def test_a_graph(graph: tuple[nn.Module, Tensor], tmp_path: Path) -> None:
    small, x = graph
    path = tmp_path / "small.onnx"
    small.train()
    certificate = eco.export(small, path, (x,), format="onnx")
    assert small.training
    assert certificate.engine is not None
    assert certificate.engine.engine.startswith("onnxruntime ")
    assert certificate.engine.largest_error < 1e-5
    assert certificate.plan is not None
    assert {file.name for file in tmp_path.iterdir()} == {"small.onnx", "small.onnx.certificate.json"}
    with torch.no_grad():
        assert torch.allclose(onnx_file.run(path, [x[:3]]), small(x[:3]), atol=1e-5)
    again = check_export(path)
    assert again.error is not None
    assert again.error < 1e-5


@pytest.mark.slow
def test_a_model_of_transformers(tmp_path: Path) -> None:
    model, path = narrow("bert"), tmp_path / "small.onnx"
    certificate = eco.export(model, path, format="onnx")
    assert certificate.engine is not None
    assert certificate.engine.largest_error < 1e-5
    ids = torch.randint(3, 61, (3, 7))
    with torch.no_grad():
        assert torch.allclose(onnx_file.run(path, [ids]), model(input_ids=ids).logits, atol=1e-4)


def test_large_weights_go_into_a_second_file(
    graph: tuple[nn.Module, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_file, "LARGEST", 100)
    small, x = graph
    certificate = eco.export(small, tmp_path / "small.onnx", kwargs={"input": x}, format="onnx")
    assert set(certificate.files) == {"small.onnx", "small.onnx.data"}
    assert (tmp_path / "small.onnx.data").is_file()
    assert check_export(tmp_path / "small.onnx").error is not None


class Sorting(nn.Module):
    """What a graph cannot say."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_what_is_refused(graph: tuple[nn.Module, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, x = graph
    path = tmp_path / "small.onnx"
    with pytest.raises(InputError, match="ONNX needs example inputs of a "):
        eco.export(small, path, format="onnx")
    with pytest.raises(InputError, match="is not taken by ONNX"):
        eco.export(small, path, (x,), format="onnx", dtype=torch.float16)
    with pytest.raises(CaptureError, match=r"torch.onnx.export cannot export Sorting"):
        eco.export(Sorting(), path, (x,), format="onnx")
    (tmp_path / "x.onnx").write_text("no")
    with pytest.raises(StorageError, match=r"ONNX Runtime does not run x.onnx"):
        onnx_file.run(tmp_path / "x.onnx", [x])
    monkeypatch.setattr(onnx_file, "run", lambda *_: torch.zeros(5, 4))
    with pytest.raises(StorageError, match="gives other numbers than the model, by"):
        eco.export(small, path, (x,), format="onnx")
    monkeypatch.setattr(onnx_file, "NEEDED", ("no_such_package",))
    with pytest.raises(StorageError, match="no_such_package is not installed"):
        eco.export(small, path, (x,), format="onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["x.onnx"]
    assert verb.ONNX_LIMIT[torch.float32] == 1e-3


def test_without_onnx_runtime_nothing_is_run(
    graph: tuple[nn.Module, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, x = graph
    certificate = eco.export(small, tmp_path / "small.onnx", (x,), format="onnx")
    monkeypatch.setattr(onnx_file, "is_installed", lambda: False)
    assert certificate.engine is not None
    assert check_export(tmp_path / "small.onnx").notes == ("ONNX Runtime was not run: pip install onnxruntime",)
