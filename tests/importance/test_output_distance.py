"""The loss of models that have none: its curvature is the Gauss-Newton matrix of the outputs, each in its own unit."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ecospa_fx as eco
from ecospa_fx.capture.export import capture
from ecospa_fx.distillation.divergence import divergence
from ecospa_fx.errors import ScoreError, TrainingError
from ecospa_fx.importance import output_distance
from ecospa_fx.importance.curvature import Collector
from ecospa_fx.importance.losses import Batch, slopes_of
from ecospa_fx.importance.output_distance import OutputDistance, or_distance, probes_of, scaled_loss
from ecospa_fx.importance.sensitivity import Trial, TrialLosses
from ecospa_fx.runtime.interpreter import PartialInterpreter
from ecospa_fx.training.second_order import second_order
from tests.support.counting import Tokens, data, looked_at

DOUBLE = torch.float64


@dataclass
class Answer:
    """As models of transformers return, with what is no floating number among it."""

    embedding: Tensor
    maps: list[Tensor]
    labels: Tensor | None = None
    count: int = 3
    nothing: None = None


class Detector(nn.Module):
    """An embedding [1, 3], and maps [1, 4, 2] and [1, 1] in units of their own."""

    def __init__(self, unit: float = 1.0, *, labels: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.unit, self.labels = unit, labels
        self.up, self.down = nn.Linear(5, 6), nn.Linear(6, 3)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(6, 1)
        self.to(DOUBLE)

    def forward(self, x: Tensor) -> Answer:
        h = torch.nn.functional.gelu(self.up(x))
        maps = [self.unit * self.first(h).unflatten(-1, (4, 2)), 0.01 * self.second(h)]
        embedding = self.down(h)
        return Answer(embedding, maps, embedding.argmax(-1) if self.labels else None)


def inputs(count: int = 6) -> list[Batch]:
    source = torch.Generator().manual_seed(1)
    return [((torch.randn(1, 5, generator=source, dtype=DOUBLE),), {}) for _ in range(count)]


def floats(answer: Answer) -> list[Tensor]:
    return [answer.embedding, *answer.maps]


def scales(model: nn.Module, batches: list[Batch]) -> list[float]:
    """q_k, spelt out."""
    with torch.no_grad():
        outputs = [floats(model(*args)) for args, _ in batches]
    return [float(torch.stack([y.square().mean() for y in column]).mean()) for column in zip(*outputs, strict=True)]


def fitted(model: nn.Module, batches: list[Batch], **options: Any) -> OutputDistance:
    with torch.no_grad():
        return OutputDistance(**options).scaled(model(*args) for args, _ in batches)


def gradient(value: Tensor, model: nn.Module, *, keep: bool = False) -> Tensor:
    """By all parameters, zero for those that the value does not depend on."""
    weights = list(model.parameters())
    gradients = torch.autograd.grad(value, weights, retain_graph=keep, create_graph=keep, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(w) if g is None else g).flatten() for w, g in zip(weights, gradients, strict=True)]
    )


def exact(model: nn.Module, batch: Batch, q: list[float]) -> Tensor:
    """Σ_k J_kᵀ J_k / (n_k q_k) of one sample, row by row of the Jacobians."""
    total = torch.zeros(())
    for output, scale in zip(floats(model(*batch[0])), q, strict=True):
        jacobian = torch.stack([gradient(number, model, keep=True) for number in output.flatten()]).detach()
        total = total + jacobian.T @ jacobian / (len(jacobian) * scale)
    return total


@pytest.mark.parametrize(
    "form",
    [
        lambda a, b: Answer(a, [b], torch.ones(3)[:0]),
        lambda a, b: (a, 3, {"maps": [b], "none": None}),
        lambda a, b: {"embedding": a, "rest": (torch.arange(4), b)},
        lambda a, b: [a, torch.ones(2, dtype=torch.bool), b],
    ],
)
def test_outputs_of_any_form_are_read(form: Any) -> None:
    source = torch.Generator().manual_seed(0)
    pairs = [(torch.randn(1, 3, generator=source), torch.randn(1, 2, 2, generator=source)) for _ in range(3)]
    loss, plain = OutputDistance().scaled(form(*pair) for pair in pairs), OutputDistance().scaled(pairs)
    assert [scale for scale in loss.scales if scale > 0] == list(plain.scales)
    want = float(plain.to(pairs[0])(pairs[1], (), {}))
    assert float(loss.to(form(*pairs[0]))(form(*pairs[1]), (), {})) == pytest.approx(want, rel=1e-6)
    assert float(loss(form(*pairs[0]))) == pytest.approx(float(plain(pairs[0])), rel=1e-6)
    assert float(loss.probe(7)(form(*pairs[0]), (), {})) == pytest.approx(float(plain.probe(7)(pairs[0], (), {})))


def test_the_first_64_answers_tell_the_scales_and_other_losses_need_none() -> None:
    answers = iter(torch.full((1, 2), 1.0 if i < 64 else 5.0) for i in range(66))
    loss = scaled_loss(OutputDistance(), answers)
    assert isinstance(loss, OutputDistance)
    assert loss.scales == (1.0,)
    assert len(list(answers)) == 2
    assert scaled_loss(loss, [torch.full((1, 2), 9.0)]) is loss
    assert scaled_loss(squares, [torch.ones(2)]) is squares
    assert or_distance(squares) is squares
    assert or_distance(None) == OutputDistance(1, 0)


def squares(output: Tensor, args: Any, kwargs: Any) -> Tensor:
    return output.square().sum()


# -- the matrix --------------------------------------------------------------------------------------------------


def test_scales_are_mean_squares_of_each_output() -> None:
    model, batches = Detector(), inputs()
    loss = fitted(model, batches)
    assert loss.scales == pytest.approx(scales(model, batches), rel=1e-12)
    assert fitted(Detector(labels=False), batches).scales == loss.scales


def test_gradients_of_probes_have_the_gauss_newton_matrix_as_their_mean_square() -> None:
    """By more probes than its rank, within four standard errors of the whole matrix."""
    model, batches, count = Detector(), inputs(1), 500
    loss = fitted(model, batches)
    want = exact(model, batches[0], scales(model, batches))
    output = model(*batches[0][0])
    rows = torch.stack([gradient(loss.probe(i)(output, *batches[0]), model, keep=True) for i in range(count)])
    fourth = rows.square().sum(1).square().mean()
    assert (rows.T @ rows / count - want).norm() < 4 * (fourth / count).sqrt()
    assert (fourth / count).sqrt() < 0.05 * want.trace()
    assert rows.mean(0).norm() < 4 * (want.trace() / count).sqrt()


def test_probes_are_unbiased(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over all patterns of signs is the matrix, to rounding."""
    model, batches = Detector(), inputs(1)
    model.first = nn.Linear(6, 2).to(DOUBLE)
    model.forward = lambda x: Answer(model.down(h := model.up(x).tanh()), [50 * model.first(h), model.second(h)])  # type: ignore[method-assign]
    loss = fitted(model, batches)
    total = torch.zeros(())
    for pattern in product((-1.0, 1.0), repeat=6):
        rest = iter(pattern)
        monkeypatch.setattr(
            output_distance,
            "_signs",
            lambda v, _, rest=rest: torch.tensor([next(rest) for _ in range(v.numel())]).view(v.shape),
        )
        g = gradient(loss.probe(0)(model(*batches[0][0]), *batches[0]), model)
        total = total + torch.outer(g, g) / 2**6
    torch.testing.assert_close(total, exact(model, batches[0], scales(model, batches)), rtol=1e-12, atol=1e-14)


