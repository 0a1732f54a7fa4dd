"""Distillation: the smaller model learns to answer like the dense one, without labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import ecospa_fx as eco
from ecospa_fx.graph.evaluate import Evaluator
from ecospa_fx.importance.curvature import Collector
from ecospa_fx.importance.score import Batch
from ecospa_fx.passes.lossy import distill
from ecospa_fx.passes.lossy.distill import Distill
from ecospa_fx.passes.lossy.reconstruct import Reconstruct
from tests.counting import VOCABULARY, data, loss_of, pair


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


def test_vectors_learn_too_but_not_frozen_ones(trained: nn.Module) -> None:
    model = deepcopy(trained)
    scale = model.get_parameter("layers.0.norm.weight").requires_grad_(False)
    dense, small = pair(model, 0.5)
    before = {name: small.program.tensor(name).clone() for name in small.program.values}
    first, last = Distill(length=64, rate=0.01).run(dense, small, data(16), loss_of)
    assert last < first
    changed = {name for name, value in before.items() if not small.program.tensor(name).equal(value)}
    assert {"layers.0.norm2.weight", "layers.1.norm.bias", "layers.0.down.weight"} <= changed
    assert changed.isdisjoint({"layers.0.norm.weight", "embed.weight", "head.weight"})
    assert small.program.tensor("layers.0.norm.weight").equal(scale)


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


@pytest.mark.parametrize(
    ("costs", "way"),
    [
        ((1.0, 0.5, 0.4), 0.9),  # the parabola's lowest point is at 0.875
        ((1.0, 0.8, 1.2), 0.4),
        ((1.0, 0.5, 0.1), 1.0),
        ((1.0, 1.2, 1.5), 0.0),
        ((1.0, 0.9, math.nan), 0.5),
        ((1.0, math.nan, math.inf), 0.0),
    ],
)
def test_the_way_that_costs_least_is_gone(costs: tuple[float, float, float], way: float) -> None:
    first, half, last = costs

    def cost(t: float) -> float:
        return first + (4 * half - 3 * first - last) * t + 2 * (first - 2 * half + last) * t * t if 0 < t < 1 else last

    found, least = distill._best_way(lambda t: half if t == 0.5 else cost(t), first)
    assert found == pytest.approx(way, abs=0.04)
    assert least == pytest.approx(min(c for c in (*costs, cost(found)) if math.isfinite(c)))


def test_nothing_is_fitted_to_the_judges(trained: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sixteenth batch judges; curvature, least squares and distillation read the others."""
    batches, read = data(32), dict[str, list[Batch]]()

    def spy(owner: type, name: str, place: int) -> None:
        """Note what is given at this place after `self`."""
        own = getattr(owner, name)

        def spied(self: Any, *args: Any) -> Any:
            read[f"{owner.__name__}.{name}"] = list(args[place])
            return own(self, *args)

        monkeypatch.setattr(owner, name, spied)

    spy(Collector, "run", 0)
    spy(Reconstruct, "run", 2)
    spy(Distill, "_descend", 2)
    spy(distill._Pair, "settle", 1)
    eco.compress(
        trained,
        batches[0][0],
        ratio=0.5,
        batches=batches,
        loss=loss_of,
        mixed=0.0,
        predicted=0.0,
        least_squares="in turn",
    )
    judges = [batches[15], batches[31]]
    known = [batch for i, batch in enumerate(batches) if i not in (15, 31)]

    def same(found: Sequence[Batch], wanted: Sequence[Batch]) -> bool:
        return len(found) == len(wanted) and all(a[0][0] is b[0][0] for a, b in zip(found, wanted, strict=True))

    assert same(read.pop("_Pair.settle"), judges)
    assert set(read) == {"Collector.run", "Reconstruct.run", "Distill._descend"}
    assert all(same(found, known) for found in read.values())
