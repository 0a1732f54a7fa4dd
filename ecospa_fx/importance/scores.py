"""Scores: one number per unit and carrier of every coupling, from `score` or of the user's own."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

import torch
from torch import Tensor

from ecospa_fx.coupling.choice import near_names
from ecospa_fx.coupling.couplings import Couplings
from ecospa_fx.coupling.types import Coupling
from ecospa_fx.errors import EcospaError, PlanError, ScoreError
from ecospa_fx.notebook import html_table


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """How much each unit matters; allocation removes the least score per parameter first.

    Scores of different couplings are compared with each other, so they must be in one currency. A mapping to look
    things up in: ``name in scores``, ``len``, iteration over names, ``items()``. Raises ScoreError for what is no
    mapping of tensors.

    Examples:
        >>> import torch, ecospa_fx as eco
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 8))
        >>> couplings = eco.detect(mlp, (torch.randn(2, 8),))
        >>> mine = eco.Scores("mine", {"ffn": torch.arange(32.0)[None]})
        >>> eco.plan(couplings, ratio=0.5, scores=mine)["ffn"].keep[0][:4]
        (16, 17, 18, 19)
    """

    method: str
    """The name that they were computed by."""
    values: Mapping[str, Tensor]
    """Coupling name to tensor [carriers, units], float64 on the CPU as `score` makes it."""

    def __post_init__(self) -> None:
        if not isinstance(self.method, str):
            raise ScoreError(f"method={self.method!r:.60} is no name: say how the scores were computed")
        if not isinstance(self.values, Mapping) or not all(isinstance(v, Tensor) for v in self.values.values()):
            raise ScoreError(
                f"values={self.values!r:.60} are no mapping of tensors: give tensors [carriers, units] by coupling"
            )

    def __getitem__(self, coupling: str) -> Tensor:
        if coupling not in self.values:
            near = get_close_matches(str(coupling), self.values, 3, 0.4) or list(self.values)[:3]
            raise KeyError(f"there are no scores of coupling {coupling!r}; near it: {', '.join(near) or 'none'}")
        return self.values[coupling]

    def __contains__(self, coupling: object) -> bool:
        return coupling in self.values

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)

    def __len__(self) -> int:
        return len(self.values)

    def __repr__(self) -> str:
        units = sum(values.numel() for values in self.values.values())
        return f"Scores({self.method!r}, {len(self):,} couplings, {units:,} units)"

    def _repr_html_(self) -> str:
        rows = [[name, f"{values.numel():,}", *_spread(values)] for name, values in self.items()]
        head = ("coupling", "units", "least", "median", "greatest")
        return html_table(rows, head, ("left", *["right"] * 4), repr(self))

    def keys(self) -> KeysView[str]:
        """Names of the couplings."""
        return self.values.keys()

    def items(self) -> ItemsView[str, Tensor]:
        """Pairs of a coupling's name and its scores."""
        return self.values.items()


def _spread(values: Tensor) -> list[str]:
    """The least, the median and the greatest of some numbers; "" where there are none."""
    if not values.numel() or values.is_meta:
        return [""] * 3
    flat = values.detach().double().flatten()
    return [f"{float(number):.3g}" for number in (flat.min(), flat.median(), flat.max())]


Given = Scores | Mapping[str, Tensor] | Literal["magnitude", "random"]
"""What a verb takes as scores: what `score` returned, tensors by name of coupling, or the name of a method."""


def given_scores(
    couplings: Couplings, chosen: Sequence[Coupling], scores: object, refused: type[EcospaError] = PlanError
) -> dict[str, Tensor]:
    """Scores of chosen couplings as float64 CPU tensors [carriers, units].

    Raises `refused` for what is neither `Scores` nor a mapping, for a mapping with a name that no coupling has, and for
    a coupling whose scores are missing, of another shape, no floating-point numbers, without values or not finite.
    """
    if not isinstance(scores, Scores | Mapping):
        raise refused(
            f"scores={scores!r:.60} is unknown: use 'magnitude', 'random', what score() returned, or a mapping of "
            "coupling names to tensors"
        )
    if isinstance(scores, Mapping):
        whole = couplings if couplings.whole is None else couplings.whole
        names = {c.name for c in whole}
        for name in scores:
            if name not in names:
                raise refused(f"scores name {name!r:.80}, and no coupling is called that: {near_names(whole, name)}")
    values = scores.values if isinstance(scores, Scores) else scores
    return {c.name: _checked(c, values.get(c.name), refused) for c in chosen}


def _checked(coupling: Coupling, value: object, refused: type[EcospaError]) -> Tensor:
    """The scores of one coupling."""
    c, shape = coupling, (coupling.carriers, coupling.size)
    if not isinstance(value, Tensor) or tuple(value.shape) != shape:
        kind = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise refused(
            f"coupling {c.name!r} needs scores of shape {shape} and has {'none' if value is None else kind}: "
            "score these couplings"
        )
    if not value.is_floating_point():
        raise refused(f"the scores of coupling {c.name!r} are {value.dtype}: give floating-point numbers")
    if value.is_meta:
        raise refused(f"the scores of coupling {c.name!r} are on meta and have no values: score it anew")
    if not value.isfinite().all():
        raise refused(f"the scores of coupling {c.name!r} are not all finite: score it anew")
    return value.detach().to("cpu", torch.float64)
