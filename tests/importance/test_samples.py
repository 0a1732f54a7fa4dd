"""A batch of several sequences counts as that many samples, in every method; where it cannot, one warning says why."""

from __future__ import annotations

import warnings
from collections import UserDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import ecospa_fx as eco
from ecospa_fx.coupling.couplings import Couplings
from ecospa_fx.errors import ScoreError
from ecospa_fx.importance import samples as sampling
from ecospa_fx.importance.samples import Indivisible, Splitter, grouped, joined, parts_of
from ecospa_fx.importance.score import Batch, Loss
from ecospa_fx.importance.scores import Scores
from tests.support.tiny import VOCABULARY, tiny, tiny_couplings
from tests.support.tiny import loss as mean_loss

METHODS = ["taylor", "fisher", "gate-fisher"]
COUNT = 4


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X = values(COUNT, 5)
"""Rows, a sample each."""


def called(*args: Any) -> Batch:
    return args, {}


def one_by_one(batch: Batch) -> list[Batch]:
    """Samples by hand, of tensors [samples, …] in a flat batch."""
    args, kwargs = batch
    count = len(next(iter((*args, *kwargs.values()))))
    return [
        (tuple(a[i : i + 1] for a in args), {name: value[i : i + 1] for name, value in kwargs.items()})
        for i in range(count)
    ]


@contextmanager
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def assert_equal(first: Scores, second: Scores, couplings: Couplings) -> None:
    for coupling in couplings.offered:
        assert second[coupling.name].max() > 0
        torch.testing.assert_close(first[coupling.name], second[coupling.name], rtol=1e-11, atol=0.0)


# -- what is counted ---------------------------------------------------------------------------------------------


def total(output: Tensor, args: Any, kwargs: Any) -> Tensor:
    return cross_entropy(output[:, :-1].flatten(0, 1), args[0][:, 1:].flatten(), reduction="sum")


def distance(output: Tensor, args: Any, kwargs: Any) -> Tensor:
    """Linear in none of its samples, and a sum of a mean and a constant."""
    return output.square().mean() + 100


@pytest.mark.parametrize("loss", [mean_loss, total, distance])
@pytest.mark.parametrize("method", METHODS)
def test_attention_and_packed_experts_score_the_same_however_sequences_are_batched(method: str, loss: Loss) -> None:
    model = tiny(layers=1)
    couplings = tiny_couplings(model)
    ids = torch.randint(0, VOCABULARY, (8, 6), generator=torch.Generator().manual_seed(3))
    single = eco.score(model, couplings, [((row[None],), {}) for row in ids], loss=loss, method=method)
    for size in (8, 3):  # the last batch is smaller
        with no_warning():
            grouped = eco.score(
                model, couplings, [((p,), {}) for p in torch.split(ids, size)], loss=loss, method=method
            )
        assert_equal(grouped, single, couplings)


class Masked(nn.Module):
    """Attention over what a mask shows, labels inside; keyword arguments only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, ids: Tensor, mask: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        x = self.embed(ids)
        q, k, v = (layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        z = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None].bool())
        x = x + self.o(z.transpose(1, 2).flatten(2))
        logits = self.head(x + self.down(self.up(x).relu()))
        if labels is None:
            return {"logits": logits}
        return {"loss": cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def masked_batch(labelled: Sequence[int]) -> Batch:
    """Sequences of 6 with as many labels as said."""
    ids = torch.randint(0, VOCABULARY, (len(labelled), 6), generator=torch.Generator().manual_seed(1))
    counts = torch.tensor(labelled)[:, None]
    mask = (torch.arange(6) < counts.clamp(min=2)).long()
    return (), {"ids": ids, "mask": mask, "labels": ids.masked_fill(torch.arange(6) >= counts, -100)}


def of_labels(output: dict[str, Tensor], args: Any, kwargs: Any) -> Tensor:
    return cross_entropy(output["logits"].flatten(0, 1), kwargs["labels"].flatten())


def inside(output: dict[str, Tensor], args: Any, kwargs: Any) -> Tensor:
    return output["loss"]


@pytest.fixture(scope="module")
def masked_model() -> tuple[nn.Module, Couplings]:
    model = Masked().double()
    batch = masked_batch([6, 6])[1]
    return model, eco.detect(model, (), {"ids": batch["ids"], "mask": batch["mask"]})


@pytest.mark.parametrize("loss", [of_labels, inside])
@pytest.mark.parametrize("method", METHODS)
def test_means_over_labels_count_each_sample_once(
    method: str, loss: Loss, masked_model: tuple[nn.Module, Couplings]
) -> None:
    """A batch's mean weighs samples by their labels; the samples alone have one mean each."""
    model, couplings = masked_model
    batch = masked_batch([6, 2, 5, 3])
    with no_warning():
        grouped = eco.score(model, couplings, [batch], loss=loss, method=method)
        single = eco.score(model, couplings, one_by_one(batch), loss=loss, method=method)
    assert_equal(grouped, single, couplings)


