"""Second-order compression: what it measures, how it chooses, and how what stays makes up for what goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ecospa_fx as eco
from ecospa_fx.budget.allocate import choose
from ecospa_fx.capture.export import capture
from ecospa_fx.importance.brain_surgeon import kept_gates, order_scores, remove_all
from ecospa_fx.importance.curvature import Collector, Curvature
from ecospa_fx.importance.linalg import damped, power
from ecospa_fx.importance.linear_views import CouplingViews, views_of
from ecospa_fx.importance.score import Batch
from ecospa_fx.importance.second_order import unit_scores
from ecospa_fx.ir.linears import LinearUse, linear_uses
from ecospa_fx.passes.lossy import change_basis
from ecospa_fx.passes.lossy.change_basis import ChangeBasis, turn_factors, turn_values
from ecospa_fx.passes.lossy.reconstruct import Reconstruct
from ecospa_fx.passes.shrink.shrink_couplings import shrink_program
from ecospa_fx.runtime.interpreter import PartialInterpreter
from tests.support import immediate_surgeon
from tests.support.counting import VOCABULARY, Tokens, data, looked_at, loss_of, pair

# -- the surgeon -------------------------------------------------------------------------------------------------


def cost_of(hessian: Tensor, weight: Tensor, gone: Sequence[int]) -> float:
    """tr(W_R S W_Rᵀ) with S the Schur complement: what taking out columns costs at least."""
    kept = [i for i in range(len(hessian)) if i not in set(gone)]
    schur = hessian[gone][:, gone]
    if kept:
        schur = schur - hessian[gone][:, kept] @ torch.linalg.solve(hessian[kept][:, kept], hessian[kept][:, gone])
    return float(torch.trace(weight[:, gone] @ schur @ weight[:, gone].T))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 3), st.integers(0, 10**6))
def test_the_surgeon_takes_the_unit_that_costs_least_every_time(
    carriers: int, units: int, width: int, seed: int
) -> None:
    """Against brute force: every candidate solved from scratch at every step."""
    source, n = torch.Generator().manual_seed(seed), units * width
    rows = torch.randn(carriers, 3 * n, n, generator=source, dtype=torch.float64)
    hessian, weight = rows.mT @ rows, torch.randn(carriers, 4, n, generator=source, dtype=torch.float64)
    removal = remove_all(hessian, weight.mT @ weight, width)
    for c in range(carriers):
        gone: list[int] = []
        before = 0.0
        for unit, cost in zip(removal.order[c].tolist(), removal.cost[c].tolist(), strict=True):
            left = [u for u in range(units) if u * width not in gone]
            costs = {u: cost_of(hessian[c], weight[c], [*gone, *range(u * width, (u + 1) * width)]) for u in left}
            assert costs[unit] <= min(costs.values()) * (1 + 1e-9) + 1e-9
            assert cost == pytest.approx(costs[unit] - before, rel=1e-6, abs=1e-8)
            gone += range(unit * width, (unit + 1) * width)
            before = costs[unit]
    assert order_scores(removal).argsort(1).equal(removal.order)


def test_gates_that_stay_are_where_the_quadratic_is_least() -> None:
    rows = torch.randn(2, 40, 7, dtype=torch.float64)
    matrix, keep = rows.mT @ rows, torch.tensor([[1, 0, 1, 1, 0, 1, 1], [0, 1, 1, 1, 1, 1, 0]]).bool()
    gates = kept_gates(matrix, keep)
    gradient = torch.einsum("cuv,cv->cu", matrix, gates - 1)
    assert gates[~keep].abs().max() == 0
    assert gradient[keep].abs().max() < 1e-9


def test_powers_undo_each_other_and_damping_survives_zeros() -> None:
    rows = torch.randn(3, 30, 5, dtype=torch.float64)
    matrix = rows.mT @ rows
    torch.testing.assert_close(power(matrix, 0.5) @ power(matrix, -0.5), torch.eye(5).double().expand(3, 5, 5))
    assert torch.linalg.eigvalsh(damped(torch.zeros(2, 4, 4), 0.1)).min() > 0


# -- running programs and finding matrices -----------------------------------------------------------------------


class Products(nn.Module):
    """Every way to multiply by a stored matrix, and some that do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.shared = nn.Linear(4, 6), nn.Linear(4, 4)
        self.conv1d = nn.Parameter(torch.randn(6, 5))
        self.bias = nn.Parameter(torch.randn(5))
        self.plain, self.turned = nn.Parameter(torch.randn(5, 7)), nn.Parameter(torch.randn(3, 7))

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(self.shared(self.shared(x)))
        x = torch.addmm(self.bias, x, self.conv1d) @ self.plain
        out: Tensor = x @ self.turned.T
        return out


