"""Which units of a coupling stay, as masks: checked wherever a user gives them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ecospa_fx.coupling.types import Coupling
from ecospa_fx.errors import PlanError


def check_mask(coupling: Coupling, keep: object) -> Tensor:
    """The same mask. Raises PlanError for what is no BoolTensor [carriers, units] with values."""
    if not isinstance(coupling, Coupling):
        raise PlanError(f"{coupling!r:.60} is no coupling: pass one of those that detect() returned")
    shape = (coupling.carriers, coupling.size)
    if isinstance(keep, Tensor) and keep.dtype is torch.bool and tuple(keep.shape) == shape and not keep.is_meta:
        return keep
    kind = f"{_describe(keep)}" if isinstance(keep, Tensor) else f"a {type(keep).__name__}"
    raise PlanError(
        f"what coupling {coupling.name!r} keeps is {kind}: give a BoolTensor of shape {list(shape)}, True where a unit "
        "stays, or numbers of units to Plan.keeping"
    )


def _describe(keep: Tensor) -> str:
    return f"of {keep.dtype} and shape {list(keep.shape)}" + (" on meta" if keep.is_meta else "")


def keep_mask(coupling: Coupling, keep: object) -> Tensor:
    """BoolTensor [carriers, units] of what a user wants to keep of a coupling.

    keep: numbers of units [kept], for all carriers alike, or [carriers, kept]; or a mask, True where a unit stays,
    [units] or [carriers, units]; as a tensor or as lists, of which carriers may have different lengths. Raises
    PlanError for anything else, and for numbers that repeat or lie outside.
    """
    rows = _rows(coupling, keep)
    mask = torch.zeros(coupling.carriers, coupling.size, dtype=torch.bool)
    for units, row in zip(mask, rows if len(rows) > 1 else rows * coupling.carriers, strict=True):
        units |= row
    return mask


def _rows(coupling: Coupling, keep: object) -> list[Tensor]:
    """One mask for all carriers, or one for each."""
    nested = isinstance(keep, Tensor) and keep.dim() == 2
    if isinstance(keep, Sequence) and not isinstance(keep, str):
        nested = any(isinstance(row, Sequence) or (isinstance(row, Tensor) and row.dim()) for row in keep)
    if not nested:
        return [_row(coupling, keep)]
    rows: list[object] = list(keep)  # type: ignore[call-overload]  # a tensor of rows, or a sequence
    if len(rows) != coupling.carriers:
        raise PlanError(
            f"coupling {coupling.name!r} has {coupling.carriers} carriers and what to keep is given for {len(rows)}: "
            "give one row for each, or one list for all alike"
        )
    return [_row(coupling, row) for row in rows]


def _row(coupling: Coupling, row: object) -> Tensor:
    """A mask [units] from a mask or from numbers of units."""
    try:
        entries = row if isinstance(row, Tensor) else torch.tensor(row)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        entries = torch.zeros(0)
    if entries.dtype is torch.bool and tuple(entries.shape) == (coupling.size,) and not entries.is_meta:
        return entries.cpu()
    whole = entries.dtype is not torch.bool and not entries.is_floating_point() and not entries.is_complex()
    if entries.dim() != 1 or not whole or entries.is_meta or not len(entries):
        kind = _describe(entries) if isinstance(row, Tensor) else repr(row)[:60]
        raise PlanError(
            f"what coupling {coupling.name!r} keeps is {kind}: give numbers of units, at least one, or a mask of its "
            f"{coupling.size} units"
        )
    units = entries.to("cpu", torch.long)
    outside = units[(units < 0) | (units >= coupling.size)].tolist()
    if outside:
        raise PlanError(
            f"coupling {coupling.name!r} has no unit {outside[0]}: give numbers from 0 to {coupling.size - 1}"
        )
    if len(units.unique()) < len(units):  # type: ignore[no-untyped-call]  # torch has no types here
        raise PlanError(f"units of coupling {coupling.name!r} are named twice: name each once, or give a mask of bools")
    return torch.zeros(coupling.size, dtype=torch.bool).index_fill_(0, units, True)