def test_the_distance_has_that_matrix_as_its_curvature_and_no_slope() -> None:
    model, batches = Detector(), inputs(1)
    loss, dense = fitted(model, batches), model(*batches[0][0])
    want = exact(model, batches[0], scales(model, batches))
    dense = Answer(dense.embedding.detach(), [m.detach() for m in dense.maps], dense.labels)
    value = loss.to(dense)(model(*batches[0][0]), *batches[0])
    flat = gradient(value, model, keep=True)
    assert float(value.detach()) == 0
    assert not flat.any()
    direction = torch.randn(len(flat), generator=torch.Generator().manual_seed(2), dtype=DOUBLE)
    torch.testing.assert_close(gradient(flat @ direction, model), want @ direction, rtol=1e-9, atol=1e-12)


def test_what_is_learnt_from_it_is_the_distance() -> None:
    model, other, batches = Detector(), Detector(), inputs(3)
    with torch.no_grad():
        other.down.weight.mul_(1.5)
        other.second.weight.mul_(-2)
    loss, q = fitted(model, batches), scales(model, batches)
    for batch in batches:
        with torch.no_grad():
            dense, output = model(*batch[0]), other(*batch[0])
        want = sum(
            float((a - b).square().mean()) / (2 * s) for a, b, s in zip(floats(output), floats(dense), q, strict=True)
        )
        learnt = divergence(loss, dense, slopes_of(loss, dense, batch), output, batch)
        assert learnt.value == pytest.approx(want, rel=1e-9)
        assert float(loss.to(dense)(output, *batch)) == pytest.approx(want, rel=1e-12)
        plain = sum(float(y.square().mean()) / (2 * s) for y, s in zip(floats(output), q, strict=True))
        assert float(loss(output, *batch)) == pytest.approx(plain, rel=1e-12)


