"""Whatever is wrong with a folder, a path or a disk is one StorageError, and what is there already stays as it is."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ecospa_fx as eco
from ecospa_fx.errors import StorageError
from ecospa_fx.example_inputs import describe, from_description
from ecospa_fx.storage import folder as folders

Tensors = dict[Any, Any]


class Net(nn.Module):
    """An FFN with a buffer."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, width), nn.Linear(width, 6)
        self.register_buffer("count", torch.arange(3))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(torch.relu(self.up(x)))
        return result


def smaller(width: int = 12) -> nn.Module:
    model, x = Net(width), torch.randn(2, 6)
    return eco.shrink(model, eco.plan(eco.detect(model, (x,)), ratio=0.5, scores="magnitude"), (x,))


@pytest.fixture(scope="module")
def small() -> nn.Module:
    return smaller()


@pytest.fixture
def saved(tmp_path: Path, small: nn.Module) -> Path:
    eco.save(small, tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def torch_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)


def manifest_of(folder: Path) -> Any:
    return json.loads((folder / "manifest.json").read_text())


def signed(folder: Path, **changes: Any) -> None:
    """The manifest describes the files as they are now, as if they had been written so."""
    manifest = {**manifest_of(folder), **changes}
    for name in manifest["files"]:
        content = (folder / name).read_bytes()
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def refused(folder: Path, sentence: str = ".") -> None:
    with pytest.raises(StorageError, match=sentence) as caught:
        eco.load(folder, model=Net)
    assert "\n" not in str(caught.value)


# -- what a folder holds -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["manifest.json", "plan.json"])
@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"a":' * 100_000, "1" * 5000, "NaN", "", "\0", "null", '{"format": 1, "format": 2}', "1e999"],
)
def test_text_that_is_no_json_of_ours(saved: Path, name: str, text: str) -> None:
    (saved / name).write_text(text)
    if name != "manifest.json":
        signed(saved)
    refused(saved, name)


@pytest.mark.parametrize(
    "size", [float("inf"), float("nan"), -1, True, None, "6", 2.0, [], 10**30, 2**40], ids=lambda v: f"{v!r:.8}"
)
def test_example_inputs_of_odd_sizes(saved: Path, size: Any) -> None:
    inputs = {"tuple": [{"tuple": [{"tensor": [size, 6], "dtype": "float32"}]}, {"dict": {}}]}
    signed(saved, inputs=inputs)
    refused(saved, "manifest.json")


@pytest.mark.parametrize(
    "field", ["class", "training", "attention", "dtypes", "version", "files", "inputs", "integers"]
)
@pytest.mark.parametrize(
    "value", [3, [], {"tuple": [{"tuple": [{"value": {}}]}, {"dict": {}}]}], ids=lambda v: f"{v!r:.2}"
)
def test_fields_of_a_manifest_that_hold_something_else(saved: Path, field: str, value: Any) -> None:
    if (field, value) == ("integers", []):
        value = [3]  # nothing to write is fine
    (saved / "manifest.json").write_text(json.dumps({**manifest_of(saved), field: value}))
    refused(saved)


def nested(depth: int) -> Any:
    value: Any = {"value": 1}
    for _ in range(depth):
        value = {"list": [value]}
    return value


def test_descriptions_of_inputs_are_read_strictly() -> None:
    odds: list[Any] = [nested(5000), {"value": [1]}, {"tensor": [2], "dtype": "load"}, {"value": 1, "list": []}, {}, []]
    for odd in odds:
        with pytest.raises(ValueError, match=r".+"):
            from_description(odd)
    with pytest.raises(TypeError, match="has no description"):
        describe((float("nan"),))


def rewritten(folder: Path, change: Callable[[Tensors], Any]) -> None:
    """Other weights, in torch's format."""
    from safetensors.torch import load_file

    tensors = change(load_file(folder / "weights.safetensors"))
    (folder / "weights.safetensors").unlink()
    torch.save(tensors, folder / "weights.pt")
    files: dict[str, Any] = {"plan.json": {}, "weights.pt": {}}
    signed(folder, files=files)


