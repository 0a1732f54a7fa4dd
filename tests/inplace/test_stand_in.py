"""The small models that stand in for whole ones in trials of what a module can carry."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import ecospa_fx as eco
from ecospa_fx.budget.allocate import choose
from ecospa_fx.budget.ties import Carried
from ecospa_fx.coupling.couplings import Couplings
from ecospa_fx.coupling.types import Coupling
from ecospa_fx.errors import PlanError
from ecospa_fx.inplace import expressible
from ecospa_fx.inplace import stand_in as stand_ins
from ecospa_fx.inplace.equivalence import EquivalenceCheck
from ecospa_fx.inplace.stand_in import stand_in
from tests.support.hugging import tiny


class Layer(nn.Module):
    """Attention whose heads an attribute counts, and an FFN."""

    def __init__(self, width: int, gated: bool) -> None:
        super().__init__()
        self.heads, self.gated = 2, gated
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down, self.norm = nn.Linear(width, 12), nn.Linear(12, width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        x = x + self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        hidden = self.up(self.norm(x))
        out: Tensor = x + self.down(hidden.sigmoid() * hidden if self.gated else hidden.relu())
        return out


class Deep(nn.Module):
    """Layers of two sorts between a table of many rows and a head as wide."""

    def __init__(self, rows: int = 200, layers: int = 6, *, by_number: bool = False) -> None:
        super().__init__()
        self.by_number, self.depth = by_number, layers
        self.table, self.head = nn.Embedding(rows, 8), nn.Linear(8, rows)
        self.layers = nn.ModuleList(Layer(8, gated=i % 3 == 2) for i in range(layers))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for i in range(self.depth if self.by_number else len(self.layers)):
            x = self.layers[i](x) if self.by_number else list(self.layers)[i](x)
        out: Tensor = self.head(x)
        return out


IDS = torch.arange(2 * 40).remainder(190).view(2, 40)


@pytest.fixture(autouse=True)
def few_rows_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stand_ins, "MANY_ROWS", 200)


def names_of(carried: Carried | None) -> set[tuple[Any, ...]]:
    assert carried is not None
    return {(tuple(c.name for c in t.couplings), t.step, t.same) for t in carried.ties}


def candidates(model: nn.Module, args: tuple[Any, ...]) -> list[Coupling]:
    """The couplings that a plan chooses from by default."""
    return choose(eco.detect(model, args), containers=True)


def both(couplings: Couplings, uniform: bool) -> tuple[Carried | None, Carried | None]:
    """What a small model and what the whole one say."""
    assert couplings.example is not None
    check = EquivalenceCheck(couplings.model, *couplings.example)
    chosen = choose(couplings, containers=True)
    small = expressible._carried_by_stand_in(couplings, chosen, uniform, False)
    return small, expressible._carried(check, chosen, uniform, False)


def test_two_layers_of_a_sort_few_rows_and_few_positions_are_kept() -> None:
    torch.manual_seed(0)
    model = Deep()
    small = stand_in(model, (IDS,), {}, candidates(model, (IDS,)))
    assert small is not None
    assert [name for name, _ in small.model.get_submodule("layers").named_children()] == ["0", "1", "2", "5"]
    assert small.model.get_parameter("table.weight").shape == (stand_ins.FEW_ROWS, 8)
    assert small.model.get_parameter("head.weight").shape == (stand_ins.FEW_ROWS, 8)
    assert small.call.args[0].shape == (2, stand_ins.SHORT)
    assert int(small.call.args[0].max()) < stand_ins.FEW_ROWS
    assert {c.layer.split(".")[1] for c in small.couplings} == {"0", "1", "2", "5"}
    assert len(model.layers) == 6


def test_what_the_code_needs_stays() -> None:
    """A model that counts its layers itself keeps them all, and loses what it does not need."""
    model = Deep(by_number=True)
    small = stand_in(model, (IDS,), {}, candidates(model, (IDS,)))
    assert small is not None
    assert len(small.model.get_submodule("layers")._modules) == 6
    assert small.model.get_parameter("table.weight").shape == (stand_ins.FEW_ROWS, 8)
    plain = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))
    assert stand_in(plain, (torch.randn(3, 8),), {}, candidates(plain, (torch.randn(3, 8),))) is None


@pytest.mark.slow
@pytest.mark.parametrize("uniform", [False, True])
def test_all_layers_carry_what_a_few_of_them_carry(uniform: bool) -> None:
    torch.manual_seed(0)
    small, whole = both(eco.detect(Deep().double(), (IDS,)), uniform)
    assert names_of(small) == names_of(whole)
    assert {c.kind for c in small.couplings} >= {"ffn"} if small is not None else False


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layers", "uniform"),
    [("llama", "num_hidden_layers", True), ("gpt2", "n_layer", False)],
)
def test_models_of_transformers_carry_the_same(name: str, layers: str, uniform: bool) -> None:
    model, kwargs = tiny(name, **{layers: 3})
    small, whole = both(eco.detect(model, (), kwargs), uniform)
    assert names_of(small) == names_of(whole)


@pytest.mark.slow
def test_the_residual_width_is_searched_for_where_it_is_named() -> None:
    """It lies in all layers, so that none of them is left out."""
    model, kwargs = tiny("llama", num_hidden_layers=3)
    model.float()  # in float64 its norms, which add up in float32, could not be proven
    couplings = eco.detect(model, (), kwargs)
    options: Any = {"scores": "magnitude", "expressible_in": "module"}
    plan = eco.plan(couplings, 0.4, kinds=("residual",), **options)
    assert [s.kind for s in plan] == ["residual"]
    with pytest.warns(UserWarning, match=r"config.hidden_size = 48 cannot say"):
        eco.shrink_(model, plan, (), kwargs)
    assert model.get_parameter("model.norm.weight").shape == (plan.selections[0].kept,)


def test_a_wrong_answer_of_the_small_model_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one plan for the whole model does not confirm is tried on the whole model."""
    couplings = eco.detect(Deep(), (IDS,))
    asked: list[int] = []

    def supports(probe: expressible.PlanProbe, plan: eco.Plan) -> bool:
        asked.append(len(plan.shapes))
        return len(plan.shapes) < len(couplings.shapes)

    monkeypatch.setattr(expressible.PlanProbe, "supports", supports)
    assert expressible._carried_by_stand_in(couplings, choose(couplings, containers=True), False, False) is None
    assert asked[-1] == len(couplings.shapes) > asked[0]


