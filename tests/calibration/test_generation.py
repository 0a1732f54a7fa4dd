"""Text that a model writes itself: what models do that, that it is theirs, and that nothing of theirs changes."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ecospa_fx as eco
from ecospa_fx.calibration.decoding import Cache, cache_of
from ecospa_fx.calibration.generation import DEGENERATE, GREEDY, GeneratedText
from ecospa_fx.errors import CaptureError, ScoreError
from ecospa_fx.importance.losses import Batch
from tests.support import hugging, tiny

VOCABULARY, WIDTH = 11, 6

CALLS: list[int] = []
"""How many tokens each call of a model below read."""


def ids_of(batches: Sequence[Batch]) -> Tensor:
    """The ids [windows, length] of batches whose ids are the only tensor."""
    rows = [v for args, kwargs in batches for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
    return torch.cat(rows)


@dataclass
class Answer:
    """What a model with a state returns."""

    state: Tensor | None
    logits: Tensor


class Summing(nn.Module):
    """A causal model in float64: logits of the sum of all embeddings so far, its state."""

    def __init__(self, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, WIDTH, dtype=torch.float64)
        self.head = nn.Linear(WIDTH, vocabulary, dtype=torch.float64)
        self.dropout = nn.Dropout(0.5)

    def forward(self, ids: Tensor, state: Tensor | None = None) -> Answer:
        CALLS.append(ids.shape[1])
        sums = self.embed(ids).cumsum(1) + (0 if state is None else state)
        return Answer(sums[:, -1:], self.head(self.dropout(sums).sin()))


class Paired(Summing):
    """The same with its state in a tuple."""

    def forward(self, ids: Tensor, state: Tensor | None = None) -> Any:
        answer = super().forward(ids, state)
        return answer.logits, answer.state


class Forgetting(Summing):
    """The same, but what it takes back as its state it only adds half of."""

    def forward(self, ids: Tensor, state: Tensor | None = None) -> Answer:
        return super().forward(ids, None if state is None else state / 2)


class Late(Summing):
    """The same, whose state is wrong from the twelfth token on."""

    def __init__(self) -> None:
        super().__init__()
        self.read = 0

    def forward(self, ids: Tensor, state: Tensor | None = None) -> Answer:
        self.read = ids.shape[1] if state is None else self.read + ids.shape[1]
        return super().forward(ids, None if state is None or self.read > 12 else state)


def test_windows_are_drawn_from_the_model() -> None:
    """With logits that are known, against counts: three greedy tokens, then draws, none of an id of probability 0."""
    table = torch.tensor([[0.1, 0.6, 0.3, 0.0], [0.5, 0.0, 0.25, 0.25], [0.2, 0.2, 0.2, 0.4], [0.25] * 4]).double()
    bigrams = nn.Embedding(4, 4, _weight=(table + 1e-9).log().where(table > 0, torch.tensor(-1e9).double()))
    ids = ids_of(eco.calibration.generated(bigrams, count=100, length=200))
    assert ids.shape == (100, 200)
    assert set(ids[:, 0].tolist()) == {0, 1, 2, 3}
    for position in range(1, 1 + GREEDY):
        assert ids[:, position].equal(table.argmax(1)[ids[:, position - 1]])
    assert not ids[:, 1 + GREEDY].equal(table.argmax(1)[ids[:, GREEDY]])
    before, after = ids[:, GREEDY:-1].flatten(), ids[:, GREEDY + 1 :].flatten()
    counts = torch.zeros(4, 4, dtype=torch.float64).index_put_((before, after), torch.tensor(1.0).double(), True)
    assert (counts / counts.sum(1, keepdim=True) - table).abs().max() < 0.02
    assert counts[table == 0].sum() == 0


def test_temperature_divides_the_logits() -> None:
    torch.manual_seed(0)
    bigrams = nn.Embedding(5, 5, dtype=torch.float64)
    halved = nn.Embedding(5, 5, _weight=bigrams.weight.detach() / 2)
    cold = ids_of(eco.calibration.generated(halved, count=3, length=40, temperature=0.5))
    assert cold.equal(ids_of(eco.calibration.generated(bigrams, count=3, length=40)))
    assert not cold.equal(ids_of(eco.calibration.generated(halved, count=3, length=40)))


@pytest.mark.parametrize("kind", [Summing, Paired])
def test_a_window_depends_on_its_seed_and_number_alone(kind: Callable[[], Summing]) -> None:
    model = kind()
    whole = ids_of(eco.calibration.generated(model, count=7, length=30))
    assert whole.equal(ids_of(eco.calibration.generated(model, count=7, length=30, batch_size=3)))
    assert whole[:5, :20].equal(ids_of(eco.calibration.generated(model, count=5, length=20, batch_size=1)))
    assert not whole.equal(ids_of(eco.calibration.generated(model, count=7, length=30, seed=1)))
    assert len({*map(tuple, whole.tolist())}) == 7


def test_a_stream_goes_on_and_writes_when_asked() -> None:
    model = Summing()
    whole = ids_of(eco.calibration.generated(model, count=9, length=12))
    fresh = eco.calibration.stream(model, start=2, length=12, batch_size=3)
    calls = len(CALLS)
    assert ids_of(list(islice(fresh, 2))).equal(whole[2:4])
    written = len(CALLS)
    assert written > calls
    assert ids_of(list(islice(fresh, 1))).equal(whole[4:5])
    assert len(CALLS) == written
    assert ids_of(list(islice(fresh, 4))).equal(whole[5:])


# -- caches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "cache"),
    [(Summing, Cache("state", "state")), (Paired, Cache(1, "state")), (Forgetting, None)],
    ids=["attribute", "tuple", "wrong"],
)
def test_a_cache_is_used_where_it_is_right(kind: Callable[[], Summing], cache: Cache | None) -> None:
    model = kind().eval()
    text = GeneratedText(model, length=20)
    assert cache_of(text.causal) == cache
    CALLS.clear()
    ids = ids_of(text.windows(0, 2))
    # a call per token of one token each, and one of the whole window that checks the last logits
    assert tuple(CALLS) == ((*[1] * 19, 19) if cache else (*range(1, 20),))
    expected = Summing()
    expected.load_state_dict(model.state_dict())
    assert ids.equal(ids_of(eco.calibration.generated(expected, count=2, length=20)))


def test_a_cache_that_is_wrong_later_is_given_up() -> None:
    model, expected = Late().eval(), Summing()
    expected.load_state_dict(model.state_dict())
    text = GeneratedText(model, length=20)
    assert cache_of(text.causal) is not None
    without = ids_of(eco.calibration.generated(expected, count=2, length=20))
    CALLS.clear()
    assert ids_of(text.windows(0, 2)).equal(without)
    assert tuple(CALLS) == (*[1] * 19, 19, *range(1, 20))
    CALLS.clear()
    text.windows(2, 3)
    assert tuple(CALLS) == (*range(1, 20),)


@pytest.fixture(scope="module")
def llama() -> tuple[nn.Module, dict[str, Any]]:
    return hugging.tiny("llama", max_position_embeddings=24)


def test_transformers_write_with_their_cache(llama: tuple[nn.Module, dict[str, Any]]) -> None:
    model, kwargs = llama
    text = GeneratedText(model, (), kwargs, length=100)
    assert text.length == 24  # of its configuration
    assert cache_of(text.causal) is not None
    batches = text.windows(0, 3)
    assert [(args, kwargs["use_cache"]) for args, kwargs in batches] == [((), False)] * 3
    text._cache = None
    assert ids_of(text.windows(0, 3)).equal(ids_of(batches))
    plain = eco.calibration.generated(model, count=3, length=24)
    assert [kwargs for _, kwargs in plain] == [{"use_cache": False}] * 3
    assert ids_of(plain).equal(ids_of(batches))


def test_masks_positions_and_labels_go_along(llama: tuple[nn.Module, dict[str, Any]]) -> None:
    model, kwargs = llama
    ids = kwargs["input_ids"]
    beside = {"attention_mask": torch.ones_like(ids), "position_ids": torch.arange(9).expand(2, 9)}
    labels = ids.masked_fill(torch.arange(9) < 4, -100)
    text = GeneratedText(model, (), {**beside, **kwargs, "labels": labels}, length=20)
    assert cache_of(text.causal) is not None
    ((_, batch),) = text.windows(0, 1)
    assert batch["attention_mask"].equal(torch.ones(1, 20).long())
    assert batch["position_ids"].equal(torch.arange(20)[None])
    assert batch["labels"].equal(batch["input_ids"])
    assert batch["input_ids"].equal(ids_of(eco.calibration.generated(model, count=1, length=20)))


# -- nothing of the user's changes -------------------------------------------------------------------------------


def test_nothing_of_the_users_changes() -> None:
    model = Summing().train()
    model.head.eval()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    states = random.getstate(), torch.get_rng_state()
    ids = ids_of(eco.calibration.generated(model, count=2, length=12))
    assert ids.equal(ids_of(eco.calibration.generated(model.eval(), count=2, length=12)))  # without dropout
    model.train()
    model.head.eval()
    ids_of(list(islice(eco.calibration.stream(model, length=12), 2)))
    assert (model.training, model.dropout.training, model.head.training) == (True, True, False)
    assert random.getstate() == states[0]
    assert torch.get_rng_state().equal(states[1])
    assert all(value.equal(weights[name]) for name, value in model.state_dict().items())
    assert torch.is_grad_enabled()
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_text_can_be_learnt_from_whatever_the_callers_mode() -> None:
    with torch.inference_mode():
        batches = eco.calibration.generated(Summing(), count=2, length=6)
    assert not ids_of(batches).is_inference()
    assert not any(args[0].is_inference() for args, _ in batches)


# -- what models write -------------------------------------------------------------------------------------------


class Limited(nn.Module):
    """Learned positions, 24 of them from the third row on, and a vocabulary of which the last id is never predicted."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 8), nn.Linear(8, 10)
        self.positions = nn.Embedding(26, 8)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        x = self.embed(ids) + self.positions(torch.arange(2, 2 + ids.shape[1]))
        logits = self.head(x.cumsum(1).tanh())
        return {"hidden": x, "logits": logits.index_fill(2, torch.tensor([3]), -torch.inf)}


