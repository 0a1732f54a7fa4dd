"""Distillation: the smaller model learns to answer like the dense one, without labels."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from copy import deepcopy
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

import ecospa_fx as eco
from ecospa_fx.calibration.distances import mean_divergence
from ecospa_fx.distillation import distill
from ecospa_fx.distillation.distill import Distill
from ecospa_fx.distillation.divergence import divergence
from ecospa_fx.errors import ScoreError
from ecospa_fx.importance.curvature import Collector
from ecospa_fx.importance.losses import Batch, Loss, slopes_of
from ecospa_fx.passes.lossy.reconstruct import Reconstruct
from ecospa_fx.runtime.interpreter import PartialInterpreter
from tests.support.counting import VOCABULARY, data, loss_of, pair


def predictions(evaluator: PartialInterpreter, batches: Sequence[Batch]) -> Tensor:
    found: list[Tensor] = []
    for args, kwargs in batches:
        values = {**evaluator.start(args, kwargs), **evaluator.weights()}
        evaluator.run(evaluator.order, values)
        found.append(evaluator.returned(values, args, kwargs).flatten(0, -2))
    return torch.cat(found).log_softmax(-1)


@pytest.mark.slow
def test_distillation_brings_the_predictions_of_unseen_data_nearer(trained: nn.Module) -> None:
    dense, small = pair(trained, 0.5)
    unseen = data(8, 14)
    want, before = predictions(dense, unseen).exp(), predictions(small, unseen)
    first, last = Distill(length=64, rate=0.01).run(dense, small, data(16), loss_of)
    assert last < first
    after = predictions(small, unseen)
    assert (want * after).sum() > (want * before).sum()  # the cross-entropies' part of the divergence


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_loss_that_cannot_take_zeros_distils_too(trained: nn.Module) -> None:
    """How much is lost cannot be told then."""

    def loss(y: Tensor, args: Any, kwargs: Any) -> Tensor:
        return loss_of(y / y.square().mean(-1, keepdim=True).sqrt(), args, kwargs)

    dense, small = pair(trained, 0.5)
    first, last = Distill(length=32).run(dense, small, data(16), loss)
    assert last < first


@pytest.mark.slow
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


@pytest.mark.parametrize("constant", [0.0, -1e5])
def test_the_divergence_of_a_cross_entropy_is_that_of_the_predictions_whatever_the_labels(constant: float) -> None:
    """Its gradient at the output is softmax(y) - softmax(y₀)."""
    torch.manual_seed(0)
    output, dense = torch.randn(2, 5, VOCABULARY), torch.randn(2, 5, VOCABULARY)
    want = kl_div(output.log_softmax(-1), dense.softmax(-1), reduction="sum")
    for labels in torch.randint(0, VOCABULARY, (3, 2, 5)):
        batch: Batch = ((labels,), {})

        def loss(logits: Tensor, args: Any, kwargs: Any) -> Tensor:
            return cross_entropy(logits.flatten(0, 1), args[0].flatten(), reduction="sum") + constant

        slopes = slopes_of(loss, dense, batch)
        (there,), (here,) = slopes_of(loss, output, batch), slopes
        assert there is not None
        assert here is not None
        torch.testing.assert_close(there - here, output.softmax(-1) - dense.softmax(-1))
        assert divergence(loss, dense, slopes, output, batch).value == pytest.approx(float(want), rel=1e-3)


@pytest.mark.slow
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

    found, least = distill._best_interpolation(lambda t: half if t == 0.5 else cost(t), first)
    assert found == pytest.approx(way, abs=0.04)
    assert least == pytest.approx(min(c for c in (*costs, cost(found)) if math.isfinite(c)))


# -- how far steps go --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameter", "size"),
    [
        (torch.ones(4, 100), 1 / 2 + 1 / 10),
        (torch.full((100, 4), -3.0), 3 * (1 / 2 + 1 / 10)),
        (torch.ones(16), 1 / 4 + 1 / 4),
        (torch.tensor(2.0), 4.0),
        (torch.zeros(4, 4), 0.02),
    ],
)
def test_steps_are_as_large_as_the_parameter_is_as_an_operator(parameter: Tensor, size: float) -> None:
    assert distill._step_size(parameter) == pytest.approx(size)


def squared(output: Tensor, args: Any, kwargs: Any) -> Tensor:
    """A squared error whose divergence is the squared distance."""
    return (output - 1.0).square().mean()


@pytest.mark.slow
def test_who_lost_little_goes_in_small_steps(trained: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps grow with the root of the share that is lost: of a squared error, with the relative distance."""
    rates: list[float] = []
    monkeypatch.setattr(Distill, "_descend", lambda self, pair, rate, batches, watch: rates.append(rate))
    batches, distances = data(4), []
    for ratio in (0.1, 0.6):
        dense, small = pair(trained, ratio)
        Distill(rate=0.5).run(dense, small, batches, squared)
        answers = [torch.cat([raw(e, batch) for batch in batches]) for e in (dense, small)]
        distances.append(float((answers[1] - answers[0]).norm() / answers[0].norm()))
    assert rates == pytest.approx([0.5 * distance for distance in distances], rel=1e-3)
    assert rates[0] < rates[1] / 2