UP = "up.weight"
CHANGES: dict[str, Callable[[Tensors], Any]] = {
    "whole numbers": lambda t: {**t, UP: t[UP].long()},
    "complex numbers": lambda t: {**t, UP: t[UP].to(torch.complex64)},
    "a mask": lambda t: {**t, UP: t[UP] > 0},
    "another width": lambda t: {**t, UP: t[UP].double()},
    "half": lambda t: {**t, "down.bias": t["down.bias"].half()},
    "a real buffer": lambda t: {**t, "count": t["count"].float()},
    "numbers as names": lambda t: {1: torch.ones(2)},
    "no names": lambda t: list(t.values()),
    "no tensors": lambda t: {**t, UP: 3.0},
    "without content": lambda t: {**t, UP: t[UP].to("meta")},
    "sparse": lambda t: {**t, UP: t[UP].to_sparse()},
    "sparse rows": lambda t: {**t, UP: t[UP].to_sparse_csr()},
    "quantised": lambda t: {**t, UP: torch.quantize_per_tensor(t[UP], 0.1, 0, torch.qint8)},
    "a column less": lambda t: {**t, UP: t[UP][:, :5].contiguous()},
    "flat": lambda t: {**t, UP: t[UP].flatten()},
    "one more": lambda t: {**t, "other": torch.ones(1)},
    "one less": lambda t: {n: v for n, v in t.items() if n != UP},
    "nothing": lambda t: {},
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta", "ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("old", [False, True], ids=["with types", "of an older version"])
def test_weights_that_are_none(saved: Path, change: str, old: bool) -> None:
    pytest.importorskip("safetensors")
    rewritten(saved, CHANGES[change])
    if old:
        manifest = manifest_of(saved)
        del manifest["dtypes"]
        (saved / "manifest.json").write_text(json.dumps(manifest))
    refused(saved)


def test_weights_of_several_types_come_back_where_they_were_saved_so(tmp_path: Path, small: nn.Module) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 12, dtype=torch.float64), nn.Linear(12, 6)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.down(torch.relu(self.up(x.double())).float())
            return result

    model, x = Mixed(), torch.randn(2, 6)
    eco.save(eco.shrink(model, eco.plan(eco.detect(model, (x,)), 0.5, scores="magnitude"), (x,)), tmp_path / "mixed")
    back = eco.load(tmp_path / "mixed", model=Mixed)
    assert {str(p.dtype) for p in back.parameters()} == {"torch.float64", "torch.float32"}


def test_folders_without_the_list_of_types_can_be_read(saved: Path, small: nn.Module) -> None:
    manifest = manifest_of(saved)
    del manifest["dtypes"]
    (saved / "manifest.json").write_text(json.dumps(manifest))
    assert torch.equal(eco.load(saved, model=Net).get_parameter(UP), small.get_parameter(UP))


def test_what_the_function_itself_raises_comes_through(saved: Path) -> None:
    def build() -> nn.Module:
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        eco.load(saved, model=build)
    with pytest.raises(StorageError, match="is no floating type"):
        eco.load(saved, model=Net, dtype=torch.int8)


# -- writing -------------------------------------------------------------------------------------------------------


