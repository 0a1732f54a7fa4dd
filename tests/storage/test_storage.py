"""Saving and loading: what comes back is what was saved, and nothing else is ever loaded."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ecospa_fx as eco
from ecospa_fx.errors import EcospaError, StorageError
from ecospa_fx.example_inputs import describe, from_description
from ecospa_fx.origin import origin, remember
from ecospa_fx.plan import Plan
from ecospa_fx.storage import folder
from ecospa_fx.storage import models as storage
from ecospa_fx.storage.models import load, save

HIDDEN, FFN = 8, 24


class Mlp(nn.Module):
    """Two layers of which one is tied, a buffer that is saved in state_dict, and one that is not."""

    scale: Tensor
    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(HIDDEN, FFN)
        self.down = nn.Linear(FFN, HIDDEN)
        self.head = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.tail = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.tail.weight = self.head.weight
        self.drop = nn.Dropout(0.5)
        self.register_buffer("scale", torch.ones(HIDDEN))
        self.register_buffer("table", torch.zeros(HIDDEN), persistent=False)

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        hidden = self.drop(nn.functional.gelu(self.up(x * self.scale)))
        out: Tensor = self.tail(self.head(self.down(hidden) + self.table)) * factor
        return out


def example() -> tuple[tuple[Tensor], dict[str, float]]:
    return (torch.randn(2, HIDDEN, generator=torch.Generator().manual_seed(1)),), {"factor": 2.0}


@cache
def shrunk(seed: int = 0) -> tuple[Mlp, nn.Module, Plan]:
    """A model whose buffers a fresh one would not have, and its smaller form, which knows where it came from."""
    torch.manual_seed(seed)
    model = Mlp().eval()
    model.scale.normal_()
    model.table.normal_()
    args, kwargs = example()
    plan = eco.plan(eco.detect(model, args, kwargs), ratio=0.5, scores="magnitude")
    small = eco.shrink(model, plan, args, kwargs)
    return model, remember(small, origin(model, plan, args, kwargs)), plan


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, nn.Module]:
    small = shrunk()[1]
    save(small, tmp_path / "small")
    return tmp_path / "small", small


def output(model: nn.Module) -> Tensor:
    args, kwargs = example()
    with torch.no_grad():
        result: Tensor = model(*args, **kwargs)
    return result


def test_a_model_of_your_own_comes_back_bit_for_bit(saved: tuple[Path, nn.Module]) -> None:
    folder, small = saved
    torch.manual_seed(5)
    fresh = Mlp()
    before = {name: t.clone() for name, t in fresh.state_dict().items()}
    back = load(folder, model=lambda: fresh)
    assert torch.equal(output(back), output(small))
    assert back.state_dict().keys() == small.state_dict().keys()
    assert {n: tuple(p.shape) for n, p in back.named_parameters()} == {
        n: tuple(p.shape) for n, p in small.named_parameters()
    }
    assert not back.training
    assert all(torch.equal(t, before[name]) for name, t in fresh.state_dict().items())
    assert fresh.training


def test_ties_and_gradients_come_back(saved: tuple[Path, nn.Module]) -> None:
    back = load(saved[0], model=Mlp)
    assert back.get_submodule("tail").weight is back.get_submodule("head").weight
    args, kwargs = example()
    back(*args, **kwargs).sum().backward()
    assert all(p.grad is not None for p in back.parameters())


def test_buffers_come_back_whether_persistent_or_not(saved: tuple[Path, nn.Module]) -> None:
    folder, small = saved
    back = dict(load(folder, model=Mlp).named_buffers())
    own = {name: t for name, t in small.named_buffers() if name in ("scale", "table")}
    assert own.keys() == {"scale", "table"}
    assert all(torch.equal(back[name], t) for name, t in own.items())


def test_a_loaded_model_can_be_saved_again(saved: tuple[Path, nn.Module], tmp_path: Path) -> None:
    back = load(saved[0], model=Mlp)
    save(back, tmp_path / "again")
    assert torch.equal(output(load(tmp_path / "again", model=Mlp)), output(saved[1]))


def test_the_function_may_return_its_own_inputs(saved: tuple[Path, nn.Module]) -> None:
    back = load(saved[0], model=lambda: (Mlp(), *example()))
    assert torch.equal(output(back), output(saved[1]))


def test_types_can_be_changed_on_the_way_out_and_in(tmp_path: Path) -> None:
    model, small, _ = shrunk()
    half = {name: torch.bfloat16 for name, _ in model.named_parameters()}
    save(small, tmp_path / "half", dtypes=half)
    back = load(tmp_path / "half", model=Mlp, dtype=torch.float64)
    assert {p.dtype for p in back.parameters()} == {torch.float64}
    for name, parameter in small.named_parameters():
        assert torch.equal(back.get_parameter(name).data, parameter.data.bfloat16().double())


def test_without_safetensors_weights_are_read_as_tensors_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = shrunk()[1]
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    save(small, tmp_path / "small")
    assert (tmp_path / "small" / "weights.pt").is_file()
    assert torch.equal(output(load(tmp_path / "small", model=Mlp)), output(small))


def test_the_folder_holds_a_manifest_of_everything_else(saved: tuple[Path, nn.Module]) -> None:
    folder, _ = saved
    manifest = json.loads((folder / "manifest.json").read_text())
    names = {f.name for f in folder.iterdir()}
    assert names == {"manifest.json", *manifest["files"]}
    assert Plan.from_json((folder / "plan.json").read_text()).removed_parameters > 0
    assert manifest["class"].endswith("Mlp")
    assert [p.name for p in folder.parent.iterdir()] == ["small"]
    assert len({f.stat().st_mode for f in folder.iterdir()}) == 1


# -- refusals ----------------------------------------------------------------------------------------------------


def test_what_exists_is_not_overwritten(saved: tuple[Path, nn.Module]) -> None:
    folder, small = saved
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    with pytest.raises(StorageError, match="exists already: choose a new folder"):
        save(small, folder)
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before


def test_a_parent_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="missing is not a folder: make it first"):
        save(shrunk()[1], tmp_path / "missing" / "small")


def test_a_module_that_was_not_shrunk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="does not say what it was shrunk from"):
        save(Mlp(), tmp_path / "small")
    assert not list(tmp_path.iterdir())


def test_a_failure_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    small = shrunk()[1]
    monkeypatch.setattr(storage, "write_weights", full)
    with pytest.raises(StorageError, match=r"cannot be written: .*No space left"):
        save(small, tmp_path / "small")
    assert not list(tmp_path.iterdir())


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage", "sentence"),
    [
        ("weights.safetensors", truncate, "weights.safetensors is not as long as it was when saved"),
        ("weights.safetensors", flip, "weights.safetensors was changed after it was saved"),
        ("weights.safetensors", Path.unlink, "weights.safetensors is missing"),
        ("plan.json", flip, "plan.json was changed after it was saved"),
        ("manifest.json", truncate, "manifest.json is damaged"),
        ("manifest.json", Path.unlink, "has no manifest.json: it was not saved by ecospa_fx, or not completely"),
    ],
)
def test_damage_is_told(
    saved: tuple[Path, nn.Module], name: str, damage: Callable[[Path], None], sentence: str
) -> None:
    damage(saved[0] / name)
    with pytest.raises(StorageError, match=sentence):
        load(saved[0], model=Mlp)


def forge(folder: Path, **changes: object) -> None:
    """Change the manifest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, **changes}))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"format": "another"}, "does not describe a model saved by ecospa_fx"),
        ({"files": {"plan.json": {}}}, "does not describe a model"),
        ({"files": {"plan.json": {}, "weights.pt": {}, "../x": {}}}, "does not describe a model"),
        ({"version": 99}, "has format version 99 and this library reads version 1"),
        ({"inputs": {"tensor": [2], "dtype": "load"}}, "describes no example inputs"),
        ({"inputs": None}, r"holds no example inputs: let model\(\) return"),
    ],
)
def test_a_foreign_manifest_is_refused(
    saved: tuple[Path, nn.Module], changes: dict[str, object], sentence: str
) -> None:
    forge(saved[0], **changes)
    with pytest.raises(StorageError, match=sentence):
        load(saved[0], model=Mlp)