# -- scores ------------------------------------------------------------------------------------------------------


def scored(model: nn.Module, batches: Any, method: str = "gate-fisher", **options: Any) -> Tensor:
    couplings = eco.detect(model, inputs(1)[0][0])
    scores = eco.score(model, couplings, batches, method=method, loss=OutputDistance(**options) if options else None)
    return scores["up:ffn"] if "up:ffn" in scores.values else next(iter(scores.values.values()))


def gates(model: Detector, batches: list[Batch], q: list[float]) -> Tensor:
    """The diagonal of the matrix for gates on the hidden units, by the columns that read them."""
    total = torch.zeros(6, dtype=DOUBLE)
    for (x,), _ in batches:
        h = torch.nn.functional.gelu(model.up(x))[0]
        for layer, unit, scale in zip((model.down, model.first, model.second), (1.0, model.unit, 0.01), q, strict=True):
            total += (unit * layer.weight * h).square().mean(0) / scale / len(batches)
    return total.detach()[None]


def test_gate_fisher_is_the_diagonal_for_gates() -> None:
    model, batches = Detector(30.0), inputs(4)
    want = gates(model, batches, scales(model, batches))
    found = scored(model, batches, probes=50)
    # (Σ r a)² has a variance of at most 2 (Σ a²)²
    torch.testing.assert_close(found, want, rtol=4 * math.sqrt(2 / 200), atol=0)


def test_fisher_is_the_sum_of_the_diagonal_times_squared_weights() -> None:
    model, batches = Detector(), inputs(2)
    q = scales(model, batches)
    diagonal = torch.stack([exact(model, batch, q).diagonal() for batch in batches]).mean(0)
    sizes = [p.numel() for p in model.parameters()]
    parts = dict(zip([name for name, _ in model.named_parameters()], torch.split(diagonal, sizes), strict=True))
    terms = {name: parts[name].view(p.shape) * p.detach().square() for name, p in model.named_parameters()}
    want = terms["up.weight"].sum(1) + terms["up.bias"]
    want = want + sum(terms[f"{name}.weight"].sum(0) for name in ("down", "first", "second"))
    found = scored(model, batches, "fisher", probes=100)
    torch.testing.assert_close(found[0], want, rtol=4 * math.sqrt(2 / 200), atol=0)


@pytest.mark.parametrize("method", ["gate-fisher", "fisher"])
def test_the_unit_of_an_output_is_no_matter(method: str) -> None:
    torch.testing.assert_close(
        scored(Detector(1000.0), inputs(), method), scored(Detector(), inputs(), method), rtol=1e-9, atol=0
    )


def test_second_moments_see_every_probe() -> None:
    """Twice the probes are twice the samples: inputs twice, gradients of two patterns of signs."""
    model, batches = Tokens(rotary=False), data(2)
    _, evaluator, views = looked_at(model)
    loss = OutputDistance(2, 3).scaled(evaluator.answer(*batch) for batch in batches)
    found = Collector(evaluator, views).run(batches, loss)
    singles = [
        Collector(evaluator, views).run([batch], probe)
        for number, batch in enumerate(batches)
        for probe in probes_of(loss, number)
    ]
    assert found.probes == 2
    assert {single.probes for single in singles} == {1}
    for site, moments in found.outputs.items():
        want = torch.stack([single.outputs[site].second for single in singles]).sum(0)
        torch.testing.assert_close(moments.second, want, rtol=1e-4, atol=1e-7 * float(want.abs().max()))
        assert found.inputs[site].rows == 4 * 16


