"""The recipe of `compress` as a whole, and what it does with bad input."""

from __future__ import annotations

import logging
import warnings
from copy import deepcopy
from itertools import pairwise
from typing import Any
from weakref import ReferenceType, ref

import pytest
import torch
from torch import Tensor, nn

import ecospa_fx as eco
from ecospa_fx import recipe
from ecospa_fx.errors import EcospaError, InputError, OptionError, PlanError, ScoreError
from ecospa_fx.importance.score import Batch
from ecospa_fx.origin import origin_of
from ecospa_fx.passes.lossy.measurement import Measurement
from ecospa_fx.recipe import Recipe
from ecospa_fx.runtime import bfloat16
from tests.support.counting import VOCABULARY, Tokens, data, learnt, loss_of, mean_loss

CAPTURES = ["capture at the example's sizes", "capture with symbolic sizes"]
"""The stages of `detect` and of `shrink`."""


@pytest.mark.slow
def test_couplings_that_are_known_are_taken_and_those_of_another_model_refused(trained: nn.Module) -> None:
    batches = data()
    couplings = eco.detect(trained, batches[0][0])
    options: dict[str, Any] = {"ratio": 0.3, "batches": batches, "loss": loss_of}
    want, small = (
        eco.compress(trained, batches[0][0], couplings=c, distillation=0, **options) for c in (None, couplings)
    )
    assert want(*batches[0][0]).equal(small(*batches[0][0]))
    other = nn.Sequential(nn.Embedding(VOCABULARY, 4), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, VOCABULARY))
    for method in ("second-order", "magnitude"):
        with pytest.raises(PlanError, match="made for another model"):
            eco.compress(other, batches[0][0], couplings=couplings, method=method, **options)
        with pytest.raises(PlanError, match="pass allow= to detect"):
            eco.compress(trained, batches[0][0], couplings=couplings, method=method, allow="cache", **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"distillation": 32}, {"distillation": 0}, {"basis": False, "gates": False, "distillation": 0}]
)
def test_what_does_nothing_goes_first_and_costs_nothing(options: dict[str, Any]) -> None:
    """Dead units: after their removal the loss is the dense one's."""
    model = learnt(Tokens(bias=True))
    with torch.no_grad():
        for layer in model.layers:  # type: ignore[union-attr]  # a ModuleList
            layer.down.weight[:, ::3] = 0
    batches = data()
    small = eco.compress(model, batches[0][0], ratio=0.2, batches=batches, loss=loss_of, kinds=["ffn"], **options)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    assert mean_loss(small, batches) == pytest.approx(mean_loss(model, batches), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "ratios"), [({}, (0.25, 0.5)), ({"rotary": False, "fused": True, "bias": True}, (0.5,))]
)
def test_it_beats_removal_alone_and_more_costs_more(shape: dict[str, Any], ratios: tuple[float, ...]) -> None:
    model = learnt(Tokens(**shape))
    before = deepcopy(model.state_dict())
    batches, losses = data(), [mean_loss(model, data())]
    options: dict[str, Any] = {"batches": batches, "loss": loss_of, "couplings": eco.detect(model, batches[0][0])}
    for ratio in ratios:
        small = eco.compress(model, batches[0][0], ratio=ratio, distillation=32, **options)
        bare = eco.compress(model, batches[0][0], ratio=ratio, method="gate-fisher", **options)
        assert mean_loss(small, batches) < mean_loss(bare, batches)
        losses.append(mean_loss(small, batches))
    assert all(b > a - 0.005 for a, b in pairwise(losses)), losses
    for name, value in model.state_dict().items():
        assert value.equal(before[name]), name


@pytest.mark.slow
def test_it_is_deterministic_and_reads_batches_of_other_sizes(trained: nn.Module) -> None:
    batches = [*data(3, 12), *data(3, 9)]
    first, second = (
        eco.compress(trained, batches[0][0], ratio=0.3, batches=iter(batches), loss=loss_of, distillation=4)
        for _ in range(2)
    )
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert a.equal(b)


