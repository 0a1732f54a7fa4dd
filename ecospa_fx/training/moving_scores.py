"""Importance scores as moving averages over the gradients that training computes anyway.

With g a parameter's gradient at a step and w its value, per unit as in `ecospa_fx.importance.methods`:

    gate-fisher   mean over steps of (Σ g·w)²      over the gate
    fisher        mean over steps of Σ (g·w)²      over all members
    taylor        |mean over steps of Σ g·w|       over all members

Training has gradients of whole batches only, so a step is what a sample is there: the Fisher methods rank more exactly
by batches that are measured sample by sample, as second-order scores and those of a schedule at the start are.

Each step counts as shares: its numbers are divided by their total over all units. So what multiplies all gradients
of a step alike (a gradient scaler, clipping, the number of accumulated batches) changes nothing. The mean is a moving
one, and one number per unit is all that is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor, nn

from ecospa_fx.coupling.types import Box, Coupling, Member
from ecospa_fx.errors import TrainingError
from ecospa_fx.importance.methods import gate_members
from ecospa_fx.importance.unit_reduction import MarginKey, accumulator_dtype, exact, margin, margin_key, unit_sums
from ecospa_fx.training.sharded import expand_local_sums, is_sharded, local_part, sum_over_shards

METHODS = ("gate-fisher", "fisher", "taylor")


class MovingScores:
    """Moving averages over the steps that were gathered, one number per unit."""

    def __init__(self, method: str, memory: int) -> None:
        if method not in METHODS:
            names = ", ".join(("second-order", *METHODS))
            raise TrainingError(f"scores={method!r:.60} cannot be taken while training: use one of {names}")
        self.method, self._decay = method, 1 - 1 / memory
        self._spans: dict[str, tuple[int, int, tuple[int, int]]] = {}
        self._members_by_margin: dict[str, dict[MarginKey, list[tuple[str, float, Member]]]] = {}
        self._parameters: Mapping[str, nn.Parameter] = {}
        self._sharded: Tensor | None = None
        self._sums = self._values = torch.zeros(0)
        self._step_valid = torch.tensor(False)

    def follow(
        self, couplings: Sequence[Coupling], parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]
    ) -> None:
        """Score these couplings from now on. values: what is known of their units so far."""
        self._parameters, self._spans, self._members_by_margin, end = parameters, {}, {}, 0
        for coupling in couplings:
            count = coupling.carriers * coupling.size
            self._spans[coupling.name] = (end, end + count, (coupling.carriers, coupling.size))
            end += count
            gate = self.method == "gate-fisher"
            members, factor = gate_members(coupling) if gate else (coupling.members, 1.0)
            for member in members:
                margins = self._members_by_margin.setdefault(member.parameter, {})
                margins.setdefault(margin_key(member), []).append((coupling.name, factor, member))
        self._sharded = next(
            (parameters[name] for name in self._members_by_margin if is_sharded([parameters[name]])), None
        )
        device = next((parameters[name].device for name in self._members_by_margin), torch.device("cpu"))
        self._values = torch.zeros(end, dtype=accumulator_dtype(device), device=device)
        for name, value in values.items():
            self._values_of(self._values, name).copy_(value)

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters whose gradients are read."""
        return tuple(self._members_by_margin)

    def gather(self) -> None:
        """Take in the gradients of one step. A step whose gradients are missing, zero or not finite counts for nothing.

        Nothing waits for the device here.
        """
        self._sums = torch.zeros_like(self._values)
        for name, margins in self._members_by_margin.items():
            parameter = self._parameters[name]
            if parameter.grad is not None:
                self._add_gradient(parameter.grad, parameter, margins)
        if self._sharded is not None:
            sum_over_shards(self._sums, self._sharded)
        squares = self._sums.abs() if self.method == "fisher" else self._sums.square()
        total = squares.sum()
        self._step_valid = total.isfinite() & (total > 0)
        shares = self._sums / total.sqrt() if self.method == "taylor" else squares / total
        moved = torch.lerp(shares, self._values, self._decay)
        self._values = torch.where(self._step_valid, moved, self._values)
        self._sums = torch.zeros(0)

    @property
    def usable(self) -> bool:
        """Whether the last step's gradients were there and finite, so that scores can be used. Waits for the device."""
        return bool(self._step_valid)

    def values(self) -> dict[str, Tensor]:
        """[carriers, units] per coupling: the moving averages themselves, which `follow` takes back."""
        return {name: self._values_of(self._values, name).clone() for name in self._spans}

    def scores(self) -> dict[str, Tensor]:
        """[carriers, units] per coupling, on the CPU: how much each unit matters."""
        return {name: value.abs().to("cpu", torch.float64) for name, value in self.values().items()}

    def flat(self) -> Tensor:
        """All averages in one tensor, to be averaged over processes in place."""
        return self._values

    def _values_of(self, flat: Tensor, name: str) -> Tensor:
        begin, end, shape = self._spans[name]
        return flat[begin:end].view(shape)

    @torch.no_grad()
    def _add_gradient(
        self, gradient: Tensor, weight: Tensor, margins: Mapping[MarginKey, list[tuple[str, float, Member]]]
    ) -> None:
        products, unit = _products(local_part(gradient), local_part(weight)), None
        if self.method == "fisher":
            unit = _power_of_two(products)
            products.mul_(unit).square_()
        for key, uses in margins.items():
            sums = expand_local_sums(margin(products, key), key, weight)
            if unit is not None:
                sums = sums.to(self._sums.dtype) / unit.to(self._sums.dtype).square()
            for name, factor, member in uses:
                self._values_of(self._sums, name).add_(_unit_sums(sums, member), alpha=factor)