@pytest.mark.parametrize("loss", [of_labels, inside])
def test_a_sample_without_labels_is_left_out_with_a_warning(
    loss: Loss, masked_model: tuple[nn.Module, Couplings]
) -> None:
    model, couplings = masked_model
    batch = masked_batch([6, 0, 5, 0])
    with pytest.warns(UserWarning, match=r"^a sample of batch 0 is left out because its own loss is not") as told:
        grouped = eco.score(model, couplings, [batch, batch], loss=loss)
    assert len(told) == 1
    labelled = [sample for sample in one_by_one(batch) if sample[1]["labels"].max() >= 0]
    assert_equal(grouped, eco.score(model, couplings, labelled, loss=loss), couplings)
    with (
        pytest.warns(UserWarning, match="^a sample of batch 0 is left out"),
        pytest.raises(ScoreError, match="the loss of batch 1 is nan: leave the batch out"),
    ):
        eco.score(model, couplings, [batch, masked_batch([0, 0])], loss=loss)


class Images(nn.Module):
    """Convolutions with a norm over the batch, or over what was seen in training."""

    def __init__(self, *, tracked: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=tracked)
        self.second, self.head = nn.Conv2d(8, 6, 3), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.second(self.norm(self.first(x)).relu()).mean((2, 3)))
        return out


def of_classes(output: Tensor, args: Any, kwargs: Any) -> Tensor:
    return cross_entropy(output, torch.arange(1, 1 + len(output)) * 0 + args[0].flatten(1).argmax(1) % 5)


@pytest.mark.parametrize("method", METHODS)
def test_images_score_the_same_however_they_are_batched(method: str) -> None:
    model, images = Images().double(), values(COUNT, 3, 8, 8)
    couplings, batch = eco.detect(model, (images,)), called(images)
    with no_warning():
        grouped = eco.score(model, couplings, [batch], loss=of_classes, method=method)
    assert_equal(grouped, eco.score(model, couplings, one_by_one(batch), loss=of_classes, method=method), couplings)


# -- arguments of all kinds --------------------------------------------------------------------------------------


@dataclass
class Cache:
    """An object with tensors and a number."""

    keys: list[Tensor]
    length: int


class Encoding(UserDict[str, Any]):
    """What tokenizers return."""


def test_every_tensor_of_the_samples_is_cut_and_all_else_is_shared() -> None:
    x, vector, table, scale = values(COUNT, 5), values(COUNT), values(1, 5), torch.tensor(2.0)
    weight = nn.Parameter(values(7, 5))
    cache, names, boxes = (
        Cache([values(COUNT, 2, 3)], 3),
        ["a", "b", "c", "d"],
        [{"at": values(n, 4)} for n in range(4)],
    )
    args = (weight, {"x": (x, [vector])}, cache)
    batch = (
        args,
        Encoding(
            scale=scale, table=table, names=names, boxes=boxes, images=[*torch.split(X, 1)], flag=True, kernel=[3, 3]
        ),
    )
    parts = parts_of(batch)
    assert not isinstance(parts, str)
    assert len(parts) == COUNT
    for i, ((own, tree, kept), kwargs) in enumerate(parts):
        assert own is weight
        assert tree["x"][0].equal(x[i : i + 1])
        assert tree["x"][1][0].equal(vector[i : i + 1])
        assert kept.keys[0].equal(cache.keys[0][i : i + 1])
        assert (type(kept), kept.length, type(kwargs)) == (Cache, 3, Encoding)
        assert kwargs["scale"] is scale
        assert kwargs["table"] is table
        assert kwargs["names"] == names[i : i + 1]
        assert kwargs["boxes"][0]["at"] is boxes[i]["at"]
        assert kwargs["images"][0].equal(X[i : i + 1])
        assert (kwargs["flag"], kwargs["kernel"]) == (True, [3, 3])
    assert parts[0][0][1]["x"][0].data_ptr() == x.data_ptr()  # no copies


