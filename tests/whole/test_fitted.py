"""Training and shrinking choose alike among the captures of a model, and know of the same couplings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ecospa_fx as eco
from ecospa_fx import rewrite
from ecospa_fx.errors import InputError, PlanError, TrainingError
from ecospa_fx.ir.program import Program
from ecospa_fx.passes.shrink import shrink_couplings
from ecospa_fx.training import graph_model
from tests.whole.test_beyond import Cached, noise, write_rows

WIDTH = 8


class Normed(nn.Module):
    """A pair with a norm between."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(4, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.norm(self.up(x).sigmoid()).relu())
        return out


def trained(model: nn.Module, args: Any, steps: int = 2, **options: Any) -> eco.SparseTraining:
    """A model that has been shrunk while it was trained."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    given: dict[str, Any] = {"optimizer": optimizer, "schedule": eco.OneShot(1), "scores": "taylor", **options}
    sparse = eco.SparseTraining(model, args, **given)
    for _ in range(steps):
        torch.autograd.backward(sparse.model(*args).square().mean())
        sparse.step()
        optimizer.step()
        optimizer.zero_grad()
        for buffer in sparse.model.buffers():
            buffer.detach_()
    assert sparse.removed > 0
    return sparse


def only_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let plans fit graphs without symbolic sizes alone."""
    own = shrink_couplings.shrink_program

    def picky(program: Program, plan: eco.Plan, *, fold: bool = True) -> int:
        if any(not isinstance(size, int) for node in program.inputs for size in node.meta["val"].shape):
            raise PlanError("a symbolic size")
        return own(program, plan, fold=fold)

    for module in (rewrite, graph_model):
        monkeypatch.setattr(module, "shrink_program", picky)


@pytest.mark.slow
def test_training_falls_back_to_fewer_symbolic_sizes_as_shrinking_does(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(nn.Linear(4, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 4)), torch.randn(3, 4)
    only_numbers(monkeypatch)
    small = eco.shrink(model, eco.plan(eco.detect(model, (x,)), ratio=0.5, scores="magnitude"), (x,))
    for made in (small, trained(model, (x,)).model):
        assert made(x).shape == x.shape
        with pytest.raises(InputError, match=r"of shape \[3, 4\], not \[5, 4\]"):
            made(torch.randn(5, 4))


def test_training_shrinks_what_it_is_allowed_to() -> None:
    x = torch.randn(3, 4)
    with pytest.raises(
        TrainingError, match=r"^there is nothing to shrink because no coupling is offered: .*allow='renormalise'"
    ):
        trained(Normed(), (x,))
    sparse = trained(Normed(), (x,), allow="renormalise")
    assert sparse.plan.allow == ("renormalise",)
    assert sparse.model.get_parameter("norm.weight").shape[0] < WIDTH


def test_caches_in_buffers_shrink_in_training() -> None:
    torch.manual_seed(0)
    args = noise(2, 1, 12), torch.tensor([3])
    model = Cached(write_rows).double()
    found = {(c.name, c.size) for c in eco.detect(model, args).offered}
    sparse = trained(model, args, kinds=["qk", "vo"])
    assert {(c.name, c.size) for c in sparse.couplings.offered} == found
    assert sparse.model.get_buffer("keys").shape[-1] == sparse.plan["qk"].kept < 6


def test_what_is_in_a_buffer_survives_one_shrink_after_another() -> None:
    torch.manual_seed(0)
    args = noise(2, 1, 12), torch.tensor([3])
    model = Cached(write_rows).double()
    with torch.no_grad():
        model.keys.normal_()
    dense = model.keys.clone()
    schedule = eco.Linear(start=1, end=3, every=1)
    sparse = trained(model, args, kinds=["qk"], schedule=schedule, steps=4)
    keep = sparse.plan["qk"].keep
    assert len(sparse.history) > 1
    rest = [0, 1, 2, 4]  # the model writes position 3
    for group, units in enumerate(keep):
        assert torch.equal(sparse.model.get_buffer("keys")[:, group, rest], dense[:, group, rest][..., list(units)])
