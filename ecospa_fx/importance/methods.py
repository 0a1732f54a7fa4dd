"""The scoring methods and their registry.

With g the gradient of a sample's loss and w the weight, per unit, E the mean over the samples (`samples` says what a
sample of a batch is):

    magnitude     ‖producers‖ · ‖consumers‖   product of the norms of the unit's two sides, needs no data
    taylor        |Σ E[g]·w|                  over all members: first-order change of the loss when the unit goes
    fisher        Σ E[(g·w)²]                 over all members: diagonal empirical Fisher, element by element
    gate-fisher   E[(Σ g·w)²]                 over the gate: empirical Fisher of one gate that multiplies the unit

Judging the members of a pair together is EcoSpa's idea (arXiv 2511.11641). The gate identity: where a gate s
multiplies the activation of a unit, the consumer sees s·w for every element of that unit, so ∂L/∂s at s = 1 is
Σ g·w over the consumers. A coupling whose two sides are contracted with each other, neither being called the
consumer (Q with K), has two such sums; each alone gives ∂L/∂s, so half of the sum over both does too.

Why magnitude is a product of two norms and not of one norm per member: a gate and an up projection then score the
same whether the checkpoint keeps them apart or fused, and a bias of zero does not make its unit worthless. Neither
side's scale matters, as it does not to the function. Norms of different layers are no common currency (ordering all
couplings of a trained language model by them keeps a few layers whole and ruins the others), so a magnitude is
relative: the product over its mean in the coupling, times the unit's elements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ecospa_fx.coupling.types import Coupling, Member, Role
from ecospa_fx.errors import ScoreError
from ecospa_fx.importance.unit_reduction import MarginKey, accumulator_dtype, exact, margin, margin_key, unit_sums

UnitScores = dict[str, Tensor]
"""Coupling name to float64 CPU tensor [carriers, units]."""


class Statistic(Protocol):
    """What a data-driven method gathers. The driver differentiates each sample's loss by `inputs` while watching.

    A method that looks at activations rather than at parameters attaches its own hooks in `watching`.
    """

    @property
    def inputs(self) -> Sequence[Tensor]:
        """Tensors that require gradients while the statistic is being gathered."""

    def watching(self) -> AbstractContextManager[None]:
        """Hooks in place inside, removed outside."""

    def end_batch(self, batch: int) -> None:
        """Fold in what the backward pass of a sample of batch number `batch` left.

        Called once per sample. Raises ScoreError where that is not finite.
        """

    def result(self) -> UnitScores:
        """The scores over all samples so far."""


Weights = Mapping[str, nn.Parameter]


@dataclass(frozen=True, slots=True)
class Method:
    """A named way to score. Exactly one of `from_weights` and `from_batches` is set."""

    name: str
    """What users call it by."""
    from_weights: Callable[[Weights, Sequence[Coupling]], UnitScores] | None = None
    """Scores from weights alone."""
    from_batches: Callable[[Weights, Sequence[Coupling]], Statistic] | None = None
    """What gathers them over samples."""
    degree: int = 0
    """Scores grow with this power of the loss, so that they can be taken in a unit in which nothing underflows; 0 takes
    them of the loss as it is."""


_METHODS: dict[str, Method] = {}


def register(method: Method) -> None:
    """Make a method known by its name; a name is given once."""
    if method.name in _METHODS:
        raise ScoreError(f"scoring method {method.name!r} is registered already: choose another name")
    if (method.from_weights is None) == (method.from_batches is None):
        raise ScoreError(f"scoring method {method.name!r} must score from weights or from batches: give exactly one")
    _METHODS[method.name] = method


def method_named(name: object, *others: str) -> Method:
    """Look a method up; the error lists the known ones, and others that the verb has."""
    if not isinstance(name, str) or name not in _METHODS:
        names = [*others, *sorted(_METHODS)]
        near = get_close_matches(name, names, 1, 0.6) if isinstance(name, str) else []
        hint = f"; near it is {near[0]!r}" if near else ""
        raise ScoreError(f"no scoring method is called {name!r:.60}: use one of {', '.join(names)}{hint}")
    return _METHODS[name]


# -- from weights alone ------------------------------------------------------------------------------------------


def magnitude(weights: Weights, couplings: Sequence[Coupling]) -> UnitScores:
    """Product of the norms of each unit's producers and consumers, relative to the coupling's mean.

    Scaled so that the mean score per parameter is one in every coupling: it ranks the units of a coupling, and says
    nothing about which coupling matters. A side without members counts as the other one.
    """
    squared: dict[tuple[str, MarginKey], Tensor] = {}

    def norm(coupling: Coupling, role: Role) -> Tensor:
        members = [m for m in coupling.members if m.role == role] or coupling.members
        total = torch.zeros(coupling.carriers, coupling.size, dtype=torch.float64)
        for member in members:
            key = (member.parameter, margin_key(member))
            if key not in squared:
                squared[key] = margin(exact(weights[member.parameter]).abs().square(), key[1])
            total += unit_sums(squared[key], member).cpu()
        return total.sqrt()

    values: UnitScores = {}
    for coupling in couplings:
        product = norm(coupling, "producer") * norm(coupling, "consumer")
        mean = product.mean()
        relative = product / mean if mean > 0 else torch.ones_like(product)
        values[coupling.name] = relative * (coupling.parameters / product.numel())
    return values


# -- from gradients of parameters --------------------------------------------------------------------------------


def _same(values: Tensor) -> Tensor:
    return values


@dataclass(frozen=True, slots=True)
class GradientRule:
    """finish(mean over samples of per_sample(Σ over a unit of per_element(g·w)))."""

    per_element: Callable[[Tensor], Tensor] = _same
    """Of g·w at each element."""
    per_sample: Callable[[Tensor], Tensor] = _same
    """Of a unit's sum in one sample."""
    finish: Callable[[Tensor], Tensor] = _same
    """Of the mean over samples."""
    gate: bool = False
    """Sum over the gate's parameters only, see the module's text; otherwise over all members."""


