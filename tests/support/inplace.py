"""Plans of known widths, and what a module has, for tests of writing plans back into modules."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import ecospa_fx as eco
from ecospa_fx.coupling.couplings import Couplings
from ecospa_fx.coupling.types import Coupling
from ecospa_fx.inplace.attributes import integers
from ecospa_fx.plan import Plan, Selection


def kept(coupling: Coupling, count: int, seed: int = 0) -> Selection:
    """Any `count` units of every carrier."""
    source = torch.Generator().manual_seed(seed)
    keep = torch.zeros(coupling.carriers, coupling.size, dtype=torch.bool)
    for row in keep:
        row[torch.randperm(coupling.size, generator=source)[:count]] = True
    return Selection.of(coupling, keep)


def plan_of(couplings: Couplings, kinds: Sequence[str], count: Callable[[Coupling, int], int]) -> Plan:
    """A plan for the first coupling of each kind in every layer; count: from coupling and number to units kept."""
    chosen: dict[tuple[str, str], Coupling] = {}
    for c in couplings.offered:
        if c.kind in kinds and c.size > 1:
            chosen.setdefault((c.layer, c.kind), c)
    selections = tuple(kept(c, count(c, i), seed=i) for i, c in enumerate(chosen.values()))
    assert selections
    return Plan(selections, tuple(couplings.shapes.items()))


def half(coupling: Coupling, number: int) -> int:
    """The same share everywhere."""
    return coupling.size // 2


def uneven(coupling: Coupling, number: int) -> int:
    """Other widths in every layer, where there are enough units."""
    return max(1, coupling.size // 2 - number % 3 * (coupling.size > 8))


def state(model: nn.Module) -> tuple[Any, ...]:
    """Everything that `shrink_` may change: identities, values, shapes, modes and integers."""
    parameters = {n: (id(p), p.detach().clone(), p.grad) for n, p in model.named_parameters(remove_duplicate=False)}
    buffers = {n: (id(b), b.clone()) for n, b in model.named_buffers()}
    numbers = {one.place: one.value for one in integers(model, {path for path, _ in model.named_modules()})}
    return parameters, buffers, numbers, {n: m.training for n, m in model.named_modules()}


def assert_loaded(loaded: nn.Module, saved: nn.Module, kwargs: dict[str, Any]) -> None:
    """Whether a model has another one's weights and logits to the bit.

    It is copied first: memory that a file is mapped to begins anywhere, and some kernels sum in another order there.
    """
    own, want = loaded.state_dict(), saved.state_dict()
    assert own.keys() == want.keys()
    assert all(torch.equal(own[name], tensor) for name, tensor in want.items())
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(loaded)(**kwargs).logits, saved(**kwargs).logits)


def assert_same(model: nn.Module, before: tuple[Any, ...]) -> None:
    """Whether a model is exactly as it was."""
    parameters, buffers, numbers, modes = state(model)
    assert numbers == before[2]
    assert modes == before[3]
    for now, then in ((parameters, before[0]), (buffers, before[1])):
        assert now.keys() == then.keys()
        assert all(now[n][0] == then[n][0] and torch.equal(now[n][1], then[n][1]) for n in now)


def masked_twin(model: nn.Module, plan: eco.Plan) -> nn.Module:
    """A copy of the dense model with every parameter multiplied by its mask."""
    import copy

    twin = copy.deepcopy(model)
    masks = plan.masks(twin)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if name in masks:
                parameter.mul_(masks[name])
    return twin


def largest(got: Tensor, want: Tensor) -> float:
    """The largest difference, relative to the largest number."""
    return float((got - want).detach().abs().max() / want.detach().abs().max())
