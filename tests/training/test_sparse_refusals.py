"""Sparse training where something is amiss: what waits, what is kept, what is refused, and what changes no decision."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import ecospa_fx as eco
from ecospa_fx.errors import TrainingError
from tests.training.test_sparse import adamw, mlp, points, said, sparse_mlp, train


def test_gradients_that_are_not_finite_postpone_a_shrink(caplog: pytest.LogCaptureFixture) -> None:
    model = mlp()
    optimizer = adamw(model)
    sparse = sparse_mlp(model, optimizer=optimizer)
    train(sparse, optimizer, 0, 1)
    weight = model.get_parameter("3.weight")
    torch.autograd.backward(sparse.model(points(1)).square().mean())
    assert weight.grad is not None
    weight.grad[0, 0] = float("nan")
    sparse.step()
    assert sparse.removed == 0
    assert "the shrink of step 2 waits" in caplog.text
    optimizer.zero_grad()
    train(sparse, optimizer, 2, 3)
    assert sparse.removed == pytest.approx(0.5)
    assert [s.step for s in sparse.history] == [3]


@pytest.mark.slow
def test_gradients_that_are_missing_postpone_a_shrink(caplog: pytest.LogCaptureFixture) -> None:
    sparse = sparse_mlp(mlp(), schedule=eco.OneShot(1))
    torch.autograd.backward(sparse.model(points()).square().mean())
    sparse.model.zero_grad()
    sparse.step()
    assert sparse.removed == 0
    assert "the shrink of step 1 waits" in caplog.text


class Idle(nn.Module):
    """Two branches, the second of which no gradient reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.busy, self.idle = mlp(), mlp()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.busy(x) + 0 * self.idle(x)
        return out


@pytest.mark.slow
@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_units_that_no_gradient_reaches_are_kept(caplog: pytest.LogCaptureFixture, allocation: str) -> None:
    model = Idle()
    optimizer = adamw(model)
    sparse = sparse_mlp(model, optimizer=optimizer, target=0.25, allocation=allocation)
    train(sparse, optimizer, 0, 3)
    assert [(s.name, s.kept) for s in sparse.plan] == [("busy.ffn", 6), ("idle.ffn", 12)]
    assert said(caplog) == ["coupling idle.ffn keeps its units at step 2: no gradient reached them lately"]


@pytest.mark.slow
def test_a_step_without_a_backward_pass_is_ignored(caplog: pytest.LogCaptureFixture) -> None:
    model = mlp()
    optimizer = adamw(model)
    sparse = sparse_mlp(model, optimizer=optimizer)
    torch.autograd.backward(sparse.model(points()).square().mean())
    for _ in range(4):
        sparse.step()
    assert sparse.state_dict()["step"] == 1
    assert sparse.removed == 0
    assert said(caplog) == ["step() is ignored: no backward pass reached the model since its last call"]


@pytest.mark.slow
def test_gradient_accumulation_clipping_and_scaling_change_no_decision() -> None:
    plans = []
    for parts, scale, clip in ((1, 1.0, 1e9), (2, 1.0, 1e9), (1, 2.0**12, 1e9), (1, 1.0, 1e-3)):
        torch.manual_seed(0)
        model = mlp(40)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        sparse = sparse_mlp(model, optimizer=optimizer, schedule=eco.OneShot(4))
        for step in range(4):
            for part in points(step).chunk(parts):
                torch.autograd.backward(sparse.model(part).square().mean() * (scale / parts))
            nn.utils.clip_grad_norm_(model.parameters(), clip)
            sparse.step()
            optimizer.zero_grad()
        plans.append(sparse.plan)
    assert plans[0].removed_parameters > 0
    assert all(plan == plans[0] for plan in plans)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gate-fisher", "fisher", "taylor"])
def test_products_in_bfloat16_tell_what_exact_ones_tell(method: str) -> None:
    """Of the same gradients; those in bfloat16 are off by as much themselves."""
    found = []
    half = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)).bfloat16()
    for dtype in (torch.bfloat16, torch.float64):
        model = copy.deepcopy(half).to(dtype)
        sparse = eco.SparseTraining(model, (torch.zeros(4, 64, dtype=dtype),), scores=method, schedule=eco.OneShot(9))
        source = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=source).bfloat16().to(dtype)
        sparse._running.gather()
        (scores,) = sparse._running.scores().values()
        found.append(scores)
    error = (found[0] - found[1]).abs().max() / found[1].max()
    assert 0 < error < 4e-3


@pytest.mark.slow
def test_a_gradient_scaler_and_autocast_go_on_working() -> None:
    model = mlp().float()
    optimizer, scaler = adamw(model), torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)
    sparse = eco.SparseTraining(model, (points().float(),), optimizer=optimizer, schedule=eco.OneShot(2))
    for step in range(5):
        with torch.autocast("cpu", torch.bfloat16):
            output = sparse.model(points(step).float())
        torch.autograd.backward(scaler.scale(output.float().square().mean()))
        sparse.step()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert sparse.removed == pytest.approx(0.5)
    assert scaler.get_scale() == 2.0**10


@pytest.mark.slow
def test_what_cannot_work_is_refused() -> None:
    model, other = mlp(), mlp()
    with pytest.raises(TrainingError, match="holds 4 of 4 parameters that are not this model's"):
        sparse_mlp(model, optimizer=adamw(other))
    with pytest.raises(TrainingError, match="training ends at step 5"):
        sparse_mlp(mlp(), schedule=eco.OneShot(6), total_steps=5)
    with pytest.raises(TrainingError, match=r"target=0.98 is out of reach because floor=0.05"):
        sparse_mlp(mlp(), target=0.98)
    with pytest.raises(TrainingError, match=r"target=1\.5 is no share"):
        sparse_mlp(mlp(), target=1.5)
    with pytest.raises(TrainingError, match="'magnitude' cannot be taken while training"):
        sparse_mlp(mlp(), scores="magnitude")
    for options, told in (
        ({"band": (1.1, 2.0)}, "band="),
        ({"allocation": "best"}, "allocation="),
        ({"window": 0}, "window=0"),
        ({"floor": 1.0}, "floor=1.0"),
    ):
        with pytest.raises(TrainingError, match=told):
            sparse_mlp(mlp(), **options)


@pytest.mark.slow
def test_frozen_and_shared_parameters_are_refused() -> None:
    frozen = mlp()
    frozen.get_parameter("3.weight").requires_grad_(False)
    with pytest.raises(TrainingError, match="parameters are frozen"):
        eco.SparseTraining(frozen, (points(),), schedule=eco.OneShot(1))
    model, other = mlp(), nn.Linear(4, 12).double()
    other.weight = model.get_parameter("0.weight")
    with pytest.raises(TrainingError, match=r"parameter '0\.weight' belongs to another Linear too"):
        sparse_mlp(model)
    del other
    sparse_mlp(model)


def test_a_forgotten_optimizer_is_noticed_before_anything_changes() -> None:
    model = mlp()
    sparse = eco.SparseTraining(model, (points(),), schedule=eco.OneShot(1))
    torch.autograd.backward(sparse.model(points()).square().mean())
    with pytest.raises(TrainingError, match="no optimizer is known"):
        sparse.step()
    assert model.get_parameter("0.weight").shape == (12, 4)
