"""The driver: exact after every shrink, the optimizer in step, within what was asked for, and made up for."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import ecospa_fx as eco
from ecospa_fx.errors import TrainingError
from ecospa_fx.importance.score import Batch
from tests.support.tiny import Tiny, batches, loss, tiny


def mlp(width: int = 12, dropout: float = 0.0) -> nn.Sequential:
    """One coupling of `width` neurons, in float64."""
    layers = nn.Linear(4, width), nn.GELU(), nn.Dropout(dropout), nn.Linear(width, 3)
    return nn.Sequential(*layers).double()


def points(seed: int = 0) -> Tensor:
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def sparse_mlp(model: nn.Module, **options: Any) -> eco.SparseTraining:
    """Training of `mlp` with the optimizer `adamw`, if none is given."""
    given = {"optimizer": adamw(model), "schedule": eco.OneShot(2), **options}
    return eco.SparseTraining(model, (points(),), **given)


def train(sparse: eco.SparseTraining, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    """The steps after `first` up to `last`, each with data of its own number."""
    for step in range(first, last):
        torch.autograd.backward(sparse.model(points(step)).square().mean())
        sparse.step()
        optimizer.step()
        optimizer.zero_grad()


def scattered(small: nn.Module, dense: nn.Module, plan: eco.Plan) -> None:
    """Give the dense model the weights of the small one, and zero elsewhere."""
    masks, weights = plan.masks(dense), dict(small.named_parameters())
    with torch.no_grad():
        for name, weight in dense.named_parameters():
            mask = masks.get(name, torch.ones_like(weight, dtype=torch.bool))
            weight.zero_()
            weight[mask] = weights[name].flatten()


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the library logged."""
    return [record.message for record in caplog.records if record.name.startswith("ecospa_fx")]


class Masked:
    """The dense model in place of a sparse one: weights, gradients and states multiplied by the masks."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer
        self.masks: dict[str, Tensor] = {}

    def step(self) -> None:
        for name, weight in self.model.named_parameters():
            mask = self.masks.get(name)
            for tensor in (weight.data, weight.grad, *self.optimizer.state[weight].values()):
                if mask is not None and isinstance(tensor, Tensor) and tensor.shape == mask.shape:
                    tensor.mul_(mask)
        self.optimizer.step()
        self.optimizer.zero_grad()


@pytest.mark.slow
def test_training_goes_on_as_that_of_the_masked_model() -> None:
    """Forward, backward and AdamW through several shrinks, in float64: weights equal those under masks."""
    model, dense = tiny(1).eval(), tiny(1).eval()
    optimizer, other = adamw(model), Masked(dense, adamw(dense))
    schedule = eco.Linear(start=3, end=9, every=3)
    sparse = eco.SparseTraining(model, *batches(1)[0], optimizer=optimizer, target=0.6, schedule=schedule)
    whole, shapes = sparse.plan, {n: p.shape for n, p in dense.named_parameters()}
    for batch in batches(12):
        for one in (sparse.model, dense):
            torch.autograd.backward(loss(one(*batch[0]), *batch))
        sparse.step()
        other.masks = sparse.plan.masks(dense)
        optimizer.step()
        optimizer.zero_grad()
        other.step()
        for name, weight in dense.named_parameters():
            mask = other.masks.get(name, torch.ones_like(weight, dtype=torch.bool))
            kept = sparse.model.get_parameter(name)
            torch.testing.assert_close(kept.flatten(), weight[mask], rtol=1e-9, atol=1e-12)
    assert whole.removed_parameters == 0
    assert [s.step for s in sparse.history] == [3, 6, 9]
    assert abs(sparse.removed - 0.6) < 0.05
    assert {n: tuple(p.shape) for n, p in dense.named_parameters()} == {n: tuple(s) for n, s in shapes.items()}
    assert list(sparse.model.state_dict()) == list(dense.state_dict())


@pytest.mark.slow
def test_dropout_follows_the_mode() -> None:
    """The graph draws the same random numbers as the model would, and none in eval mode."""
    model, dense = tiny(1), tiny(1)
    sparse = eco.SparseTraining(model, *batches(1)[0], optimizer=adamw(model), schedule=eco.OneShot(1), kinds=["qk"])
    batch = batches(1, seed=5)[0]
    torch.autograd.backward(loss(sparse.model(*batch[0]), *batch))
    sparse.step()
    assert sparse.removed > 0.3
    scattered(sparse.model, dense, sparse.plan)
    for training in (True, False, True):
        outputs = []
        for one in (dense.train(training), sparse.model.train(training)):
            torch.manual_seed(3)
            outputs.append(one(*batch[0]))
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-9, atol=1e-12)
    assert not torch.equal(sparse.model(*batch[0]), sparse.model.eval()(*batch[0]))


def test_modes_are_those_of_the_models_parts() -> None:
    model = mlp(dropout=0.5)
    model[2].eval()
    sparse = sparse_mlp(model)
    assert sparse.model.training
    assert torch.equal(sparse.model(points()), sparse.model(points()))
    assert [m.training for m in model] == [True, True, False, True]


class Moody(nn.Module):
    """Computes something else in eval mode, by its own code."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = mlp()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inside(x)
        return out if self.training else 2 * out


