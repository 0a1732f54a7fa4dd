"""Second-order scores while training: bases turn with all that belongs to them, and less is lost at a shrink."""

from __future__ import annotations

import copy
import io
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import ecospa_fx as eco
from ecospa_fx.errors import TrainingError
from ecospa_fx.importance.compensation import Compensated
from ecospa_fx.importance.linear_views import sides_of
from ecospa_fx.importance.score import Batch
from ecospa_fx.passes.lossy.reconstruct import Reconstruct

VOCABULARY, WIDTH, HEADS, LENGTH = 13, 16, 2, 10


class Block(nn.Module):
    """Attention without rotary embedding, so that Q with K is linear as well as V with O."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](x)
        q, k, v = (p(y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        out: Tensor = x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))
        return out


class Language(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Embedding(VOCABULARY, WIDTH), nn.Sequential(*(Block() for _ in range(blocks)))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(self.embed(ids)))
        return out


class Unfit(Language):
    def __init__(self) -> None:
        super().__init__(1)

    def forward(self, ids: Tensor) -> Tensor:
        raise NotImplementedError


def language(blocks: int = 2) -> Language:
    torch.manual_seed(0)
    return Language(blocks).double()


def ids(seed: int, count: int = 8) -> Tensor:
    """Sequences in which every token is the sum of the two before it, now and then one more."""
    source = torch.Generator().manual_seed(seed)
    rows = [torch.randint(0, VOCABULARY, (count,), generator=source) for _ in range(2)]
    for _ in range(LENGTH - 2):
        noise = (torch.rand(count, generator=source) < 0.1).long()
        rows.append((rows[-1] + rows[-2] + noise) % VOCABULARY)
    return torch.stack(rows, 1)


def loss_of(output: Tensor, args: Any, kwargs: Any) -> Tensor:
    return cross_entropy(output[:, :-1].flatten(0, 1), args[0][:, 1:].flatten())


def batches(count: int = 8) -> list[Batch]:
    return [((ids(1000 + i),), {}) for i in range(count)]


def sparse_language(model: nn.Module, optimizer: torch.optim.Optimizer | None, **options: Any) -> eco.SparseTraining:
    given: dict[str, Any] = {
        "schedule": eco.OneShot(1), "scores": "second-order", "batches": batches(), "loss": loss_of, "target": 0.4,
        "compensate": False,
        **options,
    }  # fmt: skip
    return eco.SparseTraining(model, (ids(0),), optimizer=optimizer, **given)


def one_step(sparse: eco.SparseTraining, optimizer: torch.optim.Optimizer, seed: int) -> None:
    optimizer.zero_grad()
    torch.autograd.backward(loss_of(sparse.model(ids(seed)), (ids(seed),), {}))
    sparse.step()
    optimizer.step()


def basis(units: int, kind: str) -> Tensor:
    """[HEADS, units, units]: any rotation, or a permutation with signs."""
    source = torch.Generator().manual_seed(3)
    if kind == "rotation":
        rotation: Tensor = torch.linalg.qr(torch.randn(HEADS, units, units, generator=source, dtype=torch.float64)).Q
        return rotation
    signs: Tensor = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(units)[:units]
    return torch.stack([torch.diag(signs)[torch.randperm(units, generator=source)] for _ in range(HEADS)])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1), "rotation"),
        (lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1), "signs"),
        (lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True), "signs"),
    ],
)
def test_training_goes_on_in_another_basis_as_it_would_have(make: Any, kind: str) -> None:
    found = []
    for turn in (False, True):
        model = language(blocks=1)
        optimizer = make(model.parameters())
        sparse = sparse_language(model, optimizer, schedule=eco.OneShot(100))
        average = copy.deepcopy(model)
        sparse.follow(average)
        for step in range(6):
            optimizer.zero_grad()
            torch.autograd.backward(loss_of(sparse.model(ids(step)), (ids(step),), {}))
            if turn and step == 3:
                linear = [c for c in sparse.couplings.offered if c.kind in ("qk", "vo")]
                assert len(linear) == 2
                before = model.blocks[0].get_submodule("v").get_parameter("weight").detach().clone()
                for coupling in linear:
                    sides = sides_of(coupling)
                    assert sides is not None
                    sparse._model.change_basis(sides, basis(coupling.size, kind))
                assert not torch.equal(before, model.blocks[0].get_submodule("v").get_parameter("weight"))
            optimizer.step()
        found.append((sparse.model(ids(9)).detach(), average(ids(9)).detach()))
    for plain, turned in zip(*found, strict=True):
        assert torch.allclose(plain, turned, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_measuring_turns_bases_and_changes_no_output() -> None:
    model = language()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparse = sparse_language(model, optimizer, schedule=eco.OneShot(100))
    for step in range(20):
        one_step(sparse, optimizer, step)
    before, weights = sparse.model(ids(99)).detach(), {n: p.detach().clone() for n, p in model.named_parameters()}
    second, measured = sparse._second_order, sparse._measured()
    assert second is not None
    assert measured is not None
    scores = second.scores(measured)
    assert torch.allclose(sparse.model(ids(99)), before, rtol=1e-9, atol=1e-9)
    turned = {n.split(".", 2)[-1] for n, p in model.named_parameters() if not torch.equal(p, weights[n])}
    assert turned == {"q.weight", "q.bias", "k.weight", "k.bias", "v.weight", "v.bias", "o.weight"}
    assert set(scores) == {c.name for c in sparse._now}
    v, o = (model.blocks[0].get_submodule(n).get_parameter("weight").detach() for n in ("v", "o"))
    assert torch.allclose(o.norm(dim=0) ** 2, v.square().sum(1) + weights_bias(model).square(), rtol=1e-6)


@pytest.mark.slow
def test_a_shrink_equals_masking_what_makes_up_for_it() -> None:
    """Twice: the second time, of units that are left. Copies follow."""
    model = language()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparse = sparse_language(model, optimizer, schedule=eco.OneShot(100), compensate=True)
    for step in range(20):
        one_step(sparse, optimizer, step)
    average = copy.deepcopy(sparse.model)
    sparse.follow(average)
    for share in (0.5, 1.0):
        second, measured = sparse._second_order, sparse._measured()
        assert second is not None
        assert measured is not None
        keep = sparse._units(second.scores(measured), share)
        left = {c.name: keep[c.name][sparse._keep[c.name]].view(c.carriers, c.size) for c in sparse._now}
        weights = Compensated(sparse._now, measured.values, measured.views, measured.curvature)
        masked = copy.deepcopy(sparse.model)
        masked.load_state_dict(weights.weights(left, measured.values))
        sparse._compensated(keep, second.changes(measured, left))
        for small in (sparse.model, average):
            assert torch.allclose(small(ids(99)), masked(ids(99)), rtol=1e-9, atol=1e-9)
    assert sparse.removed > 0.35


@pytest.mark.slow
def test_queries_and_keys_that_stay_rise_for_those_that_go() -> None:
    model = language()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sparse = sparse_language(model, optimizer, kinds=["qk"], compensate=True)
    second, measured = sparse._second_order, sparse._measured()
    assert second is not None
    assert measured is not None
    keep = sparse._units(second.scores(measured), 1.0)
    changed = set(second.changes(measured, keep))
    assert changed == {f"blocks.{i}.{side}.{kind}" for i in (0, 1) for side in "qk" for kind in ("weight", "bias")}


@pytest.mark.slow
def test_where_a_norm_runs_over_what_is_kept_the_smaller_model_is_solved_on_its_own_activations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), nn.LayerNorm(16), nn.Linear(16, 3)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    solve, runs = Reconstruct.run, list[int]()

    def counted(*args: Any, **given: Any) -> int:
        runs.append(solve(*args, **given))
        return runs[-1]

    monkeypatch.setattr(Reconstruct, "run", counted)
    sparse = eco.SparseTraining(
        model, (x,), optimizer=optimizer, schedule=eco.OneShot(1), target=0.5, allow="renormalise",
        batches=[((x,), {})], loss=lambda output, args, kwargs: output.square().mean(),
    )  # fmt: skip
    torch.autograd.backward(sparse.model(x).square().mean())
    sparse.step()
    assert sparse.removed > 0.4
    assert runs == [1]


def weights_bias(model: Language) -> Tensor:
    return model.blocks[0].get_submodule("v").get_parameter("bias").detach()


def trained(scores: str, compensate: bool) -> tuple[float, float]:
    """Loss on fresh data before and right after half of the units have gone."""
    model = language()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparse = sparse_language(model, optimizer, scores=scores, compensate=compensate, schedule=eco.OneShot(101))
    for step in range(100):
        one_step(sparse, optimizer, step)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    fresh = ids(77, 256)
    before = loss_of(sparse.model(fresh), (fresh,), {}).item()
    one_step(sparse, optimizer, 100)
    assert sparse.removed > 0.35
    return before, loss_of(sparse.model(fresh), (fresh,), {}).item()


@pytest.mark.slow
def test_less_is_lost_at_a_shrink_than_by_scores_of_training() -> None:
    first, plain = trained("gate-fisher", compensate=False)
    second, measured = trained("second-order", compensate=False)
    _, solved = trained("second-order", compensate=True)
    assert first == pytest.approx(second)
    assert solved < measured < plain
    assert solved - first < 0.5 * (plain - first)


@pytest.mark.slow
def test_a_run_that_is_resumed_ends_with_the_same_weights() -> None:
    found = []
    for at in (None, 3):
        model = language(blocks=1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        options = {"schedule": eco.Linear(2, 4, 2), "compensate": True}
        sparse = sparse_language(model, optimizer, **options)
        for step in range(6):
            if step == at:
                saved = io.BytesIO()
                torch.save((sparse.state_dict(), sparse.model.state_dict(), optimizer.state_dict()), saved)
                saved.seek(0)
                own, weights, state = torch.load(saved, weights_only=True)
                model = language(blocks=1)
                optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
                sparse = sparse_language(model, optimizer, **options)
                sparse.load_state_dict(own)
                sparse.model.load_state_dict(weights)
                optimizer.load_state_dict(state)
            one_step(sparse, optimizer, step)
        found.append(dict(sparse.model.named_parameters()))
    assert all(torch.equal(p, found[1][n]) for n, p in found[0].items())


@pytest.mark.slow
def test_states_that_nobody_knows_how_to_turn_keep_their_basis(caplog: pytest.LogCaptureFixture) -> None:
    model = language(blocks=1)
    optimizer = torch.optim.Rprop(model.parameters(), lr=1e-3)
    sparse = sparse_language(model, optimizer, schedule=eco.OneShot(2))
    one_step(sparse, optimizer, 0)
    before = model.blocks[0].get_submodule("v").get_parameter("weight").detach().clone()
    with caplog.at_level(logging.WARNING):
        sparse._measured()
    assert torch.equal(before, model.blocks[0].get_submodule("v").get_parameter("weight"))
    assert "linear couplings stay in their bases because Rprop keeps" in caplog.text
    one_step(sparse, optimizer, 1)
    assert sparse.removed > 0.3


@pytest.mark.slow
def test_at_the_start_it_needs_no_gradients_of_training() -> None:
    sparse = sparse_language(language(blocks=1), None, schedule=eco.AtStart())
    assert sparse.removed > 0.35


@pytest.mark.slow
def test_it_is_the_default_where_there_is_data() -> None:
    options: dict[str, Any] = {"scores": None, "schedule": None, "total_steps": 100}
    assert sparse_language(language(blocks=1), None, **options)._schedule.steps == (35, 45)
    assert len(sparse_language(language(blocks=1), None, **options, batches=None)._schedule.steps) == 11


def test_data_and_a_loss_are_needed() -> None:
    """Which is said before the model is traced, of one that cannot be."""
    model = Unfit()
    for missing in ({"batches": None}, {"loss": None}):
        with pytest.raises(TrainingError, match="second-order' needs data: give batches= and loss="):
            sparse_language(model, torch.optim.SGD(model.parameters(), lr=0.1), **missing)
