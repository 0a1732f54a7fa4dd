"""What the whole smaller model may hold or cost, in place of a share of its couplings.

The dense model has `size_of` it, so that the couplings must free the difference, in the unit of a cost model.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from ecospa_fx.budget.graph_cost import NarrowedOps
from ecospa_fx.checks import is_number
from ecospa_fx.coupling.couplings import Couplings
from ecospa_fx.errors import PlanError
from ecospa_fx.runtime.guards import leaves_untouched

Unit = Literal["parameters", "bytes", "flops", "seconds"]
"""What a ceiling is counted in."""

UNITS: tuple[Unit, ...] = ("parameters", "bytes", "flops", "seconds")

SCALES = {"B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
SCALES |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
"""Bytes by what they are given in."""

CALLS = 5
"""Of the dense model to see how long it takes; the shortest counts."""


@dataclass(frozen=True, slots=True)
class Ceiling:
    """An amount that the smaller model stays within."""

    unit: Unit
    """What is counted."""
    amount: float
    """Parameters, each once; bytes of parameters and of the model's buffers, which count whole; FLOPs of the example
    call as torch counts them; seconds that it takes."""

    @classmethod
    def of(cls, value: object) -> Ceiling:
        """Read bytes, such as "6GiB", or an amount by its unit, such as {"parameters": 100e6}.

        Raises PlanError for anything else.
        """
        if isinstance(value, str):
            value = {"bytes": _bytes(value)}
        if not isinstance(value, Mapping) or len(value) != 1:
            raise PlanError(
                f"within={value!r:.60} is unknown: give bytes like '6GiB', or an amount by its unit like "
                f"{{'parameters': 100e6}}, one of {', '.join(UNITS)}"
            )
        ((name, amount),) = value.items()
        unit = next((u for u in UNITS if u == name), None)
        if unit is None:
            raise PlanError(f"within={dict(value)!r:.60} has an unknown unit: use one of {', '.join(UNITS)}")
        if not is_number(amount) or not 0 < amount < math.inf:
            raise PlanError(f"within={dict(value)!r:.60} is no amount of {unit}: give a number above 0")
        return cls(unit, float(amount))

    def __str__(self) -> str:
        return f"{self.amount:,.6g} {self.unit}"


def _bytes(text: str) -> float:
    match = re.fullmatch(r"\s*(\d+\.?\d*)\s*([A-Za-z]+)\s*", text)
    if match is None or match[2] not in SCALES:
        raise PlanError(f"within={text!r:.60} is no number of bytes: give one like '6GiB' or '500MB'")
    return float(match[1]) * SCALES[match[2]]


def size_of(couplings: Couplings, unit: Unit) -> float:
    """What the couplings' model holds or costs before anything is removed.

    Raises PlanError where FLOPs or seconds need what the couplings do not know.
    """
    model = couplings.model
    if unit == "parameters":
        return sum(p.numel() for p in model.parameters())
    if unit == "bytes":
        return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    if unit == "flops":
        return NarrowedOps.of(couplings, unit).flops
    return _seconds(model, couplings)


@leaves_untouched(calls=True)
def _seconds(model: nn.Module, couplings: Couplings) -> float:
    """How long a model takes for the example inputs: the shortest of some calls, without gradients."""
    if couplings.example is None:
        raise PlanError("within= in seconds needs example inputs: pass the couplings that detect() returned")
    args, kwargs = couplings.example
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type == "meta":
        raise PlanError("the model is on meta, where nothing takes time: load it, or give flops")
    best = math.inf
    with torch.no_grad():
        for _ in range(CALLS):
            begin = time.perf_counter()
            model(*args, **kwargs)
            if device.type != "cpu":
                torch.accelerator.synchronize()
            best = min(best, time.perf_counter() - begin)
    return best
