"""What does nothing goes, and only that."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ecospa_fx import shrink
from ecospa_fx.passes import RemoveInert
from ecospa_fx.plan import Plan
from tests.support.attention import calls, traced


class Verbose(nn.Module):
    """Views of the whole, casts to the same type, and a result that nobody reads."""

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        x = x[:, :][0:].to(torch.float64).expand(-1, x.shape[1]).view(x.shape[0], -1)
        unread = x.exp() + 1
        assert unread.shape == x.shape
        return x.sin().to(torch.float64)


class Terse(nn.Module):
    """Everything has an effect: parts, other types, copies, writes, detached gradients."""

    def forward(self, x: Tensor) -> Tensor:
        y = x[:, 1:].to(torch.float32).to(torch.float64).detach() + x.to(torch.float64, copy=True)[:, :-1]
        z = torch.zeros_like(y)
        z.copy_(y)
        return z.view(-1, 2)


X = torch.linspace(-1, 1, 8).double().view(2, 4)


def test_golden_calls() -> None:
    graph = traced(Verbose(), (X,), axes=(0,))
    result = RemoveInert().run(graph)
    assert calls(graph) == ["mul", "sin"]
    assert result.changes >= 5


def test_twin_what_has_an_effect_stays() -> None:
    graph = traced(Terse(), (X,), axes=())
    before = calls(graph)
    RemoveInert().run(graph)
    assert calls(graph) == before
    assert {"copy_", "detach", "slice", "to"} <= set(before)


def test_equal_to_the_bit() -> None:
    for model in (Verbose(), Terse()):
        graph = traced(model, (X,), axes=())
        want = graph(X)
        RemoveInert().run(graph)
        graph.recompile()
        assert torch.equal(graph(X), want)


def test_again_changes_nothing() -> None:
    graph = traced(Verbose(), (X,), axes=(0,))
    RemoveInert().run(graph)
    before = str(graph.graph)
    assert RemoveInert().run(graph).modified is False
    assert str(graph.graph) == before


def test_casts_stay_where_autocast_chooses_types() -> None:
    graph = traced(Verbose(), (X,), axes=(0,))
    RemoveInert(casts=False).run(graph)
    assert calls(graph) == ["mul", "to", "sin", "to"]


def test_the_type_of_an_input_is_still_taken_care_of() -> None:
    class Cast(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.to(torch.float64) / 3

    graph = traced(Cast(), (X,), axes=())
    RemoveInert().run(graph)
    graph.recompile()
    assert graph(X.float()).dtype is torch.float64


def test_sizes_that_depend_on_data_are_left_alone() -> None:
    class Counted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            count: Any = x.long().sum().item()
            check: Any = torch._check
            check(count >= 0)
            check(count <= x.shape[1])
            return x[:, count:].to(x.dtype).sum()

    model, x = Counted(), torch.tensor([[1.0, 0.5, 1.0, 0.5]]).double()
    graph = traced(model, (x,), axes=())
    RemoveInert().run(graph)
    graph.recompile()
    assert torch.equal(graph(x), model(x))


def test_dropout_of_none_goes_and_one_whose_probability_follows_the_mode_stays() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.none, self.some = nn.Dropout(0.0), nn.Dropout(0.3)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.some(self.none(x).sin())
            return result

    graph = traced(Two().train(), (X,), axes=())
    RemoveInert().run(graph)
    assert calls(graph) == ["sin", "dropout"]

    class Functional(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(x.sin(), 0.5 if self.training else 0.0, True)

    couplings_of_nothing = Plan((), ())
    small = shrink(Functional().eval(), couplings_of_nothing, (X,))
    assert torch.equal(small(X), X.sin())
    assert (small.train()(X.abs()) == 0).any()
