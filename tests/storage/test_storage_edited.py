"""Saving and loading modules that were edited in place: they come back as their own class."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ecospa_fx as eco
from ecospa_fx.errors import StorageError
from ecospa_fx.origin import origin_of
from ecospa_fx.plan import Plan
from ecospa_fx.storage.models import load, save
from tests.inplace.test_inplace import HIDDEN as WIDTH
from tests.inplace.test_inplace import Model, Wide
from tests.storage.test_storage import forge
from tests.support.hugging import couplings_of, tiny
from tests.support.inplace import assert_loaded, kept, plan_of, uneven
from tests.whole.test_beyond import write_rows


def edited(folder: Path) -> tuple[nn.Module, Plan]:
    """A module of its own class, with fewer heads and FFN units, saved; other widths in each layer."""
    torch.manual_seed(0)
    model, args = Model().double().eval(), (torch.randn(2, 5, WIDTH, dtype=torch.float64),)
    plan = plan_of(eco.detect(model, args), ["ffn", "heads"], uneven)
    save(eco.shrink_(model, plan, args), folder)
    return model, plan


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where such a module is saved."""
    folder = tmp_path_factory.mktemp("edited") / "own"
    edited(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_module_edited_in_place_comes_back_as_its_own_class(tmp_path: Path, device: str) -> None:
    own, plan = edited(tmp_path / "own")
    x = torch.randn(3, 7, WIDTH, dtype=torch.float64)
    fresh = Model().to(device)
    back = load(tmp_path / "own", model=lambda: fresh)
    assert type(back) is Model
    assert repr(back) == repr(own)
    assert not back.training
    assert back.state_dict().keys() == own.state_dict().keys()
    assert torch.equal(back(x), own(x))
    assert fresh.up.out_features == 40  # what the function built is as it was
    save(back, tmp_path / "again")
    again = load(tmp_path / "again", model=Model)
    assert torch.equal(again(x), own(x))
    assert [origin_of(m).plan for m in (back, again)] == [plan, plan]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("integers", "sentence"),
    [
        ("all", "no list of integers"),
        ([3], "has no integer at 3"),
        ([["layers.7", [], "heads", None, 2]], r"has no integer at \['layers.7'"),
        ([["layers.0", [], "forward", None, 2]], r"has no integer at .*forward"),
        ([["layers.0", [], "how", None, 2]], r"has no integer at .*how"),
        ([["layers.0", ["_modules"], "out", None, 2]], r"has no integer at .*_modules"),
        ([["layers.0", [], "heads", None, "__import__('os')"]], "has no integer at"),
        ([["layers.0", [], "training", None, 1]], "has no integer at"),
        ([["layers.0", [], "heads", None, -1]], "has no integer at"),
    ],
)
def test_only_integers_are_written_and_only_over_integers(
    once: Path, tmp_path: Path, integers: object, sentence: str
) -> None:
    shutil.copytree(once, tmp_path / "own")
    forge(tmp_path / "own", integers=integers)
    with pytest.raises(StorageError, match=sentence):
        load(tmp_path / "own", model=Model)


@pytest.mark.slow
def test_an_edited_transformers_model_generates_after_loading(tmp_path: Path) -> None:
    model, kwargs = tiny("llama")
    with pytest.warns(UserWarning, match="cannot say how wide the layers"):
        own: Any = eco.shrink_(model, plan_of(couplings_of("llama"), ["ffn", "heads"], uneven), (), kwargs)
    save(own, tmp_path / "own")
    back: Any = load(tmp_path / "own")
    assert type(back) is type(own)
    assert_loaded(back, own, kwargs)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    prompt = kwargs["input_ids"][:, :4]
    assert torch.equal(back.generate(prompt, **options), own.generate(prompt, **options))


def test_caches_in_buffers_come_back_narrower(tmp_path: Path) -> None:
    torch.manual_seed(0)
    args = torch.randn(2, 1, 12, dtype=torch.float64), torch.tensor([3])
    model = Wide(write_rows).double()
    couplings = eco.detect(model, args)
    eco.shrink_(model, Plan((kept(couplings["qk"], 4),), tuple(couplings.shapes.items())), args)
    model(*args)
    save(model, tmp_path / "own")
    back: Any = load(tmp_path / "own", model=lambda: Wide(write_rows))
    assert torch.equal(back.keys, model.keys)
    assert torch.equal(back(*args), model(*args))
