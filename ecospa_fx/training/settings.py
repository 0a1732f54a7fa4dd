"""The options of training with structured pruning, checked together, and the couplings that they select."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ecospa_fx.budget.alignment import preferred_multiple
from ecospa_fx.checks import check_data, check_flag, check_function, check_share, check_whole, is_number
from ecospa_fx.coupling.choice import ChoiceOptions, checked_limits, choosable, texts
from ecospa_fx.coupling.couplings import Couplings, check_couplings
from ecospa_fx.coupling.detection import check_allow
from ecospa_fx.coupling.types import Coupling
from ecospa_fx.coupling.unit_elements import coupled_elements, removed_elements
from ecospa_fx.errors import TrainingError
from ecospa_fx.importance.methods import gate_members
from ecospa_fx.importance.score import Batch, Loss
from ecospa_fx.importance.scores import Scores
from ecospa_fx.importance.second_order import SECOND_ORDER
from ecospa_fx.runtime.lift_parameters import check_call
from ecospa_fx.training.allocation import bounds, uniform_share
from ecospa_fx.training.remaining_couplings import disjoint

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from ecospa_fx.training.graph_model import ShrinkableGraph


class TrainingOptions(ChoiceOptions, total=False):
    """Options of `SparseTraining` beside those in its signature."""

    total_steps: int | None
    """None by default. Length of the run in steps, for the default schedule and to check a given one."""
    allocation: Literal["global", "uniform"]
    """"global" by default, by score per parameter over all couplings; "uniform": the same share of each."""
    band: tuple[float, float] | None
    """(0.6, 1.6) by default. Least and most that a coupling keeps, as multiples of what uniform allocation keeps; None:
    no bounds."""
    round_to: int | None
    """None by default. Kept units are a multiple of this; None: of what the device prefers in half precision, which
    autocast makes of float32."""
    couplings: Couplings | None
    """None by default: all. Only these, a selection of what `detect` found on this model."""
    allow: str | Iterable[str]
    """() by default. What else may be offered, "renormalise" or "cache": see `detect`."""
    window: int
    """50 by default. Steps before each shrink whose gradients are scored, and the memory of their moving average."""
    compensate: bool | None
    """None by default: where scores are second-order. True: at each shrink, let kept units make up for removed ones, by
    what second-order scores measured or else by least squares on `batches`, layer by layer."""
    batches: Iterable[Batch] | None
    """None by default. Calibration data as in `score`, for second-order scores, for compensation, and for a schedule
    that shrinks at the start. Of several processes each gives its own part."""
    loss: Loss | None
    """None by default. Function (output, args, kwargs) to a scalar, for these."""
    wrap: Callable[[nn.Module], nn.Module] | None
    """None by default. What to put around the model, after every shrink anew, such as ``DistributedDataParallel``."""
    group: ProcessGroup | None
    """None by default: all. The processes that train together; each holds all parameters during a shrink."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Options of `SparseTraining` beyond those in its signature."""

    total_steps: int | None = None
    """The length of the run in optimizer steps, if known; the default schedule needs it."""
    allocation: Literal["global", "uniform"] = "global"
    """How sizes are chosen: "global" removes the least score per parameter, "uniform" the same share everywhere."""
    band: tuple[float, float] | None = (0.6, 1.6)
    """Least and most that a coupling keeps, as multiples of what uniform allocation keeps; None: no bounds."""
    round_to: int | None = None
    """Kept units are a multiple of this; None: of what the device prefers for half precision, as autocast uses it."""
    floor: float = 0.05
    """Share of its units that every coupling keeps in any case."""
    kinds: str | Sequence[str] | None = None
    """Kinds of couplings to shrink, as in `plan`; None: all."""
    exclude: str | Sequence[str] = ()
    """Patterns of names of couplings to leave alone, as in `plan`."""
    limits: Mapping[str, float] | None = None
    """Largest share to remove, by kind or pattern of names, as in `plan`."""
    couplings: Couplings | None = None
    """Only these: a selection of what `detect` returned for this model; None: all."""
    allow: str | Iterable[str] = ()
    """Approximations to allow, as in `detect`."""
    window: int = 50
    """Steps before each shrink whose gradients are scored, and the memory of their moving average."""
    compensate: bool | None = None
    """Whether remaining weights are updated to compensate for removed units: from the curvature that second-order
    scores measured, else by least squares on `batches`, layer by layer. None: with second-order scores only."""
    batches: Iterable[Batch] | None = None
    """Calibration data as in `score`, for compensation, second-order scores, and a schedule that shrinks at the start.
    Its samples count however they are batched. Of several processes each gives its own part, and holds all parameters
    during a shrink."""
    loss: Loss | None = None
    """The loss on these batches, as in `score`."""
    wrap: Callable[[nn.Module], nn.Module] | None = None
    """What to put around the model, anew after every shrink, such as ``DistributedDataParallel``."""
    group: ProcessGroup | None = None
    """The processes that train together; None: all of them."""

    def __post_init__(self) -> None:
        if self.allocation not in ("global", "uniform"):
            raise TrainingError(f"allocation={self.allocation!r} is unknown: use 'global' or 'uniform'")
        if self.band is not None and not _is_band(self.band):
            raise TrainingError(f"band={self.band!r} does not hold uniform allocation: give (at most 1, at least 1)")
        for name in ("total_steps", "round_to", "window"):
            value = getattr(self, name)
            if value is not None or name == "window":
                check_whole(name, value, 1, TrainingError)
        check_share("floor", self.floor, TrainingError, "a share of units to keep")
        if self.kinds is not None:
            texts("kinds", self.kinds, TrainingError)
        texts("exclude", self.exclude, TrainingError)
        checked_limits(self.limits, TrainingError)
        if self.couplings is not None:
            check_couplings(self.couplings, TrainingError)
        check_allow(self.allow)
        if self.compensate is not None:
            check_flag("compensate", self.compensate, TrainingError)
        check_data(() if self.batches is None else self.batches, self.loss, TrainingError)
        if self.wrap is not None:
            check_function("wrap", self.wrap, TrainingError, "from a module to one that holds it")

    def method(self, scores: object) -> str | None:
        """The method of what a user gives as scores, None for numbers; by default the best, which may need data."""
        if isinstance(scores, Scores | Mapping):
            return None
        if scores is None:
            return SECOND_ORDER if self.batches is not None and self.loss is not None else "gate-fisher"
        if not isinstance(scores, str):
            raise TrainingError(f"scores={scores!r:.60} name no method: give a name, or tensors by name of coupling")
        return scores

    def multiples(self, couplings: Iterable[Coupling], parameters: Mapping[str, Tensor]) -> dict[str, int]:
        """By coupling, what the units that stay are a multiple of. Products may have less precision than weights."""
        return {c.name: self.round_to or preferred_multiple(c, parameters, autocast=True) for c in couplings}

    @property
    def shares(self) -> tuple[float, float, float]:
        """Share kept in any case; least and most as multiples of what uniform allocation keeps."""
        low, high = self.band if self.band is not None and self.allocation == "global" else (0.0, float("inf"))
        return self.floor, low, high