class Cut(nn.Module):
    """A model that says itself how much it reads."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.table, self.most = nn.Embedding(7, 7), most

    def forward(self, ids: Tensor) -> Tensor:
        assert ids.shape[1] <= self.most, "too long"
        logits: Tensor = self.table(ids)
        return logits


def test_ids_are_those_that_can_be_read_and_predicted() -> None:
    torch.manual_seed(0)
    text = GeneratedText(Limited(), length=64)
    assert text.length == 24
    assert text.causal.vocabulary == 10
    assert text.causal.valid.tolist() == [0, 1, 2, 4, 5, 6, 7, 8]
    assert set(ids_of(text.windows(0, 40)).flatten().tolist()) == set(text.causal.valid.tolist())


@pytest.mark.parametrize(("most", "length"), [(64, 20), (20, 20), (19, 19), (13, 13), (5, 5)])
def test_windows_are_as_long_as_the_model_reads(most: int, length: int) -> None:
    assert ids_of(eco.calibration.generated(Cut(most), count=1, length=20)).shape == (1, length)


def test_windows_may_be_shorter_than_what_is_tried() -> None:
    assert ids_of(eco.calibration.generated(Cut(20), count=2, length=2)).shape == (2, 2)


def test_dense_attention_looks_ahead_and_causal_attention_does_not(llama: tuple[nn.Module, dict[str, Any]]) -> None:
    with pytest.raises(ScoreError, match=r"Tiny cannot write .* because later tokens move earlier logits"):
        eco.calibration.generated(tiny.tiny())
    bert, kwargs = hugging.tiny("bert")
    with pytest.raises(ScoreError, match="later tokens move earlier logits"):
        eco.calibration.generated(bert, (), kwargs)


class Returns(nn.Module):
    """A table of 6 ids, and what a function makes of its logits."""

    def __init__(self, change: Callable[[Tensor], object], classes: int = 6) -> None:
        super().__init__()
        self.table, self.change = nn.Embedding(6, classes), change

    def forward(self, ids: Tensor) -> object:
        return self.change(self.table(ids))


REFUSED: list[tuple[nn.Module, str]] = [
    (Returns(lambda y: y.long()), "its output holds no floating logits"),
    (Returns(lambda y: y[:, 0]), "its output holds no floating logits"),
    (Returns(lambda y: y[:, :-1]), "its output holds no floating logits"),
    (Returns(lambda y: y * torch.nan), "none of the 6 ids that it predicts can be read and has finite logits"),
    (Returns(lambda y: y.index_fill(2, torch.arange(5), -torch.inf)), "only one of the 6 ids that it predicts"),
    (Returns(lambda y: y * 0), "its logits do not depend on the ids"),
    (Returns(lambda y: y, 3), "its output has 3 classes and it reads 6 ids, so that it predicts no ids"),
    (nn.Linear(4, 4), "it fails on token ids [2, 4] (RuntimeError: "),
    (nn.Embedding(6, 6, device="meta"), "its weights are on meta and have no values"),
    (Cut(4), "Cut reads only 4 tokens at a time"),
]


@pytest.mark.parametrize(("model", "sentence"), REFUSED, ids=[sentence[:24] for _, sentence in REFUSED])
def test_what_cannot_write(model: nn.Module, sentence: str) -> None:
    with pytest.raises(ScoreError) as refusal:
        eco.calibration.generated(model)
    assert sentence in str(refusal.value)
    assert str(refusal.value).endswith(": pass data with batches=")


def test_a_vocabulary_of_more_than_half_of_the_ids_will_do() -> None:
    assert set(ids_of(eco.calibration.generated(Returns(lambda y: y, 4), length=9)).flatten().tolist()) == {0, 1, 2, 3}


def test_one_token_for_ever_is_no_text() -> None:
    torch.manual_seed(0)
    table = nn.Embedding(6, 6)
    with torch.no_grad():
        table.weight[:, 4] += 20
    with pytest.raises(
        ScoreError, match=r"Embedding writes one token for ever: 100% of its own text .* such as 4, .* batches="
    ):
        eco.calibration.generated(table, count=2, length=30)
    with torch.no_grad():  # every tenth token or more is another one
        table.weight.zero_()[:, 4] = torch.tensor(DEGENERATE * 5 / (1 - DEGENERATE)).log() - 0.4
        table.weight[0] += 0.1
    assert len(eco.calibration.generated(table, count=8, length=100)) == 8


@pytest.mark.parametrize(
    ("args", "kwargs", "sentence"),
    [
        ((torch.randn(2, 4),), {}, "its example inputs hold no tensors of token ids"),
        ((torch.tensor([[3, 4]]), torch.tensor([[4, 3]])), {}, "its example inputs hold 2 tensors of token ids"),
        ((torch.tensor([[3, 4]]), torch.tensor([[0.5, 3.0]])), {}, "of which it is not known how it follows"),
    ],
)
def test_examples_that_do_not_say_what_the_ids_are(args: Any, kwargs: Any, sentence: str) -> None:
    with pytest.raises(ScoreError, match=sentence):
        eco.calibration.generated(Summing(), args, kwargs)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"count": 0}, "count=0 is not a number of windows: give a whole number of at least 1"),
        ({"length": 1}, "length=1 is not a number of tokens: give a whole number of at least 2"),
        ({"seed": -1}, "seed=-1 is not a seed"),
        ({"batch_size": 0}, "batch_size=0 is not a number of windows"),
        ({"temperature": 0}, "temperature=0 is none to sample at: give a positive number"),
        ({"temperature": float("inf")}, "temperature=inf is none to sample at"),
        ({"temperature": "hot"}, "temperature='hot' is none to sample at"),
        ({"progress": 1}, "progress=1 is neither True nor False"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ScoreError, match=sentence):
        eco.calibration.generated(Summing(), **options)


def test_a_stream_begins_somewhere_and_a_model_is_a_module() -> None:
    with pytest.raises(ScoreError, match="start=-1 is not the number of a window"):
        eco.calibration.stream(Summing(), start=-1)
    with pytest.raises(CaptureError):
        eco.calibration.generated("gpt2")  # type: ignore[arg-type]


def test_a_bar_counts_the_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    eco.calibration.generated(Summing(), count=5, length=12, batch_size=2, progress=True)
    assert "generate: 100%" in capsys.readouterr().err