@pytest.mark.slow
def test_what_a_module_can_carry_is_compressed_by_whole_heads() -> None:
    """KV groups, whose content its code could not narrow, are scored and made up for like what is in them."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 8, "num_key_value_heads": 4}
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=2, **shape)
    ).eval()
    no_cache = {"use_cache": False}
    batches: list[Batch] = [(args, no_cache) for args, _ in data(4)]

    def loss(output: Any, args: Any, kwargs: Any) -> Tensor:
        return loss_of(output.logits, args, kwargs)

    options: dict[str, Any] = {"expressible_in": "module", "uniform": True, "round_to": 1, "distillation": 2}
    small = eco.compress(model, batches[0][0], no_cache, ratio=0.3, batches=batches, loss=loss, **options)
    plan = origin_of(small).plan
    assert {"heads", "ffn"} <= {s.kind for s in plan}
    assert plan.removed_parameters / plan.coupled_parameters == pytest.approx(0.3, abs=0.1)
    own = deepcopy(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "config.* cannot say how wide the layers")
        eco.shrink_(own, plan, batches[0][0], no_cache)
    own.load_state_dict(small.state_dict())
    ids = batches[0][0][0]
    torch.testing.assert_close(own(ids).logits, small(ids, **no_cache).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_bfloat16_and_training_mode_stay_what_they_are() -> None:
    model = learnt(Tokens(dropout=0.2)).bfloat16().train()
    small = eco.compress(model, data()[0][0], ratio=0.3, batches=data(4), loss=loss_of, distillation=4)
    assert small.training
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    assert all(p.isfinite().all() and p.requires_grad for p in small.parameters())


@pytest.mark.slow
def test_it_works_in_inference_mode(trained: nn.Module) -> None:
    batches = data(4)
    with torch.inference_mode():
        small = eco.compress(trained, batches[0][0], ratio=0.3, batches=batches, loss=loss_of, distillation=4)
    assert not any(p.is_inference() for p in small.parameters())


@pytest.mark.slow
def test_a_compressed_model_is_saved_and_loaded(trained: nn.Module, tmp_path: Any) -> None:
    small = eco.compress(trained, data()[0][0], ratio=0.3, batches=data(), loss=loss_of, distillation=0)
    eco.save(small, tmp_path / "small")
    again = eco.load(tmp_path / "small", model=Tokens)
    assert mean_loss(again, data()) == pytest.approx(mean_loss(small, data()), abs=1e-6)


class InPlace(nn.Module):
    """Layers that overwrite what others have computed."""

    def __init__(self, *, overwrite: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.overwrite = overwrite
        self.up = nn.ModuleList(nn.Linear(6, 24) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(24, 6) for _ in range(3))
        self.unused = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        for up, down in zip(self.up, self.down, strict=True):
            self.unused(x)
            h = torch.relu_(up(x)) if self.overwrite else up(x).relu()
            x = x.add_(down(h)) if self.overwrite else x + down(h)
        return x


@pytest.mark.slow
def test_models_of_several_sizes_are_those_that_come_by_one(
    trained: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ecospa_fx.progress")
    batches, ratios = data(8), (0.2, 0.5)
    options: dict[str, Any] = {"batches": batches, "loss": loss_of, "distillation": 4}
    before = deepcopy(trained.state_dict())
    models = eco.compress(trained, batches[0][0], ratio=ratios, **options)
    stages = [message.split(":")[0] for message in caplog.messages]
    assert stages == [*CAPTURES, "curvature", "surgeon", *["solving"] * 2, *["distillation"] * 2]
    assert all(value.equal(before[name]) for name, value in trained.state_dict().items())
    masks = [{s.name: s.mask for s in origin_of(model).plan} for model in models]
    for wide, narrow in pairwise(masks):
        assert all((mask <= wide[name]).all() for name, mask in narrow.items() if name in wide)
    for ratio, model in zip(ratios, models, strict=True):
        alone = eco.compress(trained, batches[0][0], ratio=ratio, **options)
        assert origin_of(alone).plan == origin_of(model).plan
        assert alone.state_dict().keys() == model.state_dict().keys()
        assert all(value.equal(alone.state_dict()[name]) for name, value in model.state_dict().items())
        assert model(*batches[0][0]).equal(alone(*batches[0][0]))


@pytest.mark.slow
def test_what_was_measured_is_let_go_before_distilling(trained: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[ReferenceType[object]] = []
    alive: list[bool] = []
    measure, distil = recipe._measured, recipe._distil

    def noted(*args: Any) -> Measurement:
        result = measure(*args)
        measured.append(ref(result.curvature))
        return result

    def looked(*args: Any) -> None:
        alive.append(measured[0]() is not None)
        distil(*args)

    monkeypatch.setattr(recipe, "_measured", noted)
    monkeypatch.setattr(recipe, "_distil", looked)
    batches = data(4)
    eco.compress(trained, batches[0][0], ratio=0.3, batches=batches, loss=loss_of, distillation=2)
    assert alive == [False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": ()}, r"ratio=\(\) does not ascend: give at least one, from the least to the most"),
        ({"ratio": (0.3, 0.2)}, r"ratio=\(0.3, 0.2\) does not ascend"),
        ({"ratio": [0.3, 0.3]}, r"ratio=\(0.3, 0.3\) does not ascend"),
        ({"ratio": (0.3,), "method": "magnitude"}, "method='magnitude' scores for each anew: call it once per ratio"),
    ],
)
def test_ratios_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        eco.compress(nn.Linear(2, 2), (torch.ones(1, 2),), **options)
    with pytest.raises(PlanError, match="ratio"):
        eco.compress(nn.Linear(2, 2), (torch.ones(1, 2),), ratio=(0.2, 1.5))


@pytest.mark.slow
def test_every_stage_shows_itself(
    trained: nn.Module, tmp_path: Any, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ecospa_fx.progress")
    batches = data(8)
    options: dict[str, Any] = {"allocation": "sensitivity", "rounds": 1, "distillation": 4, "progress": True}
    small = eco.compress(trained, batches[0][0], ratio=0.3, batches=batches, loss=loss_of, **options)
    eco.save(small, tmp_path / "small")
    stages = [message.split(":")[0] for message in caplog.messages]
    assert stages == [*CAPTURES, "curvature", "surgeon", "search", "solving", "distillation", "saving"]
    bars = [line.split(":")[0] for line in capsys.readouterr().err.splitlines()]
    assert list(dict.fromkeys(bars)) == ["curvature", "surgeon", "sensitivity", "distill"]
    shown = len(caplog.messages)
    eco.compress(
        trained, batches[0][0], ratio=0.3, batches=batches, loss=loss_of, least_squares="in turn", distillation=0
    )
    eco.score(trained, eco.detect(trained, batches[0][0]), batches, loss=loss_of)
    stages = [message.split(":")[0] for message in caplog.messages[shown:]]
    assert {"solving in turn", "scores"} < set(stages)
    assert capsys.readouterr().err == ""


@pytest.mark.slow
@pytest.mark.parametrize("rounded", [False, True])
def test_what_overwrites_is_compressed_like_what_does_not(rounded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bfloat16, "_multiplies_bfloat16", lambda: rounded)
    monkeypatch.setattr(bfloat16, "FEW_ROWS", 0)
    batches: list[Batch] = [((torch.randn(8, 6),), {}) for _ in range(8)]
    found = [
        eco.compress(
            InPlace(overwrite=overwrite), batches[0][0], ratio=0.5, batches=batches, loss=square, distillation=16
        )
        for overwrite in (False, True)
    ]
    for (name, a), (_, b) in zip(*(model.named_parameters() for model in found), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


class Memory:
    """What a call leaves for the next one."""

    def __init__(self) -> None:
        self.total = torch.zeros(8, 6)


class Remembering(InPlace):
    """Overwrites its argument, and an object that it is given."""

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        x = super().forward(x.add_(1.0))
        if memory is not None:
            memory.total = memory.total + x
        return x


def test_calibration_data_stays_as_it_is() -> None:
    batches: list[Batch] = [((torch.randn(8, 6), Memory()), {}) for _ in range(4)]
    before = [args[0].clone() for args, _ in batches]
    example = (torch.randn(8, 6), Memory())
    eco.compress(Remembering(overwrite=True), example, ratio=0.5, batches=batches, loss=square, distillation=16)
    for (args, _), values in zip(batches, before, strict=True):
        assert args[0].equal(values)
        assert not args[1].total.any()


# -- bad input ---------------------------------------------------------------------------------------------------


class Routed(nn.Module):
    """Two experts, of which the second one never gets a token."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 6))
        self.second = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 6))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.first(x) + self.second(x * (x > 1e6))
        return out


