"""Several processes train as one: same plan, same weights as one process with the same global batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.support import processes
from tests.training.test_resume import assert_equal

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")

needs_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are fewer than two GPUs")
on_each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpus)])


def together(
    folder: Path, world: int, *arguments: str, script: str = "parallel_training", device: str = "cpu"
) -> list[tuple[int, str]]:
    """Run all processes; the exit code and the error output of each. On GPUs, the backend is NCCL."""
    folder.mkdir()
    ranks = [[str(folder), str(rank), str(world), *arguments] for rank in range(world)]
    return processes.together(folder, f"tests.support.{script}", ranks, device)


def result(folder: Path, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / str(rank), weights_only=True)
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process makes of it."""
    folder = tmp_path_factory.mktemp("alone") / "one"
    assert together(folder, 1) == [(0, "")]
    return result(folder, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "mode", "device"),
    [
        (2, "replicated", "cpu"),
        (4, "sharded", "cpu"),  # of which some have no row of a weight of six
        pytest.param(2, "replicated", "cuda", marks=needs_gpus),
        pytest.param(2, "sharded", "cuda", marks=needs_gpus),
    ],
)
def test_several_processes_train_as_one(
    tmp_path: Path, alone: dict[str, Any], world: int, mode: str, device: str
) -> None:
    """With the same global batch: same plan, same weights and states to rounding; between them no difference at all."""
    outcomes = together(tmp_path / "folder", world, mode, device=device)
    assert [code for code, _ in outcomes] == [0] * world, outcomes[0][1]
    found = [result(tmp_path / "folder", rank) for rank in range(world)]
    for other in found[1:]:
        assert_equal(found[0], other)
    assert len(alone["sparse"]["history"]) == len(found[0]["sparse"]["history"]) == 3
    assert_equal(alone["sparse"]["keep"], found[0]["sparse"]["keep"])
    for part in ("weights", "optimizer"):
        torch.testing.assert_close(found[0][part], alone[part], rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@on_each_device
def test_processes_that_disagree_are_stopped_before_anything_is_removed(tmp_path: Path, device: str) -> None:
    outcomes = together(tmp_path / "apart", 2, "different", device=device)
    for code, error in outcomes:
        assert code == 1
        assert "processes [1] would remove other units than process 0, and nothing was removed" in error


@pytest.fixture(scope="module")
def measured_alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """What one process on a device makes of all batches, those of training and those that shrinks are measured on.

    Of the same kind of device as the processes that it is compared with: a basis of eigenvectors is as good with other
    signs, which is up to the library that finds them.
    """

    @cache
    def found(device: str) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("alone") / "one"
        assert together(folder, 1, script="parallel_measured", device=device) == [(0, "")]
        return result(folder, 0)

    return found


@pytest.mark.slow
@on_each_device
@pytest.mark.parametrize("mode", ["replicated", "sharded"])
def test_several_processes_measure_and_make_up_as_one(
    tmp_path: Path, measured_alone: Callable[[str], dict[str, Any]], mode: str, device: str
) -> None:
    """Second-order scores, changed bases and compensation from batches of which each process has its own."""
    alone = measured_alone(device)
    outcomes = together(tmp_path / "folder", 2, mode, script="parallel_measured", device=device)
    assert [code for code, _ in outcomes] == [0, 0], outcomes
    first, second = (result(tmp_path / "folder", rank) for rank in range(2))
    for part in ("weights", "optimizer"):
        assert_equal(first[part], second[part])
        torch.testing.assert_close(first[part], alone[part], rtol=1e-8, atol=1e-10)
    assert_equal(alone["sparse"]["keep"], first["sparse"]["keep"])
    widths = [shrink["widths"] for shrink in first["sparse"]["history"]]
    assert len(widths) == 2
    assert set(widths[1].values()) != set(widths[0].values())


@pytest.mark.slow
def test_several_processes_begin_small_as_one(tmp_path: Path) -> None:
    """By what gradients of all batches say, of which each process has its own."""
    for name, world in (("alone", 1), ("both", 2)):
        outcomes = together(tmp_path / name, world, "start", script="parallel_measured")
        assert [code for code, _ in outcomes] == [0] * world, outcomes
    alone, first, second = (result(tmp_path / name, rank) for name, rank in (("alone", 0), ("both", 0), ("both", 1)))
    assert_equal(first["weights"], second["weights"])
    assert_equal(alone["sparse"]["keep"], first["sparse"]["keep"])
    torch.testing.assert_close(first["weights"], alone["weights"], rtol=1e-8, atol=1e-10)


@pytest.mark.slow
def test_sharded_parameters_begin_small(tmp_path: Path) -> None:
    outcomes = together(tmp_path / "folder", 2, "start-sharded", script="parallel_measured")
    assert [code for code, _ in outcomes] == [0, 0], outcomes
    first, second = (result(tmp_path / "folder", rank) for rank in range(2))
    assert_equal(first["weights"], second["weights"])
    assert len(first["sparse"]["history"]) == 1


@pytest.mark.slow
@on_each_device
def test_a_process_that_cannot_measure_stops_all(tmp_path: Path, device: str) -> None:
    outcomes = together(tmp_path / "folder", 2, "failing", script="parallel_measured", device=device)
    assert [code for code, _ in outcomes] == [1, 1]
    assert "another process could not measure its batches, and nothing was removed" in outcomes[0][1]
    assert "the loss of batch 0 is nan" in outcomes[1][1]