def gate_members(coupling: Coupling) -> tuple[tuple[Member, ...], float]:
    """The members over which Σ g·w is the derivative by a gate, and the factor that makes it so."""
    consumers = tuple(m for m in coupling.members if m.role == "consumer")
    return (consumers, 1.0) if consumers else (coupling.members, 0.5)


def _hook(tensor: Tensor, function: Callable[[Tensor], Tensor]) -> RemovableHandle:
    handle: RemovableHandle = tensor.register_hook(function)  # type: ignore[no-untyped-call]  # torch has no types here
    return handle


class GradientStatistic:
    """Gathers a `GradientRule`, one parameter at a time, while the backward pass runs.

    Only [carriers, units] tensors outlive a parameter's gradient.
    """

    def __init__(self, rule: GradientRule, weights: Weights, couplings: Sequence[Coupling]) -> None:
        self._rule, self._samples = rule, 0
        self._uses: dict[str, dict[MarginKey, list[tuple[str, float, Member]]]] = {}
        self._sums: UnitScores = {}
        for coupling in couplings:
            members, factor = gate_members(coupling) if rule.gate else (coupling.members, 1.0)
            for member in members:
                margins = self._uses.setdefault(member.parameter, {})
                margins.setdefault(margin_key(member), []).append((coupling.name, factor, member))
            device = weights[members[0].parameter].device
            shape, dtype = (coupling.carriers, coupling.size), accumulator_dtype(device)
            self._sums[coupling.name] = torch.zeros(shape, dtype=dtype, device=device)
        self._weights = {name: weights[name] for name in self._uses}
        self._sample: UnitScores = {}
        self._finite: dict[str, Tensor] = {}

    @property
    def inputs(self) -> Sequence[Tensor]:
        return list(self._weights.values())

    @contextmanager
    def watching(self) -> Iterator[None]:
        # Hooks on the tensors: the caller's .grad is never read or written.
        hooks = [_hook(weight, partial(self._take, name)) for name, weight in self._weights.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _take(self, name: str, gradient: Tensor) -> Tensor:
        products = self._rule.per_element(exact(gradient) * exact(self._weights[name]))
        for key, uses in self._uses[name].items():
            margins = margin(products, key)
            self._finite[name] = margins.isfinite().all()
            for coupling, factor, member in uses:
                total = self._sums[coupling]
                sample = self._sample.setdefault(coupling, torch.zeros_like(total))
                sample += (unit_sums(margins, member) * factor).to(total)
        # What a hook returns replaces the gradient: one broadcast number lets go of it before the next one is made.
        return gradient.new_zeros(()).expand_as(gradient)

    def end_batch(self, batch: int) -> None:
        if not self._finite:
            raise ScoreError(
                f"the loss of batch {batch} does not depend on any coupled parameter: "
                "return the loss of the model's output"
            )
        self.fold(batch)

    def fold(self, batch: int) -> None:
        """As `end_batch`, for a sample that need not reach anything."""
        for name, finite in self._finite.items():
            if not finite:
                raise ScoreError(f"the gradient of parameter {name!r} is not finite in batch {batch}: leave it out")
        for coupling, sums in self._sample.items():
            self._sums[coupling] += self._rule.per_sample(sums)
        self._samples += 1
        self._sample, self._finite = {}, {}

    def result(self) -> UnitScores:
        return {name: self._rule.finish(s / self._samples).to("cpu", torch.float64) for name, s in self._sums.items()}


GATE_FISHER = GradientRule(per_sample=torch.square, gate=True)

register(Method("magnitude", from_weights=magnitude))
register(Method("taylor", from_batches=partial(GradientStatistic, GradientRule(finish=torch.abs)), degree=1))
register(Method("fisher", from_batches=partial(GradientStatistic, GradientRule(per_element=torch.square)), degree=2))
register(Method("gate-fisher", from_batches=partial(GradientStatistic, GATE_FISHER), degree=2))