def test_numbers_have_signs_of_their_own() -> None:
    loss, output = OutputDistance(2, 5), torch.ones(1, 64)
    first, second = (
        [torch.autograd.grad(p(y := output.clone().requires_grad_(), (), {}), y)[0] for p in probes_of(loss, n)]
        for n in (0, 1)
    )
    signs = [*first, *second]
    assert len({tuple(s.sign().flatten().tolist()) for s in signs}) == 4
    assert all(s.abs().allclose(torch.full_like(s, 1 / 8)) for s in signs)
    again = torch.autograd.grad(loss.probe(3)(y := output.clone().requires_grad_(), (), {}), y)[0]
    assert again.equal(signs[3])
    other = torch.autograd.grad(OutputDistance(2, 6).probe(3)(y := output.clone().requires_grad_(), (), {}), y)[0]
    assert not other.equal(again)


def test_batches_of_several_score_as_their_samples_do() -> None:
    model, batches = Detector(), inputs(6)
    joined: list[Batch] = [((torch.cat([x for (x,), _ in batches[i : i + 3]]),), {}) for i in (0, 3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = scored(model, iter(joined), probes=2)
    torch.testing.assert_close(found, scored(model, batches, probes=2), rtol=1e-9, atol=0)


def test_integers_do_not_count() -> None:
    assert scored(Detector(), inputs()).equal(scored(Detector(labels=False), inputs()))


def test_scores_of_a_seed_are_the_same() -> None:
    model, batches = Detector(), inputs()
    assert scored(model, batches).equal(scored(model, batches, probes=1, seed=0))
    assert not scored(model, batches).equal(scored(model, batches, seed=1))


# -- what is filled in -------------------------------------------------------------------------------------------

HIDDEN = torch.arange(40) % 4 == 0
LEAST = torch.finfo(torch.float32).min


def rows(count: int = 3) -> list[Tensor]:
    source = torch.Generator().manual_seed(0)
    return [torch.randn(1, 40, generator=source) for _ in range(count)]


@pytest.mark.parametrize("filling", [-math.inf, LEAST, -1e9])
def test_what_masks_fill_in_does_not_count(filling: float) -> None:
    """As if those places were not there."""
    answers = rows()
    batch: Batch = ((), {})
    loss = OutputDistance().scaled(y.masked_fill(HIDDEN, filling) for y in answers)
    bare = OutputDistance().scaled(y[:, ~HIDDEN] for y in answers)
    assert loss.scales[0] * 40 == pytest.approx(bare.scales[0] * 30, rel=1e-6)
    assert loss.fillings == (None if filling == -math.inf else pytest.approx(filling),)
    dense, output = answers[0].masked_fill(HIDDEN, filling), answers[1].masked_fill(HIDDEN, filling)
    want = float(bare.to(answers[0][:, ~HIDDEN])(answers[1][:, ~HIDDEN], *batch))
    assert float(loss.to(dense)(output, *batch)) == pytest.approx(want, rel=1e-5)
    learnt = divergence(loss, dense, slopes_of(loss, dense, batch), output, batch)
    assert learnt.value == pytest.approx(want, rel=1e-4)
    assert float(loss(output, *batch)) == pytest.approx(float(bare(answers[1][:, ~HIDDEN], *batch)), rel=1e-5)
    slope = torch.autograd.grad(loss.probe(0)(y := dense.clone().requires_grad_(), *batch), y)[0]
    assert slope.ne(0).equal(~HIDDEN[None])


@pytest.mark.parametrize(
    "answers",
    [
        [y.softmax(-1) for y in (torch.eye(4)[None, i] * 30 for i in range(3))],  # certain, but of no size
        [torch.tensor([[1e6 + i, 0.1, -0.2]]) for i in range(3)],  # another number each time
        [torch.tensor([[1e6, 0.1]]), torch.tensor([[2e3, 0.1]]), torch.tensor([[1e6, 0.3]])],  # and some between
        [torch.tensor([[1e6, 0.1]])],  # once
        [torch.full((1, 2), 1e6), torch.full((1, 2), 1e6)],  # nothing else
        [torch.tensor([[2e3, 2.0]]), torch.tensor([[2e3, -2.0]])],  # not so large
        [torch.tensor([[1e3, 0.1]]), torch.tensor([[1e3, 0.2]])],  # nor these
    ],
)
def test_what_is_large_by_itself_counts(answers: list[Tensor]) -> None:
    loss = OutputDistance().scaled(answers)
    assert loss.fillings == (None,)
    assert loss.scales[0] == pytest.approx(float(torch.stack(answers).double().square().mean()), rel=1e-5)


def test_numbers_of_any_size_have_scales() -> None:
    for size in (1e-30, 1e30):
        (scale,) = OutputDistance().scaled(size * y for y in rows()).scales
        assert scale == pytest.approx(size**2 * float(torch.stack(rows()).square().mean()), rel=1e-5)


def test_what_runs_away_counts() -> None:
    """Which numbers count is what the dense answer says."""
    answer = torch.ones(1, 8)
    loss = OutputDistance().scaled([answer])
    far = answer.clone()
    far[0, 3] = 1e6
    assert float(loss.to(answer)(far, (), {})) == pytest.approx(1e12 / 16, rel=1e-5)
    assert float(loss(far)) == pytest.approx(1e12 / 16, rel=1e-5)
    far[0, 3] = math.nan
    assert math.isnan(float(loss.to(answer)(far, (), {})))


def test_an_output_of_zeros_does_not_count() -> None:
    answers = [(torch.zeros(1, 3), torch.full((1, 2), 2.0), torch.zeros(1, 0))]
    loss = OutputDistance().scaled(answers)
    assert loss.scales == (0.0, 4.0)
    assert float(loss(answers[0])) == 0.5


# -- compression -------------------------------------------------------------------------------------------------


def compressed(model: nn.Module, **options: Any) -> nn.Module:
    batches = inputs(16)
    return eco.compress(model, batches[0][0], ratio=0.5, batches=batches, **{"distillation": 32, **options})


def distance(model: nn.Module, small: nn.Module) -> float:
    batches = inputs(32)[16:]
    loss = fitted(model, batches)
    with torch.no_grad():
        return sum(float(loss.to(model(*args))(small(*args), args, {})) for args, _ in batches)


@pytest.fixture(scope="module")
def default() -> nn.Module:
    return compressed(Detector())


def test_compress_needs_no_loss(default: nn.Module) -> None:
    model = Detector()
    before = deepcopy(model.state_dict())
    same = compressed(model, loss=OutputDistance())
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert all(p.equal(default.get_parameter(name)) for name, p in same.named_parameters())
    assert default.get_parameter("up.weight").shape == (3, 5)
    answer = default(*inputs(1)[0][0])
    assert isinstance(answer, Answer)
    assert answer.count == 3


def test_every_ingredient_brings_it_nearer(default: nn.Module) -> None:
    model = Detector()
    removed = eco.compress(model, inputs(1)[0][0], ratio=0.5, batches=inputs(16), method="gate-fisher")
    apart = [distance(model, small) for small in (default, compressed(model, distillation=0), removed)]
    assert apart == sorted(apart)
    assert apart[0] < 0.9 * apart[1]


def test_points_are_judged_by_the_distance() -> None:
    model, other, batches = Detector(), Detector(), inputs(3)
    with torch.no_grad():
        other.down.weight.mul_(1.5)
    program = capture(model, batches[0][0], {}, dynamic=False)
    evaluator = PartialInterpreter(program, model, *batches[0])
    loss = fitted(model, batches)
    bench = TrialLosses(evaluator, batches, loss, {})
    change = {"down.weight": other.down.weight.detach()}
    (same, changed) = bench.losses([Trial("", tuple(change), [dict, lambda: change])])[""]
    assert same == 0
    with torch.no_grad():
        want = sum(float(loss.to(model(*args))(other(*args), args, {})) for args, _ in batches) / 3
    assert changed == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("options", [{"allocation": "sensitivity"}, {"least_squares": "in turn"}])
def test_every_way_of_compressing_takes_it(options: dict[str, Any]) -> None:
    model = Detector()
    small = compressed(model, **options)
    assert small.get_parameter("up.weight").shape == (3, 5)
    assert distance(model, small) < 32 * 0.5


def test_in_place_it_needs_no_loss_either(default: nn.Module) -> None:
    model = Detector()
    eco.compress_(model, inputs(1)[0][0], ratio=0.5, batches=inputs(16), distillation=32)
    assert model.up.out_features == 3
    assert distance(Detector(), model) == pytest.approx(distance(Detector(), default), rel=0.5)


# -- refusals ----------------------------------------------------------------------------------------------------


class Fixed(nn.Module):
    """An FFN whose answer is made of the last state by a function."""

    def __init__(self, end: Any) -> None:
        super().__init__()
        self.up, self.down, self.end = nn.Linear(5, 6, dtype=DOUBLE), nn.Linear(6, 3, dtype=DOUBLE), end

    def forward(self, x: Tensor) -> Any:
        return self.end(self.down(self.up(x).tanh()))


@pytest.mark.parametrize(
    ("end", "state"), [(lambda y: y.argmax(-1), "no floating numbers"), (lambda y: y * 0, "only zeros")]
)
def test_outputs_that_are_never_far_are_refused(end: Any, state: str) -> None:
    model, batches = Fixed(end), inputs(3)
    couplings = eco.detect(Fixed(lambda y: y), batches[0][0])
    text = (
        f"the model returns {state} for the calibration data, which have no distance to others: give loss=, a function "
        "(output, args, kwargs) -> scalar, or use method='magnitude'"
    )
    with pytest.raises(ScoreError) as error:
        eco.score(model, couplings, batches)
    assert str(error.value) == text


def test_compress_refuses_them_too() -> None:
    with pytest.raises(ScoreError, match=r"^the model returns only zeros for the calibration data"):
        eco.compress(Fixed(lambda y: y * 0), inputs(1)[0][0], ratio=0.5, batches=inputs(3))


def test_outputs_that_get_narrower_are_refused() -> None:
    class Keeps(nn.Module):
        """A product of queries with keys, which it returns too."""

        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(5, 4, dtype=DOUBLE), nn.Linear(5, 4, dtype=DOUBLE)

        def forward(self, x: Tensor, keys: Tensor) -> Any:
            keys = torch.cat([keys, self.k(x)[:, None]], 1)
            return (self.q(x)[:, None] @ keys.mT).tanh(), keys

    batches: list[Batch] = [((x, torch.ones(1, 3, 4, dtype=DOUBLE)), {}) for (x,), _ in inputs(3)]
    with pytest.raises(ScoreError, match=r"^without \S+ an output is narrower than the dense model's") as error:
        eco.compress(Keeps(), batches[0][0], ratio=0.5, batches=batches, allow="cache")
    assert "give loss=" in str(error.value)


def test_a_mean_slope_of_zero_is_refused() -> None:
    with pytest.raises(ScoreError, match=r"^method 'taylor' reads the mean slope .* is zero: use method='gate-fisher'"):
        scored(Detector(), inputs(), "taylor")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"probes": 0}, "probes=0 is not a number of probes per sample: give a whole number of at least 1"),
        ({"probes": 1.5}, "probes=1.5 is not a number of probes per sample: give a whole number of at least 1"),
        ({"seed": -1}, "seed=-1 is not a seed: give a whole number of at least 0"),
    ],
)
def test_options_are_checked(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ScoreError) as error:
        OutputDistance(**options)
    assert str(error.value) == text


