"""What stands around a model in training: statistics, averages, wrappers of layers, folders, a resumed start."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

import ecospa_fx as eco
from ecospa_fx.errors import TrainingError


class Blocks(nn.Module):
    """Residual feed-forward blocks, after a norm with statistics."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.norm = nn.BatchNorm1d(8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        for layer in self.layers:
            x = x + layer(x)
        return x


X = torch.randn(16, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 1


def square(output: Any, args: Any = (), kwargs: Any = None) -> Tensor:
    result: Tensor = output.square().mean()
    return result


def started(seed: int = 0, **options: Any) -> tuple[eco.SparseTraining, torch.optim.Optimizer]:
    model = Blocks(seed).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return eco.SparseTraining(model, (X,), optimizer=optimizer, **options), optimizer


def train(sparse: eco.SparseTraining, optimizer: torch.optim.Optimizer, steps: int = 4) -> None:
    for _ in range(steps):
        torch.autograd.backward(square(sparse.model(X)))
        sparse.step()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.slow
@pytest.mark.parametrize("mode", [True, False])
def test_statistics_are_as_they_were(mode: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = Blocks().double().train(mode)
    expected = copy.deepcopy(model).eval()(X)
    sparse = eco.SparseTraining(model, (X,), schedule=eco.OneShot(9))
    assert sparse.model.get_buffer("norm.num_batches_tracked") == 0
    assert torch.equal(sparse.model.eval()(X), expected)
    assert not [r for r in caplog.records if r.name.startswith("ecospa_fx")]


def test_statistics_that_the_user_froze_stay_frozen() -> None:
    model = Blocks().double().train()
    model.norm.eval()
    expected = copy.deepcopy(model)(X)
    sparse = eco.SparseTraining(model, (X,), schedule=eco.OneShot(9))
    assert torch.allclose(sparse.model(X), expected)
    assert not sparse.model.get_buffer("norm.running_mean").any()


@pytest.mark.slow
def test_an_averaged_model_follows() -> None:
    sparse, optimizer = started(schedule=eco.OneShot(2))
    average = AveragedModel(sparse.model, use_buffers=True)
    sparse.follow(average)
    for _ in range(3):
        train(sparse, optimizer, 1)
        average.update_parameters(sparse.model)
    widths = [p.shape for p in sparse.model.parameters()]
    assert [p.shape for p in average.module.parameters()] == widths != [p.shape for p in Blocks().parameters()]
    assert average(X).shape == X.shape


class Spare(Blocks):
    """With a buffer that nothing reads, which no graph has."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("spare", torch.zeros(3))


@pytest.mark.slow
@pytest.mark.parametrize("states", [True, False])
def test_a_copy_of_the_dense_model_follows(states: bool) -> None:
    model = Spare().double()
    average = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters())
    sparse = eco.SparseTraining(model, (X,), optimizer=optimizer, schedule=eco.OneShot(1))
    sparse.follow(average.state_dict(keep_vars=True) if states else average)
    train(sparse, optimizer, 2)
    assert [p.shape for p in average.parameters()] == [p.shape for p in sparse.model.parameters()]


@pytest.mark.slow
@pytest.mark.parametrize(("strange", "told"), [({"other": X}, "'other'"), ({}, "nothing in it")])
def test_a_copy_of_something_else_is_refused(strange: dict[str, Tensor], told: str) -> None:
    sparse, _ = started(schedule=eco.OneShot(2))
    with pytest.raises(TrainingError, match=told):
        sparse.follow(strange)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"batches": [((X,), {})], "loss": square}])
def test_layers_with_something_around_them_shrink(options: dict[str, Any]) -> None:
    found = []
    for wrapped in (False, True):
        sparse, optimizer = started(schedule=eco.Linear(start=2, end=4, every=2), **options)
        layers: Any = sparse.model.get_submodule("layers")
        for i in range(len(layers) if wrapped else 0):
            layers[i] = checkpoint_wrapper(layers[i])
        average = copy.deepcopy(sparse.model)
        sparse.follow(average)
        train(sparse, optimizer, 6)
        assert sparse.removed == pytest.approx(0.5, abs=0.02)
        found.append((sparse.model(X), average(X)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.slow
def test_a_model_in_training_is_saved_as_it_is(tmp_path: Path) -> None:
    sparse, optimizer = started(schedule=eco.Linear(start=1, end=3, every=2))
    average = copy.deepcopy(sparse.model)
    sparse.follow(average)
    for steps in (0, 4):
        train(sparse, optimizer, steps)
        for name, tree in (("own", sparse.model), ("average", average)):
            folder = tmp_path / f"{name}-{len(sparse.history)}"
            eco.save(tree.eval(), folder)
            back = eco.load(folder, model=lambda: Blocks(1).double())
            assert torch.allclose(back.eval()(X), tree(X))
            tree.train()
    assert len(sparse.history) == 2


@pytest.mark.slow
def test_a_start_is_resumed_with_other_weights() -> None:
    options: dict[str, Any] = {"schedule": eco.AtStart(), "batches": [((X,), {})], "loss": square}
    sparse, optimizer = started(**options)
    train(sparse, optimizer)
    again, _ = started(7, **options, state=sparse.state_dict())
    again.model.load_state_dict(sparse.model.state_dict())
    assert again.plan == sparse.plan
    assert torch.equal(again.model(X), sparse.model(X))
    other, _ = started(7, **options)
    with pytest.raises(TrainingError, match="give it as state="):
        other.load_state_dict(sparse.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("rows", [X[:1], torch.ones_like(X), torch.zeros_like(X)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inputs_that_do_not_vary(rows: Tensor, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 3)).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters())
    batches: list[Any] = [((rows.to(dtype),), {})]
    x = X.to(dtype)
    sparse = eco.SparseTraining(
        model, (x,), optimizer=optimizer, schedule=eco.OneShot(1), batches=batches, loss=square, target=0.5
    )
    torch.autograd.backward(square(sparse.model(x)))
    sparse.step()
    assert sparse.removed == pytest.approx(0.5, abs=0.05)
    assert sparse.model(x).isfinite().all()


def test_what_is_no_schedule_and_no_optimizer_is_named() -> None:
    schedule: Any = "cubic"
    with pytest.raises(TrainingError, match="schedule='cubic' is none"):
        started(schedule=schedule)
    optimizer: Any = "adam"
    with pytest.raises(TrainingError, match="no optimizer"):
        eco.SparseTraining(Blocks().double(), (X,), optimizer=optimizer, schedule=eco.OneShot(2))


@pytest.mark.slow
def test_compress_with_fewer_samples_than_units() -> None:
    """The mean over tokens leaves four rows for sixteen units, in a basis that stretches what does not vary."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
            self.head = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 3))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head((x + self.body(x)).mean(1))
            return y

    torch.manual_seed(0)
    model, x = Pooled(), torch.randn(4, 6, 16)
    for rows in (x, torch.zeros_like(x), x[:1]):
        small = eco.compress(model, (x,), ratio=0.5, batches=[((rows,), {})], loss=square, distillation=4)
        assert small(x).isfinite().all()
