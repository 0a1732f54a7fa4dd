"""What several processes have to agree on: scores, whether a shrink can happen, and what it removes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ecospa_fx.errors import EcospaError, TrainingError


def processes(group: Any = None) -> int:
    """How many train together; 1 where nothing was initialised."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def averaged(values: Tensor, group: Any = None) -> Tensor:
    """The values of every process, which become their mean over all."""
    add_up(values, group)
    return values.div_(processes(group))


def add_up(values: Tensor, group: Any = None) -> None:
    """Replace the values of every process by their sum over all."""
    if processes(group) > 1:
        dist.all_reduce(values, group=group)


def of_first(values: Tensor, group: Any = None) -> Tensor:
    """The values of the first process, for all: what is computed from equal sums need not be equal to the last bit."""
    if processes(group) == 1:
        return values
    shared = values.contiguous()
    dist.broadcast(shared, group=group, group_src=0)
    return shared


def all_agree(flag: bool, device: torch.device, group: Any = None) -> bool:
    """Whether it is so in every process."""
    if processes(group) == 1:
        return flag
    told = torch.tensor(int(flag), device=device)
    dist.all_reduce(told, dist.ReduceOp.MIN, group=group)
    return bool(told)


def fail_together(error: EcospaError | None, device: torch.device, group: Any = None) -> None:
    """Raise what went wrong in this process; TrainingError where it did in another one, which would be waited for."""
    fine = all_agree(error is None, device, group)
    if error is not None:
        raise error
    if not fine:
        raise TrainingError(
            "another process could not measure its batches, and nothing was removed: its error says which and why"
        )


def check_same(keep: Mapping[str, Tensor], device: torch.device, group: Any = None) -> None:
    """Raise TrainingError, in every process, where they are about to keep different units."""
    count = processes(group)
    if count == 1:
        return
    digest = hashlib.sha256()
    for name, kept in keep.items():
        digest.update(name.encode() + kept.to(torch.uint8).numpy().tobytes())
    own = torch.tensor(list(digest.digest()), dtype=torch.uint8, device=device)
    told = [torch.empty_like(own) for _ in range(count)]
    dist.all_gather(told, own, group=group)
    different = [rank for rank, other in enumerate(told) if not torch.equal(other, told[0])]
    if different:
        raise TrainingError(
            f"processes {different} would remove other units than process 0, and nothing was removed: "
            "give every process the same model, options and schedule"
        )