def test_training_has_a_loss() -> None:
    with pytest.raises(TrainingError, match=r"^training has a loss, which loss= is to be too"):
        second_order(inputs(), OutputDistance(), None, solves=True)


def nothing() -> Iterator[Batch]:
    yield from ()


@pytest.mark.parametrize("data", [[], nothing()])
def test_without_batches_there_is_no_default(data: Any) -> None:
    with pytest.raises(ScoreError, match=r"^there are no batches to score with 'gate-fisher'"):
        scored(Detector(), data)


def test_what_no_output_depends_on_stays_whole() -> None:
    """As a pooler whose result is not returned."""

    class Pooled(Fixed):
        def __init__(self) -> None:
            super().__init__(lambda y: y)
            self.pooler = nn.Linear(3, 4, dtype=DOUBLE)

        def forward(self, x: Tensor) -> Any:
            y = super().forward(x)
            self.pooler(y[:, :]).tanh()
            return y

    with pytest.warns(UserWarning, match=r"^the calibration data never reaches pooler\S+, which therefore stay whole"):
        small = eco.compress(Pooled(), inputs(1)[0][0], ratio=0.5, batches=inputs(4), distillation=0)
    assert small.get_parameter("up.weight").shape == (3, 5)
    assert small.get_parameter("pooler.weight").shape == (4, 3)
