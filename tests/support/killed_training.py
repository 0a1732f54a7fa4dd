"""A training script that writes a checkpoint after every step and goes on from it: what `test_resume` kills.

    python -m tests.support.killed_training FOLDER [STEP LAST]

With STEP, the process kills itself in the middle of the shrink of that step, between two parameters, once, and after
step LAST.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

import ecospa_fx as eco
from ecospa_fx.training import optimizer_surgery
from ecospa_fx.training.tensor_cuts import TensorCut

STEPS = 14


class Net(nn.Module):
    """Two layers with dropout on a stream of their own random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 40), nn.GELU(), nn.Dropout(0.2), nn.Linear(40, 6))
        self.second = nn.Sequential(nn.Linear(6, 32), nn.GELU(), nn.Linear(32, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.second(x + self.first(x))
        return out


def built() -> tuple[eco.SparseTraining, torch.optim.AdamW]:
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = eco.Cubic(start=3, end=11, every=2)
    return eco.SparseTraining(model, (torch.randn(4, 6),), optimizer=optimizer, schedule=schedule, window=4), optimizer


def kill_at_second_parameter() -> None:
    """Let the second parameter that is cut be the last thing that this process does."""
    cut_tensor, cut, module = optimizer_surgery.cut_tensor, [], cast(Any, optimizer_surgery)

    def killing(tensor: torch.Tensor, how: TensorCut) -> None:
        cut.append(how)
        if len(cut) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        cut_tensor(tensor, how)

    module.cut_tensor = killing


def run(folder: Path, fatal: int, last: int) -> None:
    sparse, optimizer = built()
    checkpoint, first = folder / "checkpoint.pt", 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        sparse.load_state_dict(saved["sparse"])
        sparse.model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["random"])
        first = saved["sparse"]["step"]
    for step in range(first + 1, STEPS + 1):
        torch.autograd.backward(sparse.model(torch.randn(16, 6)).square().mean())
        if step == fatal and not (folder / "killed").exists():
            (folder / "killed").touch()
            kill_at_second_parameter()
        sparse.step()
        optimizer.step()
        optimizer.zero_grad()
        state = {"sparse": sparse.state_dict(), "model": sparse.model.state_dict(),
                 "optimizer": optimizer.state_dict(), "random": torch.get_rng_state()}  # fmt: skip
        torch.save(state, folder / "partial")
        (folder / "partial").replace(checkpoint)
        if step == last:
            os.kill(os.getpid(), signal.SIGKILL)


def begin() -> None:
    torch.set_num_threads(1)
    numbers = [int(argument) for argument in sys.argv[2:]]
    run(Path(sys.argv[1]), *(*numbers, 0, 0)[:2])


if __name__ == "__main__":
    begin()
