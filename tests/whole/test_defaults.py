"""Compression without inputs, data or a loss: what follows from a causal language model, and what it says of itself."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu

import ecospa_fx as eco
from ecospa_fx.calibration import second_text
from ecospa_fx.calibration.causal import causal_model
from ecospa_fx.calibration.generation import GeneratedText
from ecospa_fx.calibration.second_text import NextTokenLoss, SecondText
from ecospa_fx.defaults import NO_BATCHES, CalibrationData, calibration_data
from ecospa_fx.distillation.distill import Distill
from ecospa_fx.errors import OptionError, ScoreError
from ecospa_fx.importance.losses import Batch

VOCABULARY, LONGEST = 13, 12
JUDGES, COUNT = 3, 6
BRIEF: dict[str, Any] = {"ratio": 0.3, "distillation": 0, "mixed": 0.0, "generated_windows": COUNT}


class Writer(nn.Module):
    """A causal language model of means over the past and an FFN."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)
        self.positions = nn.Embedding(LONGEST, 8)

    def forward(self, ids: Tensor) -> Tensor:
        steps = torch.arange(ids.shape[1])
        x = self.embed(ids) + self.embed(ids).cumsum(1) / (1 + steps[:, None]) + self.positions(steps)
        logits: Tensor = self.head(x + self.down(gelu(self.up(x))))
        return logits


def loss_of(output: Tensor, args: Sequence[Tensor], kwargs: object) -> Tensor:
    return cross_entropy(output[:, :-1].flatten(0, 1), args[0][:, 1:].flatten())


def rows(count: int, seed: int = 5) -> list[Batch]:
    """The user's samples, one per batch."""
    source = torch.Generator().manual_seed(seed)
    return [((torch.randint(0, VOCABULARY, (1, 10), generator=source),), {}) for _ in range(count)]


@pytest.fixture(scope="module", autouse=True)
def few() -> Iterator[None]:
    """Few windows."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(second_text, "JUDGES", JUDGES)
        yield


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    model = Writer().double().eval()
    with torch.no_grad():
        model.head.weight.mul_(3)
    return model


@pytest.fixture(scope="module")
def windows(model: nn.Module) -> list[Batch]:
    """What it writes: held-out windows first."""
    return eco.calibration.generated(model, count=40, length=LONGEST)


def assert_same(small: nn.Module, other: nn.Module) -> None:
    theirs = dict(other.named_parameters())
    for name, parameter in small.named_parameters():
        torch.testing.assert_close(parameter, theirs[name])


@pytest.fixture(scope="module")
def small(model: nn.Module) -> nn.Module:
    smaller: nn.Module = eco.compress(model, **BRIEF)
    return smaller


def test_a_language_model_needs_nothing_but_a_ratio(model: nn.Module, small: nn.Module, windows: list[Batch]) -> None:
    """It is what its own windows and the next-token loss give, without those that are held out."""
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    calibration = windows[JUDGES : JUDGES + COUNT]
    assert_same(small, eco.compress(model, *windows[0], batches=calibration, loss=loss_of, **BRIEF))
    assert small(torch.zeros(3, 7, dtype=torch.long)).shape == (3, 7, VOCABULARY)


def test_what_it_is_away_from_the_dense_one_is_said(
    model: nn.Module, small: nn.Module, windows: list[Batch], caplog: pytest.LogCaptureFixture
) -> None:
    """The mean divergence in nats per token, on windows that nothing else has read."""

    def divergence(smaller: nn.Module, batches: Sequence[Batch]) -> float:
        logs = [[m(*args).log_softmax(-1)[:, :-1] for m in (model, smaller)] for args, _ in batches]
        return sum(float((p.exp() * (p - q)).sum(-1).mean()) for p, q in logs) / len(logs)

    said = eco.calibration.distances(small)
    with torch.no_grad():
        assert said.on_generated == pytest.approx(divergence(small, windows[:JUDGES]), rel=1e-3)
    assert said.on_batches is None
    assert str(said) == f"{said.on_generated:.3f} on text that the dense model wrote"
    given = rows(17)
    with caplog.at_level(logging.INFO, "ecospa_fx.progress"):
        mixed = eco.compress(model, batches=given, **BRIEF)
    said = eco.calibration.distances(mixed)
    with torch.no_grad():
        judges: list[Batch] = [((ids[:, :10],), {}) for (ids,), _ in windows[:JUDGES]]  # as long as what was given
        assert said.on_generated == pytest.approx(divergence(mixed, judges), rel=1e-3)
        assert said.on_batches == pytest.approx(divergence(mixed, given[15:16]), rel=1e-3)
    assert f"divergence from the dense model: {said}" in caplog.messages
    assert str(said).endswith(f" wrote, {said.on_batches:.3f} on the batches")


def test_of_what_wrote_no_text_nothing_is_said(model: nn.Module, windows: list[Batch]) -> None:
    plain = eco.compress(model, *windows[0], batches=rows(2), loss=loss_of, **BRIEF)
    with pytest.raises(ScoreError, match="no distances are known: compress a causal language model without a loss"):
        eco.calibration.distances(plain)


def test_batches_are_mixed_with_as_many_windows(model: nn.Module, windows: list[Batch]) -> None:
    given = rows(4)
    mixed = eco.compress(model, batches=iter(given), **BRIEF)
    cut: list[Batch] = [((ids[:, :10],), {}) for (ids,), _ in windows[JUDGES : JUDGES + 4]]
    assert_same(mixed, eco.compress(model, *given[0], batches=[*given, *cut], loss=loss_of, **BRIEF))
    alone = eco.compress(model, batches=given, generated_share=0, **BRIEF)
    assert_same(alone, eco.compress(model, *given[0], batches=given, loss=loss_of, **BRIEF))


def example_of(data: CalibrationData) -> Tensor:
    (ids,) = data.args
    assert isinstance(ids, Tensor)
    return ids


def text_of(data: CalibrationData) -> SecondText:
    text = data.text(COUNT, 0, progress=False)
    assert text is not None
    return text


@pytest.mark.parametrize(("share", "count"), [(None, 9), (0.5, 9), (0.25, 3), (0.01, 1), (0.9, 81)])
def test_the_share_is_of_all_samples(model: nn.Module, share: float | None, count: int) -> None:
    """Nine of the user's, in batches of several."""
    given: list[Batch] = [((torch.zeros(size, length).long(),), {}) for size, length in ((4, 6), (5, 8))]
    data = calibration_data(model, (), None, given, None, share)
    text = text_of(data)
    assert len(text.windows) == count
    assert {args[0].shape for args, _ in text.windows} == {(1, 8)}
    assert data.share == (0.5 if share is None else share)
    assert data.batches == given