def _is_band(band: object) -> bool:
    """Whether a value is a pair of numbers around 1."""
    pair = isinstance(band, tuple | list) and len(band) == 2 and all(map(is_number, band))
    return pair and 0 <= band[0] <= 1 <= band[1]  # type: ignore[index]  # a pair, as has been checked


def check_arguments(model: object, args: object, kwargs: object, target: object, state: object) -> None:
    """Raise TrainingError for what is no model, no arguments of one, no share to remove, or no state."""
    check_call(model, args, kwargs, TrainingError)
    if not is_number(target) or not 0 < target < 1:  # type: ignore[operator]  # a number, as has been checked
        raise TrainingError(f"target={target!r:.60} is no share of parameters to remove: give one between 0 and 1")
    if state is not None and not isinstance(state, Mapping):
        raise TrainingError(f"state={state!r:.60} is none: pass what SparseTraining.state_dict() gave")


def optimizers_of(optimizer: object) -> tuple[Optimizer, ...]:
    """One optimizer, or several, or None, as a tuple. Raises TrainingError for anything else."""
    if optimizer is None:
        return ()
    is_list = isinstance(optimizer, Sequence) and not isinstance(optimizer, str)
    entries: tuple[object, ...] = tuple(cast(Sequence[object], optimizer)) if is_list else (optimizer,)
    for entry in entries:
        if not isinstance(entry, Optimizer):
            raise TrainingError(f"{entry!r:.60} is no optimizer: give a torch.optim.Optimizer, or a list of them")
    return cast(tuple[Optimizer, ...], entries)


