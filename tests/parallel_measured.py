"""One of several processes whose shrinks are measured on batches: what `test_parallel` starts.

    python -m tests.parallel_measured FOLDER RANK WORLD [sharded | failing | start | start-sharded]

Each has its part of every training batch, and some of the calibration batches. Writes its weights, its optimizer's
states and its plan at the end; with "failing" one of them has a batch whose loss is not finite; with "start" the model
shrinks before the first step, by gate Fisher scores unless its parameters are sharded.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

import ecospa_fx as eco
from ecospa_fx.errors import EcospaError
from tests.parallel_training import whole
from tests.test_second_order_training import batches, ids, language, loss_of

STEPS = 7


def sharded(module: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    fully_shard(module.get_submodule("blocks.1"))
    fully_shard(module)
    return module


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
        language(), (ids(0),), target=0.4, schedule=schedule, scores=scores, wrap=wrap,
        batches=batches()[rank::world], loss=loss,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(sparse.model.parameters(), lr=1e-2)
    sparse.attach(optimizer)
    try:
        for step in range(STEPS):
            part = ids(step).chunk(world)[rank]
            torch.autograd.backward(loss_of(sparse.model(part), (part,), {}))
            sparse.step()
            optimizer.step()
            optimizer.zero_grad()
    except EcospaError as error:
        return str(error)
    weights = {k.removeprefix("module."): whole(v) for k, v in sparse.model.state_dict().items()}
    states = tree_map(whole, optimizer.state_dict()["state"])
    torch.save({"weights": weights, "optimizer": states, "sparse": sparse.state_dict()}, folder / f"{rank}")
    return ""


def main() -> None:
    """Ends without the interpreter's teardown, as `parallel_training` does."""
    folder, rank, world = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=world)
    error = outcome(folder, rank, world, sys.argv[4] if len(sys.argv) > 4 else "")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    sys.stderr.write(error)
    sys.stderr.flush()
    os._exit(1 if error else 0)


if __name__ == "__main__":
    main()
