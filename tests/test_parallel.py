"""Several processes train as one: same plan, same weights as one process with the same global batch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.test_resume import assert_equal

SCRIPT = Path(__file__).with_name("parallel_training.py")

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")


def together(folder: Path, world: int, *arguments: str) -> list[tuple[int, str]]:
    """Run all processes; the exit code and the error output of each."""
    folder.mkdir()
    command = [sys.executable, "-W", "ignore", str(SCRIPT), str(folder)]
    running = [
        subprocess.Popen([*command, str(rank), str(world), *arguments], stderr=subprocess.PIPE, text=True)
        for rank in range(world)
    ]
    errors = [process.communicate(timeout=300)[1] for process in running]
    return [(process.returncode, error) for process, error in zip(running, errors, strict=True)]


def result(folder: Path, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / str(rank), weights_only=True)
    return found


def test_two_processes_train_as_one_with_the_same_global_batch(tmp_path: Path) -> None:
    for folder, world in (("one", 1), ("two", 2)):
        assert [code for code, _ in together(tmp_path / folder, world)] == [0] * world
    one, two = result(tmp_path / "one", 0), [result(tmp_path / "two", rank) for rank in range(2)]
    assert_equal(two[0], two[1])
    assert len(one["sparse"]["history"]) == 3
    assert_equal(one["sparse"]["keep"], two[0]["sparse"]["keep"])
    for name, weight in one["weights"].items():
        torch.testing.assert_close(weight, two[0]["weights"][name], rtol=1e-9, atol=1e-12)


def test_processes_that_disagree_are_stopped_before_anything_is_removed(tmp_path: Path) -> None:
    outcomes = together(tmp_path / "apart", 2, "different")
    for code, error in outcomes:
        assert code == 1
        assert "processes [1] would remove other units than process 0, and nothing was removed" in error