def test_a_model_whose_own_code_asks_for_the_mode_gets_a_graph_for_each(caplog: pytest.LogCaptureFixture) -> None:
    """Both modes follow every shrink, copies too, on one set of parameters."""
    model, dense = Moody(), Moody()
    optimizer = adamw(model)
    sparse = sparse_mlp(model, optimizer=optimizer)
    average = copy.deepcopy(sparse.model)
    sparse.follow(average)
    train(sparse, optimizer, 0, 3)
    assert sparse.removed == pytest.approx(0.5)
    for small in (sparse.model, average):
        scattered(small, dense, sparse.plan)
        for training in (True, False):
            got, want = (one.train(training)(points(9)) for one in (small, dense))
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    assert list(sparse.model.state_dict()) == list(dense.state_dict())
    assert sparse.model.float()(points(9).float()).dtype is torch.float32
    assert not said(caplog)


@pytest.mark.slow
def test_whoever_holds_modules_and_parameters_goes_on_holding_them() -> None:
    model = tiny(1)
    optimizer = adamw(model)
    sparse = eco.SparseTraining(model, *batches(1)[0], optimizer=optimizer, schedule=eco.OneShot(1))
    held, weight = sparse.model.get_submodule("layers.0.ffn"), model.get_parameter("layers.0.ffn.down.weight")
    calls: list[int] = []
    held.register_forward_hook(lambda *_: calls.append(1))
    batch = batches(1)[0]
    torch.autograd.backward(loss(sparse.model(*batch[0]), *batch))
    sparse.step()
    optimizer.step()
    kept = sparse.plan["layers.0.ffn.ffn"].kept
    assert weight.shape == (8, kept)
    assert kept < 12
    assert sparse.model.get_submodule("layers.0.ffn") is held
    assert sparse.model.get_parameter("layers.0.ffn.down.weight") is weight
    assert any(p is weight for group in optimizer.param_groups for p in group["params"])
    sparse.model(*batch[0])
    assert len(calls) == 2
    again = copy.deepcopy(sparse.model)
    torch.testing.assert_close(again.eval()(*batch[0]), sparse.model.eval()(*batch[0]))


@pytest.mark.slow
def test_averages_follow_on_request() -> None:
    model = tiny(1).eval()
    optimizer = adamw(model)
    sparse = eco.SparseTraining(model, *batches(1)[0], optimizer=optimizer, schedule=eco.OneShot(2))
    average = copy.deepcopy(sparse.model)
    masters = {name: p.detach().clone() for name, p in sparse.model.named_parameters()}
    sparse.follow(average)
    sparse.follow(masters)
    before = masters["layers.0.ffn.down.weight"].clone()
    for batch in batches(3):
        torch.autograd.backward(loss(sparse.model(*batch[0]), *batch))
        sparse.step()
        optimizer.step()
        optimizer.zero_grad()
    dense = tiny(1).eval()
    mask = sparse.plan.masks(dense)["layers.0.ffn.down.weight"]
    assert torch.equal(masters["layers.0.ffn.down.weight"].flatten(), before[mask])
    scattered(average, dense, sparse.plan)
    torch.testing.assert_close(average(*batch[0]), dense(*batch[0]), rtol=1e-9, atol=1e-12)
    with pytest.raises(TrainingError, match="make it from the model as it is now"):
        sparse.follow(tiny(1))


