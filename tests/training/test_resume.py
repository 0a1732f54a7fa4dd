"""A resumed run ends with the weights of an undisturbed one, bit for bit, also where its process is killed."""

from __future__ import annotations

import copy
import io
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import ecospa_fx as eco
from ecospa_fx.errors import TrainingError
from tests.support.processes import together
from tests.training.test_sparse import adamw, mlp, sparse_mlp, train

STEPS = 14


def run(folder: Path, *numbers: int) -> int:
    """One process that trains, from its checkpoint if there is one. Returns its exit code."""
    ((code, error),) = together(folder, "tests.support.killed_training", [[str(folder), *map(str, numbers)]])
    assert not error
    return code


def checkpoint(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / "checkpoint.pt", weights_only=True)
    return found


def assert_equal(a: Any, b: Any, at: str = "") -> None:
    """Every number of two checkpoints is the same, but for how long shrinks took."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            if key not in ("seconds",):
                assert_equal(a[key], b[key], f"{at}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{at}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), at
    else:
        assert a == b, at


@pytest.mark.slow
def test_a_killed_run_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("undisturbed", "killed")]
    for folder in folders:
        folder.mkdir()
    assert run(folders[0]) == 0
    source = random.Random(0)
    assert run(folders[1], 5, source.randint(1, 4)) == -signal.SIGKILL
    assert checkpoint(folders[1])["sparse"]["step"] < 5
    assert run(folders[1], 5, STEPS) == -signal.SIGKILL  # by itself, between two parameters of a shrink
    assert (folders[1] / "killed").exists()
    assert checkpoint(folders[1])["sparse"]["step"] == 4
    assert run(folders[1], 5, source.randint(7, 11)) == -signal.SIGKILL
    assert run(folders[1]) == 0
    undisturbed, killed = (checkpoint(folder) for folder in folders)
    assert undisturbed["sparse"]["step"] == STEPS
    assert len(undisturbed["sparse"]["history"]) == 5
    assert_equal(undisturbed, killed)


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 3, 4, 7])
def test_a_resumed_run_gives_the_same_weights_bit_for_bit(at: int) -> None:
    def begin() -> tuple[eco.SparseTraining, torch.optim.Optimizer]:
        model = mlp(24)
        optimizer = adamw(model)
        return sparse_mlp(model, optimizer=optimizer, schedule=eco.Cubic(2, 6, 2), window=3), optimizer

    torch.manual_seed(1)
    sparse, optimizer = begin()
    train(sparse, optimizer, 0, at)
    file = io.BytesIO()
    torch.save({"s": sparse.state_dict(), "m": sparse.model.state_dict(), "o": optimizer.state_dict()}, file)
    train(sparse, optimizer, at, 9)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again, other = begin()
    again.load_state_dict(saved["s"])
    again.model.load_state_dict(saved["m"])
    other.load_state_dict(saved["o"])
    train(again, other, at, 9)
    for name, weight in sparse.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name])
    assert again.plan == sparse.plan
    assert len(again.history) == len(sparse.history) == 3


@pytest.mark.slow
def test_a_state_that_does_not_fit_is_refused() -> None:
    model = mlp()
    optimizer = adamw(model)
    sparse = sparse_mlp(model, optimizer=optimizer)
    early = sparse.state_dict()
    train(sparse, optimizer, 0, 3)
    late = sparse.state_dict()
    with pytest.raises(TrainingError, match="has already lost"):
        sparse.load_state_dict(early)
    with pytest.raises(TrainingError, match="no state of sparse training"):
        sparse.load_state_dict({})
    with pytest.raises(TrainingError, match="other parameters"):
        sparse_mlp(mlp(14)).load_state_dict(late)
    torn = copy.deepcopy(late)
    next(iter(torn["keep"].values()))[:] = False
    with pytest.raises(TrainingError, match="damaged"):
        sparse_mlp(mlp()).load_state_dict(torn)
    sparse.load_state_dict(late)