def square(output: Tensor, args: Any, kwargs: Any) -> Tensor:
    return output.square().mean()


def test_what_the_data_never_reaches_stays_whole() -> None:
    model = Routed()
    nn.init.zeros_(model.second[0].bias)  # type: ignore[arg-type]  # of a linear layer
    batches: list[Batch] = [((torch.randn(4, 6),), {}) for _ in range(4)]
    with pytest.warns(UserWarning, match=r"never reaches second.*stay whole"):
        small = eco.compress(model, batches[0][0], ratio=0.5, batches=batches, loss=square)
    assert small.get_parameter("second.0.weight").equal(model.second[0].weight)  # type: ignore[arg-type]
    assert small.get_parameter("first.0.weight").shape == (6, 6)
    assert all(p.isfinite().all() for p in small.parameters())


def test_constant_inputs_make_no_trouble() -> None:
    """Gram matrices of rank one."""
    model = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6))
    batches: list[Batch] = [((torch.ones(4, 6),), {}) for _ in range(4)]
    small = eco.compress(model, batches[0][0], ratio=0.5, batches=batches, loss=square)
    torch.testing.assert_close(small(*batches[0][0]), model(*batches[0][0]), rtol=1e-3, atol=1e-3)


def nan_loss(output: Tensor, args: Any, kwargs: Any) -> Tensor:
    return output.sum() * float("nan")


