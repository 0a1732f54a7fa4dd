"""Norms over fewer units: in a module, an RMSNorm over K of N units has another epsilon and other weights.

With what is removed at 0, x·w / √(Σ x² / N + ε) is the norm over the K kept units with the epsilon ε · N / K and the
weight w · √(N / K). No norm is known by name: where a weight of one axis gets narrower, each number beside it that can
be an epsilon is tried, and the weight as it is or counted from 1, as integers are tried with other values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt

import torch
from torch import nn

from ecospa_fx.inplace.attributes import INTERNAL
from ecospa_fx.inplace.edits import Edits
from ecospa_fx.inplace.groups import NarrowedAxes, Role, role_of

OFFSETS = (0.0, 1.0)
"""What is added to a weight before it multiplies."""


@dataclass(frozen=True, slots=True)
class NormEdit:
    """A norm that runs over fewer units; an edit may name it where it names integers, with the units that stay."""

    module: str
    """Path of the module that holds weight and epsilon."""
    weight: str
    """The parameter in that module."""
    epsilon: str
    """The attribute; None stands for the smallest step at 1 of the type."""
    units: int
    """Units before."""
    offset: float
    """What the module adds to the weight."""

    def write(self, model: nn.Module, value: int, edits: Edits) -> None:
        """Scale weight and epsilon. value: the number of units that stay."""
        module = model.get_submodule(self.module)
        weight, epsilon, ratio = module._parameters[self.weight], vars(module)[self.epsilon], self.units / value
        assert weight is not None  # `norm_edits` asks
        default = torch.finfo(torch.promote_types(weight.dtype, torch.float32)).eps
        edits.attribute(module, self.epsilon, (default if epsilon is None else epsilon) * ratio)
        edits.values(weight, (weight.data + self.offset) * sqrt(ratio) - self.offset)

    def fits(self, model: nn.Module) -> bool:
        """Whether a model has this weight and this epsilon."""
        try:
            module = model.get_submodule(self.module)
        except AttributeError:
            return False
        weight = module._parameters.get(self.weight)
        return weight is not None and weight.dim() == 1 and self.epsilon in _epsilons(module)

    def __str__(self) -> str:
        return self.epsilon


def norm_rules(model: nn.Module, axes: NarrowedAxes) -> Iterator[tuple[str, tuple[dict[NormEdit, int], ...]]]:
    """By module, told by its class: the ways to let all norms of a role run over fewer units.

    axes: the parameter axes that get narrower.
    """
    by_role: dict[Role, list[dict[tuple[str, str, float], tuple[NormEdit, int]]]] = {}
    for path, module in model.named_modules():
        ways = {}
        for name, weight in module._parameters.items():
            sizes = axes.get((f"{path}.{name}" if path else name, 0))
            if sizes is None or weight is None or weight.dim() != 1:
                continue
            for epsilon in _epsilons(module):
                for offset in OFFSETS:
                    ways[name, epsilon, offset] = NormEdit(path, name, epsilon, sizes[0], offset), sizes[1]
        if ways:
            by_role.setdefault(role_of(path, model), []).append(ways)
    for (kind, *_), layers in by_role.items():
        common = [way for way in layers[0] if all(way in ways for ways in layers)]
        yield (
            f"{kind.__name__} with {', '.join(dict.fromkeys(e for _, e, _ in common))}",
            tuple(dict(ways[way] for ways in layers) for way in common),
        )


def _epsilons(module: nn.Module) -> list[str]:
    """The attributes of a module that may be an epsilon."""
    attributes = {n: value for n, value in vars(module).items() if n not in INTERNAL}
    return [n for n, v in attributes.items() if v is None or (isinstance(v, float) and 0 < v < 1)]
