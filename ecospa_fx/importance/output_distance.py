"""A loss for models that have none: the distance of the outputs to the dense model's.

Of one sample with floating outputs y₁ … y_K, of n_k numbers each, and the dense model's y₁⁰ … y_K⁰,

    D(y, y⁰) = ½ Σ_k ‖y_k - y_k⁰‖² / (n_k q_k),    q_k = the mean of ‖y_k⁰‖² / n_k over samples (the first 64).

Each output counts alike, whatever its size and its unit. The gradient of D is 0 at the dense model, but its curvature
there is not: it is the Gauss-Newton matrix (Schraudolph, "Fast curvature matrix-vector products", 2002)

    C = Σ_k J_kᵀ J_k / (n_k q_k),    J_k = ∂y_k/∂w.

Scores need gradients whose mean square is C. Random signs r_k, of which E r rᵀ is the identity, give them (Hutchinson,
1990): with g the gradient by the weights of the probe

    P_r(y) = Σ_k ⟨r_k, y_k⟩ / √(n_k q_k)

E g gᵀ = C, also for the sum over the outputs, because the signs of two of them are independent.

As a loss like any other, a function of (output, args, kwargs), this one is ½ Σ_k ‖y_k‖² / (n_k q_k). What is learnt
from a loss is its Bregman divergence (`ecospa_fx.distillation.divergence`), and that of this one is D.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from random import Random

import torch
from torch import Tensor

from ecospa_fx.checks import check_whole
from ecospa_fx.errors import ScoreError
from ecospa_fx.importance.losses import Batch, Loss, is_floating, leaves_of

FILLED = 1e3
"""A number so many times as large as 1 and all others of an output, and the same in several samples, was filled in, as
where logits are masked."""

SCALED = 64
"""How many samples tell the scales."""


@dataclass(frozen=True, slots=True)
class OutputDistance:
    """The loss of models that have none: how far the outputs are from the dense model's, each in its own unit.

    ``loss=eco.OutputDistance()`` is what `score` and `compress` take where they are given batches and no loss. All
    floating outputs count alike: with y_k of n_k numbers, ½ Σ_k ‖y_k - y_k⁰‖² / (n_k q_k), where q_k is the mean square
    of the dense model's y_k⁰ over the first 64 samples. Integers, flags, and numbers that masks fill in do not count.

    Scores are of its curvature at the dense model, the Gauss-Newton matrix of the outputs, which is sampled by random
    signs: see `ecospa_fx.importance.output_distance`. Distillation brings the distance itself down, and
    allocation="sensitivity" measures it.

    Examples:
        >>> import torch, ecospa_fx as eco
        >>> encoder = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 8))
        >>> data = [((torch.randn(1, 8),), {}) for _ in range(8)]
        >>> small = eco.compress(encoder, *data[0], ratio=0.5, batches=data, distillation=16)
        >>> sum(p.numel() for p in small.parameters())
        280

        More probes per sample, for scores with less noise in more time:

        >>> couplings = eco.detect(encoder, *data[0])
        >>> eco.score(encoder, couplings, data, loss=eco.OutputDistance(probes=4)).method
        'gate-fisher'
    """

    probes: int = 1
    """How many probes are taken of each sample, with a pass over the model for each. Twice as many halve the
    variance that the random signs bring."""
    seed: int = 0
    """Of the random signs: the same seed gives the same scores."""
    scales: tuple[float, ...] = ()
    """q_k of each leaf of the output, 0 for those that do not count. (), the default: measured on the data."""
    fillings: tuple[float | None, ...] = ()
    """By leaf, what masks fill in; None for nothing. Measured together with the scales."""

    def __post_init__(self) -> None:
        check_whole("probes", self.probes, 1, ScoreError, "a number of probes per sample")
        check_whole("seed", self.seed, 0, ScoreError, "a seed")

    def __call__(
        self, output: object, args: Sequence[object] = (), kwargs: Mapping[str, object] | None = None
    ) -> Tensor:
        """½ Σ_k ‖y_k‖² / (n_k q_k), of which D is the Bregman divergence."""
        return _sum(c.of(leaf).square().sum() / (2 * c.weight) for leaf, c in self._counted(output))

    def probe(self, number: int) -> Loss:
        """P_r, with signs r that are the same for a number in every call, and independent for two numbers."""
        return partial(self._probe, number)

    def _probe(self, number: int, output: object, args: Sequence[object], kwargs: Mapping[str, object]) -> Tensor:
        # Generators of torch take 32 bits of a seed.
        source = torch.Generator().manual_seed(Random(f"{self.seed} {number}").getrandbits(32))
        terms = ((leaf, c, _signs(leaf, source)) for leaf, c in self._counted(output))
        return _sum((c.of(leaf) * signs).sum() / math.sqrt(c.weight) for leaf, c, signs in terms)

    def to(self, answer: object) -> Loss:
        """D(·, answer), for outputs of an answer's structure."""
        want = list(self._counted(answer))

        def distance(output: object, args: Sequence[object], kwargs: Mapping[str, object]) -> Tensor:
            leaves = (leaf for leaf, _ in self._counted(output))
            return _sum(
                c.of(leaf - dense).square().sum() / (2 * c.weight)
                for leaf, (dense, c) in zip(leaves, want, strict=True)
            )

        return distance

    def scaled(self, answers: Iterable[object]) -> OutputDistance:
        """With the scales of a dense model's answers, one per sample.

        Raises ScoreError where there is nothing to be far from.
        """
        seen: dict[int, list[_Sizes]] = {}
        answered = False
        for answer in answers:
            answered = True
            for place, leaf in enumerate(leaves_of(answer)):
                if is_floating(leaf) and leaf.numel():
                    seen.setdefault(place, []).append(_Sizes.of(leaf.detach()))
        if not answered:
            return self
        fillings = [_filling(seen.get(place, ())) for place in range(max(seen, default=-1) + 1)]
        scales = [_scale(seen.get(place, ()), filling) for place, filling in enumerate(fillings)]
        if not any(scale > 0 for scale in scales):
            state = "only zeros" if seen else "no floating numbers"
            raise ScoreError(
                f"the model returns {state} for the calibration data, which have no distance to others: give loss=, a "
                "function (output, args, kwargs) -> scalar, or use method='magnitude'"
            )
        return replace(self, scales=tuple(scales), fillings=tuple(fillings))

    def _counted(self, output: object) -> Iterable[tuple[Tensor, _Counted]]:
        """The leaves that count, in at least float32, and which of their numbers do."""
        leaves = leaves_of(output)
        scales = self.scales or (1.0,) * len(leaves)
        fillings = self.fillings or (None,) * len(leaves)
        for leaf, scale, filling in zip(leaves, scales, fillings, strict=False):  # what no sample had has no scale
            if scale > 0 and is_floating(leaf):
                wide = leaf.to(torch.promote_types(leaf.dtype, torch.float32))
                places = wide.detach().isfinite()
                yield wide, _Counted(places if filling is None else places & (wide != filling), leaf.numel() * scale)


