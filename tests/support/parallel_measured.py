"""One of several processes whose shrinks are measured on batches: what `test_parallel` starts.

    python -m tests.support.parallel_measured FOLDER RANK WORLD [sharded | failing | start | start-sharded]

Each has its part of every training batch, and some of the calibration batches. Writes its weights, its optimizer's
states and its plan at the end; with "failing" one of them has a batch whose loss is not finite; with "start" the model
shrinks before the first step, by gate Fisher scores unless its parameters are sharded. Devices as in
`parallel_training`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

import ecospa_fx as eco
from ecospa_fx.errors import EcospaError
from tests.support.parallel_training import device, ended, sharded_at, write
from tests.training.test_second_order_training import batches, ids, language, loss_of

STEPS = 5


def sharded(module: nn.Module) -> nn.Module:
    return sharded_at(module, "blocks.0")


def outcome(folder: Path, rank: int, world: int, mode: str) -> str:
    """Train and write what came of it; the error's text where it was refused."""
    wrap: Any = sharded if mode.endswith("sharded") else DistributedDataParallel if world > 1 else None
    spoilt = mode == "failing" and rank == 1

    def loss(output: Tensor, args: Any, kwargs: Any) -> Tensor:
        return loss_of(output, args, kwargs) * (float("nan") if spoilt else 1.0)

    begins = mode.startswith("start")
    schedule: Any = eco.AtStart() if begins else eco.Linear(start=2, end=4, every=2)
    scores = "gate-fisher" if mode == "start" else None
    sparse = eco.SparseTraining(
        language(blocks=1).to(device()), (ids(0).to(device()),), target=0.4, schedule=schedule, scores=scores,
        wrap=wrap, round_to=1,  # by default it is what the device likes
        batches=tree_map_only(Tensor, lambda t: t.to(device()), batches()[rank::world]), loss=loss,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(sparse.model.parameters(), lr=1e-2)
    sparse.attach(optimizer)
    try:
        for step in range(STEPS):
            part = ids(step).chunk(world)[rank].to(device())
            torch.autograd.backward(loss_of(sparse.model(part), (part,), {}))
            sparse.step()
            optimizer.step()
            optimizer.zero_grad()
    except EcospaError as error:
        return str(error)
    write(folder / f"{rank}", sparse, optimizer)
    return ""


def begin() -> None:
    ended(outcome)


if __name__ == "__main__":
    begin()
