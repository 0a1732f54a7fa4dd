"""Slices of buffers that hold one number per unit, such as the frequencies of a rotary embedding.

No buffer is known by name. Where a plan keeps the same units everywhere below a module, a buffer there with one entry
per unit, or per element of a unit, is tried with what is kept of it, as integers are tried with other values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, product

import torch
from torch import Tensor, nn

from ecospa_fx.inplace.attributes import Place
from ecospa_fx.inplace.edits import Edits
from ecospa_fx.inplace.groups import Group
from ecospa_fx.inplace.norms import NormEdit
from ecospa_fx.plan import Selection


@dataclass(frozen=True, slots=True)
class BufferSlice:
    """What stays of a buffer along one axis; an edit may name it where it names integers."""

    module: str
    """Path of the module that holds the buffer."""
    name: str
    """Of the buffer in that module."""
    axis: int
    """Along which it is cut."""
    kept: tuple[int, ...]
    """Positions along that axis that stay."""

    def write(self, model: nn.Module, value: int, edits: Edits) -> None:
        """Put what stays in the place of the buffer. value: the number of positions."""
        path = f"{self.module}.{self.name}" if self.module else self.name
        buffer = model.get_buffer(path)
        edits.buffer(model, path, buffer.index_select(self.axis, torch.tensor(self.kept, device=buffer.device)))

    def __str__(self) -> str:
        return self.name


EditTarget = Place | BufferSlice | NormEdit
"""Where an edit writes."""


def buffer_rules(model: nn.Module, groups: Sequence[Group]) -> Iterator[tuple[str, tuple[dict[EditTarget, int], ...]]]:
    """By module, told by its class: the ways to cut all its buffers that have an entry per unit of a group."""
    for path, module in model.named_modules():
        buffers = {name: buffer for name, buffer in module.named_buffers(recurse=False) if buffer.dim()}
        for group in groups if buffers else ():
            ways = tuple(_buffer_slices(path, buffers, _nearest_selections(path, group)))
            if any(ways):
                names = dict.fromkeys(str(cut) for way in ways for cut in way)
                yield f"{type(module).__name__} with {', '.join(names)}", ways


def _nearest_selections(path: str, group: Group) -> list[Selection]:
    """The selections of a group in the nearest module around a buffer that has any."""
    while not (selections := group.beneath([path])) and path:
        path = path.rpartition(".")[0]
    return selections


def _buffer_slices(
    path: str, buffers: dict[str, Tensor], selections: Sequence[Selection]
) -> Iterator[dict[EditTarget, int]]:
    """What stays of all buffers of the right lengths, for every layout of each length."""
    rows = {units for s in selections for units in s.keep}
    if len(rows) != 1 or len({s.size for s in selections}) != 1 or selections[0].kept == selections[0].size:
        return
    kept = set(rows.pop())
    by_length: dict[int, list[dict[EditTarget, int]]] = {}
    for units in sorted(_layouts(selections[0])):
        stays = tuple(position for position, unit in enumerate(units) if unit in kept)
        axes = {n: [i for i, size in enumerate(buffer.shape) if size == len(units)] for n, buffer in buffers.items()}
        cuts: dict[EditTarget, int] = {
            BufferSlice(path, n, matching[0], stays): len(stays) for n, matching in axes.items() if len(matching) == 1
        }
        if cuts:
            by_length.setdefault(len(units), []).append(cuts)
    for chosen in product(*by_length.values()) if by_length else ():
        yield dict(chain.from_iterable(cuts.items() for cuts in chosen))


def _layouts(selection: Selection) -> set[tuple[int, ...]]:
    """Which unit each entry of a table may belong to: one entry per unit, or as the elements stand in a weight.

    Of the first carrier the elements that follow on each other: a head's, where several pieces are in one weight.
    """
    layouts = {tuple(range(selection.size))}
    for member in selection.members:
        inside = member.indices[0]
        unit = torch.arange(selection.size)[:, None].expand_as(inside).flatten()
        places, order = inside.flatten().sort()
        run = int((places.diff() == 1).long().cumprod(0).sum()) + 1
        layouts.add(tuple(unit[order[:run]].tolist()))
    return {units for units in layouts if len(set(units)) == selection.size}
