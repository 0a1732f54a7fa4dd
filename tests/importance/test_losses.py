"""What a loss must be; what its unit, its sign and what is added to it may not do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ecospa_fx as eco
from ecospa_fx.errors import ScoreError
from ecospa_fx.importance.curvature import Collector
from ecospa_fx.importance.losses import Batch, Loss, NormalisedLoss, check_slope, slopes_of
from ecospa_fx.importance.samples import Splitter
from ecospa_fx.importance.score import score
from ecospa_fx.importance.sensitivity import Curves
from ecospa_fx.origin import origin_of
from ecospa_fx.plan import Plan
from ecospa_fx.training.moving_scores import MovingScores
from tests.support.counting import Tokens, data, looked_at, loss_of
from tests.support.tiny import tiny, tiny_couplings

SCALES = 1e-12, 1e-6, 1e6, 1e12
METHODS = "taylor", "fisher", "gate-fisher"


class Block(nn.Module):
    """A residual block of two matrices."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return out


def inputs(count: int = 8, dtype: torch.dtype = torch.float32) -> list[Batch]:
    source = torch.Generator().manual_seed(1)
    return [((torch.randn(1, 5, 8, generator=source).to(dtype),), {}) for _ in range(count)]


def squares(y: Tensor, args: Any = (), kwargs: Any = None) -> Tensor:
    return y.to(torch.promote_types(y.dtype, torch.float32)).square().mean()


def compressed(loss: Loss, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Plan, dict[str, Tensor]]:
    """What is kept, and the parameters of the smaller model."""
    model, batches = Block().to(dtype), inputs(8, dtype)
    if options.get("method") is None:
        options = {"distillation": 8, **options}
    small = eco.compress(model, batches[0][0], ratio=0.4, batches=batches, loss=loss, **options)
    origin = origin_of(small)
    assert origin is not None
    return origin.plan, {name: value.detach() for name, value in small.named_parameters()}


def check_same(one: tuple[Plan, dict[str, Tensor]], other: tuple[Plan, dict[str, Tensor]], tolerance: float) -> None:
    assert one[0] == other[0]
    for name, value in one[1].items():
        torch.testing.assert_close(value, other[1][name], rtol=0, atol=tolerance)


@cache
def usual(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Plan, dict[str, Tensor]]:
    return compressed(squares, dtype, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "tolerance", "scale"),
    [
        *((torch.float64, 1e-9, scale) for scale in SCALES),
        # A gradient that is nothing but float32's rounding moves a parameter by up to a tenth of what a step is.
        (torch.float32, 2e-4, 1e6),
        (torch.bfloat16, 1e-2, 1e-12),
        (torch.float16, 3e-3, 1e12),
    ],
)
def test_the_unit_of_a_loss_changes_nothing(dtype: torch.dtype, tolerance: float, scale: float) -> None:
    check_same(compressed(lambda y, a, k: scale * squares(y), dtype), usual(dtype), tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("scale", SCALES)
def test_the_unit_of_a_loss_changes_nothing_that_is_solved(scale: float) -> None:
    found = compressed(lambda y, a, k: scale * squares(y), distillation=0)
    check_same(found, usual(torch.float32, distillation=0), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e12, 1e30])
def test_losses_of_any_unit_are_read_in_groups(dtype: torch.dtype, scale: float) -> None:
    """And one that is made of several samples is never taken for theirs."""
    model = Block().to(dtype)
    batches = inputs(4, dtype)

    def together(y: Tensor, args: Any, kwargs: Any) -> Tensor:
        return scale * squares(y - y.mean(0))

    whole: Batch = ((torch.cat([x for (x,), _ in batches]),), {})
    for loss, count in ((lambda y, a, k: scale * squares(y), 4), (together, 1)):
        splitter = Splitter(lambda batch: model(*batch[0]), loss, model.parameters())
        with nullcontext() if count == 4 else pytest.warns(UserWarning, match="is not made of the losses"):
            assert len(splitter.split(whole, 0)) == count


@pytest.mark.parametrize("options", [{"method": "gate-fisher", "steps": 2}, {"allocation": "sensitivity"}])
def test_the_unit_of_a_loss_changes_nothing_by_other_ways(options: dict[str, Any]) -> None:
    double = torch.float64
    check_same(compressed(lambda y, a, k: 1e-12 * squares(y), double, **options), usual(double, **options), 1e-9)