def test_an_optimizer_may_train_master_weights() -> None:
    """Copies in another type, which the optimizer holds in place of the parameters, are cut with its states."""
    model = mlp().float()
    sparse = eco.SparseTraining(model, (points().float(),), schedule=eco.OneShot(2))
    masters = {name: p.detach().double().requires_grad_() for name, p in sparse.model.named_parameters()}
    optimizer = torch.optim.AdamW(masters.values(), lr=1e-2)
    with pytest.raises(TrainingError, match=r"follow\(\) the copies"):
        sparse.attach(optimizer)
    sparse.follow(masters)
    sparse.attach(optimizer)
    for step in range(4):
        torch.autograd.backward(sparse.model(points(step).float()).square().mean())
        sparse.step()
        for name, parameter in sparse.model.named_parameters():
            assert parameter.grad is not None
            masters[name].grad = parameter.grad.double()
        optimizer.step()
        sparse.model.zero_grad()
        with torch.no_grad():
            for name, parameter in sparse.model.named_parameters():
                parameter.copy_(masters[name])
    assert masters["0.weight"].shape == optimizer.state[masters["0.weight"]]["exp_avg"].shape == (6, 4)


@pytest.mark.slow
def test_compiled_layers_are_compiled_anew_only_where_they_changed() -> None:
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        compiled.append(len(graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    counters.clear()
    model = nn.Sequential(mlp(), nn.Linear(3, 4).double(), mlp(), nn.Linear(3, 4).double())
    optimizer = adamw(model)
    sparse = eco.SparseTraining(
        model, (points(),), optimizer=optimizer, schedule=eco.Linear(2, 3, 1), target=0.3, band=None
    )
    run: Any = torch.compile(sparse.model, backend=backend)
    counts = []
    for step in range(6):
        torch.autograd.backward(run(points(step)).square().mean())
        sparse.step()
        optimizer.step()
        optimizer.zero_grad()
        counts.append(len(compiled))
    assert counts == [1, 1, 2, 3, 3, 3]
    assert [s.compiled for s in sparse.history] == [1, 2]
    assert "3 graphs compiled" in sparse.report()


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"allocation": "uniform"}, {"band": None}, {"round_to": 4}])
def test_the_target_is_reached_within_the_options(options: dict[str, Any]) -> None:
    model = nn.Sequential(mlp(24), nn.Linear(3, 4).double(), mlp(48), nn.Linear(3, 4).double())
    optimizer = adamw(model)
    schedule = eco.Constant(every=1, part=0.5)
    sparse = eco.SparseTraining(model, (points(),), optimizer=optimizer, target=0.5, schedule=schedule, **options)
    train(sparse, optimizer, 0, 3)
    assert sparse.removed == pytest.approx(0.5, abs=0.04)
    kept = {name: (s.kept, s.size) for name, s in ((s.name, s) for s in sparse.plan)}
    if "round_to" in options:
        assert all(k % 4 == 0 or k == size for k, size in kept.values())
    if options.get("allocation") == "uniform":
        assert len({k / size for k, size in kept.values() if size > 4}) == 1
    if not options:
        assert all(0.3 * size <= k <= 0.8 * size for k, size in kept.values())


@pytest.mark.slow
def test_at_the_start_nothing_dense_is_ever_trained() -> None:
    model = mlp()
    data: list[Batch] = [((points(seed),), {}) for seed in range(4)]
    seen: list[int] = []
    optimizer = adamw(model)
    sparse = sparse_mlp(
        model, optimizer=optimizer, schedule=eco.AtStart(), batches=data, loss=lambda y, args, kwargs: y.square().mean()
    )
    train(sparse, optimizer, 0, 2)
    seen += [sum(t.numel() for t in state.values() if t.dim()) for state in optimizer.state.values()]
    assert sparse.removed == pytest.approx(0.5)
    assert sum(seen) == 2 * sum(p.numel() for p in sparse.model.parameters())
    with pytest.raises(TrainingError, match="batches= and loss="):
        sparse_mlp(mlp(), schedule=eco.AtStart())


