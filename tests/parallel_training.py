"""One of several processes that train together: what `test_parallel` starts.

    python parallel_training.py FOLDER RANK WORLD [different]

All see the same global batch, each its own part of it. Writes its weights, its plan and its scores at the end.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ecospa_fx as eco
from ecospa_fx.errors import TrainingError

STEPS, BATCH = 9, 8


def run(folder: Path, rank: int, world: int, target: float) -> None:
    torch.manual_seed(0)
    first = nn.Sequential(nn.Linear(6, 40), nn.GELU(), nn.Linear(40, 6))
    model = nn.Sequential(first, nn.Linear(6, 32), nn.GELU(), nn.Linear(32, 2)).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    options: dict[str, Any] = {"wrap": DistributedDataParallel} if world > 1 else {}
    sparse = eco.SparseTraining(
        model, (torch.randn(4, 6, dtype=torch.float64),), optimizer=optimizer, target=target,
        schedule=eco.Linear(start=2, end=6, every=2), **options,
    )  # fmt: skip
    source = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        batch = torch.randn(BATCH, 6, generator=source, dtype=torch.float64)
        part = batch.chunk(world)[rank]
        torch.autograd.backward(sparse.model(part).square().mean())
        sparse.step()
        optimizer.step()
        optimizer.zero_grad()
    state = sparse.state_dict()
    torch.save(
        {"weights": model.state_dict(), "sparse": state, "optimizer": optimizer.state_dict()}, folder / f"{rank}"
    )


def main() -> None:
    folder, rank, world = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=world)
    try:
        run(folder, rank, world, 0.5 if len(sys.argv) < 5 or rank == 0 else 0.4)
    except TrainingError as error:
        sys.exit(str(error))
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