def test_what_is_added_to_a_loss_changes_nothing() -> None:
    """Such as what makes a log density negative."""
    check_same(compressed(lambda y, a, k: squares(y) - 1e4), usual(), 1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("half", [False, True])
def test_scores_are_in_the_unit_of_the_loss_and_no_digit_is_lost(method: str, half: bool) -> None:
    """Losses that differ by powers of two have scores that do, to the bit; signs and constants are no matter."""
    model = Block().half() if half else Block()
    batches = inputs(3, torch.float16 if half else torch.float32)
    couplings = eco.detect(model, batches[0][0])
    degree = 1 if method == "taylor" else 2
    want = score(model, couplings, batches, loss=squares, method=method)
    for factor in (2.0**-40, -(2.0**40)):

        def loss(y: Tensor, args: Any, kwargs: Any, factor: float = factor) -> Tensor:
            return factor * squares(y) + 3 * factor

        found = score(model, couplings, batches, loss=loss, method=method)
        for name, values in want.values.items():
            assert values.max() > 0
            torch.testing.assert_close(found[name] / abs(factor) ** degree, values, rtol=1e-2 if half else 0, atol=0)


def test_curvature_is_in_the_unit_of_the_loss() -> None:
    model = Tokens(rotary=False)
    _, evaluator, views = looked_at(model)
    factor, batches = 2.0**-60, data(3)
    want = Collector(evaluator, views).run(batches, loss_of)
    found = Collector(evaluator, views).run(batches, lambda y, a, k: factor * loss_of(y, a, k))
    assert want.gates
    for name, matrix in want.gates.items():
        assert found.gates[name].equal(matrix * factor**2)
    for site, moments in want.outputs.items():
        assert moments.second.any()
        assert found.outputs[site].second.equal(moments.second * factor**2)
        assert found.outputs[site].total.equal(moments.total * factor)


def test_curves_are_read_alike_in_any_unit() -> None:
    ffn = tiny_couplings(tiny())["layers.1.ffn:ffn"]
    lost = []
    for unit in (1.0, 1e-30, 1e30):

        def predicted(kept: Sequence[int], unit: float = unit) -> Tensor:
            return unit * (12.0 - torch.tensor(kept, dtype=torch.float64))

        curves = Curves({ffn.name: ((9, 3.0 * unit), (6, 2.0 * unit), (3, 9.0 * unit))}, 1.0)
        lost.append(curves.rise(ffn, range(12, 2, -1), predicted) / unit)
    for other in lost[1:]:
        torch.testing.assert_close(other, lost[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_scores_of_training_are_alike_in_any_unit(method: str) -> None:
    model = tiny().float()
    chosen = [c for c in tiny_couplings(model) if c.blocked is None and c.kind == "ffn"]
    parameters, found = dict(model.named_parameters()), []
    gradients = {name: torch.randn_like(p) for name, p in parameters.items()}
    for unit in (1.0, 2.0**-75, 2.0**60):
        running = MovingScores(method, 4)
        running.follow(chosen, parameters, {})
        for name, parameter in parameters.items():
            parameter.grad = gradients[name] * unit
        running.gather()
        assert running.usable
        found.append(torch.cat([value.flatten() for value in running.scores().values()]))
    assert found[0].min() > 0
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-6, atol=0)


# -- losses that are negative ------------------------------------------------------------------------------------


def test_a_loss_that_grows_smaller_far_away_is_refused_where_it_measures_distances() -> None:
    """And where only its slope counts it does what its opposite does."""

    def loss(y: Tensor, args: Any, kwargs: Any) -> Tensor:
        return -squares(y)

    with pytest.raises(ScoreError, match=r"divergence is below zero.*pass distillation=0"):
        compressed(loss)
    check_same(compressed(loss, distillation=0), usual(distillation=0), 0.0)


# -- losses that say nothing -------------------------------------------------------------------------------------

MODEL = Block().eval()


@torch.no_grad()
def answer(x: Tensor) -> Tensor:
    out: Tensor = MODEL(x)
    return out


NO_SLOPE: dict[str, Callable[[Tensor, Any, Any], Tensor]] = {
    "zero": lambda y, a, k: 0.0 * y.square().mean(),
    "distance": lambda y, a, k: (y - answer(*a)).square().mean(),
    "distance to a rounded answer": lambda y, a, k: 1e6 * (y - answer(*a) * (1 + 2e-7)).square().mean(),
    "distance in pieces": lambda y, a, k: nn.functional.smooth_l1_loss(y, answer(*a)) - 7,
    "a hinge that is met": lambda y, a, k: (y - 1e3).relu().mean(),
}


@pytest.mark.parametrize("name", NO_SLOPE)
def test_a_loss_without_slope_is_refused(name: str) -> None:
    batches, loss = inputs(4), NO_SLOPE[name]
    couplings = eco.detect(MODEL, batches[0][0])
    for method in METHODS:
        with pytest.raises(ScoreError, match=rf"{method}' would be zero for every unit.*no slope.*method='magnitude'"):
            score(MODEL, couplings, batches, loss=loss, method=method)
    with pytest.raises(ScoreError, match=r"no slope at the dense model"):
        eco.compress(MODEL, batches[0][0], ratio=0.4, batches=batches, loss=loss, couplings=couplings)


def test_compress_by_other_methods_and_training_refuse_it_too() -> None:
    batches, loss = inputs(4), NO_SLOPE["distance"]
    with pytest.raises(ScoreError, match=r"no slope at the dense model"):
        eco.compress(MODEL, batches[0][0], ratio=0.4, batches=batches, loss=loss, method="gate-fisher")
    for scores in ("second-order", "gate-fisher"):
        options: dict[str, Any] = {"schedule": eco.AtStart(), "batches": batches, "loss": loss, "scores": scores}
        copy = Block()
        with pytest.raises(ScoreError, match=r"no slope at the dense model"):
            eco.SparseTraining(copy, batches[0][0], target=0.4, **options)
        assert all(a.equal(b) for a, b in zip(copy.parameters(), MODEL.parameters(), strict=True))


def test_a_root_at_zero_and_a_loss_of_something_else_are_told() -> None:
    batches = inputs(2)
    spare = torch.ones((), requires_grad=True)
    for loss, text in (
        (lambda y, a, k: (y - answer(*a)).square().sum().sqrt(), r"batch 0 is finite, but its slope .* is not.*square"),
        (lambda y, a, k: spare * 2, r"the loss of batch 0 does not depend on what the model returns"),
        (lambda y, a, k: a[0].sum(), r"the loss of batch 0 does not depend on the model"),
    ):
        with pytest.raises(ScoreError, match=text):
            check_slope(loss, [(batch, answer(*batch[0])) for batch in batches])


def test_a_loss_that_says_something_in_one_batch_is_taken() -> None:
    """What was met in a batch adds nothing; slopes far below those of others are no rounding."""
    batches = inputs(4)
    couplings = eco.detect(MODEL, batches[0][0])
    last = batches[-1][0][0]

    def loss(y: Tensor, args: Any, kwargs: Any) -> Tensor:
        return squares(y) if args[0] is last else 0.0 * squares(y)

    assert score(MODEL, couplings, batches, loss=loss)[couplings.offered[0].name].max() > 0
    batch, _ = check_slope(loss, ((batch, answer(*batch[0])) for batch in batches))
    assert batch[0][0] is last
    fitted = check_slope(lambda y, a, k: (y - answer(*a) * 1.001).square().mean(), [(batch, answer(*batch[0]))])
    assert fitted[0] is batch


def test_scores_call_a_loss_once_per_batch() -> None:
    """It may take what it compares with from an iterator."""
    batches = inputs(4)
    couplings, targets = eco.detect(MODEL, batches[0][0]), iter(range(4))
    score(MODEL, couplings, batches, loss=lambda y, a, k: (y - next(targets)).square().mean())
    assert next(targets, None) is None


def test_slopes_have_a_length_about_one_whatever_holds_the_output() -> None:
    class Answer:
        def __init__(self, logits: Tensor) -> None:
            self.logits = logits

    logits = torch.randn(2, 3)
    nothing: Batch = ((), {})
    readers: list[tuple[Any, Callable[[Any], Tensor]]] = [
        (logits, lambda y: y),
        ({"a": [logits]}, lambda y: y["a"][0]),
        (Answer(logits), lambda y: y.logits),
    ]
    for output, read in readers:

        def loss(y: Any, args: Any, kwargs: Any, read: Callable[[Any], Tensor] = read) -> Tensor:
            return 1e-9 * squares(read(y))

        units = NormalisedLoss(loss), NormalisedLoss(loss, exact=True)
        slope, scaled, one = (slopes_of(each, output, nothing)[0] for each in (loss, *units))
        assert slope is not None
        assert scaled is not None
        assert one is not None
        assert 1 <= scaled.norm().item() < 2
        assert one.norm().item() == pytest.approx(1, abs=1e-6)
        assert torch.equal(scaled / units[0].unit, slope)
        torch.testing.assert_close(one / units[1].unit, slope)