@pytest.mark.parametrize(
    "batch",
    [
        ((), {}),
        ((torch.tensor(1.0), 3), {}),
        ((values(1, 9), values(9)), {}),
        ((), {"ids": values(1, 4), "images": values(3, 4, 4), "sizes": values(2)}),
        ((values(0, 4),), {}),
    ],
)
def test_what_is_one_sample_stays_the_very_batch(batch: Batch) -> None:
    parts = parts_of(batch)
    assert len(parts) == 1
    assert parts[0] is batch


@pytest.mark.parametrize(
    ("batch", "offender"),
    [
        (((values(4, 5), values(5)), {}), "args[1] of shape [5]"),
        (((values(4, 5),), {"mask": values(5, 5)}), "kwargs['mask'] of shape [5, 5]"),
        ((({"a": values(4, 5), "b": [values(3)]},), {}), "args[0]['b'][0] of shape [3]"),
    ],
)
def test_tensors_of_other_leading_sizes_are_named(batch: Batch, offender: str) -> None:
    with pytest.raises(Indivisible) as reason:
        parts_of(batch)
    assert str(reason.value) == f"{offender} has not the 4 samples of the first tensor along its first axis"


# -- batches that count as one sample ----------------------------------------------------------------------------


class Rows(nn.Module):
    """An FFN over rows, and what a test makes of the result."""

    def __init__(self, after: Callable[[Tensor], Any] = lambda y: y) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.after = nn.Linear(5, 12), nn.Linear(12, 5), after

    def forward(self, x: Tensor, *more: Tensor) -> Any:
        for other in more:
            x = x + other
        return self.after(self.down(self.up(x).relu()))


def square(output: Tensor, args: Any, kwargs: Any) -> Tensor:
    return output.square().mean()


def contrastive(output: Tensor, args: Any, kwargs: Any) -> Tensor:
    return cross_entropy(output @ args[0].T, torch.arange(len(output)))


def partly_contrastive(output: Tensor, args: Any, kwargs: Any) -> Tensor:
    return square(output, args, kwargs) + 0.5 * contrastive(output, args, kwargs)


def variance(output: Tensor, args: Any, kwargs: Any) -> Tensor:
    return output.var(0).mean()


LOSS, MODEL = "its loss is not made of the losses of its samples", "the model's answer to one sample of it depends on"