@pytest.mark.parametrize("kept", [1, 7, 13])
def test_weights_begin_where_torch_begins_its_own(kept: int, tmp_path: Path) -> None:
    """Also behind a tensor that ends anywhere in the file; else products round otherwise than before."""
    torch.manual_seed(0)
    model, (args, kwargs) = Mlp().eval(), example()
    couplings = eco.detect(model, args, kwargs)
    small = eco.shrink(model, Plan.keeping(couplings, {"ffn": list(range(kept))}), args, kwargs)
    save(small, tmp_path / "small")
    loaded = load(tmp_path / "small", model=lambda: (Mlp().eval(), args, kwargs))
    assert [tensor.data_ptr() % 64 for tensor in loaded.state_dict().values()] == [0] * len(small.state_dict())
    assert torch.equal(loaded(*args, **kwargs), small(*args, **kwargs))


def test_a_pickle_in_place_of_weights_is_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
            return Path.touch, (tmp_path / "executed",)

    small = shrunk()[1]
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    save(small, tmp_path / "small")
    weights = tmp_path / "small" / "weights.pt"
    torch.save({"up.weight": Payload()}, weights)
    files = json.loads((tmp_path / "small" / "manifest.json").read_text())["files"]
    entry = {"bytes": weights.stat().st_size, "sha256": folder.digest(weights)}
    forge(tmp_path / "small", files={**files, "weights.pt": entry})
    with pytest.raises(StorageError, match="cannot be read"):
        load(tmp_path / "small", model=Mlp)
    assert not (tmp_path / "executed").exists()


