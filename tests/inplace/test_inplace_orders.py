"""Buffers that hold an order of channels: counted anew in the graph, and in the user's own module."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ecospa_fx as eco
from ecospa_fx.verify import masked_error

ORDER = torch.tensor([3, 0, 7, 1, 5, 2, 6, 4])


class Permuted(nn.Module):
    """An FFN whose hidden units are put in an order."""

    def __init__(self, persistent: bool = True, order: Tensor = ORDER) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(len(order), 6)
        self.register_buffer("order", order.clone(), persistent=persistent)
        self.order: Tensor

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.down(torch.relu(self.up(x))[..., self.order])
        return result


class Changed(Permuted):
    """Turns its order round at every call."""

    def forward(self, x: Tensor) -> Tensor:
        result = super().forward(x)
        self.order.copy_(self.order.flip(0))
        return result


class Twice(Permuted):
    """Reads two things in the same order, of which each may keep others."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        both = [f(x).relu()[..., self.order] for f in (self.up, self.other)]
        result: Tensor = self.down(both[0]) + both[1].sum(-1, keepdim=True)
        return result


def planned(model: nn.Module, x: Tensor, ratio: float = 0.4, seed: int = 0) -> eco.Plan:
    return eco.plan(eco.detect(model, (x,)), ratio=ratio, scores="random", seed=seed)


@pytest.mark.parametrize("persistent", [True, False])
def test_an_order_is_counted_anew(persistent: bool, tmp_path: Path) -> None:
    """In graph and in place the buffer says where what is left stands; in place again, saved and loaded too."""
    torch.manual_seed(0)
    model, x = Permuted(persistent).double().eval(), torch.randn(2, 3, 6, dtype=torch.float64)
    plan = planned(model, x)
    kept = [unit for unit in ORDER.tolist() if unit in plan.selections[0].keep[0]]
    left = [sorted(kept).index(unit) for unit in kept]
    small = eco.shrink(model, plan, (x,))
    assert masked_error(model, small, plan, (x,)) < 1e-12
    assert {name: b.tolist() for name, b in small.named_buffers()} == {"order": left}
    assert ("order" in small.state_dict()) is persistent
    assert model.order.equal(ORDER)
    here = copy.deepcopy(model)
    eco.shrink_(here, plan, (x,))
    assert here.order.tolist() == left
    assert here.order.dtype is torch.int64
    assert torch.equal(here(x), small(x))
    eco.save(small, tmp_path / "small")
    assert torch.equal(eco.load(tmp_path / "small", model=lambda: Permuted(persistent).double())(x), small(x))
    again = planned(small, x, 0.3)
    assert masked_error(small, eco.shrink(small, again, (x,)), again, (x,)) < 1e-12
    eco.shrink_(here, planned(here, x, 0.3), (x,))
    assert sorted(here.order.tolist()) == list(range(here.up.out_features))


def test_a_selection_that_stays_whole_is_counted_anew() -> None:
    """What is never read goes; the order has as many entries as before, and other ones."""
    torch.manual_seed(0)
    model, x = Permuted(order=torch.tensor([-1, 2, 5])).double().eval(), torch.randn(2, 6, dtype=torch.float64)
    couplings = eco.detect(model, (x,))
    unread = next(c for c in couplings.offered if c.size == 5)
    assert all(m.parameter.startswith("up") for m in unread.members)
    plan = eco.Plan.keeping(couplings, {unread.name: [0, 3]})
    small = eco.shrink(model, plan, (x,))
    assert masked_error(model, small, plan, (x,)) < 1e-12
    assert small.get_buffer("order").tolist() == [4, 1, 3]
    eco.shrink_(model, plan, (x,))
    assert model.order.tolist() == [4, 1, 3]


def test_readers_that_keep_different_units() -> None:
    """Each gets an order of its own, and in place, where one buffer cannot hold both, nothing is written."""
    torch.manual_seed(0)
    model, x = Twice().double().eval(), torch.randn(2, 6, dtype=torch.float64)
    plan = planned(model, x)
    assert len(plan) == 2
    assert plan.selections[0].keep != plan.selections[1].keep
    assert masked_error(model, eco.shrink(model, plan, (x,)), plan, (x,)) < 1e-12
    with pytest.raises(eco.errors.PlanError):
        eco.shrink_(model, plan, (x,))
    assert model.order.equal(ORDER)
    assert model.up.out_features == 8


def test_an_order_that_the_model_changes_is_refused() -> None:
    """What is written in forward is no fixed order."""
    refusals = [c.blocked.message for c in eco.detect(Changed().eval(), (torch.randn(2, 6),)).blocked if c.blocked]
    assert any("chooses its positions by computed indices" in message for message in refusals)
    assert not eco.detect(Changed().eval(), (torch.randn(2, 6),)).offered
    meta = Permuted().to("meta")
    assert not eco.detect(meta, (torch.randn(2, 6, device="meta"),)).offered  # no numbers are known there


def test_a_plan_of_another_order_is_refused() -> None:
    """A plan says in which order units stand, and is not applied to a model that has another one."""
    x = torch.randn(2, 6)
    plan = planned(Permuted(), x)
    assert eco.Plan.from_json(plan.to_json()) == plan
    with pytest.raises(eco.errors.PlanError, match="detect and plan again"):
        eco.shrink(Permuted(order=ORDER.flip(0)), plan, (x,))


def test_training_counts_orders_anew() -> None:
    """Units that go while the model is trained leave an order of those that are left, step by step."""
    torch.manual_seed(0)
    model, x = Permuted(), torch.randn(4, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    schedule = eco.Cubic(start=1, end=3, every=1)
    sparse = eco.SparseTraining(model, (x,), optimizer=optimizer, target=0.5, schedule=schedule, scores="gate-fisher")
    for _ in range(4):
        optimizer.zero_grad()
        sparse.model(x).square().mean().backward()
        sparse.step()
        optimizer.step()
    assert sparse.model.get_parameter("up.weight").shape[0] < 8
    assert sparse.model(x).isfinite().all()