@pytest.mark.parametrize(
    ("model", "args", "loss", "reason"),
    [
        (Rows(), (X,), contrastive, LOSS),
        (Rows(), (X,), partly_contrastive, LOSS),
        (Rows(), (X,), variance, LOSS),
        (Rows(lambda y: contrastive(y, (X[: len(y)],), {})), (X,), lambda y, a, k: y, LOSS),
        (Rows(lambda y: y @ y.T), (X,), lambda y, a, k: cross_entropy(y, torch.arange(len(y))), LOSS),
        (Rows(lambda y: y - y.mean(0)), (X,), square, MODEL),
        (Rows(lambda y: y.view(COUNT, 5) * 1), (X,), square, "a single sample of it cannot be computed (shape "),
        (Rows(), (X, values(5)), square, "args[1] of shape [5] has not the 4 samples of the first tensor along"),
        (Images(tracked=False), (values(COUNT, 3, 8, 8),), of_classes, MODEL),
    ],
)
def test_where_samples_cannot_be_told_apart_one_warning_says_why(
    model: nn.Module, args: tuple[Any, ...], loss: Loss, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = model.double(), called(*args)
    couplings = eco.detect(model, args)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = eco.score(model, couplings, [batch, batch], loss=loss)
    assert len(told) == 1
    text = str(told[0].message)
    assert f"as one sample, because {reason}" in text
    assert text.endswith(": where it holds several, pass each as a batch of its own")
    monkeypatch.setattr(sampling, "parts_of", lambda batch: [batch])
    with no_warning():
        assert_equal(found, eco.score(model, couplings, [batch], loss=loss), couplings)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_scale_of_the_loss_decides_nothing(scale: float) -> None:
    """In float32, where squares of such gradients are out of range."""
    model, x = Rows(), X.float()
    couplings = eco.detect(model, (x,))
    with no_warning():
        eco.score(model, couplings, [((x,), {})], loss=lambda y, a, k: scale * square(y, a, k), method="taylor")
    with pytest.warns(UserWarning, match=LOSS):
        eco.score(model, couplings, [((x,), {})], loss=lambda y, a, k: scale * contrastive(y, a, k), method="taylor")


def test_a_loss_of_what_a_hook_has_seen_counts_batches() -> None:
    """What the loss is made of cannot be cut, and the loss itself is right for what was called last."""
    model, seen = Rows().double(), list[Tensor]()
    couplings = eco.detect(model, (X,))
    model.down.register_forward_hook(lambda module, args, output: seen.append(output))
    with pytest.warns(UserWarning, match="because its loss is no function of what the model returns: where it holds"):
        found = eco.score(model, couplings, [((X,), {})], loss=lambda y, a, k: seen[-1].square().mean())
    model.down._forward_hooks.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "parts_of", lambda batch: [batch])
        assert_equal(found, eco.score(model, couplings, [((X,), {})], loss=square), couplings)


def test_positions_are_no_samples() -> None:
    """One sequence without an axis for samples, in a model that mixes positions."""

    def half(output: Tensor, args: Any, kwargs: Any) -> Tensor:
        return output[..., :4].square().mean()

    model, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).double(), values(6, 8)
    couplings = eco.detect(model, (x,))
    with pytest.warns(UserWarning, match=r"^every batch counts as one sample, because the model's answer to one"):
        found = eco.score(model, couplings, [((x,), {})], loss=half)
    assert_equal(found, eco.score(model, couplings, [((x[None],), {})], loss=half), couplings)


def test_a_model_that_writes_into_its_arguments_leaves_the_batches_alone() -> None:
    class Writing(Rows):
        def forward(self, x: Tensor, *more: Tensor) -> Any:
            return super().forward(x.mul_(2.0))

    model, x = Writing().double(), values(COUNT, 5)
    batch, before = called(x), x.clone()
    couplings = eco.detect(model, (x.clone(),))
    scores = eco.score(model, couplings, [batch], loss=square)
    assert x.equal(before)
    assert_equal(scores, eco.score(model, couplings, one_by_one(batch), loss=square), couplings)


# -- second order ------------------------------------------------------------------------------------------------


