"""Tells elementwise optimizer states from preconditioners that have a square weight's shape by chance.

A preconditioner of a weight with n rows and n columns (a factor of Shampoo or K-FAC, a basis of SOAP, a triangle of
PSGD) has the weight's own shape by chance, and no name tells it from a momentum. What does:

=============================================  =========================================================
the optimizer is one of `torch.optim`          elementwise, as torch documents
beside a weight whose axes all differ the      not elementwise
same entry has another shape
it is symmetric, triangular or orthogonal      not told: refused (a constant is only trusted with the next)
beside a weight whose axes all differ the      elementwise
same entry has the weight's shape
only vectors have the same entry, of their     elementwise
own shape
nothing of all that                            not told: refused
=============================================  =========================================================
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from ecospa_fx.training.sharded import full_tensor

Path = tuple[object, ...]
"""Keys and positions that lead to a tensor."""

ParameterStates = Mapping[Tensor, Mapping[str, object]]
"""What is kept beside each parameter, by name."""


@dataclass(frozen=True, slots=True, eq=False)
class OptimizerStates:
    """Tensors that one optimizer keeps beside parameters."""

    owner: str
    """The class of the optimizer, for messages."""
    by_parameter: ParameterStates
    """The states."""
    documented: bool
    """Whether all states of a parameter's shape are known to be elementwise."""
    owners: Mapping[int, Set[int]]
    """Per address in memory, the parameters beside which a tensor begins there."""


def states_of(optimizer: Optimizer) -> OptimizerStates:
    """What an optimizer keeps, or the one that it wraps."""
    inner = getattr(optimizer, "optimizer", optimizer)
    kind = type(inner if isinstance(inner, Optimizer) else optimizer)
    return collect_states(kind.__name__, optimizer.state, kind.__module__.partition(".")[0] == "torch")


def collect_states(owner: str, states: ParameterStates, documented: bool) -> OptimizerStates:
    """Tensors beside parameters, with where they lie."""
    owners: dict[int, set[int]] = {}
    for parameter, state in states.items():
        for _, tensor in leaves(state):
            if tensor.numel() > 1:
                owners.setdefault(_address(tensor), set()).add(id(parameter))
    return OptimizerStates(owner, states, documented, owners)


def leaves(value: object, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """All tensors in a nest of mappings, lists and tuples, with the way to each."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from leaves(item, (*path, i))


def shares_memory(states: OptimizerStates, tensor: Tensor) -> bool:
    """Whether entries of several parameters begin at the same address."""
    address = _address(tensor)
    return address != 0 and len(states.owners.get(address, ())) > 1


def is_elementwise(states: OptimizerStates, parameter: Tensor, path: Path, tensor: Tensor) -> bool:
    """Whether a tensor is known to hold a number per element of a parameter, or sums of such; see the table above."""
    if states.documented or not _ambiguous(tuple(tensor.shape), tuple(parameter.shape)):
        return True
    if tensor.dim() < parameter.dim():
        return False
    entries = ((p, t) for p, state in states.by_parameter.items() for where, t in leaves(state) if where == path)
    beside = [(p, t) for p, t in entries if p.dim() > 0]
    matrices = [t.shape == p.shape for p, t in beside if p.dim() > 1 and len(set(p.shape)) == p.dim()]
    vectors = [t.shape == p.shape for p, t in beside if p.dim() == 1 and p.numel() > 1]
    values = full_tensor(tensor).detach()
    if not all(matrices) or not (matrices or vectors):
        return False
    if bool((values == values.flatten()[0]).all()):
        return bool(matrices)
    return all(matrices or vectors) and not _structured(values)


def _ambiguous(shape: tuple[int, ...], parameter: tuple[int, ...]) -> bool:
    """Whether a shape that could be the parameter's could be that of a matrix on one of its sides as well."""
    return len(parameter) in (2, 3) and len(shape) > 1 and shape[-1] == shape[-2] > 1


def _address(tensor: Tensor) -> int:
    """Where a tensor begins; 0 for those that say nothing about it, as of other processes."""
    try:
        return tensor.data_ptr()
    except (NotImplementedError, RuntimeError):
        return 0


def _structured(values: Tensor) -> bool:
    """Whether matrices are symmetric, triangular, or orthogonal up to a factor, each to rounding of their type."""
    matrices = values.to(torch.complex128 if values.is_complex() else torch.float64)
    largest = matrices.abs().amax()
    limit = torch.finfo(values.dtype).eps ** 0.5 * largest if values.dtype != torch.bool else 0 * largest
    if any(bool((rest.abs() <= limit).all()) for rest in (matrices - matrices.mT, matrices.tril(-1), matrices.triu(1))):
        return True
    source = torch.Generator().manual_seed(0)
    probe = torch.randn(matrices.shape[-1], 2, generator=source, dtype=torch.float64).to(matrices)
    back = matrices.mH @ (matrices @ probe)
    scale = (back * probe.conj()).sum((-2, -1), keepdim=True) / probe.abs().square().sum()
    return bool(((back - scale * probe).abs() <= limit * largest * matrices.shape[-1] ** 0.5).all())
