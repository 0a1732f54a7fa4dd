"""Certificates: what they hold, and that what differs from them is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ecospa_fx as eco
from ecospa_fx.errors import StorageError
from ecospa_fx.export.certificate import described, exactness_of, restored, sampled, weights_digest
from ecospa_fx.export.check import check_export
from ecospa_fx.plan import Plan
from tests.support.narrow import narrow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("certificate") / "small"
    eco.export(narrow("vit"), path, format="transformers")
    return path


def copied(folder: Path, target: Path) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def edited(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    entries = json.loads((folder / "certificate.json").read_text())
    edit(entries)
    (folder / "certificate.json").write_text(json.dumps(entries))


def test_what_was_exported_passes(folder: Path) -> None:
    checked = check_export(folder)
    assert (checked.error, checked.files, checked.notes) == (0.0, 3, ())
    certificate = checked.certificate
    assert certificate.code == certificate.files["modeling_per_layer.py"].sha256
    assert certificate.weights == weights_digest(narrow("vit"))
    assert certificate.dense_weights is None
    assert {"ecospa_fx", "torch", "transformers"} < set(certificate.versions)
    assert certificate.engine is not None
    assert certificate.engine.engine.startswith("transformers ")
    assert certificate.model_class.endswith("modeling_vit.ViTForImageClassification")


@pytest.mark.parametrize(
    ("name", "edit", "sentence"),
    [
        ("weights", lambda e: e.update(weights="0" * 64), "has other weights than its certificate.json says"),
        (
            "outputs",
            lambda e: e["engine"]["outputs"].__setitem__(0, 9.0),
            "gives other numbers than when it was exported",
        ),
        ("count", lambda e: e["engine"]["outputs"].pop(), "gives other numbers than when it was exported, by inf"),
        ("kind", lambda e: e.update(format="another"), "it is no ecospa-fx-certificate of version 1"),
        ("version", lambda e: e.update(version=2), "it is no ecospa-fx-certificate of version 1"),
        ("field", lambda e: e.pop("weights"), "is damaged"),
        ("type", lambda e: e.update(weights=3), "is damaged"),
        ("place", lambda e: e["files"].update({"../x": {"bytes": 1, "sha256": ""}}), "it names files elsewhere"),
        ("export", lambda e: e.update(export="pdf"), "is an export as 'pdf', which this version does not know"),
        ("inputs", lambda e: e["engine"].update(inputs=[1]), "describes no inputs"),
    ],
)
def test_certificates_that_say_otherwise(
    name: str, edit: Callable[[dict[str, Any]], object], sentence: str, folder: Path, tmp_path: Path
) -> None:
    damaged = copied(folder, tmp_path / name)
    edited(damaged, edit)
    with pytest.raises(StorageError, match=sentence):
        check_export(damaged)


def test_files_that_changed(folder: Path, tmp_path: Path) -> None:
    damaged = copied(folder, tmp_path / "code")
    (damaged / "modeling_per_layer.py").write_text("print()")
    with pytest.raises(StorageError, match=r"modeling_per_layer.py is not as long as it was"):
        check_export(damaged)
    damaged = copied(folder, tmp_path / "stranger")
    (damaged / "helper.py").write_text("print()")
    with pytest.raises(StorageError, match=r"helper.py may hold code and was not exported"):
        check_export(damaged)
    damaged = copied(folder, tmp_path / "config")
    (damaged / "config.json").unlink()
    with pytest.raises(StorageError, match=r"config.json is missing"):
        check_export(damaged)
    with pytest.raises(StorageError, match=r"there is no .*certificate.json: name a folder or a file"):
        check_export(tmp_path)


def test_what_was_not_checked_is_said(folder: Path, tmp_path: Path) -> None:
    other = copied(folder, tmp_path / "other")
    edited(other, lambda e: e.update(engine=None))
    assert check_export(other).notes == ("the engine was not run when this was exported",)
    assert check_export(other).error is None
    edited(other, lambda e: e.update(json.loads((folder / "certificate.json").read_text()), code="0" * 64))
    (note,) = check_export(other).notes
    assert "that of another version of ecospa_fx, and was not run" in note


# -- exactness ---------------------------------------------------------------------------------------------------


class Mlp(nn.Module):
    """A gate of its own, so that an attribute may be wrong where all weights are right."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.scale = nn.Linear(4, 12), nn.Linear(12, 4), 1.0

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.up(x).relu()) * self.scale
        return out


def shrunk() -> tuple[nn.Module, Any, Plan, dict[str, Tensor]]:
    torch.manual_seed(0)
    dense, call = Mlp(), {"x": torch.randn(3, 4)}
    plan = eco.plan(eco.detect(dense, (), call), ratio=0.5, scores="magnitude")
    return dense, eco.shrink_(copy.deepcopy(dense), plan, (), call), plan, call


def test_exactness_against_masking_and_against_the_graph() -> None:
    dense, small, plan, call = shrunk()
    exact = exactness_of(dense, small, plan, call)
    assert (exact.against, exact.dtype) == ("masking", "float64")
    assert exact.error < 1e-12
    small.scale = 1.5
    assert 0.3 < exactness_of(dense, small, plan, call).error < 0.6
    with torch.no_grad():
        small.down.weight.mul_(2)
    exact = exactness_of(dense, small, plan, call)
    assert exact.against == "graph"
    assert 0.3 < exact.error < 0.6
    small.scale = 1.0
    assert exactness_of(dense, small, plan, call).error < 1e-12


def test_code_that_does_not_run_in_float64_is_compared_in_float32() -> None:
    class Single(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            if x.dtype is torch.float64:
                raise RuntimeError("expected float32")
            return super().forward(x)

    torch.manual_seed(0)
    dense, call = Single(), {"x": torch.randn(3, 4)}
    plan = eco.plan(eco.detect(dense, (), call), ratio=0.5, scores="magnitude")
    small = eco.shrink_(copy.deepcopy(dense), plan, (), call)
    exact = exactness_of(dense, small, plan, call)
    assert (exact.against, exact.dtype) == ("masking", "float32")
    assert exact.error < 1e-5


# -- inputs and outputs ------------------------------------------------------------------------------------------


def test_inputs_as_json_and_back() -> None:
    noise = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    call: dict[str, Any] = {"a": torch.tensor([[1, 2]]), "b": noise.bfloat16(), "c": torch.tensor([0.5]), "d": False}
    description = json.loads(json.dumps(described(call)))
    assert description["b"] == {"noise": [2, 3], "dtype": "bfloat16"}
    again = restored(description)
    assert again.keys() == call.keys()
    assert again["d"] is False
    for name in "abc":
        assert again[name].dtype == call[name].dtype
        assert torch.equal(again[name], call[name])


def test_samples_are_spread_over_the_output() -> None:
    assert sampled(torch.arange(3)) == (0.0, 1.0, 2.0)
    assert sampled(torch.arange(64)) == tuple(map(float, range(64)))
    assert sampled(torch.arange(65)) == tuple(map(float, range(0, 65, 2)))


def test_digests_tell_names_types_shapes_and_values() -> None:
    first = nn.Linear(2, 2, bias=False)
    others = [nn.Linear(2, 2, bias=False), copy.deepcopy(first).double(), nn.Sequential(copy.deepcopy(first))]
    reshaped = nn.Linear(4, 1, bias=False)
    reshaped.weight = nn.Parameter(first.weight.detach().reshape(1, 4))
    assert weights_digest(copy.deepcopy(first)) == weights_digest(first)
    assert len({weights_digest(m) for m in (first, reshaped, *others)}) == 5
