"""What depends on the mode is read off an export of the example sizes, and off a second full one where need be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ecospa_fx as eco
from ecospa_fx.capture import export as capturing
from ecospa_fx.plan import Plan
from ecospa_fx.runtime.restore import restore
from tests.support.exported_once import exported_once

NOTHING = Plan((), ())


class Regrouped(nn.Module):
    """Sizes, whole slices and a dropout that is always there."""

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.arange(x.shape[0])[: x.shape[0], None]
        x = x.reshape(x.shape[0] * 2, -1)[:, :].view(-1, x.shape[1]) + rows
        return nn.functional.dropout(x, 0.5, self.training) * (0.5 if self.training else 2.0)


class Shifted(nn.Module):
    """A whole number that depends on the mode."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sin() * (3 if self.training else 2)


class LeftOut(nn.Module):
    """A dropout that evaluation leaves out."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x.sin(), 0.5) if self.training else x.sin()


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The symbolic sizes of every export, as they come; None for those of the example."""
    shapes: list[Any] = []
    export = capturing._export

    def counted(model: nn.Module, view: nn.Module, attempt: Any, **options: Any) -> Any:
        shapes.append(attempt.shapes)
        return export(model, view, attempt, **options)

    monkeypatch.setattr(capturing, "_export", counted)
    return shapes


@pytest.mark.parametrize(("model", "exports"), [(Regrouped(), 2), (Shifted(), 3), (LeftOut(), 3)])
def test_both_modes_are_right_at_other_sizes(model: nn.Module, exports: int, exported: list[Any]) -> None:
    small = eco.shrink(model.eval(), NOTHING, (torch.ones(3, 4),))
    assert len(exported) == exports
    assert exported[1] is None
    other = torch.linspace(-1, 1, 20).view(5, 4)
    assert torch.equal(small(other), model(other))
    torch.manual_seed(0)
    want = model.train()(other)
    torch.manual_seed(0)
    assert torch.equal(small.train()(other), want)
    assert not torch.equal(want, model.eval()(other))


def test_the_other_mode_is_exported_where_it_is_asked_for(exported: list[Any]) -> None:
    model, other = Regrouped().eval(), torch.linspace(-1, 1, 20).view(5, 4)
    program = capturing.capture(model, (torch.ones(3, 4),), None, dynamic=True, both_modes=False)
    assert len(exported) == 1
    targets = {node.target for node in program.graph.nodes}
    assert torch.ops.aten.reshape.default in targets
    assert torch.ops.aten.view.default not in targets  # an order in memory that other kernels need not have
    assert torch.equal(restore(program, model, (torch.ones(3, 4),), {})(other), model(other))


@pytest.mark.parametrize("training", [False, True])
def test_modules_are_edited_by_what_one_mode_does(training: bool, exported: list[Any]) -> None:
    model, args = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 4)).train(training), (torch.ones(3, 4),)
    plan = eco.plan(eco.detect(model, args), 0.5, scores="magnitude")
    exported.clear()
    eco.shrink_(model, plan, args)
    assert len(exported) == 1
    assert model[0].out_features == 4
    assert model.training is training


def test_plans_share_an_export_and_nothing_else(exported: list[Any]) -> None:
    """What other tests save time by: each plan shrinks a graph of its own."""
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), torch.linspace(-1, 1, 20).view(5, 4)
    couplings = eco.detect(model, (torch.ones(3, 4),))
    plans = [eco.plan(couplings, 0.5, "random", seed) for seed in (0, 1)]
    exported.clear()
    args = (torch.ones(3, 4),)
    with exported_once():
        shared = [eco.shrink(model, plan, args) for plan in plans]
    assert len(exported) == 2
    assert plans[0] != plans[1]
    for plan, small in zip(plans, shared, strict=True):
        assert torch.equal(small(x), eco.shrink(model, plan, args)(x))


class Skipped(nn.Module):
    """Samples that training leaves out, by numbers that it draws, as stochastic depth does."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x * x.new_empty(x.shape[0], 1).bernoulli_(0.5)
        return nn.functional.dropout(x.sin(), 0.5, self.training)


@pytest.mark.parametrize("training", [False, True])
def test_modes_that_draw_other_numbers_are_not_exported_again(training: bool, exported: list[Any]) -> None:
    model, x = Skipped().train(training), torch.linspace(-1, 1, 20).view(5, 4)
    small = eco.shrink(model, NOTHING, (torch.ones(3, 4),))
    assert len(exported) == 2
    assert exported[1] is None
    torch.manual_seed(0)
    want = model(x)
    torch.manual_seed(0)
    assert torch.equal(small(x), want)
