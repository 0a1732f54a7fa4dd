"""One thread per process and a fixed seed per test, so that runs in parallel are fast and repeat."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

os.environ.setdefault("SYMPY_CACHE_SIZE", "100000")  # read when sympy is first imported, which torch alone does not do
torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Collect garbage rarely: exports make many objects, and looking through them takes a fifth of a run."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's cases run in one process, which makes once what they share, and files in their order."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


@pytest.fixture(autouse=True, scope="session")
def uncached() -> Iterator[None]:
    """Symbolic exports run without torch's cache of fake tensors: of one or two layers it takes more than it saves."""
    from torch._dynamo import config

    from ecospa_fx.capture import export as capturing

    export = capturing._export

    def uncached(model: nn.Module, view: nn.Module, attempt: Any, **options: Any) -> Any:
        with config.patch(fake_tensor_cache_enabled=attempt.shapes is None):
            return export(model, view, attempt, **options)

    with mock.patch.object(capturing, "_export", uncached):
        yield


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers in every test, whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def trained() -> nn.Module:
    """A language model that has learnt something, so that units differ in what they are worth. No test changes it."""
    from tests.support.counting import Tokens, learnt

    return learnt(Tokens())


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For the command line: a Hugging Face folder in bfloat16, its tokenizer and a text. No test changes it."""
    from tests.support.cli import written

    return written(tmp_path_factory.mktemp("source"))


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the current folder, which is not on the path, with functions for the command line to call."""
    from tests.support.cli import FACTORIES

    name = f"factories_{random.Random(str(tmp_path)).getrandbits(32)}"
    (tmp_path / f"{name}.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    return name


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the demonstration's model is loaded, it has one layer."""
    from ecospa_fx import demo
    from tests.support import demonstration

    monkeypatch.setattr(demo, "load", demonstration.shallow)


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing else is asked for, `compress` distils on eight samples: for tests of what stands around it."""
    from ecospa_fx.recipe import Recipe

    def draws(self: Recipe, batches: int) -> int:
        return 8 if self.distillation is None else self.distillation

    monkeypatch.setattr(Recipe, "draws", draws)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes a `case` runs once for each of its module's CASES, the table of a family of rules."""
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", metafunc.module.CASES, ids=lambda case: case.id)