def test_what_is_given_is_taken(model: nn.Module) -> None:
    args, given = (torch.zeros(1, 5).long(),), rows(2)
    data = calibration_data(model, args, None, given, loss_of)
    assert (data.args, data.batches, data.loss, data.causal, data.writes) == (args, given, loss_of, None, False)
    data = calibration_data(model, (), None, given, loss_of)
    assert (data.loss, data.share) == (loss_of, 0)
    assert example_of(data).shape == (2, LONGEST)
    data = calibration_data(model, (), None, given, loss_of, 0.5)
    assert (data.loss, len(text_of(data).windows)) == (loss_of, 2)
    data = calibration_data(model, args, None, NO_BATCHES, loss_of)
    assert (data.args, data.loss, data.share, len(text_of(data).windows)) == (args, loss_of, 1, COUNT)
    assert calibration_data(model, args, None, NO_BATCHES, None, 0.5).share == 1
    assert calibration_data(model, args, None, NO_BATCHES, None, 0.0).share == 0
    data = calibration_data(model, (), None, NO_BATCHES, None, measures=False)
    assert (data.loss, data.writes) == (None, False)
    assert example_of(data).shape == (2, LONGEST)
    assert example_of(data).flatten().tolist() == [*range(VOCABULARY), *range(2 * LONGEST - VOCABULARY)]


