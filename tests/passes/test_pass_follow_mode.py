"""Dropout that export froze works in training and rests in evaluation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.functional import dropout
from torch.nn.functional import scaled_dot_product_attention as attend

import ecospa_fx as eco
from ecospa_fx.passes import FollowMode
from ecospa_fx.plan import Plan


class Dropping(nn.Module):
    """Dropout as a module, as a function, left out by the code in evaluation, and inside attention."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(8, 16), nn.Linear(16, 8), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = dropout(self.drop(self.up(x).relu()), 0.5, self.training)
        if self.training:
            h = dropout(h, 0.5)
        q = self.down(h)[:, None]
        return attend(q, q, q, dropout_p=0.5 if self.training else 0.0)


class Plain(nn.Module):
    """No dropout at all."""

    def forward(self, x: Tensor) -> Tensor:
        return x.relu()


def data() -> Tensor:
    return torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))


def frozen(model: nn.Module, training: bool) -> fx.GraphModule:
    graph: Any = torch.export.export(copy.deepcopy(model).train(training), (data(),)).module()
    return graph  # type: ignore[no-any-return]  # a graph module, whatever its annotation says


def seeded(module: Any, training: bool) -> Tensor:
    torch.manual_seed(1)
    result: Tensor = module.train(training)(data())
    return result


def nothing(model: nn.Module) -> Plan:
    """A plan that removes nothing."""
    return Plan((), tuple(eco.detect(model, (data(),)).shapes.items()))


@pytest.fixture
def model() -> Dropping:
    torch.manual_seed(0)
    return Dropping()


def test_golden_code(model: Dropping) -> None:
    graph = frozen(model, training=True)
    assert FollowMode().run(graph).changes == 4
    graph.recompile()
    assert graph.code.count("self.training") == 1
    assert graph.code.count(", 0.5, training)") == 3
    assert "0.5 * training" in graph.code


def test_twin_without_dropout_is_untouched() -> None:
    graph = frozen(Plain(), training=True)
    before = str(graph.graph)
    assert FollowMode().run(graph).modified is False
    assert str(graph.graph) == before


def test_equal_to_the_bit_in_both_modes(model: Dropping) -> None:
    graph = frozen(model, training=True)
    FollowMode().run(graph)
    graph.recompile()
    for training in (True, False, True):
        assert torch.equal(seeded(graph, training), seeded(model, training))


def test_again_changes_nothing(model: Dropping) -> None:
    graph = frozen(model, training=True)
    FollowMode().run(graph)
    before = str(graph.graph)
    assert FollowMode().run(graph).modified is False
    assert str(graph.graph) == before


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_a_shrunk_model_drops_in_training_whatever_the_mode_was(model: Dropping, training: bool) -> None:
    model.train(training)
    small = eco.shrink(model, nothing(model), (data(),))
    assert small.training is model.training is training
    for mode in (True, False):
        assert torch.equal(seeded(small, mode), seeded(model, mode))
    assert not torch.equal(seeded(small, True), seeded(small, False))


def test_parts_keep_their_own_mode(model: Dropping) -> None:
    model.train().drop.eval()
    small = eco.shrink(model, nothing(model), (data(),))
    assert small.training
    assert not small.get_submodule("drop").training


def test_models_whose_modes_differ_in_more_keep_theirs() -> None:
    class Switching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sin() if self.training else x.cos()

    model = Switching().eval()
    small = eco.shrink(model, nothing(model), (data(),))
    assert torch.equal(small.train()(data()), data().cos())


class Factors(nn.Module):
    """Literals that differ by the mode, neither of them 0."""

    def __init__(self, training: float, evaluation: float) -> None:
        super().__init__()
        self.up, self.down, self.factors = nn.Linear(8, 16), nn.Linear(16, 8), (training, evaluation)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(self.up(x).relu() * self.factors[0 if self.training else 1])
        return result


@pytest.mark.parametrize("factors", [(3.0, 2.0), (1.0, 0.25), (0.0, 2.0), (2.0, 0.0)])
def test_literals_follow_the_mode_whatever_they_are(factors: tuple[float, float]) -> None:
    model = Factors(*factors)
    small = eco.shrink(model, nothing(model), (data(),))
    for training in (True, False):
        assert torch.equal(small.train(training)(data()), model.train(training)(data()))
