"""Collectives of a shrink in several processes: scores are averaged, and all must remove the same units."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from ecospa_fx.errors import EcospaError, TrainingError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def world_size(group: ProcessGroup | None = None) -> int:
    """How many train together; 1 where nothing was initialised."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def averaged(values: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """The values of every process, which become their mean over all."""
    add_up(values, group)
    return values.div_(world_size(group))


def add_up(values: Tensor, group: ProcessGroup | None = None) -> None:
    """Replace the values of every process by their sum over all."""
    if world_size(group) > 1:
        dist.all_reduce(values, group=group)


def of_first(values: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """The values of the first process, for all: what is computed from equal sums need not be equal to the last bit."""
    if world_size(group) == 1:
        return values
    shared = values.contiguous()
    dist.broadcast(shared, group=group, group_src=0)
    return shared


def all_agree(flag: bool, device: torch.device, group: ProcessGroup | None = None) -> bool:
    """Whether it is so in every process."""
    if world_size(group) == 1:
        return flag
    agreed = torch.tensor(int(flag), device=device)
    dist.all_reduce(agreed, dist.ReduceOp.MIN, group=group)
    return bool(agreed)


def fail_together(error: EcospaError | None, device: torch.device, group: ProcessGroup | None = None) -> None:
    """Raise what went wrong in this process; TrainingError where it did in another one, which would be waited for."""
    succeeded = all_agree(error is None, device, group)
    if error is not None:
        raise error
    if not succeeded:
        raise TrainingError(
            "another process could not measure its batches, and nothing was removed: its error says which and why"
        )


def check_same(keep: Mapping[str, Tensor], device: torch.device, group: ProcessGroup | None = None) -> None:
    """Raise TrainingError, in every process, where they are about to keep different units."""
    count = world_size(group)
    if count == 1:
        return
    digest = hashlib.sha256()
    for name, kept in keep.items():
        digest.update(name.encode() + kept.to(torch.uint8).numpy().tobytes())
    local_digest = torch.tensor(list(digest.digest()), dtype=torch.uint8, device=device)
    digests = [torch.empty_like(local_digest) for _ in range(count)]
    dist.all_gather(digests, local_digest, group=group)
    different = [rank for rank, other in enumerate(digests) if not torch.equal(other, digests[0])]
    if different:
        raise TrainingError(
            f"processes {different} would remove other units than process 0, and nothing was removed: "
            "give every process the same model, options and schedule"
        )