def test_distillation_reads_every_window_once(
    model: nn.Module, windows: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups of six windows of 12 tokens, which are fewer than 64; first those that were calibrated on."""
    lessons: list[tuple[Distill, Sequence[Batch], Sequence[Batch]]] = []

    def run(self: Distill, dense: Any, small: Any, batches: Any, loss: Any, validation: Any, watch: Any) -> None:
        lessons.append((self, batches, validation))

    monkeypatch.setattr(Distill, "run", run)
    models = eco.compress(model, ratio=(0.2, 0.3), distillation=5, mixed=0.0, generated_windows=COUNT)
    assert len(models) == len(lessons) == 2
    distill, batches, validation = lessons[0]
    assert (distill.length, batches, validation) == (5, [], [])
    read = torch.cat([args[0] for args, _ in distill.fresh])
    assert len(distill.fresh) == 5
    assert read.equal(torch.cat([args[0] for args, _ in windows[JUDGES : JUDGES + len(read)]]))
    assert len(read) > COUNT
    assert torch.cat([args[0] for args, _ in distill.second]).equal(
        torch.cat([args[0] for args, _ in windows[:JUDGES]])
    )
    lessons.clear()
    eco.compress(model, ratio=0.3, batches=rows(4), distillation=6, generated_share=0.25, mixed=0.0)
    distill, batches, validation = lessons[0]
    assert (distill.length, len(distill.fresh)) == (6, 2)
    assert sum(len(args[0]) for args, _ in batches) == 4
    assert validation == []


def test_windows_for_distillation_are_those_that_are_wanted(model: nn.Module, windows: list[Batch]) -> None:
    text = SecondText.written(GeneratedText(model, length=LONGEST), COUNT, 1.0)
    for count in (0, COUNT - 1, COUNT, COUNT + 2):
        unread = text.unread(count)
        assert len(unread) == count
        assert all(a[0][0].equal(b[0][0]) for a, b in zip(unread, windows[JUDGES:], strict=False))


def test_example_inputs_are_no_inference_tensors(model: nn.Module) -> None:
    with torch.inference_mode():
        data = calibration_data(model, (), None, NO_BATCHES, None)
    assert not example_of(data).is_inference()


def test_compression_in_place_needs_no_inputs(windows: list[Batch]) -> None:
    torch.manual_seed(0)
    model = Writer().double().eval()
    assert eco.compress_(model, **BRIEF) is model
    assert isinstance(model.up, nn.Linear)
    assert model.up.out_features < 24
    assert eco.calibration.distances(model).on_generated > 0


def test_other_methods_take_what_the_model_writes(model: nn.Module, windows: list[Batch]) -> None:
    small = eco.compress(model, ratio=0.3, method="gate-fisher", steps=1, generated_windows=COUNT)
    batches = windows[JUDGES : JUDGES + COUNT]
    options: dict[str, Any] = {"ratio": 0.3, "method": "gate-fisher", "steps": 1}
    assert_same(small, eco.compress(model, *windows[0], batches=batches, loss=loss_of, **options))


def test_magnitude_writes_no_text(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CalibrationData, "text", lambda *_: pytest.fail("it writes"))
    small = eco.compress(model, ratio=0.3, method="magnitude")
    assert small(torch.zeros(1, 2, dtype=torch.long)).shape == (1, 2, VOCABULARY)


def test_padding_does_not_count() -> None:
    class Masked(Writer):
        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(ids)

    ids, mask = torch.tensor([[3, 1, 4, 1, 5]]), torch.tensor([[1, 1, 1, 0, 0]])
    model = Masked()
    loss = NextTokenLoss(causal_model(model, (ids, mask)))
    output = model(ids, mask)
    torch.testing.assert_close(loss(output, (ids, mask), {}), loss_of(output[:, :3], (ids[:, :3],), {}))
    with pytest.raises(ScoreError, match="batches differ in their structure"):
        loss(output, (ids,), {"mask": mask})


class Both(nn.Module):
    """Attention that looks ahead."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(5, 4), nn.Linear(4, 8), nn.Linear(8, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        y: Tensor = self.down(gelu(self.up(x + x.mean(1, keepdim=True))))
        return y


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"batches": []}, ScoreError, "there are no batches to calibrate with: pass at least one"),
        ({"batches": iter([])}, ScoreError, "there are no batches to calibrate with"),
        ({"generated_share": 0}, ScoreError, "there are no batches to calibrate with"),
        ({"batches": [torch.zeros(1, 2)]}, ScoreError, "batch 0 is not a pair"),
        (
            {"batches": [*rows(1), ((), {"ids": torch.ones(1, 4).long()})]},
            ScoreError,
            "batches differ in their structure",
        ),
        ({"generated_share": 1.0}, ScoreError, "generated_share=1.0 is not a share: give a number from 0 to below 1"),
        ({"generated_share": 0.5, "method": "magnitude"}, OptionError, "takes generated_share= where it measures, and"),
        ({"seed": -1}, ScoreError, "seed=-1 is not a seed"),
        ({"generated_windows": 0}, ScoreError, "generated_windows=0 is not a number of windows"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(
    model: nn.Module, options: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence) as refusal:
        eco.compress(model, ratio=0.3, **options)
    assert "\n" not in str(refusal.value)


def test_what_does_not_write_is_asked_for_data() -> None:
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(ScoreError, match="no batches to calibrate with"):
        eco.compress(Both(), (ids,), ratio=0.3)
    with pytest.raises(
        ScoreError, match=r"generated_share=0.5 needs a model that writes text, and Both does not because"
    ):
        eco.compress(Both(), (ids,), ratio=0.3, batches=[((ids,), {})], loss=loss_of, generated_share=0.5)


def test_a_model_that_says_one_thing_for_ever_is_refused(model: nn.Module) -> None:
    torch.manual_seed(0)
    stuck = Writer()
    with torch.no_grad():
        stuck.head.bias[2] += 50
    with pytest.raises(
        ScoreError, match=r"Writer writes one token for ever: .*pass data with batches=, and generated_share=0"
    ):
        eco.compress(stuck, ratio=0.3, generated_windows=COUNT)