def test_sites_are_the_products_with_a_matrix_that_is_used_once() -> None:
    model = Products()
    program = capture(model, (torch.randn(3, 4),), {}, dynamic=True)
    found = {
        s.parameter: (s.rows, s.bias, tuple(s.matrix(program.values[s.parameter]).shape)) for s in linear_uses(program)
    }
    assert found == {
        "linear.weight": (True, "linear.bias", (6, 4)),
        "conv1d": (False, "bias", (5, 6)),
        "plain": (False, None, (7, 5)),
        "turned": (True, None, (3, 7)),
    }


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_evaluation_is_that_of_the_module_in_eval_mode(training: bool) -> None:
    model = Tokens(dropout=0.5).double()
    args = (torch.randint(0, VOCABULARY, (3, 11)),)
    want = model.eval()(*args)
    model.train(training)
    evaluator = PartialInterpreter(capture(model, (args[0][:2, :5],), {}, dynamic=True), model, (args[0][:2, :5],), {})
    values = {**evaluator.start(args, {}), **evaluator.weights()}
    evaluator.run(evaluator.order, values)
    torch.testing.assert_close(evaluator.returned(values, args, {}), want, rtol=1e-12, atol=1e-12)
    assert len(values) < 8  # what nothing reads any more is gone


@pytest.mark.slow
def test_a_frozen_program_stays_as_it_is() -> None:
    model = Tokens().double()
    example = (torch.randint(0, VOCABULARY, (2, 9)),)
    program = capture(model, example, {}, dynamic=True)
    frozen = program.frozen()
    shrink_program(program, eco.plan(eco.detect(model, example), 0.5, scores="magnitude"))
    evaluator = PartialInterpreter(frozen, model, example, {})
    values = {**evaluator.start(example, {}), **evaluator.weights()}
    evaluator.run(evaluator.order, values)
    torch.testing.assert_close(evaluator.returned(values, example, {}), model(*example), rtol=1e-12, atol=1e-12)