@pytest.fixture
def full_disk() -> Iterator[None]:
    """A limit on the size of files stands for the full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("format", ["safetensors", "torch"])
def test_a_full_disk_leaves_nothing(
    tmp_path: Path, request: pytest.FixtureRequest, full_disk: None, format: str
) -> None:
    if format == "torch":
        request.getfixturevalue("torch_format")
    with pytest.raises(StorageError, match="cannot be written"):
        eco.save(smaller(20_000), tmp_path / "saved")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "path", ["a" * 300, "nul\0", 3, None, b"bytes", "\ud800", ("a", "b")], ids=lambda p: f"{p!r:.6}"
)
def test_paths_that_are_none(tmp_path: Path, small: nn.Module, path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for call in (lambda: eco.save(small, path), lambda: eco.load(path, model=Net)):
        with pytest.raises(StorageError):
            call()
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_just_short_enough(tmp_path: Path, small: nn.Module) -> None:
    eco.save(small, tmp_path / ("a" * 250))
    assert [len(p.name) for p in tmp_path.iterdir()] == [250]


def test_what_is_in_the_way_stays(tmp_path: Path, small: nn.Module) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "weights.pt").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "half")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    before = sorted(p.name for p in tmp_path.iterdir())
    for name in before:
        with pytest.raises(StorageError, match="exists already"):
            eco.save(small, tmp_path / name)
    with pytest.raises(StorageError, match="is not a folder"):
        eco.save(small, tmp_path / "file" / "saved")
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert (tmp_path / "half" / "weights.pt").read_text() == (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("content", [(), ("mine",)])
def test_a_folder_that_was_made_meanwhile_is_not_replaced(tmp_path: Path, content: tuple[str, ...]) -> None:

    def meanwhile() -> None:
        with folders.new_folder(tmp_path / "saved") as partial:
            (partial / "x").write_text("new")
            (tmp_path / "saved").mkdir()
            for name in content:
                (tmp_path / "saved" / name).write_text("old")

    with pytest.raises(StorageError, match="exists already"):
        meanwhile()
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]
    assert [p.name for p in (tmp_path / "saved").iterdir()] == list(content)


def test_a_view_is_saved_alone_and_one_memory_for_two_twice(tmp_path: Path, torch_format: None) -> None:
    small = smaller()
    whole = torch.randn(1000, 1000)
    up: Any = small.get_submodule("up")
    down: Any = small.get_submodule("down")
    up.weight = nn.Parameter(whole[: up.weight.shape[0], :6])
    up.bias = nn.Parameter(down.bias.detach()[: up.bias.numel()])
    eco.save(small, tmp_path / "saved")
    numbers = sum(t.numel() * t.element_size() for t in small.state_dict().values())
    assert (tmp_path / "saved" / "weights.pt").stat().st_size < numbers + 10_000
    tensors = torch.load(tmp_path / "saved" / "weights.pt", weights_only=True)
    assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in tensors.values())


def test_tensors_that_no_file_holds(tmp_path: Path) -> None:
    small: Any = smaller()
    with pytest.raises(StorageError, match=r"dtypes\['odd'\]"):
        eco.save(small, tmp_path / "saved", dtypes={"odd": torch.float16})
    with pytest.raises(StorageError, match=r"dtypes\['up.weight'\]"):
        eco.save(small, tmp_path / "saved", dtypes={UP: torch.int8})
    small.up.weight = nn.Parameter(small.up.weight.detach().to_sparse())
    with pytest.raises(StorageError, match=r"'up.weight' is a .* that is not dense"):
        eco.save(small, tmp_path / "saved")
    assert not list(tmp_path.iterdir())


# -- killed saves --------------------------------------------------------------------------------------------------


def in_a_child(action: Callable[[], None]) -> int:
    """The process that runs an action and ends without a word."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(0)
    return child


@pytest.mark.parametrize("moment", ["rename", "mkdir"])
def test_what_a_killed_save_left_goes_with_the_next_one(tmp_path: Path, small: nn.Module, moment: str) -> None:
    def killed() -> None:
        original = Path.mkdir

        def stop(*args: Any, **kwargs: Any) -> None:
            if moment == "mkdir":
                original(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(Path, moment, stop)
        eco.save(small, tmp_path / "saved")

    os.waitpid(in_a_child(killed), 0)
    assert [p.name for p in tmp_path.iterdir()] != ["saved"]
    (tmp_path / ".other.partial-1-x").mkdir()
    eco.save(small, tmp_path / "saved")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".other.partial-1-x", "saved"]


def test_a_save_that_another_process_is_at_stays(tmp_path: Path, small: nn.Module) -> None:
    def waiting() -> None:
        with folders.new_folder(tmp_path / "saved") as partial:
            (partial / "begun").touch()
            time.sleep(60)

    child = in_a_child(waiting)
    try:
        while not list(tmp_path.glob(".saved.partial-*/begun")):
            time.sleep(0.01)
        eco.save(small, tmp_path / "saved")
        assert len(list(tmp_path.glob(".saved.partial-*/begun"))) == 1
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_old_folders_go_whoever_made_them(tmp_path: Path, small: nn.Module) -> None:
    for name, age in (("0123", 7200), ("4567", 0), (f"{os.getpid()}-x", 7200), (f"{os.getpid()}-y", 0)):
        folder = tmp_path / f".saved.partial-{name}"
        folder.mkdir()
        os.utime(folder, (time.time() - age,) * 2)
    eco.save(small, tmp_path / "saved")
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {"saved", f".saved.partial-{os.getpid()}-y"} | left & {".saved.partial-4567"}