def _products(gradient: Tensor, weight: Tensor) -> Tensor:
    """Elementwise, in at least float32, or in bfloat16 where both are.

    A gradient in bfloat16 has been rounded already, and no product can leave its range: rounding once more adds noise
    that the sum averages out, and float32 would move three and a half times the memory, which is all that this costs.
    """
    if gradient.dtype == weight.dtype == torch.bfloat16:
        return gradient.detach() * weight.detach()
    return exact(gradient) * exact(weight)


def _power_of_two(values: Tensor) -> Tensor:
    """The power of two by which the largest value is about 1, so that squares do not underflow; found on the device."""
    if not values.numel():
        return values.new_ones((), dtype=torch.float32)
    exponent = torch.frexp(values.abs().amax().float()).exponent.clamp(-100, 100)
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), -exponent)


def _unit_sums(margins: Tensor, member: Member) -> Tensor:
    """Sums per unit [carriers, units], read off the margin by strides where its grid allows, without an index."""
    if member.carrier_axis is not None and any(box.carriers for box in member.boxes):
        return unit_sums(margins, member)
    margins = margins.contiguous()
    parts = [part for box in member.boxes if (part := _strided(margins, box, member)) is not None]
    if len(parts) < len(member.boxes):
        return unit_sums(margins, member)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _strided(margins: Tensor, box: Box, member: Member) -> Tensor | None:
    """Sums over the width of a box; None where a table stands in place of a stride."""
    outer = list(box.carriers)
    if member.carrier_axis is not None:
        outer = [(member.carriers, margins.stride(0))]
    sizes = [*(n for n, _ in outer), member.units, *(n for n, _ in box.width)]
    steps = [*(s for _, s in outer), box.unit, *(s for _, s in box.width)]
    strides = [step for step in steps if isinstance(step, int)]
    if len(strides) < len(steps):
        return None
    grid = margins.as_strided(sizes, strides, box.offset)
    rows = prod(n for n, _ in outer)
    flat = grid.reshape(rows, member.units, -1)
    sums = flat.squeeze(2) if flat.shape[2] == 1 else flat.sum(2)
    return sums.expand(member.carriers, member.units)
