"""What stays makes up for what goes, by the moments that the scores measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

import ecospa_fx as eco
from ecospa_fx.budget.allocate import choose
from ecospa_fx.capture.export import capture
from ecospa_fx.importance.compensation import Compensated
from ecospa_fx.importance.curvature import Collector
from ecospa_fx.importance.linear_views import views_of
from ecospa_fx.importance.score import Batch
from ecospa_fx.ir.linears import linear_uses
from ecospa_fx.runtime.interpreter import PartialInterpreter


class Layers(nn.Module):
    """An FFN; where it has a side way, a product that is no linear layer's reads the same units."""

    def __init__(self, *, bias: bool, side: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 5, bias=bias)
        self.side = nn.Parameter(torch.randn(12, 5) / 12) if side else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).relu()
        out: Tensor = self.down(h)
        # Read twice, it is none of the layers that are looked at one by one.
        return out if self.side is None else out + h @ self.side + (h * 0.5) @ self.side


def square(output: Tensor, args: Any, kwargs: Any) -> Tensor:
    return (output - 1).square().mean()


def compensated(model: nn.Module, batches: list[Batch], damping: float = 1e-9) -> Compensated:
    args = batches[0][0]
    program = capture(model, args, {}, dynamic=False)
    chosen = choose(eco.detect(model, args), None, containers=False)
    views = views_of(chosen, linear_uses(program))
    curvature = Collector(PartialInterpreter(program, model, args, {}), views).run(batches, square)
    values = {name: tensor.detach() for name, tensor in program.values.items()}
    return Compensated(chosen, values, views, curvature, damping)


def data(dtype: torch.dtype = torch.float64) -> list[Batch]:
    source = torch.Generator().manual_seed(1)
    return [((torch.randn(16, 6, generator=source, dtype=dtype),), {}) for _ in range(6)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("side", [False, True])
def test_residuals_are_none_that_the_kept_inputs_explain(bias: bool, side: bool) -> None:
    """The normal equations, for units that scores look at one by one and for those that they do not."""
    model, batches = Layers(bias=bias, side=side).double().eval(), data()
    weights = compensated(model, batches)
    assert weights.views is not None
    assert bool(weights.views.beside) == side
    (coupling,) = weights.couplings
    keep = torch.ones(1, coupling.size, dtype=torch.bool)
    keep[0, ::3] = False
    made = dict(weights.compensated({coupling.name: keep}))
    assert set(made) == {"down.weight", *(["down.bias"] if bias else [])}
    h = torch.cat([model.up(args[0]).relu() for args, _ in batches]).detach()
    kept = h[:, keep[0]]
    solved = linear(kept, made["down.weight"][:, keep[0]], made.get("down.bias"))
    residual = model.down(h).detach() - solved
    assert residual.abs().max() > 1e-3
    assert (residual.T @ kept).abs().max() < 1e-6 * residual.norm() * kept.norm()
    if bias:
        assert residual.mean(0).abs().max() < 1e-9


def test_nothing_is_made_up_for_nothing_and_on_request_for_some() -> None:
    weights = compensated(Layers(bias=True).double().eval(), data())
    (coupling,) = weights.couplings
    keep = torch.ones(1, coupling.size, dtype=torch.bool)
    assert not dict(weights.compensated({}))
    assert not dict(weights.compensated({coupling.name: keep}))
    keep[0, 0] = False
    assert set(dict(weights.compensated({coupling.name: keep}, {"down.bias", "up.weight"}))) == {"down.bias"}


class Scored(nn.Module):
    """Queries whose inputs may lose units as well."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.q, self.k, self.v = nn.Linear(6, 12), nn.Linear(12, 8), nn.Linear(6, 8), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q(self.up(x).relu()) @ self.k(x).mT
        out: Tensor = scores.softmax(-1) @ self.v(x)
        return out


def test_what_is_rescaled_and_solved_is_both_with_its_bias() -> None:
    weights = compensated(Scored().double().eval(), data())
    inner, outer = (next(c for c in weights.couplings if c.kind == kind) for kind in ("qk", "ffn"))
    keep = {c.name: torch.arange(c.size)[None] % 3 > 0 for c in (inner, outer)}
    scaled = dict(weights.compensated({inner.name: keep[inner.name]}))
    assert "q.bias" in scaled
    assert not scaled["q.bias"].equal(weights.values["q.bias"])
    want = dict(replace(weights, values={**weights.values, **scaled}).compensated({outer.name: keep[outer.name]}))
    found = dict(weights.compensated(keep))
    for name in ("q.weight", "q.bias"):
        torch.testing.assert_close(found[name], want[name])
    torch.testing.assert_close(found["k.bias"], scaled["k.bias"])


def test_where_a_norm_runs_over_what_is_kept_its_real_outputs_count() -> None:
    """There the dense model's inputs are not those of the smaller one, so that layers are solved in turn."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 24), nn.RMSNorm(24), nn.Linear(24, 5)).eval()
    batches = data(torch.float32)
    costs = []
    for how in (True, "in turn"):
        small = eco.compress(
            model, batches[0][0], ratio=0.5, batches=batches, loss=square, allow="renormalise", distillation=0,
            least_squares=how,
        )  # fmt: skip
        with torch.no_grad():
            costs.append(sum(float((small(*args) - model(*args)).square().mean()) for args, _ in batches))
    assert costs[0] == costs[1]


@pytest.mark.slow
@pytest.mark.parametrize("side", [False, True])
def test_compress_solves_at_once_or_in_turn(side: bool) -> None:
    model, batches = Layers(bias=True, side=side).eval(), data(torch.float32)
    want = [model(*args).detach() for args, _ in batches]
    costs = {}
    for how in (False, True, "in turn"):
        small = eco.compress(
            model, batches[0][0], ratio=0.5, batches=batches, loss=square, distillation=0, least_squares=how
        )
        with torch.no_grad():
            found = [small(*args) for args, _ in batches]
        costs[how] = sum(float((a - y).square().mean()) for a, y in zip(found, want, strict=True))
    assert costs[True] < 0.9 * costs[False]
    assert costs["in turn"] == pytest.approx(costs[True], rel=0.05)  # one layer: both read the same inputs
