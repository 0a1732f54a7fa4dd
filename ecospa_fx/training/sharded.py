"""Parameters that are spread over processes by ``fully_shard``: their parts in scores, and cutting them.

``fully_shard`` fixes the sizes of the parameters that it finds, so a shrink builds the tree of modules anew, without
memory, lets the user's function shard it again, and moves the parts over: one parameter at a time is gathered, cut and
spread again, in every process alike. Parameters are new objects then, and take the places of the old ones in the
optimizers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ecospa_fx.errors import TrainingError
from ecospa_fx.training.tensor_cuts import TensorCut


def is_sharded(parameters: Iterable[Tensor]) -> bool:
    """Whether some are spread over processes."""
    return any(_spread(p) for p in parameters)


def _spread(value: object) -> bool:
    """Whether it is a DTensor; nobody has one who has not imported them, and that takes a while."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def release(tree: nn.Module) -> None:
    """Drop what generated code holds besides the modules it belongs to: the parameters from before sharding."""
    for module in tree.modules():
        code = module.__dict__.get("graph_module")
        if isinstance(code, nn.Module):
            code._parameters.clear()  # its submodules are those of the tree itself


# -- values ------------------------------------------------------------------------------------------------------


def whole(tensor: Tensor) -> Tensor:
    """All parts together, without history. Every process has to call this."""
    part: Any = tensor.detach()
    found: Tensor = part.full_tensor() if _spread(tensor) else part
    return found


def put(tensor: Tensor, values: Tensor) -> None:
    """Give a tensor, spread or not, new values in place. values: all of them, the same in every process."""
    if not _spread(tensor):
        tensor.copy_(values)
        return
    from torch.distributed.tensor import distribute_tensor

    spread: Any = tensor
    own: Any = distribute_tensor(values, spread.device_mesh, spread.placements, src_data_rank=None)
    spread.to_local().copy_(own.to_local())


# -- scores ------------------------------------------------------------------------------------------------------


def local(tensor: Tensor) -> Tensor:
    """The part of this process."""
    part: Any = tensor
    found: Tensor = part.to_local() if _spread(tensor) else tensor
    return found


def placed(margins: Tensor, key: tuple[int, ...], whole: Tensor) -> Tensor:
    """Sums over the part of this process at their place in those over the whole, zeros elsewhere.

    margins: axes as in `key`, which are axes of `whole`.
    """
    if not _spread(whole):
        return margins
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    spread: Any = whole
    shape, offset = compute_local_shape_and_global_offset(whole.shape, spread.device_mesh, spread.placements)
    result = margins.new_zeros([whole.shape[axis] for axis in key])
    if margins.numel():
        result[tuple(slice(offset[a], offset[a] + shape[a]) for a in key)] = margins
    return result


def summed(sums: Tensor, like: Tensor) -> None:
    """Add up the sums of all processes that hold a part of `like`, a spread tensor. Copies of a part count once."""
    from torch import distributed

    spread: Any = like
    for at, placement in enumerate(spread.placements):
        if placement.is_shard():
            distributed.all_reduce(sums, group=spread.device_mesh.get_group(at))


# -- cutting -----------------------------------------------------------------------------------------------------


def moved(old: Tensor, like: Tensor, cut: TensorCut | None) -> Tensor:
    """What is left of a spread tensor, spread as `like` is. Every process has to call this."""
    if cut is None or not _spread(old):
        return old
    from torch.distributed.tensor import distribute_tensor

    if old.shape != cut.before:
        raise TrainingError(f"a state of shape {tuple(old.shape)} cannot be cut where parameters are sharded")
    whole: Any = old
    spread: Any = like
    return distribute_tensor(cut(whole.full_tensor()), spread.device_mesh, spread.placements, src_data_rank=None)


def fill(tree: nn.Module, old: Mapping[str, Tensor], cuts: Mapping[str, TensorCut]) -> None:
    """Give a newly sharded tree without memory what is left of the old parameters."""
    known = dict(tree.named_parameters())
    values = {name: moved(old[name].detach(), like, cuts.get(name)) for name, like in known.items()}
    aliases = {id(p): name for name, p in known.items()}
    every = {name: values[aliases[id(p)]] for name, p in tree.named_parameters(remove_duplicate=False)}
    tree.load_state_dict(every, strict=False, assign=True)


def replace_in(
    optimizers: Sequence[Optimizer], old: Mapping[str, Tensor], new: Mapping[str, Tensor], cuts: Mapping[str, TensorCut]
) -> None:
    """Put new parameters into the places of the old ones, with what is left of gradients and states."""
    successor = {id(parameter): new[name] for name, parameter in old.items()}
    for name, parameter in old.items():
        cut, after = cuts.get(name), new[name]
        if parameter.grad is not None:
            after.grad = moved(parameter.grad, after, cut)
        for optimizer in optimizers:
            if parameter in optimizer.state:
                state: dict[str, Any] = optimizer.state.pop(parameter)
                optimizer.state[after] = {k: _state(v, after, cut) for k, v in state.items()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [successor.get(id(p), p) for p in group["params"]]


def _state(value: Any, like: Tensor, cut: TensorCut | None) -> Any:
    return moved(value, like, cut) if _spread(value) and value.dim() else value