def raw(evaluator: PartialInterpreter, batch: Batch) -> Tensor:
    values = {**evaluator.start(*batch), **evaluator.weights()}
    evaluator.run(evaluator.order, values)
    output: Tensor = evaluator.returned(values, *batch)
    return output


# -- batches that are read once, and a second kind of judge ------------------------------------------------------


@pytest.mark.parametrize(("repeated", "once", "length"), [(5, 0, 12), (4, 3, 9), (0, 3, 3), (4, 5, 5), (3, 2, 8)])
def test_some_batches_are_read_once_and_others_again_and_again(repeated: int, once: int, length: int) -> None:
    order = distill._order(repeated, once, length, torch.Generator().manual_seed(0))
    counts = [order.count(number) for number in range(repeated + once)]
    assert len(order) == length == sum(counts)
    assert counts[repeated:] == [1] * once
    fewest = (length - once) // max(repeated, 1)
    assert all(fewest <= count <= fewest + 1 for count in counts[:repeated])
    if once == 3 and repeated:  # in random places
        assert order != sorted(order)
        assert not {4, 5, 6} <= {*order[-3:]}


@pytest.mark.slow
def test_fresh_batches_are_read_as_they_are(trained: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, small = pair(trained, 0.5)
    pulled: list[Batch] = []
    pull = distill._Pair.pull

    def noted(self: Any, batch: Batch) -> list[Tensor]:
        pulled.append(batch)
        return pull(self, batch)

    monkeypatch.setattr(distill._Pair, "pull", noted)
    fresh, batches = data(4, 20), data(4)
    Distill(length=12, rate=0.01, fresh=fresh).run(dense, small, batches, loss_of)
    assert len(pulled) == 12
    assert sorted(next(i for i, f in enumerate(fresh) if f is p) for p in pulled if any(f is p for f in fresh)) == [
        0,
        1,
        2,
        3,
    ]
    assert not any(p is batch for p in pulled for batch in batches)  # which vary


@pytest.mark.slow
def test_what_a_second_kind_loses_is_not_learnt(trained: nn.Module) -> None:
    """Means of both kinds count alike, however many batches there are of each."""
    lesson: list[Batch] = [((torch.full((4, 12), 7),), {})]
    second, found = data(6, 20), []
    for others in ((), second):
        dense, small = pair(trained, 0.5)

        def apart(dense: PartialInterpreter = dense, small: PartialInterpreter = small) -> list[float]:
            return [mean_divergence(dense, small, kind, loss_of) or 0.0 for kind in (lesson, second)]

        before = apart()
        first, last = Distill(length=24, rate=1.0, mixed=0.0, predicted=0.0, second=others).run(
            dense, small, lesson, loss_of
        )
        found.append((before, apart()))
        count = 2 if others else 1
        assert first == pytest.approx(sum(before[:count]) / count, rel=1e-3)
        assert last == pytest.approx(sum(found[-1][1][:count]) / count, rel=1e-3)
        assert last <= first
    (_, alone), (before, both) = found
    assert alone[1] > before[1] + before[0] - alone[0]  # it lost more on the second kind than it won
    assert sum(both) <= sum(before)
    assert both[1] < alone[1]


# -- losses that are no distance ---------------------------------------------------------------------------------


def unlike(output: Tensor, args: Any, kwargs: Any) -> Tensor:
    return -loss_of(output, args, kwargs)


def reward(output: Tensor, args: Any, kwargs: Any) -> Tensor:
    """A cross-entropy that counts for some tokens and against others."""
    signs = torch.where(args[0][:, 1:] % 3 == 0, -1.0, 1.0).flatten()
    return (signs * cross_entropy(output[:, :-1].flatten(0, 1), args[0][:, 1:].flatten(), reduction="none")).mean()


@pytest.mark.slow
@pytest.mark.parametrize("loss", [unlike, lambda y, args, kwargs: -y.square().sum()])
def test_a_divergence_below_zero_is_refused_and_nothing_changes(trained: nn.Module, loss: Loss) -> None:
    dense, small = pair(trained, 0.5)
    before = dict(small.program.values)
    with pytest.raises(ScoreError, match=r"divergence is below zero.*pass distillation=0.*convex"):
        Distill(length=8).run(dense, small, data(8), loss)
    assert all(small.program.values[name] is value for name, value in before.items())


@pytest.mark.slow
def test_what_is_farther_by_the_slopes_is_never_returned(trained: nn.Module) -> None:
    """Where a loss counts against some answers it leads away from them: not so far that less is alike afterwards."""
    dense, small = pair(trained, 0.5)
    batches = data(4)

    def apart() -> float:
        pairs = [(raw(dense, batch).softmax(-1), raw(small, batch).softmax(-1)) for batch in batches]
        return sum(float((a - b)[:, :-1].square().sum()) for a, b in pairs)

    before = apart()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Distill(length=24, rate=0.5).run(dense, small, batches, reward)
    assert apart() <= before * 1.01


@pytest.mark.slow
def test_a_model_that_returns_an_object_of_its_own_distils_too(trained: nn.Module) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = trained

        def forward(self, ids: Tensor) -> Any:
            return {"answer": [self.inner(ids)]}

    dense, small = pair(Wrapped(), 0.5)
    first, last = Distill(length=8, rate=0.01).run(
        dense, small, data(4), lambda y, args, kwargs: loss_of(y["answer"][0], args, kwargs)
    )
    assert last < first


@pytest.mark.slow
def test_nothing_is_fitted_to_the_judges(trained: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sixteenth sample judges; curvature, least squares and distillation, in groups, read the others."""
    batches, read = data(32), dict[str, list[Batch]]()

    def spy(owner: type, name: str, place: int) -> None:
        """Note what is given at this place after `self`."""
        own = getattr(owner, name)

        def spied(self: Any, *args: Any) -> Any:
            noted = chain.from_iterable(args[place]) if name == "settle" else args[place]
            read[f"{owner.__name__}.{name}"] = list(noted)
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
        rows, others = (torch.cat([args[0] for args, _ in some]) for some in (found, wanted))
        return rows.equal(others)

    assert same(read.pop("_Pair.settle"), judges)
    assert {name: len(found) for name, found in read.items()} == {
        "Collector.run": 30, "Reconstruct.run": 30, "Distill._descend": 8
    }  # fmt: skip
    assert all(same(found, known) for found in read.values())
