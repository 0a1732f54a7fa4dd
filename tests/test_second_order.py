"""Second-order compression: what it measures, how it chooses, and how what stays makes up for what goes."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import ecospa_fx as eco
from ecospa_fx.budget.allocate import choose
from ecospa_fx.errors import EcospaError, InputError, PlanError, ScoreError
from ecospa_fx.graph.capture import capture
from ecospa_fx.graph.evaluate import Evaluator
from ecospa_fx.graph.program import ExportedForm
from ecospa_fx.graph.sites import find_sites
from ecospa_fx.importance.curvature import Collector
from ecospa_fx.importance.matrices import damped, power
from ecospa_fx.importance.score import Batch
from ecospa_fx.importance.second_order import unit_scores
from ecospa_fx.importance.surgeon import kept_gates, order_scores, remove_all
from ecospa_fx.importance.views import Views, views_of
from ecospa_fx.passes.lossy import distill
from ecospa_fx.passes.lossy.change_basis import turn_factors, turn_values
from ecospa_fx.passes.lossy.distill import Distill
from ecospa_fx.passes.lossy.reconstruct import Reconstruct
from ecospa_fx.passes.shrink_couplings import shrink_program

VOCABULARY = 29


class Tokens(nn.Module):
    """A language model of one's own: grouped heads, rotary or not, separate or fused projections, two layers."""

    def __init__(self, *, rotary: bool = True, fused: bool = False, bias: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.layers = nn.ModuleList(Layer(rotary, fused, bias, dropout) for _ in range(2))
        self.head = nn.Linear(16, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.head(x)
        return out


class Layer(nn.Module):
    def __init__(self, rotary: bool, fused: bool, bias: bool, dropout: float) -> None:
        super().__init__()
        self.rotary, self.fused, self.repeats = rotary, fused, 1 if fused else 2
        self.norm, self.norm2, self.drop = nn.LayerNorm(16), nn.LayerNorm(16), nn.Dropout(dropout)
        if fused:
            self.qkv = nn.Linear(16, 3 * 16, bias=bias)
        else:
            self.q, self.k, self.v = (
                nn.Linear(16, 32, bias=bias),
                nn.Linear(16, 16, bias=bias),
                nn.Linear(16, 16, bias=bias),
            )
        self.o = nn.Linear(16 * self.repeats, 16, bias=bias)
        self.up, self.gate, self.down = nn.Linear(16, 24, bias=bias), nn.Linear(16, 24), nn.Linear(24, 16, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = self.qkv(h).chunk(3, -1) if self.fused else (self.q(h), self.k(h), self.v(h))
        q, k, v = (t.unflatten(-1, (-1, 8)).transpose(1, 2) for t in (q, k, v))
        if self.rotary:
            q, k = turned(q), turned(k)
        k, v = (t.repeat_interleave(self.repeats, 1) for t in (k, v))
        z = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.drop(self.o(z.transpose(1, 2).flatten(2)))
        h = self.norm2(x)
        out: Tensor = x + self.drop(self.down(nn.functional.silu(self.gate(h)) * self.up(h)))
        return out


def turned(x: Tensor) -> Tensor:
    angle = torch.arange(x.shape[2], dtype=x.dtype)[:, None] / 10.0 ** (torch.arange(4, dtype=x.dtype) / 4)
    cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
    return x * cos + torch.cat([-x[..., 4:], x[..., :4]], -1) * sin


def loss_of(output: Tensor, args: Sequence[Any], kwargs: Any) -> Tensor:
    return cross_entropy(output[:, :-1].flatten(0, 1), args[0][:, 1:].flatten())


def data(count: int = 12, length: int = 16) -> list[Batch]:
    source = torch.Generator().manual_seed(1)
    starts = torch.randint(0, VOCABULARY, (count, 1), generator=source)
    steps = torch.randint(1, 4, (count, 1), generator=source)
    ids = (starts + steps * torch.arange(length)) % VOCABULARY
    return [((row[None],), {}) for row in ids]


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A model that has learnt something, so that units differ in what they are worth."""
    return learnt(Tokens())


def learnt(model: nn.Module, steps: int = 60) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    batches = data(32)
    for step in range(steps):
        args, _ = batches[step % len(batches)]
        optimizer.zero_grad()
        torch.autograd.backward(loss_of(model(*args), args, {}))
        optimizer.step()
    return model.eval()


def mean_loss(model: nn.Module, batches: Sequence[Batch]) -> float:
    with torch.no_grad():
        return sum(loss_of(model(*args), args, {}).item() for args, _ in batches) / len(batches)


def looked_at(model: nn.Module) -> tuple[ExportedForm, Evaluator, Views]:
    """A captured model, what runs it, and how its couplings look."""
    example = (data(2)[0][0][0].repeat(2, 1),)
    program = capture(model, example, {}, dynamic=True)
    couplings = choose(eco.detect(model, example), None, containers=False)
    return program, Evaluator(program, model, example, {}), views_of(couplings, find_sites(program))


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
    removal = remove_all(hessian, weight, width)
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
        s.parameter: (s.rows, s.bias, tuple(s.matrix(program.values[s.parameter]).shape)) for s in find_sites(program)
    }
    assert found == {
        "linear.weight": (True, "linear.bias", (6, 4)),
        "conv1d": (False, "bias", (5, 6)),
        "plain": (False, None, (7, 5)),
        "turned": (True, None, (3, 7)),
    }


@pytest.mark.parametrize("training", [False, True])
def test_evaluation_is_that_of_the_module_in_eval_mode(training: bool) -> None:
    model = Tokens(dropout=0.5).double()
    args = (torch.randint(0, VOCABULARY, (3, 11)),)
    want = model.eval()(*args)
    model.train(training)
    evaluator = Evaluator(capture(model, (args[0][:2, :5],), {}, dynamic=True), model, (args[0][:2, :5],), {})
    values = {**evaluator.start(args, {}), **evaluator.weights()}
    evaluator.run(evaluator.order, values)
    torch.testing.assert_close(evaluator.returned(values, args, {}), want, rtol=1e-12, atol=1e-12)
    assert len(values) < 8  # what nothing reads any more is gone


def test_a_frozen_program_stays_as_it_is() -> None:
    model = Tokens().double()
    example = (torch.randint(0, VOCABULARY, (2, 9)),)
    program = capture(model, example, {}, dynamic=True)
    frozen = program.frozen()
    shrink_program(program, eco.plan(eco.detect(model, example), 0.5))
    evaluator = Evaluator(frozen, model, example, {})
    values = {**evaluator.start(example, {}), **evaluator.weights()}
    evaluator.run(evaluator.order, values)
    torch.testing.assert_close(evaluator.returned(values, example, {}), model(*example), rtol=1e-12, atol=1e-12)


# -- what is measured --------------------------------------------------------------------------------------------


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
    from tests.tiny import HIDDEN, Experts

    model = Experts().eval()
    x = torch.randn(2, 3, HIDDEN)
    program = capture(model, (x,), {}, dynamic=True)
    couplings = eco.detect(model, (x,))
    views = views_of(choose(couplings, None, containers=False), find_sites(program))
    assert [c.name for c in views.others] == [c.name for c in couplings.offered if c.size > 1]
    batches: list[Batch] = [((torch.randn(1, 3, HIDDEN),), {}) for _ in range(4)]

    def loss(output: Tensor, args: Any, kwargs: Any) -> Tensor:
        return output.square().mean()

    curvature = Collector(Evaluator(program, model, (x,), {}), views).run(batches, loss)
    found = unit_scores(views, curvature, {}, 0.01)
    want = eco.score(model, couplings, batches, loss=loss, method="gate-fisher")
    for name, values in found.items():
        torch.testing.assert_close(values, want[name] * len(batches) / 2, rtol=1e-5, atol=0)


# -- bases -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rotary", "fused", "bias"), [(True, False, False), (False, False, True), (False, True, True)])
def test_a_change_of_basis_changes_nothing_but_the_basis(rotary: bool, fused: bool, bias: bool) -> None:
    """The function stays, and what was measured before is what would be measured after."""
    model = Tokens(rotary=rotary, fused=fused, bias=bias).double().eval()
    program, evaluator, views = looked_at(model)
    batches = data(6)
    want = [model(*args) for args, _ in batches]
    nothing = Views((), (), ())
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


def pair(model: nn.Module, ratio: float) -> tuple[Evaluator, Evaluator]:
    """A program and what is left of it without some FFN units."""
    program, _, _ = looked_at(model)
    example = (data(2)[0][0][0].repeat(2, 1),)
    dense = Evaluator(program.frozen(), model, example, {})
    shrink_program(program, eco.plan(eco.detect(model, example), ratio, kinds=["ffn"]))
    return dense, Evaluator(program, model, example, {})


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
            (site,) = (s for s in find_sites(evaluator.program) if s.parameter == "layers.0.down.weight")
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


def test_couplings_that_are_known_are_taken_and_those_of_another_model_refused(trained: nn.Module) -> None:
    batches = data()
    couplings = eco.detect(trained, batches[0][0])
    options: dict[str, Any] = {"ratio": 0.3, "batches": batches, "loss": loss_of}
    want, small = (
        eco.compress(trained, batches[0][0], couplings=c, distillation=0, **options) for c in (None, couplings)
    )
    assert want(*batches[0][0]).equal(small(*batches[0][0]))
    other = nn.Sequential(nn.Embedding(VOCABULARY, 4), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, VOCABULARY))
    for method in ("second-order", "magnitude"):
        with pytest.raises(PlanError, match="made for another model"):
            eco.compress(other, batches[0][0], couplings=couplings, method=method, **options)
        with pytest.raises(PlanError, match="pass allow= to detect"):
            eco.compress(trained, batches[0][0], couplings=couplings, method=method, allow="cache", **options)


# -- distillation ------------------------------------------------------------------------------------------------


def predictions(evaluator: Evaluator, batches: Sequence[Batch]) -> Tensor:
    found: list[Tensor] = []
    for args, kwargs in batches:
        values = {**evaluator.start(args, kwargs), **evaluator.weights()}
        evaluator.run(evaluator.order, values)
        found.append(evaluator.returned(values, args, kwargs).flatten(0, -2))
    return torch.cat(found).log_softmax(-1)


def test_distillation_brings_the_predictions_of_unseen_data_nearer(trained: nn.Module) -> None:
    dense, small = pair(trained, 0.5)
    unseen = data(8, 14)
    want, before = predictions(dense, unseen).exp(), predictions(small, unseen)
    first, last = Distill(length=64, rate=0.01).run(dense, small, data(16), loss_of)
    assert last < first
    after = predictions(small, unseen)
    assert (want * after).sum() > (want * before).sum()  # the cross-entropies' part of the divergence


def test_the_unit_of_the_loss_changes_nothing_but_the_divergence(trained: nn.Module) -> None:
    found = []
    for factor in (1.0, 1024.0):
        dense, small = pair(trained, 0.5)

        def loss(y: Any, args: Any, kwargs: Any, factor: float = factor) -> Tensor:
            return factor * loss_of(y, args, kwargs)

        found.append((*Distill(length=16).run(dense, small, data(8), loss), predictions(small, data(2, 14))))
    (first, last, one), (scaled_first, scaled_last, other) = found
    assert (scaled_first, scaled_last) == pytest.approx((1024 * first, 1024 * last), rel=1e-3)
    torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


def test_a_loss_that_cannot_take_zeros_distils_too(trained: nn.Module) -> None:
    """How much is lost cannot be told then."""

    def loss(y: Tensor, args: Any, kwargs: Any) -> Tensor:
        return loss_of(y / y.square().mean(-1, keepdim=True).sqrt(), args, kwargs)

    dense, small = pair(trained, 0.5)
    first, last = Distill(length=32).run(dense, small, data(16), loss)
    assert last < first


def test_rounding_of_products_is_the_callers_again_afterwards(trained: nn.Module) -> None:
    dense, small = pair(trained, 0.5)
    seen = []

    def loss(y: Any, args: Any, kwargs: Any) -> Tensor:
        seen.append(torch.get_float32_matmul_precision())
        if len(seen) > 50:
            raise KeyboardInterrupt
        return loss_of(y, args, kwargs)

    with pytest.raises(KeyboardInterrupt):
        Distill(length=64).run(dense, small, data(8), loss)
    assert set(seen) == {"highest", "medium"}
    assert torch.get_float32_matmul_precision() == "highest"


def test_the_divergence_of_a_cross_entropy_is_that_of_the_predictions_whatever_the_labels() -> None:
    """Its gradient at the output is softmax(y) - softmax(y₀)."""
    torch.manual_seed(0)
    output, dense = torch.randn(2, 5, VOCABULARY, requires_grad=True), torch.randn(2, 5, VOCABULARY)
    for labels in torch.randint(0, VOCABULARY, (3, 2, 5)):
        batch: Batch = ((labels,), {})

        def loss(logits: Tensor, args: Any, kwargs: Any) -> Tensor:
            return cross_entropy(logits.flatten(0, 1), args[0].flatten(), reduction="sum")

        value = distill._divergence(output, distill._slopes(dense, batch, loss), batch, loss)
        (found,) = torch.autograd.grad(value, output)
        torch.testing.assert_close(found, output.softmax(-1) - dense.softmax(-1))


def test_a_loss_that_the_model_computes_itself_distils_nothing_and_says_so(trained: nn.Module) -> None:
    class Judged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = trained

        def forward(self, ids: Tensor) -> Tensor:
            return cross_entropy(self.inner(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    batches = data()
    with pytest.warns(UserWarning, match="linear in what the model returns.*logits"):
        eco.compress(Judged(), batches[0][0], ratio=0.3, batches=batches, loss=lambda y, args, kwargs: y)


# -- the recipe --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"distillation": 0}, {"basis": False, "gates": False}])
def test_what_does_nothing_goes_first_and_costs_nothing(options: dict[str, Any]) -> None:
    """Dead units: after their removal the loss is the dense one's."""
    model = learnt(Tokens(bias=True))
    with torch.no_grad():
        for layer in model.layers:  # type: ignore[union-attr]  # a ModuleList
            layer.down.weight[:, ::3] = 0
    batches = data()
    small = eco.compress(model, batches[0][0], ratio=0.2, batches=batches, loss=loss_of, kinds=["ffn"], **options)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    assert mean_loss(small, batches) == pytest.approx(mean_loss(model, batches), abs=1e-5)


@pytest.mark.parametrize("shape", [{}, {"rotary": False, "fused": True, "bias": True}])
def test_it_beats_removal_alone_and_more_costs_more(shape: dict[str, Any]) -> None:
    model = learnt(Tokens(**shape))
    before = deepcopy(model.state_dict())
    batches, losses = data(), [mean_loss(model, data())]
    for ratio in (0.2, 0.4, 0.6):
        small = eco.compress(model, batches[0][0], ratio=ratio, batches=batches, loss=loss_of)
        bare = eco.compress(model, batches[0][0], ratio=ratio, batches=batches, loss=loss_of, method="gate-fisher")
        assert mean_loss(small, batches) < mean_loss(bare, batches)
        losses.append(mean_loss(small, batches))
    assert all(b > a - 0.005 for a, b in pairwise(losses)), losses
    for name, value in model.state_dict().items():
        assert value.equal(before[name]), name


def test_it_is_deterministic_and_reads_batches_of_other_sizes(trained: nn.Module) -> None:
    batches = [*data(6, 12), *data(6, 9)]
    first, second = (
        eco.compress(trained, batches[0][0], ratio=0.3, batches=iter(batches), loss=loss_of, distillation=16)
        for _ in range(2)
    )
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert a.equal(b)


def test_bfloat16_and_training_mode_stay_what_they_are() -> None:
    model = learnt(Tokens(dropout=0.2)).bfloat16().train()
    small = eco.compress(model, data()[0][0], ratio=0.3, batches=data(), loss=loss_of, distillation=16)
    assert small.training
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    assert all(p.isfinite().all() and p.requires_grad for p in small.parameters())


def test_it_works_in_inference_mode(trained: nn.Module) -> None:
    batches = data()
    with torch.inference_mode():
        small = eco.compress(trained, batches[0][0], ratio=0.3, batches=batches, loss=loss_of, distillation=16)
    assert not any(p.is_inference() for p in small.parameters())


def test_a_compressed_model_is_saved_and_loaded(trained: nn.Module, tmp_path: Any) -> None:
    small = eco.compress(trained, data()[0][0], ratio=0.3, batches=data(), loss=loss_of, distillation=0)
    eco.save(small, tmp_path / "small")
    again = eco.load(tmp_path / "small", model=Tokens)
    assert mean_loss(again, data()) == pytest.approx(mean_loss(small, data()), abs=1e-6)


class InPlace(nn.Module):
    """Layers that overwrite what others have computed."""

    def __init__(self, *, overwrite: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.overwrite = overwrite
        self.up = nn.ModuleList(nn.Linear(6, 24) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(24, 6) for _ in range(3))
        self.unused = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        for up, down in zip(self.up, self.down, strict=True):
            self.unused(x)
            h = torch.relu_(up(x)) if self.overwrite else up(x).relu()
            x = x.add_(down(h)) if self.overwrite else x + down(h)
        return x


def test_what_overwrites_is_compressed_like_what_does_not() -> None:
    batches: list[Batch] = [((torch.randn(8, 6),), {}) for _ in range(8)]
    found = [
        eco.compress(
            InPlace(overwrite=overwrite), batches[0][0], ratio=0.5, batches=batches, loss=square, distillation=16
        )
        for overwrite in (False, True)
    ]
    for (name, a), (_, b) in zip(*(model.named_parameters() for model in found), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


class Memory:
    """What a call leaves for the next one."""

    def __init__(self) -> None:
        self.total = torch.zeros(8, 6)


class Remembering(InPlace):
    """Overwrites its argument, and an object that it is given."""

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        x = super().forward(x.add_(1.0))
        if memory is not None:
            memory.total = memory.total + x
        return x


def test_calibration_data_stays_as_it_is() -> None:
    batches: list[Batch] = [((torch.randn(8, 6), Memory()), {}) for _ in range(4)]
    before = [args[0].clone() for args, _ in batches]
    example = (torch.randn(8, 6), Memory())
    eco.compress(Remembering(overwrite=True), example, ratio=0.5, batches=batches, loss=square, distillation=16)
    for (args, _), values in zip(batches, before, strict=True):
        assert args[0].equal(values)
        assert not args[1].total.any()


# -- bad input ---------------------------------------------------------------------------------------------------


class Routed(nn.Module):
    """Two experts, of which the second one never gets a token."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 6))
        self.second = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 6))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.first(x) + self.second(x * (x > 1e6))
        return out


def square(output: Tensor, args: Any, kwargs: Any) -> Tensor:
    return output.square().mean()


def test_what_the_data_never_reaches_stays_whole() -> None:
    model = Routed()
    nn.init.zeros_(model.second[0].bias)  # type: ignore[arg-type]  # of a linear layer
    batches: list[Batch] = [((torch.randn(4, 6),), {}) for _ in range(4)]
    with pytest.warns(UserWarning, match=r"never reaches second.*stay whole"):
        small = eco.compress(model, batches[0][0], ratio=0.5, batches=batches, loss=square)
    assert small.get_parameter("second.0.weight").equal(model.second[0].weight)  # type: ignore[arg-type]
    assert small.get_parameter("first.0.weight").shape == (6, 6)
    assert all(p.isfinite().all() for p in small.parameters())


def test_constant_inputs_make_no_trouble() -> None:
    """Gram matrices of rank one."""
    model = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6))
    batches: list[Batch] = [((torch.ones(4, 6),), {}) for _ in range(4)]
    small = eco.compress(model, batches[0][0], ratio=0.5, batches=batches, loss=square)
    torch.testing.assert_close(small(*batches[0][0]), model(*batches[0][0]), rtol=1e-3, atol=1e-3)


def nan_loss(output: Tensor, args: Any, kwargs: Any) -> Tensor:
    return output.sum() * float("nan")


def constant_loss(output: Tensor, args: Any, kwargs: Any) -> Tensor:
    return torch.zeros(())


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"loss": None}, ScoreError, "needs a loss"),
        ({"batches": []}, ScoreError, "no batches to calibrate with"),
        ({"batches": [torch.ones(2, 3)]}, ScoreError, "batch 0 is not a pair"),
        ({"loss": constant_loss}, ScoreError, "loss of batch 0 does not depend on the model"),
        ({"loss": nan_loss}, ScoreError, "loss of batch 0 is nan"),
        ({"batches": [*data(2), ((data(1)[0][0][0], 1), {})]}, InputError, "the call of a batch is not that of"),
        ({"ratio": 1.5}, EcospaError, "ratio=1.5"),
        ({"damping": 0}, ScoreError, "damping=0 is not a factor"),
        ({"distillation": -1}, ScoreError, "distillation=-1 is not a count"),
        ({"step": None}, ScoreError, "step=None is not a count"),
        ({"mixed": 1.5}, ScoreError, "mixed=1.5 is not a share"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(
    trained: nn.Module, change: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    before = deepcopy(trained.state_dict())
    given: dict[str, Any] = {"ratio": 0.3, "batches": data(2), "loss": loss_of, **change}
    with pytest.raises(error, match=sentence) as raised:
        eco.compress(trained, data()[0][0], **given)
    assert "\n" not in str(raised.value)
    assert all(value.equal(before[name]) for name, value in trained.state_dict().items())


def test_activations_that_overflow_are_told() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    with torch.no_grad():
        model[2].weight.zero_()  # type: ignore[operator]  # a linear layer
    batches: list[Batch] = [((torch.full((2, 4), 1e30),), {})]
    with pytest.raises(ScoreError, match=r"input of '2.weight' is not finite in the calibration data"):
        eco.compress(model, batches[0][0], ratio=0.5, batches=batches, loss=lambda y, a, k: (y * 1e-30).sum())