def choose_couplings(couplings: Couplings, settings: Settings, method: str | None, model: nn.Module) -> list[Coupling]:
    """The couplings that training shrinks. method: of scores, None where they are known. Raises TrainingError for none.

    couplings: of the model; of these the ones that the settings select.
    """
    if settings.couplings is not None:
        names = {c.name for c in settings.couplings.offered}
        strange = sorted(names.difference(c.name for c in couplings))
        if strange:
            raise TrainingError(f"couplings= hold {strange[0]!r}, which this model has not: detect on this model")
        couplings = couplings.select(predicate=lambda c: c.name in names)
    offered = choosable(couplings, settings.kinds, settings.exclude, TrainingError, "shrink")
    unscored = {} if method is None else frozen_parameters(offered, method, model)
    selected = disjoint(c for c in offered if c.name not in unscored)
    if not selected:
        parameter = next(iter(unscored.values()))
        raise TrainingError(
            f"there is nothing to shrink because parameters are frozen ({parameter}): see "
            "print(eco.detect(model, args, kwargs))"
        )
    return selected


def check_reach(
    couplings: Sequence[Coupling], settings: Settings, target: float, limits: Mapping[str, float], form: ShrinkableGraph
) -> None:
    """Raise TrainingError where floors and limits, by name of coupling, keep more than the target leaves."""
    choices, steps = [], settings.multiples(couplings, form.parameters)
    uniform = uniform_share(couplings, limits, target)
    for c in couplings:
        least, _ = bounds(c.size, c.size, uniform, settings.shares, steps[c.name], limits.get(c.name, 1.0))
        keep = torch.arange(c.size).expand(c.carriers, -1) < least
        choices.append((c.members, keep))
    most = removed_elements(form.shapes, choices) / coupled_elements(form.shapes, (c.members for c in couplings))
    if most < target * 0.98:
        rounding = settings.round_to or f"None, which is {max(steps.values())} here,"
        limited = f", limits={dict(settings.limits)}" if settings.limits else ""
        raise TrainingError(
            f"target={target} is out of reach because floor={settings.floor}, band={settings.band}{limited} and "
            f"round_to={rounding} leave at most {most:.3f} to remove: ask for less, or lower them"
        )


def frozen_parameters(couplings: Iterable[Coupling], method: str, model: nn.Module) -> dict[str, str]:
    """Couplings that get no scores, and the frozen parameter that is why."""
    parameters, frozen = dict(model.named_parameters()), {}
    for coupling in couplings:
        members = gate_members(coupling)[0] if method == "gate-fisher" else coupling.members
        for member in members:
            if not parameters[member.parameter].requires_grad:
                frozen[coupling.name] = member.parameter
    return frozen


def other_owners(model: nn.Module) -> dict[str, str]:
    """Parameters that modules outside of the model hold too, and what these modules are."""
    owners = _other_owners(model)
    if owners:
        gc.collect()  # what is only waiting for this is no longer another model
        owners = _other_owners(model)
    return owners


def _other_owners(model: nn.Module) -> dict[str, str]:
    inside = {id(module) for module in model.modules()}
    names, owners = {id(p): name for name, p in model.named_parameters()}, {}
    for thing in gc.get_objects():
        if issubclass(type(thing), nn.Module) and id(thing) not in inside:
            for parameter in thing.__dict__.get("_parameters", {}).values():
                if id(parameter) in names:
                    owners[names[id(parameter)]] = type(thing).__name__
    return owners


def check_unshared(couplings: Sequence[Coupling], owners: Mapping[str, str]) -> None:
    """Raise TrainingError where a parameter that is going to be narrowed has other owners."""
    for name in (m.parameter for c in couplings for m in c.members):
        if name in owners:
            raise TrainingError(
                f"parameter {name!r} belongs to another {owners[name]} too, which would lose elements with it: "
                "train copy.deepcopy(model), or delete the other one"
            )