def test_code_that_only_you_have_is_asked_for(saved: tuple[Path, nn.Module]) -> None:
    with pytest.raises(StorageError, match="Mlp, which only your code can build: pass model="):
        load(saved[0])


def test_another_architecture_is_refused(saved: tuple[Path, nn.Module]) -> None:
    with pytest.raises(EcospaError, match="made for another model"):
        load(saved[0], model=lambda: nn.Sequential(nn.Linear(HIDDEN, HIDDEN)))


def test_another_set_of_buffers_is_refused(saved: tuple[Path, nn.Module]) -> None:
    class More(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("extra", torch.zeros(1))

        def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
            return super().forward(x, factor) + self.get_buffer("extra")

    with pytest.raises(StorageError, match="'extra' is in the model only"):
        load(saved[0], model=More)


def test_a_function_that_returns_no_module_is_refused(saved: tuple[Path, nn.Module]) -> None:
    with pytest.raises(StorageError, match=r"model\(\) returned int"):
        load(saved[0], model=lambda: 3)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"there is no folder .*nowhere"):
        load(tmp_path / "nowhere")


# -- example inputs without their values -------------------------------------------------------------------------


def test_inputs_are_described_by_shape_and_type() -> None:
    value = ((torch.ones(2, 3, dtype=torch.int32),), {"a": [None, True, 2, 0.5, "x"], "b": (torch.ones(1),)})
    args, kwargs = from_description(json.loads(json.dumps(describe(value))))
    assert args[0].shape == (2, 3)
    assert args[0].dtype == torch.int32
    assert not args[0].any()
    assert kwargs["a"] == [None, True, 2, 0.5, "x"]
    assert isinstance(kwargs["b"], tuple)


def test_what_has_no_description_is_refused() -> None:
    with pytest.raises(TypeError, match="a set has no description"):
        describe(({1},))


# -- transformers ------------------------------------------------------------------------------------------------


def hugging_face(tmp_path: Path) -> tuple[Path, nn.Module, dict[str, object]]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(
        num_hidden_layers=1, vocab_size=64, tie_word_embeddings=True, attn_implementation="eager", **sizes
    )
    model = transformers.LlamaForCausalLM(config).eval()
    kwargs: dict[str, object] = {"input_ids": torch.arange(24).view(2, 12), "use_cache": False}
    plan = eco.plan(eco.detect(model, (), kwargs), ratio=0.4, scores="magnitude")
    small = eco.shrink(model, plan, (), kwargs)
    save(small, tmp_path / "small", origin=origin(model, plan, (), kwargs))
    return tmp_path / "small", small, kwargs


@pytest.mark.slow
def test_a_transformers_model_comes_back_without_help(tmp_path: Path) -> None:
    folder, small, kwargs = hugging_face(tmp_path)
    back = load(folder)
    with torch.no_grad():
        got, want = back(**kwargs), small(**kwargs)
    assert type(got) is type(want)
    assert torch.equal(got.logits, want.logits)
    assert back.get_parameter("lm_head.weight") is back.get_parameter("model.embed_tokens.weight")

    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "llama"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["attention"] == "eager"
    assert manifest["versions"].keys() == {"ecospa_fx", "torch", "transformers"}

    forge(folder, attention="somebody/kernel")
    with pytest.raises(StorageError, match="attention implementation 'somebody/kernel' outside transformers"):
        load(folder)
    forge(folder, **{"attention": "eager", "class": "transformers.AutoModel"})
    with pytest.raises(StorageError, match="has no model class 'AutoModel'"):
        load(folder)