@pytest.mark.slow
def test_the_report_and_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model = mlp()
    optimizer = adamw(model)
    sparse = sparse_mlp(model, optimizer=optimizer)
    assert "0 of at most 1 shrinks" in sparse.report()
    train(sparse, optimizer, 0, 3)
    report = sparse.report()
    assert "50% (50% to 50%)" in report
    assert "1 of at most 1 shrinks done, 50.0% of the couplings' parameters removed (target 50.0%)" in report
    assert sparse.history[0].optimizer_bytes == 2 * 8 * (4 * 6 + 6 + 3 * 6 + 3) + 4 * 4
    sparse.plot(tmp_path / "widths.svg")
    assert "<svg" in (tmp_path / "widths.svg").read_text()


def test_nothing_is_said_in_vain(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model = mlp()
    optimizer = adamw(model)
    train(sparse_mlp(model, optimizer=optimizer), optimizer, 0, 4)
    stages = ["capture at the example's sizes", "capture with symbolic sizes"]  # each with its seconds and memory
    assert [line.split(": ")[0] for line in said(caplog)[:-1]] == stages
    assert said(caplog)[-1] == "step 2: 50.0 % removed, 51 parameters left"
    assert isinstance(tiny(1), Tiny)


def test_a_causal_mask_stays_a_flag_after_every_shrink() -> None:
    class Causal(nn.Module):
        """One head; its mask is built as a tensor, which would keep attention from its fast kernels."""

        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(4, 24), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x)[:, None].chunk(3, -1)
            mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            out: Tensor = self.out(mixed[:, 0])
            return out

    model, x = Causal().double(), points().view(2, 4, 4)
    dense, optimizer = copy.deepcopy(model), adamw(model)
    sparse = eco.SparseTraining(model, (x,), optimizer=optimizer, schedule=eco.Linear(1, 2, 1))
    for _ in range(3):
        code = vars(type(sparse.model))["_graph_code"].source
        assert "is_causal = True" in code
        assert "tril" not in code
        torch.autograd.backward(sparse.model(x).square().mean())
        sparse.step()
        optimizer.step()
    scattered(sparse.model, dense, sparse.plan)
    assert sparse.removed > 0.3
    assert torch.allclose(sparse.model(x), dense(x), rtol=1e-9)


@pytest.mark.slow
def test_what_stays_makes_up_for_what_goes() -> None:
    found, errors = {}, list[float]()
    data: list[Batch] = [((points(seed),), {}) for seed in range(8)]
    for compensate in (False, True):
        torch.manual_seed(0)
        model = mlp(32)
        dense, optimizer = copy.deepcopy(model), torch.optim.SGD(model.parameters(), lr=0.0)
        average = copy.deepcopy(model)
        sparse = sparse_mlp(model, optimizer=optimizer, schedule=eco.OneShot(1), compensate=compensate, batches=data)
        sparse.follow(dict(average.named_parameters()))
        train(sparse, optimizer, 0, 1)
        found[compensate] = sparse
        fresh = points(100)
        errors.append(float((sparse.model(fresh) - dense(fresh)).detach().square().mean()))
        for name, parameter in sparse.model.named_parameters():
            assert torch.equal(parameter, average.get_parameter(name))
    assert errors[1] < 0.3 * errors[0]
    assert found[True].plan == found[False].plan  # only what consumes the units is solved anew
    for name, parameter in found[True].model.named_parameters():
        assert torch.equal(parameter, found[False].model.get_parameter(name)) != name.startswith("3."), name


@pytest.mark.slow
def test_compensation_without_data_is_refused() -> None:
    with pytest.raises(TrainingError, match="compensate=True needs data"):
        sparse_mlp(mlp(), compensate=True)
