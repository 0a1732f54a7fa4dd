"""A run whose process is killed, during a shrink too, ends with the weights of an undisturbed one, bit for bit."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

SCRIPT = Path(__file__).with_name("killed_training.py")
STEPS = 14


def started(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "ignore", str(SCRIPT), str(folder), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def run_until(folder: Path, last: int, *arguments: str) -> int:
    """Run until a step is done, where the process waits to be killed. Returns its exit code."""
    process = started(folder, *arguments, str(last))
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= last:
            process.send_signal(signal.SIGKILL)
            break
    process.stdout.close()
    return process.wait()


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


def test_a_killed_run_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("undisturbed", "killed")]
    for folder in folders:
        folder.mkdir()
    assert started(folders[0]).wait() == 0
    source = random.Random(0)
    assert run_until(folders[1], source.randint(1, 4), "5") == -signal.SIGKILL
    assert checkpoint(folders[1])["sparse"]["step"] < 5
    assert run_until(folders[1], STEPS, "5") == -signal.SIGKILL  # by itself, between two parameters of a shrink
    assert (folders[1] / "killed").exists()
    assert checkpoint(folders[1])["sparse"]["step"] == 4
    assert run_until(folders[1], source.randint(7, 11), "5") == -signal.SIGKILL
    assert started(folders[1]).wait() == 0
    undisturbed, killed = (checkpoint(folder) for folder in folders)
    assert undisturbed["sparse"]["step"] == STEPS
    assert len(undisturbed["sparse"]["history"]) == 5
    assert_equal(undisturbed, killed)