def test_a_search_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    couplings = eco.detect(Deep(layers=2), (IDS,))
    searches: list[object] = []
    search = expressible.PlanProbe.search

    def counted(*args: Any) -> Any:
        searches.append(args)
        return search(*args)

    monkeypatch.setattr(expressible.PlanProbe, "search", counted)
    options: Any = {"scores": "magnitude", "expressible_in": "module", "kinds": ["ffn"]}
    plans = [eco.plan(couplings, ratio, **options) for ratio in (0.2, 0.4)]
    assert plans[0] != plans[1]
    assert len(searches) == 1


def test_the_search_shows_a_bar_where_it_is_asked_to(capsys: pytest.CaptureFixture[str]) -> None:
    for progress in (False, True):
        couplings = eco.detect(Deep(layers=2), (IDS,))
        eco.plan(couplings, scores="magnitude", expressible_in="module", kinds=["ffn"], progress=progress)
        assert ("module:" in capsys.readouterr().err) is progress


def test_weights_on_meta_are_drawn() -> None:
    with torch.device("meta"):
        model = Deep()
    couplings = eco.detect(model, (IDS.to("meta"),))
    scores = {c.name: torch.rand(c.carriers, c.size) for c in couplings.offered}
    plan = eco.plan(couplings, 0.3, scores, expressible_in="module", kinds=["ffn"])
    assert len(plan) == 6
    assert all(p.is_meta for p in model.parameters())


def test_meta_that_no_numbers_stand_in_for_is_refused() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
            self.scale = [torch.ones(12)]

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.down(self.up(x).relu() * self.scale[0])
            return out

    with torch.device("meta"):
        model = Hidden()
    with pytest.raises(PlanError, match=r"weights of Hidden are on meta.*load its weights first"):
        stand_in(model, (torch.randn(3, 8),), {}, ())