@dataclass(frozen=True, slots=True, eq=False)
class _Counted:
    """Which numbers of one output count."""

    places: Tensor
    """True where a number counts."""
    weight: float
    """n_k q_k."""

    def of(self, values: Tensor) -> Tensor:
        """With zeros for those that do not count."""
        return torch.where(self.places, values, 0)


@dataclass(frozen=True, slots=True)
class _Sizes:
    """How large the numbers of one output of one sample are."""

    square: float
    """Their mean square, in which infinities are zeros."""
    largest: float
    """The number of largest size."""
    square_of_others: float
    """The mean square with zeros for all numbers that are this one."""
    next: float
    """The largest size of the others."""

    @classmethod
    def of(cls, leaf: Tensor) -> _Sizes:
        """Those of a leaf with any numbers."""
        wide = leaf.to(torch.promote_types(leaf.dtype, torch.float32)).flatten()
        wide = torch.where(wide.isfinite(), wide, 0)
        largest = wide[wide.abs().argmax()]
        others = torch.where(wide == largest, 0, wide)
        return cls(_mean_square(wide), float(largest), _mean_square(others), float(others.abs().max()))

    @property
    def is_filled(self) -> bool:
        """Whether one number is much larger than 1 and than all others, of which there are some."""
        return 0 < FILLED * self.next < abs(self.largest) > FILLED


def _mean_square(values: Tensor) -> float:
    """Of values of any size, of which squares might be none of the type."""
    peak = values.abs().max()
    return float((values / peak).square().mean()) * float(peak) ** 2 if peak > 0 else 0.0


def _filling(samples: Sequence[_Sizes]) -> float | None:
    """The number that masks fill in: the same one in at least two samples, and by far the largest in all."""
    filled = [sizes.largest for sizes in samples if sizes.is_filled]
    if len(filled) < 2 or len({*filled}) > 1:
        return None
    others = (abs(sizes.largest) for sizes in samples if not sizes.is_filled)
    return filled[0] if all(FILLED * other < abs(filled[0]) for other in others) else None


def _scale(samples: Sequence[_Sizes], filling: float | None) -> float:
    """q_k, 0 where there are no samples."""
    squares = [sizes.square_of_others if sizes.largest == filling else sizes.square for sizes in samples]
    return sum(squares) / max(len(squares), 1)


def _sum(terms: Iterable[Tensor]) -> Tensor:
    """Of terms that may be on several devices; 0 where there are none."""
    total: Tensor | None = None
    for term in terms:
        total = term if total is None else total + term.to(total)
    return torch.zeros(()) if total is None else total


def _signs(values: Tensor, source: torch.Generator) -> Tensor:
    """±1 for each number, drawn on the CPU, so that they are the same on all devices."""
    drawn = torch.randint(0, 2, values.shape, generator=source, dtype=torch.int8)
    return drawn.to(values.device).to(values.dtype) * 2 - 1


# -- for what takes any loss -------------------------------------------------------------------------------------


def or_distance(loss: Loss | None) -> Loss:
    """The loss, or what stands for it where there is none."""
    return OutputDistance() if loss is None else loss


def is_distance(loss: Loss) -> bool:
    """Whether it is a distance to the dense model's outputs, whose slope there is zero."""
    return isinstance(loss, OutputDistance)


def needs_scales(loss: Loss) -> bool:
    """Whether it is a distance without the scales of the dense model's answers."""
    return isinstance(loss, OutputDistance) and not loss.scales


def scaled_loss(loss: Loss, answers: Iterable[object]) -> Loss:
    """The loss; a distance with the scales of the first `SCALED` of a dense model's answers, one per sample."""
    return loss.scaled(islice(answers, SCALED)) if isinstance(loss, OutputDistance) and not loss.scales else loss


def probes_of(loss: Loss, number: int) -> list[Loss]:
    """What to differentiate for sample `number`, so that the gradients' mean square is the curvature: often the loss
    itself."""
    if not isinstance(loss, OutputDistance):
        return [loss]
    return [loss.probe(number * loss.probes + i) for i in range(loss.probes)]


def judging(loss: Loss, answer: Callable[[Batch], object], batches: Iterable[Batch]) -> list[Loss]:
    """Per batch, what tells how much a smaller model loses there: the loss, or the distance to the dense answer."""
    return [loss.to(answer(batch)) if isinstance(loss, OutputDistance) else loss for batch in batches]
