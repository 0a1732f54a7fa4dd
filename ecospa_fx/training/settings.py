"""The options of sparse training, checked together, and which couplings they leave to choose from."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from ecospa_fx.budget.alignment import liked
from ecospa_fx.coupling.couplings import Coupling, Couplings
from ecospa_fx.errors import TrainingError
from ecospa_fx.importance.methods import gate_members
from ecospa_fx.importance.score import Batch, Loss
from ecospa_fx.training.narrow import disjoint

SECOND_ORDER = "second-order"
"""The name of scores that are measured on batches at each shrink."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Options of `SparseTraining` beyond those that every run has.

    total_steps: the length of the run, if known; allocation: "global", by score per parameter, or "uniform"; band:
    least and most that a coupling keeps, as multiples of what uniform allocation keeps (None: no bounds); round_to: as
    in `compress`, None for what the device likes of half precision, which autocast makes of float32; floor, kinds: as
    in `plan`; allow: as in `detect`; window: steps before each shrink whose gradients are scored, and the memory of
    their moving average; compensate: at each shrink, let what stays make up for what goes, by what second-order scores
    measured, or else by least squares on `batches`, layer by layer (None: where scores are second-order); batches,
    loss: calibration data as in `score`, whose samples count however they are batched, for that, for second-order
    scores, and for a schedule that shrinks at the start; of several processes each gives its own part, and holds all
    parameters during a shrink; wrap: what to put around the model, after every shrink anew
    (``DistributedDataParallel``); group: the processes that train together, by default all of them.
    """

    total_steps: int | None = None
    allocation: Literal["global", "uniform"] = "global"
    band: tuple[float, float] | None = (0.6, 1.6)
    round_to: int | None = None
    floor: float = 0.05
    kinds: Sequence[str] | None = None
    allow: str | Iterable[str] = ()
    window: int = 50
    compensate: bool | None = None
    batches: Iterable[Batch] | None = None
    loss: Loss | None = None
    wrap: Callable[[nn.Module], nn.Module] | None = None
    group: Any = None

    def __post_init__(self) -> None:
        if self.allocation not in ("global", "uniform"):
            raise TrainingError(f"allocation={self.allocation!r} is unknown: use 'global' or 'uniform'")
        if self.band is not None and not 0 <= self.band[0] <= 1 <= self.band[1]:
            raise TrainingError(f"band={self.band!r} does not hold uniform allocation: give (at most 1, at least 1)")
        for name in ("round_to", "window"):
            value = getattr(self, name)
            if (name, value) != ("round_to", None) and (not isinstance(value, int) or value < 1):
                raise TrainingError(f"{name}={value!r} makes no sense: give a whole number of at least 1")
        if not 0 <= self.floor < 1:
            raise TrainingError(f"floor={self.floor!r} is no share of units to keep: give a number from 0 to below 1")

    @property
    def scores(self) -> str:
        """The best scores that can be had: second-order ones need data."""
        return SECOND_ORDER if self.batches is not None and self.loss is not None else "gate-fisher"

    def multiples(self, couplings: Iterable[Coupling], parameters: Mapping[str, Tensor]) -> dict[str, int]:
        """By coupling, what the units that stay are a multiple of. Products may have less precision than weights."""
        return {c.name: self.round_to or liked(c, parameters, autocast=True) for c in couplings}

    @property
    def limits(self) -> tuple[float, float, float]:
        """Share kept in any case; least and most as multiples of what uniform allocation keeps."""
        low, high = self.band if self.band is not None and self.allocation == "global" else (0.0, float("inf"))
        return self.floor, low, high


def chosen(couplings: Couplings, settings: Settings, method: str, model: nn.Module) -> list[Coupling]:
    """The couplings that training shrinks. Raises TrainingError where there are none."""
    offered = [c for c in couplings.offered if settings.kinds is None or c.kind in settings.kinds]
    unscored = frozen(offered, method, model)
    found = disjoint(c for c in offered if c.name not in unscored)
    if not found:
        told = "none is offered" if not offered else f"parameters are frozen ({next(iter(unscored.values()))})"
        raise TrainingError(f"no coupling can shrink because {told}: see print(eco.detect(model, args, kwargs))")
    return found


def frozen(couplings: Iterable[Coupling], method: str, model: nn.Module) -> dict[str, str]:
    """Couplings that get no scores, and the frozen parameter that is why."""
    parameters, found = dict(model.named_parameters()), {}
    for coupling in couplings:
        members = gate_members(coupling)[0] if method == "gate-fisher" else coupling.members
        for member in members:
            if not parameters[member.parameter].requires_grad:
                found[coupling.name] = member.parameter
    return found


def other_owners(model: nn.Module) -> dict[str, str]:
    """Parameters that modules outside of the model hold too, and what these modules are."""
    found = _other_owners(model)
    if found:
        gc.collect()  # what is only waiting for this is no longer another model
        found = _other_owners(model)
    return found


def _other_owners(model: nn.Module) -> dict[str, str]:
    own = {id(module) for module in model.modules()}
    names, found = {id(p): name for name, p in model.named_parameters()}, {}
    for thing in gc.get_objects():
        if issubclass(type(thing), nn.Module) and id(thing) not in own:
            for held in thing.__dict__.get("_parameters", {}).values():
                if id(held) in names:
                    found[names[id(held)]] = type(thing).__name__
    return found


def check_unshared(couplings: Sequence[Coupling], owners: Mapping[str, str]) -> None:
    """Raise TrainingError where a parameter that is going to be narrowed has other owners."""
    for name in (m.parameter for c in couplings for m in c.members):
        if name in owners:
            raise TrainingError(
                f"parameter {name!r} belongs to another {owners[name]} too, which would lose elements with it: "
                "train copy.deepcopy(model), or delete the other one"
            )