def constant_loss(output: Tensor, args: Any, kwargs: Any) -> Tensor:
    return torch.zeros(())


def test_few_batches_are_read_more_often() -> None:
    """At most twenty times each, but never fewer in all than where there are many."""
    assert [Recipe().draws(count) for count in (1, 16, 32, 64, 128, 1000)] == [224, 320, 640, 501, 224, 224]
    assert Recipe(distillation=7).draws(32) == 7


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"batches": []}, ScoreError, "no batches to calibrate with"),
        ({"batches": [torch.ones(2, 3)]}, ScoreError, "batch 0 is not a pair"),
        ({"loss": constant_loss}, ScoreError, "loss of batch 0 does not depend on the model"),
        ({"loss": nan_loss}, ScoreError, "loss of batch 0 is nan"),
        ({"batches": [*data(2), ((data(1)[0][0][0], 1), {})]}, InputError, "the call of a batch is not that of"),
        ({"ratio": 1.5}, EcospaError, "ratio=1.5"),
        ({"damping": 0}, ScoreError, "damping=0 is not a factor"),
        ({"distillation": -1}, ScoreError, "distillation=-1 is not a count"),
        ({"least_squares": "twice"}, ScoreError, "least_squares='twice' is unknown: use True, False or 'in turn'"),
        ({"step": None}, ScoreError, "step=None is not a count"),
        ({"mixed": 1.5}, ScoreError, "mixed=1.5 is not a share"),
        ({"predicted": -0.5}, ScoreError, "predicted=-0.5 is not a share"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(
    trained: nn.Module, change: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    before = deepcopy(trained.state_dict())
    given: dict[str, Any] = {"ratio": 0.3, "batches": data(2), "loss": loss_of, **change}
    with pytest.raises(error, match=sentence) as raised:
        eco.compress(trained, data()[0][0], **given)
    assert "\n" not in str(raised.value)
    assert all(value.equal(before[name]) for name, value in trained.state_dict().items())


def test_activations_that_overflow_are_told() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    with torch.no_grad():
        model[2].weight.zero_()  # type: ignore[operator]  # a linear layer
    rows = 1e30 * torch.randn(1, 2, 4)
    batches: list[Batch] = [((rows,), {})]
    with pytest.raises(ScoreError, match=r"input of '2.weight' is not finite in the calibration data"):
        eco.compress(model, batches[0][0], ratio=0.5, batches=batches, loss=lambda y, a, k: (y * 1e-30).sum())
    alone: list[Batch] = [((rows[0],), {})]  # samples of one row do not vary within
    small = eco.compress(model, alone[0][0], ratio=0.5, batches=alone, loss=lambda y, a, k: (y * 1e-30).sum())
    assert all(p.isfinite().all() for p in small.parameters())
