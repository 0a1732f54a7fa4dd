"""A coupling that claims to be linear takes any change of basis; what fixes a basis takes the claim away."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ecospa_fx as eco
from ecospa_fx.coupling.types import Coupling
from ecospa_fx.importance.linalg import rotated
from ecospa_fx.importance.linear_views import sides_of
from tests.coupling.test_labels import MANY, Block, by_matmul, merged, rows
from tests.support.oracle import Sandwich

Operation = Callable[..., Tensor]

LINEAR: dict[str, tuple[Operation, list[tuple[int, ...]]]] = {
    "nothing": (lambda h: -h / 3, []),
    "bias": (lambda h, a: h + a, [(8,)]),
    "both": (lambda h: torch.add(h, h.roll(1, 1), alpha=2), []),
    "mean": (lambda h: h.mean(1, keepdim=True), []),
    "pad": (lambda h: F.pad(h, (0, 0, 1, 0)), []),
    "sum": (lambda h: h.cumsum(1)[:, 1:].sum(1, keepdim=True), []),
    "scaled rows": (lambda h: h * torch.arange(3)[:, None] / h.new_tensor([[2.0], [3.0], [4.0]]), []),
    "interpolated": (lambda h: F.interpolate(h.mT, scale_factor=2).mT, []),
    "pooled": (lambda h: F.avg_pool1d(h.mT, 2).mT, []),
}

LINEAR["convolved"] = (lambda h, w: F.conv1d(h.mT, w).mT, [(5, 8, 1)])

FIXED: dict[str, tuple[Operation, list[tuple[int, ...]]]] = {
    "bilinear gate": (lambda h, w: h * (h.detach() @ w), [(8, 8)]),
    "scale": (lambda h, a: h * a, [(8,)]),
    "stored scale": (lambda h: h * torch.arange(8), []),
    "number": (lambda h: h + 1, []),
    "less": (lambda h: 1 - h, []),
    "stored": (lambda h: h + torch.arange(8), []),
    "one number": (lambda h, a: h + a.expand(8), [(1,)]),
    "of each row": (lambda h: h + torch.arange(3)[:, None], []),
    "divisor": (lambda h, w: h / (h @ w + 99), [(8, 8)]),
    "learnt divisor": (lambda h, a: h / (a + 9), [(8,)]),
    "remainder": (lambda h: h % 2, []),
    "rounded": (lambda h: torch.div(h, 2, rounding_mode="floor"), []),
    "addcmul": (torch.addcmul, [(1, 1, 8), (8,)]),
    "addcdiv": (lambda h, a, b: torch.addcdiv(b, h, a + 9), [(8,), (8,)]),
    "lerp": (torch.lerp, [(8,), (8,)]),
    "choice": (lambda h: torch.where(torch.arange(8) > 3, h, 0.0), []),
    "filled": (lambda h: h.masked_fill(torch.arange(3)[:, None] > 1, 1.0), []),
    "padded": (lambda h: F.pad(h, (0, 0, 1, 0), value=1.0), []),
    "joined": (lambda h: torch.cat([h, torch.ones_like(h)], 1), []),
    "stacked": (lambda h: torch.stack([h, h.new_ones(8).expand_as(h)], 1).flatten(1, 2), []),
    "sorted": (lambda h: h.sort(1)[0], []),
    "largest": (lambda h: h.amax(1, keepdim=True), []),
    "spread": (lambda h: h.std(1, keepdim=True), []),
    "overwritten": (lambda h: h.index_fill(1, torch.tensor([1]), 1.0), []),
    "scattered": (lambda h: h.scatter(1, torch.zeros(2, 1, 8, dtype=torch.long), 1.0), []),
    "gathered": (lambda h: h.gather(1, torch.arange(8).remainder(2).expand(2, 1, 8)), []),
    "summed": (lambda h: h + h.sum(-1, keepdim=True), []),
    "with itself": (lambda h: (h @ h.mT) @ h, []),
}


def turned(model: nn.Module, args: tuple[Tensor, ...], coupling: Coupling) -> float:
    """The relative change of the output when producers are multiplied by a matrix and consumers by its inverse."""
    sides = sides_of(coupling)
    assert sides is not None
    source = torch.Generator().manual_seed(1)
    basis = torch.randn(coupling.carriers, coupling.size, coupling.size, dtype=torch.float64, generator=source)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for side, matrix in zip(sides, (basis, torch.linalg.inv(basis).mT), strict=True):
            for s in side:
                weight = other.get_parameter(s.member.parameter)
                weight.copy_(rotated(weight.detach(), s.member.axis, s.positions, matrix))
    wanted = model(*args)
    return float(((other(*args) - wanted).abs().max() / wanted.abs().max()).detach())


def sandwiched(case: tuple[Operation, list[tuple[int, ...]]]) -> tuple[nn.Module, tuple[Tensor], Coupling]:
    torch.manual_seed(0)
    model, args = Sandwich(*case).double(), (torch.randn(2, 3, 6, dtype=torch.float64),)
    (coupling,) = (c for c in eco.detect(model, args).offered if "up.weight" in {m.parameter for m in c.members})
    return model, args, coupling


@pytest.mark.parametrize("name", LINEAR)
def test_any_basis_will_do(name: str) -> None:
    model, args, coupling = sandwiched(LINEAR[name])
    assert (coupling.symmetry, coupling.kind) == ("linear", "pair")
    assert turned(model, args, coupling) <= 1e-12


@pytest.mark.parametrize("name", FIXED)
def test_no_other_basis_will_do(name: str) -> None:
    model, args, coupling = sandwiched(FIXED[name])
    assert coupling.symmetry == "permutation"
    assert sides_of(coupling) is None or turned(model, args, coupling) > 1e-6


def shared_key_and_value(m: Any, x: Any) -> Any:
    q, k = rows(x, m.q, 3, 4), rows(x, m.k, 3, 4)
    return merged((q @ k.mT).softmax(-1) @ k) @ m.o.mT


def shared_query_and_key(m: Any, x: Any) -> Any:
    q, v = rows(x, m.q, 3, 4), rows(x, m.v, 3, 5)
    return merged((q @ q.mT).softmax(-1) @ v) @ m.o.mT


def used_twice(m: Any, x: Any) -> Any:
    return by_matmul(m, by_matmul(m, x))


@pytest.mark.parametrize(
    ("forward", "shapes", "symmetry"),
    [
        (by_matmul, MANY, "linear"),
        (used_twice, MANY, "linear"),
        (shared_key_and_value, {**MANY, "o": (10, 12)}, "permutation"),
        (shared_query_and_key, MANY, "permutation"),
    ],
    ids=lambda v: getattr(v, "__name__", None),
)
def test_queries_and_keys(forward: Callable[[Any, Any], Any], shapes: Any, symmetry: str) -> None:
    torch.manual_seed(0)
    model, args = Block(forward, **shapes).double(), (torch.randn(2, 6, 10, dtype=torch.float64),)
    (coupling,) = (c for c in eco.detect(model, args).offered if c.kind == "qk")
    assert coupling.symmetry == symmetry
    assert symmetry == "permutation" or turned(model, args, coupling) <= 1e-10
