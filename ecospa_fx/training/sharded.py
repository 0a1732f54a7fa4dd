"""Shrinking parameters that are sharded by ``fully_shard`` (FSDP2): their scores, and cutting them.

``fully_shard`` fixes the sizes of the parameters that it finds, so a shrink builds the tree of modules anew, without
memory, lets the user's function shard it again, and moves the parts over: one parameter at a time is gathered, cut and
spread again, in every process alike. Parameters are new objects then, and take the places of the old ones in the
optimizers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeGuard, cast

from torch import Tensor, nn
from torch.optim import Optimizer

from ecospa_fx.errors import TrainingError
from ecospa_fx.training.tensor_cuts import TensorCut

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(parameters: Iterable[Tensor]) -> bool:
    """Whether some are spread over processes."""
    return any(_is_dtensor(p) for p in parameters)


def _is_dtensor(value: object) -> TypeGuard[DTensor]:
    """Whether it is a DTensor; nobody has one who has not imported them, and that takes a while."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def drop_parameters_of_code(tree: nn.Module) -> None:
    """Drop what generated code holds besides the modules it belongs to: the parameters from before sharding."""
    for module in tree.modules():
        code = module.__dict__.get("graph_module")
        if isinstance(code, nn.Module):
            code._parameters.clear()  # its submodules are those of the tree itself


# -- values ------------------------------------------------------------------------------------------------------


def full_tensor(tensor: Tensor) -> Tensor:
    """All parts together, without history. Every process has to call this."""
    detached = tensor.detach()
    return detached.full_tensor() if _is_dtensor(detached) else detached


def assign(tensor: Tensor, values: Tensor) -> None:
    """Give a tensor, spread or not, new values in place. values: all of them, the same in every process."""
    if not _is_dtensor(tensor):
        tensor.copy_(values)
        return
    from torch.distributed.tensor import distribute_tensor

    sharded = distribute_tensor(values, tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.to_local().copy_(sharded.to_local())


# -- scores ------------------------------------------------------------------------------------------------------


def local_part(tensor: Tensor) -> Tensor:
    """The part of this process."""
    return tensor.to_local() if _is_dtensor(tensor) else tensor


def expand_local_sums(margins: Tensor, key: tuple[int, ...], parameter: Tensor) -> Tensor:
    """Sums over the part of this process at their place in those over the whole, zeros elsewhere.

    margins: axes as in `key`, which are axes of `full_tensor`.
    """
    if not _is_dtensor(parameter):
        return margins
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    result = margins.new_zeros([parameter.shape[axis] for axis in key])
    if margins.numel():
        result[tuple(slice(offset[a], offset[a] + shape[a]) for a in key)] = margins
    return result


def sum_over_shards(sums: Tensor, like: Tensor) -> None:
    """Add up the sums of all processes that hold a part of `like`, a spread tensor. Copies of a part count once."""
    from torch import distributed

    dtensor = cast("DTensor", like)
    for mesh_axis, placement in enumerate(dtensor.placements):
        if placement.is_shard():
            distributed.all_reduce(sums, group=dtensor.device_mesh.get_group(mesh_axis))


# -- cutting -----------------------------------------------------------------------------------------------------


def cut_and_reshard(old: Tensor, like: Tensor, cut: TensorCut | None) -> Tensor:
    """What is left of a spread tensor, spread as `like` is. Every process has to call this."""
    if cut is None or not _is_dtensor(old):
        return old
    from torch.distributed.tensor import distribute_tensor

    if old.shape != cut.before:
        raise TrainingError(f"a state of shape {tuple(old.shape)} cannot be cut where parameters are sharded")
    target = cast("DTensor", like)
    return distribute_tensor(cut(old.full_tensor()), target.device_mesh, target.placements, src_data_rank=None)


def load_cut_parameters(tree: nn.Module, old: Mapping[str, Tensor], cuts: Mapping[str, TensorCut]) -> None:
    """Give a newly sharded tree without memory what is left of the old parameters."""
    parameters = dict(tree.named_parameters())
    values = {name: cut_and_reshard(old[name].detach(), like, cuts.get(name)) for name, like in parameters.items()}
    aliases = {id(p): name for name, p in parameters.items()}
    every = {name: values[aliases[id(p)]] for name, p in tree.named_parameters(remove_duplicate=False)}
    tree.load_state_dict(every, strict=False, assign=True)


def replace_in_optimizers(
    optimizers: Sequence[Optimizer], old: Mapping[str, Tensor], new: Mapping[str, Tensor], cuts: Mapping[str, TensorCut]
) -> None:
    """Put new parameters into the places of the old ones, with what is left of gradients and states."""
    successor = {id(parameter): new[name] for name, parameter in old.items()}
    for name, parameter in old.items():
        cut, after = cuts.get(name), new[name]
        if parameter.grad is not None:
            after.grad = cut_and_reshard(parameter.grad, after, cut)
        for optimizer in optimizers:
            if parameter in optimizer.state:
                state: dict[str, object] = optimizer.state.pop(parameter)
                optimizer.state[after] = {k: _state(v, after, cut) for k, v in state.items()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [successor.get(id(p), p) for p in group["params"]]


def _state(value: object, like: Tensor, cut: TensorCut | None) -> object:
    return cut_and_reshard(value, like, cut) if _is_dtensor(value) and value.dim() else value