def compressed_both_ways(model: nn.Module, batch: Batch, couplings: Couplings, **options: Any) -> None:
    """One batch of several, and its samples one by one, give the same smaller model."""
    with no_warning():
        small, other = (
            eco.compress(model, *one_by_one(batch)[0], ratio=0.4, batches=batches, couplings=couplings, **options)
            for batches in ([batch], one_by_one(batch))
        )
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    parameters = dict(other.named_parameters())
    for name, parameter in small.named_parameters():
        torch.testing.assert_close(parameter, parameters[name], rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_compress_gives_the_same_model_however_sequences_are_batched(
    masked_model: tuple[nn.Module, Couplings],
) -> None:
    compressed_both_ways(
        masked_model[0], masked_batch([6, 2, 5, 3]), masked_model[1], loss=of_labels, distillation=3, mixed=0.0
    )


@pytest.mark.parametrize(
    "options", [{"allocation": "sensitivity", "distillation": 3}, {"least_squares": "in turn", "distillation": 0}]
)
def test_sensitivity_distillation_and_least_squares_count_samples(options: dict[str, Any]) -> None:
    model, rows = Rows().double(), values(18, 5)  # the 16th judges, every fourth one is held out
    compressed_both_ways(model, ((rows,), {}), eco.detect(model, (rows,)), loss=square, **options)


@pytest.mark.parametrize("method", ["second-order", "gate-fisher"])
def test_compress_warns_once_of_a_contrastive_loss_and_goes_on(method: str) -> None:
    model = Rows().double()
    options: dict[str, Any] = {"distillation": 0} if method == "second-order" else {"steps": 3}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        small = eco.compress(model, (X,), ratio=0.5, batches=[((X,), {})], loss=contrastive, method=method, **options)
    assert [LOSS in str(warning.message) for warning in told] == [True]
    assert sum(p.numel() for p in small.parameters()) < 100


def test_a_sample_without_labels_is_left_out_of_what_compress_measures() -> None:
    model = Masked().double()
    splitter = Splitter(lambda batch: model(*batch[0], **batch[1]), of_labels, model.parameters())
    with pytest.warns(UserWarning, match="^a sample of batch 1 is left out because its own loss is not finite"):
        found = splitter.all_of([masked_batch([6, 3]), masked_batch([5, 0, 4])])
    assert [int((kwargs["labels"] >= 0).sum()) for _, kwargs in found] == [6, 3, 5, 4]


def test_a_graph_of_one_batch_size_takes_batches_whole() -> None:
    model = Rows(lambda y: y.view(COUNT, 5) * 1).double()
    with pytest.warns(UserWarning, match="^every batch counts as one sample, because a single sample of it cannot"):
        small = eco.compress(model, (X,), ratio=0.5, batches=[((X,), {})] * 2, loss=square, distillation=2)
    assert small(X).shape == X.shape


def runs(model: nn.Module) -> Any:
    """As much of an evaluator as reading samples takes."""

    def answer(args: Sequence[Any], kwargs: Any) -> Any:
        return model(*args, **kwargs)

    return SimpleNamespace(answer=answer, program=SimpleNamespace(values=dict(model.named_parameters())))


def test_small_samples_are_read_together_where_model_and_loss_allow_it() -> None:
    batch = masked_batch([6, 2, 5, 3, 4])
    samples = one_by_one(batch)
    groups = grouped(samples, 2, runs(Masked().double()), of_labels)
    assert [len(kwargs["ids"]) for _, kwargs in groups] == [2, 2, 1]
    assert torch.cat([kwargs["labels"] for _, kwargs in groups]).equal(batch[1]["labels"])
    assert grouped(samples, 1, runs(Masked().double()), of_labels) == samples
    assert grouped(samples[:1], 2, runs(Masked().double()), of_labels) == samples[:1]
    rows = one_by_one(((X,), {}))
    for model, loss in ((Rows(lambda y: y.view(1, 5)), square), (Rows(), contrastive)):
        assert grouped(rows, 2, runs(model.double()), loss) == rows


def test_samples_join_where_they_fit() -> None:
    scale, flags = torch.tensor(2.0), {"flag": True, "cache": Cache([values(1, 2)], 3)}
    whole = joined([((x, scale), Encoding(flags)) for x in torch.split(X, 1)])
    assert whole is not None
    assert whole[0][0].equal(X)
    assert whole[0][1] is scale
    assert type(whole[1]) is Encoding
    assert whole[1]["cache"].keys[0].shape == (COUNT, 2)
    x = values(1, 5)
    for other in (values(1, 6), x.float(), values(2, 5), 3, None):
        assert joined([((x,), {}), ((other,), {})]) is None
    assert joined([((x, scale), {}), ((x, scale + 1), {})]) is None
    assert joined([((x,), {"flag": True}), ((x,), {"flag": False})]) is None
    assert joined([((x,), {"flag": True}), ((x,), {})]) is None


@pytest.mark.slow
@pytest.mark.parametrize("scores", ["second-order", "fisher"])
def test_training_measures_samples_of_its_batches(scores: str) -> None:
    kept = []
    for batches in ([called(X)], one_by_one(called(X))):
        model = Rows().double()
        sparse = eco.SparseTraining(
            model, (X,), optimizer=torch.optim.SGD(model.parameters(), lr=0.1), schedule=eco.AtStart(), target=0.4,
            scores=scores, batches=batches, loss=square,
        )  # fmt: skip
        kept.append(dict(sparse.model.named_parameters()))
    assert kept[0]["up.weight"].shape[0] < 12
    for name, parameter in kept[0].items():
        torch.testing.assert_close(parameter, kept[1][name], rtol=1e-9, atol=1e-12)
