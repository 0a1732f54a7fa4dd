"""One of several processes that train together: what `test_parallel` starts.

    python -m tests.support.parallel_training FOLDER RANK WORLD [different | sharded]

On CPUs with gloo, or, with PARALLEL_DEVICE=cuda in the environment, on one GPU each with NCCL. All see the same global
batch, each its own part of it. Writes its weights, its plan and its scores at the end; sharded ones write a distributed
checkpoint in the middle too, and end with what a new run makes of it.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves, tree_map

import ecospa_fx as eco
from ecospa_fx.errors import TrainingError

STEPS, BATCH = 9, 8


def device() -> str:
    return os.environ.get("PARALLEL_DEVICE", "cpu")


def sharded(module: nn.Module) -> nn.Module:
    """The first part for itself, then the rest."""
    return sharded_at(module, "0")


def sharded_at(module: nn.Module, *parts: str) -> nn.Module:
    """These parts for themselves, then the rest, over all processes; without a mesh, any GPUs are taken."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device(), (dist.get_world_size(),))
    for part in parts:
        fully_shard(module.get_submodule(part), mesh=mesh)
    fully_shard(module, mesh=mesh)
    return module


def built(target: float, wrap: Any) -> tuple[eco.SparseTraining, torch.optim.Optimizer]:
    torch.manual_seed(0)
    first = nn.Sequential(nn.Linear(6, 40), nn.GELU(), nn.Linear(40, 6))
    model = nn.Sequential(first, nn.Linear(6, 32), nn.GELU(), nn.Linear(32, 2)).double().to(device())
    sparse = eco.SparseTraining(
        model, (torch.randn(4, 6, dtype=torch.float64, device=device()),), target=target, wrap=wrap,
        round_to=1,  # by default it is what the device likes
        schedule=eco.Linear(start=2, end=6, every=2),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(sparse.model.parameters(), lr=1e-2)
    sparse.attach(optimizer)
    return sparse, optimizer


def train(sparse: eco.SparseTraining, optimizer: torch.optim.Optimizer, steps: range, place: tuple[int, int]) -> None:
    rank, world = place
    for step in steps:
        source = torch.Generator().manual_seed(step)
        batch = torch.randn(BATCH, 6, generator=source, dtype=torch.float64).to(device())
        torch.autograd.backward(sparse.model(batch.chunk(world)[rank]).square().mean())
        sparse.step()
        optimizer.step()
        optimizer.zero_grad()


def resumed(folder: Path, sparse: eco.SparseTraining, optimizer: torch.optim.Optimizer) -> Any:
    """Training and its optimizer after a round trip through a distributed checkpoint."""
    import torch.distributed.checkpoint as module

    checkpoint: Any = module
    state = {"model": sparse.model.state_dict(), "optimizer": optimizer.state_dict()}
    checkpoint.save(state, checkpoint_id=folder / "checkpoint")
    again, other = built(0.5, sharded)
    again.load_state_dict(sparse.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # of the right sizes; the values come from the file
    state = {"model": again.model.state_dict(), "optimizer": other.state_dict()}
    for value in tree_leaves(state):
        if isinstance(value, torch.Tensor):
            value.zero_()
    checkpoint.load(state, checkpoint_id=folder / "checkpoint")
    again.model.load_state_dict(state["model"])
    other.load_state_dict(state["optimizer"])
    return again, other


def whole(value: Any) -> Any:
    value = value.full_tensor() if hasattr(value, "full_tensor") else value
    return value.cpu() if isinstance(value, torch.Tensor) else value


def outcome(folder: Path, rank: int, world: int, mode: str) -> str:
    """Train and write what came of it; the error's text where it was refused."""
    wrap = sharded if mode == "sharded" else DistributedDataParallel if world > 1 else None
    try:
        sparse, optimizer = built(0.4 if mode == "different" and rank else 0.5, wrap)
        train(sparse, optimizer, range(5), (rank, world))
        if mode == "sharded":
            sparse, optimizer = resumed(folder, sparse, optimizer)
        train(sparse, optimizer, range(5, STEPS), (rank, world))
    except TrainingError as error:
        return str(error)
    write(folder / f"{rank}", sparse, optimizer)
    return ""


def write(path: Path, sparse: eco.SparseTraining, optimizer: torch.optim.Optimizer) -> None:
    """What a process ends with; all of them have to call this."""
    weights = {k.removeprefix("module."): whole(v) for k, v in sparse.model.state_dict().items()}
    states = tree_map(whole, optimizer.state_dict()["state"])
    torch.save({"weights": weights, "optimizer": states, "sparse": sparse.state_dict()}, path)


def ended(outcome: Callable[[Path, int, int, str], str]) -> None:
    """Ends without the interpreter's teardown: a thread of gloo that wants the GIL during it aborts the process."""
    folder, rank, world = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    if device() == "cuda":
        torch.cuda.set_device(rank)
    if world > 1:
        backend = "nccl" if device() == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=world)
    error = outcome(folder, rank, world, sys.argv[4] if len(sys.argv) > 4 else "")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    sys.stderr.write(error)
    sys.stderr.flush()
    os._exit(1 if error else 0)


def begin() -> None:
    ended(outcome)


if __name__ == "__main__":
    begin()