# -- what is measured --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_curvature_is_what_hooks_on_the_module_see() -> None:
    model = Tokens(bias=True).double().eval()
    _, evaluator, views = looked_at(model)
    batches = data(3, 7)
    curvature = Collector(evaluator, views).run(batches, loss_of)
    layer: Any = model.layers[1]
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    queries: list[Tensor] = []

    def at_down(_: nn.Module, given: tuple[Tensor], out: Tensor) -> None:
        inputs.append(given[0].detach())
        out.register_hook(outputs.append)  # type: ignore[no-untyped-call]  # torch has no types here

    def at_queries(_: nn.Module, given: tuple[Tensor], out: Tensor) -> None:
        seen = out.detach()
        out.register_hook(lambda g: queries.append(g * seen))  # type: ignore[no-untyped-call]  # torch has no types here

    layer.down.register_forward_hook(at_down)
    layer.q.register_forward_hook(at_queries)
    for args, _ in batches:
        torch.autograd.backward(loss_of(model(*args), args, {}))
    site = next(s for s in views.sites if s.parameter == "layers.1.down.weight")
    rows, gradients = torch.cat(inputs).flatten(0, 1), torch.cat(outputs).flatten(0, 1)
    torch.testing.assert_close(curvature.inputs[site].second, rows.T @ rows, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(
        curvature.inputs[site].covariance(), rows.T.cov() * (len(rows) - 1), rtol=1e-6, atol=1e-8
    )
    torch.testing.assert_close(curvature.outputs[site].second, gradients.T @ gradients, rtol=1e-5, atol=1e-12)
    # the gate on pair u of KV head c multiplies dims u and u + 4 of both query heads that read it
    each = torch.cat(queries).flatten(0, 1).view(-1, 2, 2, 2, 4).sum((2, 3))
    gate = next(g for g in views.gates if "layers.1" in g.coupling.name)
    half = curvature.gates[gate.coupling.name] - torch.einsum("ncu,ncv->cuv", each, each) / 2
    assert half.diagonal(dim1=1, dim2=2).min() > -1e-9  # the rest is the keys' half
    assert not views.others


def test_packed_experts_are_scored_by_their_parameters() -> None:
    from tests.support.tiny import HIDDEN, Experts

    model = Experts().eval()
    x = torch.randn(2, 3, HIDDEN)
    program = capture(model, (x,), {}, dynamic=True)
    couplings = eco.detect(model, (x,))
    views = views_of(choose(couplings, None, containers=False), linear_uses(program))
    assert [c.name for c in views.others] == [c.name for c in couplings.offered if c.size > 1]
    batches: list[Batch] = [((torch.randn(1, 3, HIDDEN),), {}) for _ in range(4)]

    def loss(output: Tensor, args: Any, kwargs: Any) -> Tensor:
        return output.square().mean()

    curvature = Collector(PartialInterpreter(program, model, (x,), {}), views).run(batches, loss)
    found = unit_scores(views, curvature, {}, 0.01)
    want = eco.score(model, couplings, batches, loss=loss, method="gate-fisher")
    for name, values in found.items():
        torch.testing.assert_close(values, want[name] * len(batches) / 2, rtol=1e-5, atol=0)


@pytest.mark.slow
def test_scores_are_what_the_surgeon_says_of_each_matrix_by_itself() -> None:
    """Outputs count by the gradients there, carriers by themselves, gates by their Fisher matrix."""
    _, evaluator, views = looked_at(Tokens(bias=True).double().eval())
    curvature = Collector(evaluator, views).run(data(8), loss_of)
    weights = evaluator.program.values
    scores = unit_scores(views, curvature, weights, 0.01)
    assert len(scores) == len(views.inputs) + len(views.gates) == 6
    for view in views.inputs:
        ((site, positions),) = view.positions.items()
        flat, gradients = positions.flatten(1), curvature.outputs[site]
        matrix = power(gradients.second / gradients.rows, 0.5) @ site.matrix(weights[site.parameter])
        hessian = torch.stack([curvature.second(site)[row][:, row] for row in flat])
        square = torch.stack([curvature.inputs[site].second.diagonal()[row].mean() for row in flat])
        weight = torch.stack([matrix[:, row] for row in flat])
        removal = immediate_surgeon.remove_all(damped(hessian, 0.01, square), weight, positions.shape[2])
        torch.testing.assert_close(scores[view.coupling.name], order_scores(removal) / 2, rtol=1e-6, atol=1e-12)
    for gate in views.gates:
        hessian = damped(curvature.gates[gate.coupling.name], 0.01)
        removal = immediate_surgeon.remove_all(hessian, torch.ones_like(hessian[:, :1]))
        torch.testing.assert_close(scores[gate.coupling.name], order_scores(removal) / 2, rtol=1e-6, atol=1e-12)


# -- bases -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("rotary", "fused", "bias"), [(True, False, False), (False, False, True), (False, True, True)])
def test_a_change_of_basis_changes_nothing_but_the_basis(rotary: bool, fused: bool, bias: bool) -> None:
    """The function stays, and what was measured before is what would be measured after."""
    model = Tokens(rotary=rotary, fused=fused, bias=bias).double().eval()
    program, evaluator, views = looked_at(model)
    batches = data(6)
    want = [model(*args) for args, _ in batches]
    nothing = CouplingViews((), (), ())
    turned = turn_factors(views, lambda sites: Collector(evaluator, nothing, sites).run(batches, loss_of), program)
    curvature = Collector(evaluator, views).run(batches, loss_of)
    turned_values = turn_values(views, curvature, program)
    assert (turned, turned_values) == (0 if rotary else 2, 2)
    for (args, kwargs), expected in zip(batches, want, strict=True):
        values = {**evaluator.start(args, kwargs), **evaluator.weights()}
        evaluator.run(evaluator.order, values)
        torch.testing.assert_close(evaluator.returned(values, args, kwargs), expected, rtol=1e-9, atol=1e-9)
    again = Collector(evaluator, views).run(batches, loss_of)
    for site, moments in curvature.inputs.items():
        torch.testing.assert_close(moments.second, again.inputs[site].second, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(moments.total, again.inputs[site].total, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("quieter", ["q", "k"])
def test_the_factor_decides_at_which_gradients_tell_less(quieter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is added to all keys alike shows in the gradients at single keys, and softmax does not see it."""
    program, _, views = looked_at(Tokens(rotary=False))
    changes: list[ChangeBasis] = []

    def basis(site: LinearUse, positions: Tensor, curvature: Curvature) -> tuple[Tensor, Tensor]:
        carriers, units, _ = positions.shape
        weight = 1.0 if f".{quieter}." in site.parameter else 2.0
        return torch.eye(units).expand(carriers, -1, -1), torch.full((carriers, units), weight)

    def made(change: ChangeBasis) -> ChangeBasis:
        changes.append(change)
        return change

    monkeypatch.setattr(change_basis, "factor_basis", basis)
    assert turn_factors(views, lambda sites: Curvature(), program, made) == len(changes) == 2
    assert all(f".{quieter}." in side.member.parameter for change in changes for side in change.first)


@pytest.mark.slow
def test_values_are_uncorrelated_after_the_change_and_fall_in_importance() -> None:
    model = Tokens().double().eval()
    program, evaluator, views = looked_at(model)
    curvature = Collector(evaluator, views).run(data(12), loss_of)
    turn_values(views, curvature, program)
    for view in views.inputs:
        if view.coupling.kind == "vo":
            ((site, at),) = view.positions.items()
            blocks = curvature.inputs[site].second[at[:, :, None, :], at[:, None, :, :]].mean(-1)
            normalised = blocks / curvature.inputs[site].rows
            torch.testing.assert_close(normalised, torch.eye(8).double().expand(2, 8, 8), rtol=1e-4, atol=1e-4)


# -- reconstruction ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("bias", [False, True])
def test_least_squares_leave_residuals_that_inputs_do_not_explain(bias: bool) -> None:
    """The normal equations of the first layer, whose inputs the smaller model shares with the dense one."""
    model = Tokens(bias=bias).double().eval()
    dense, small = pair(model, 0.4)
    assert Reconstruct(damping=1e-8).run(dense, small, data(16)) == 2
    rows, residuals = [], []
    for args, kwargs in data(16):
        found = []
        for evaluator in (dense, small):
            values = {**evaluator.start(args, kwargs), **evaluator.weights()}
            (site,) = (s for s in linear_uses(evaluator.program) if s.parameter == "layers.0.down.weight")
            last = evaluator.order.index(site.node)
            evaluator.run(evaluator.order[:last], values)
            given = values[site.input].flatten(0, 1)
            evaluator.run([site.node], values)
            found.append((given, values[site.node].flatten(0, 1)))
        rows.append(found[1][0])
        residuals.append(found[0][1] - found[1][1])
    x, r = torch.cat(rows), torch.cat(residuals)
    assert r.abs().max() > 1e-3
    assert (x.T @ r).abs().max() < 1e-4 * (x.norm() * r.norm())
    if bias:
        assert r.mean(0).abs().max() < 1e-6
