"""Choosing what may go: patterns on modules, limits, selections, widths, units by hand, scores of one's own."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import ecospa_fx as eco
from ecospa_fx.budget import latency
from ecospa_fx.budget.graph_cost import flops
from ecospa_fx.coupling.couplings import Couplings
from ecospa_fx.coupling.types import Coupling
from ecospa_fx.errors import EcospaError, PlanError, ScoreError, TrainingError
from ecospa_fx.verify import masked_error
from tests.support.tiny import box, coupling, member, tiny, tiny_couplings


class Block(nn.Module):
    def __init__(self, width: int = 20) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, width), nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(torch.relu(self.up(x)))
        return out


class Net(nn.Module):
    """Residual FFNs, the first of whose matrices is also the second of a tied head."""

    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.alias = self.layers[0].up

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build().double().eval()


X = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
NET = seeded(Net)
COUPLINGS = eco.detect(NET, (X,))
DATA: list[Any] = [((X[i : i + 1],), {}) for i in range(3)]
MODEL = tiny()
TINY = tiny_couplings(MODEL)
NAMES = [f"layers.{i}.ffn" for i in range(4)]


def loss(output: Tensor, args: object, kwargs: object) -> Tensor:
    return output.square().mean()


def kept(plan: eco.Plan) -> dict[str, int]:
    return {s.name: s.kept for s in plan}


def random_scores(couplings: Couplings, seed: int = 0) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(seed)
    return {c.name: torch.rand(c.carriers, c.size, generator=source) for c in couplings.offered}


SCORES = random_scores(COUPLINGS)


# -- patterns ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patterns", "left"),
    [
        (["layers.0"], "123"),
        (["layers.0.*"], "123"),
        (["layers.0*"], "123"),
        ("layers.0", "123"),
        (["layers.0.up"], "123"),
        (["layers.0.down.weight"], "123"),
        (["*.up.bias"], ""),
        (["layers.[01]", "*.3.*"], "2"),
        (["alias"], "123"),  # another name of the same parameters
        (["alias.weight"], "123"),
        ((), "0123"),
    ],
)
def test_what_a_pattern_matches(patterns: Any, left: str) -> None:
    if not left:
        with pytest.raises(PlanError, match=r"^there is nothing to remove because exclude=.* matches all 4 couplings"):
            eco.plan(COUPLINGS, 0.5, SCORES, exclude=patterns)
        return
    plan = eco.plan(COUPLINGS, 0.5, SCORES, exclude=patterns)
    assert set(kept(plan)) == {f"layers.{i}.ffn" for i in left}
    assert plan.removed_parameters / plan.coupled_parameters == pytest.approx(0.5, abs=0.02)  # of what may go
    assert [c.name for c in COUPLINGS.select(exclude=patterns).offered] == list(kept(plan))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"exclude": ["layer.0"]},
            "exclude='layer.0' matches no module and no parameter of the model: near it are 'layers.0'",
        ),
        (
            {"exclude": ["3.up"]},
            "exclude='3.up' matches no module and no parameter of the model: near it are 'layers.3.up'",
        ),
        ({"exclude": ["LAYERS.0"]}, "exclude='LAYERS.0' matches no module"),
        ({"exclude": [""]}, "exclude=[''] is no name and no list of names"),
        ({"exclude": ["layers.0", 3]}, "exclude=['layers.0', 3] is no name and no list of names"),
        (
            {"limits": {"layer.1": 0.5}},
            "limits names 'layer.1', which is no kind that is chosen (ffn) and matches no module",
        ),
        ({"limits": {"pair": 0.5}}, "limits names kind 'pair', of which nothing is chosen: use some of ffn"),
        ({"limits": {"layers.0": -0.1}}, "limits['layers.0']=-0.1 is not a share of units to remove at most"),
        ({"limits": {"layers.0": True}}, "limits['layers.0']=True is not a share of units to remove at most"),
        ({"limits": {3: 0.5}}, "limits names 3, which is no text"),
        ({"kinds": []}, "kinds=[] names no kind: use some of ffn, or leave it out"),
        ({"kinds": ["qk"]}, "no offered coupling is of kind 'qk': use some of ffn"),
    ],
)
def test_a_choice_that_makes_no_sense_is_refused(options: dict[str, Any], text: str) -> None:
    for verb in (
        lambda **given: eco.plan(COUPLINGS, 0.5, SCORES, **given),
        lambda **given: eco.compress(NET, (X,), ratio=0.5, couplings=COUPLINGS, batches=DATA, loss=loss, **given),
    ):
        with pytest.raises(PlanError) as refused:
            verb(**options)
        assert str(refused.value).startswith(text)


def test_a_key_that_is_a_kind_and_another_module_is_refused() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ffn, self.other = Block(), Block()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.other(self.ffn(x))
            return out

    couplings = eco.detect(seeded(Both), (X,))
    with pytest.raises(PlanError, match=r"^limits names 'ffn', which is both a kind and a module: write 'ffn\.\*' for"):
        eco.plan(couplings, 0.3, "magnitude", limits={"ffn": 0.5})
    assert kept(eco.plan(couplings, 0.4, "magnitude", limits={"ffn.*": 0.1}))["ffn.ffn"] >= 18
    only = couplings.select(modules="ffn.*")
    assert kept(eco.plan(only, 0.1, "magnitude", limits={"ffn": 0.1})) == {"ffn.ffn": 18}  # both mean the same


# -- allocation within limits --------------------------------------------------------------------------------------

TINY_SCORES = random_scores(TINY)


def reached(choice: dict[str, Any]) -> eco.Plan | None:
    """The plan, or None where limits or what is left out keep too much."""
    if choice["exclude"] == ["*.experts", "layers.1.attention.q"] and "experts" in choice["limits"]:
        return None
    try:
        return eco.plan(TINY, scores=TINY_SCORES, **choice)
    except PlanError as error:
        if " is out of reach because floor=" not in str(error):
            raise
        return None


choices = st.fixed_dictionaries(
    {
        "ratio": st.floats(0.05, 0.6),
        "round_to": st.integers(1, 3),
        "allocation": st.sampled_from(["global", "uniform", "ragged"]),
        "floor": st.sampled_from([0.0, 0.05, 0.3]),
        "exclude": st.sampled_from([(), ["layers.0"], ["*.experts", "layers.1.attention.q"]]),
        "limits": st.dictionaries(
            st.sampled_from(["ffn", "vo", "layers.1.*", "layers.*.attention", "layers.1.ffn"]),
            st.floats(0, 1),
            max_size=3,
        ),
    }
)
WITHIN: dict[str, Callable[[Coupling], bool]] = {
    "layers.1.*": lambda c: c.name.startswith("layers.1."),
    "layers.*.attention": lambda c: ".attention" in c.name,
    "layers.1.ffn": lambda c: c.name.startswith("layers.1.ffn"),
}


@settings(max_examples=60, deadline=None)
@given(choices)
def test_every_plan_keeps_to_its_limits(choice: dict[str, Any]) -> None:
    plan = reached(choice)
    if plan is None:
        return
    names = set(kept(plan))
    assert not choice["exclude"] or names < {c.name for c in TINY.offered}
    for s in plan:
        coupling = TINY[s.name]
        for key, limit in choice["limits"].items():
            if s.kind == key or (key in WITHIN and WITHIN[key](coupling)):
                assert int(s.removed.sum()) <= limit * s.size * s.carriers + 1e-6
        assert all(len(units) == s.size or len(units) % choice["round_to"] == 0 for units in s.keep)
        assert s.size * s.carriers - int(s.removed.sum()) >= choice["floor"] * s.size * s.carriers - 1e-6
    untouched = set(dict(MODEL.named_parameters())) - set(plan.masks(MODEL))
    if choice["exclude"] == ["layers.0"]:
        assert all(name in untouched for name in dict(MODEL.named_parameters()) if name.startswith("layers.0."))
    if choice["exclude"] == ["*.experts", "layers.1.attention.q"]:
        assert "layers.1.attention.q.weight" in untouched
        assert "layers.0.experts.up" in untouched


@pytest.mark.parametrize("budget", ["flops", "latency"])
def test_budgets_count_what_may_go(budget: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ECOSPA_FX_CACHE", str(tmp_path))
    monkeypatch.setattr(latency, "measured", lambda operations, device: [flops(one) * 1e-9 for one in operations])
    options: dict[str, Any] = {"budget": budget, "exclude": ["layers.0"], "limits": {"layers.1": 0.2}}
    plan = eco.plan(COUPLINGS, 0.3, SCORES, **options)
    widths = kept(plan)
    assert set(widths) == set(NAMES[1:])
    assert widths["layers.1.ffn"] >= 16
    assert sum(20 - k for k in widths.values()) / 60 == pytest.approx(0.3, abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("uniform", [False, True])
def test_what_a_module_can_carry_keeps_to_limits(uniform: bool) -> None:
    options: dict[str, Any] = {"expressible_in": "module", "uniform": uniform, "limits": {"layers.1": 0.25}}
    plan = eco.plan(COUPLINGS, 0.2, SCORES, exclude=["layers.0"], **options)
    widths = kept(plan)
    assert set(widths) == set(NAMES[1:])
    assert widths["layers.1.ffn"] >= 15
    if uniform:
        assert len(set(widths.values())) == 1  # one number for all layers is one that every one of them may have
    small = eco.shrink_(seeded(Net), plan, (X,))
    assert masked_error(NET, small, plan, (X,)) <= 1e-9
    with pytest.raises(
        PlanError, match=r"is out of reach because .* and limits=\{'layers\.1': 0\.25\} leave at most 0\.25"
    ):
        eco.plan(COUPLINGS, 0.4, SCORES, expressible_in="module", uniform=True, limits={"layers.1": 0.25})


# -- selections ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_selection_is_taken_by_every_verb() -> None:
    some = COUPLINGS.select(names="layers.[12].ffn")
    assert isinstance(some, Couplings)
    assert [c.name for c in some] == NAMES[1:3]
    assert "2 couplings offered, 0 blocked" in str(some)
    scores = eco.score(NET, some, DATA, loss=loss, method="fisher")
    assert list(scores) == NAMES[1:3]
    plan = eco.plan(some, 0.5, scores)
    assert set(kept(plan)) == set(NAMES[1:3])
    assert masked_error(NET, eco.shrink(NET, plan, (X,)), plan, (X,)) <= 1e-9
    for method in ("second-order", "fisher", "magnitude"):
        options: dict[str, Any] = {"distillation": 4} if method == "second-order" else {}
        small = eco.compress(NET, (X,), ratio=0.5, couplings=some, batches=DATA, loss=loss, method=method, **options)
        assert small.get_parameter("layers.0.up.weight").shape == (20, 8)
        assert sum(small.get_parameter(f"layers.{i}.up.weight").shape[0] for i in (1, 2)) == 20
    sparse = eco.SparseTraining(seeded(Net), (X,), couplings=some, schedule=eco.OneShot(1))
    assert [s.name for s in sparse.plan] == NAMES[1:3]
    assert kept(eco.Plan.keeping(some, {NAMES[1]: [3]})) == {NAMES[1]: 1}


def test_conditions_of_a_selection() -> None:
    assert {c.kind for c in COUPLINGS.select(kinds="ffn")} == {"ffn"}
    assert {c.name for c in COUPLINGS.select(modules=["layers.1", "*.2.up"]).offered} == set(NAMES[1:3])
    assert [c.name for c in COUPLINGS.select(predicate=lambda c: c.blocked is None)] == NAMES
    assert COUPLINGS.select(modules="layers.1").select(kinds="ffn", exclude="layers.0")[0].name == NAMES[1]
    assert len(COUPLINGS.select()) == len(COUPLINGS)
    for wanted, text in (
        ({"names": "layers.9.ffn"}, "names names 'layers.9.ffn', and no coupling is called that: near it are layers."),
        ({"names": ["layers.1.ffn", "*.vo"]}, "names names '*.vo', and no coupling is called that"),
        ({"kinds": "vo"}, "no coupling is of kind 'vo': use some of ffn, pair"),
        ({"modules": "layer"}, "modules='layer' matches no module"),
        ({"predicate": 3}, "predicate=3 cannot be called"),
    ):
        with pytest.raises(PlanError) as refused:
            COUPLINGS.select(**wanted)
        assert str(refused.value).startswith(text)


@pytest.mark.parametrize("some", [list(COUPLINGS.offered), COUPLINGS[:2], (), None])
def test_a_plain_list_is_refused(some: Any) -> None:
    """It does not know the model."""
    text = f"couplings is a {type(some).__name__}: pass what detect() returned, or a part of it that couplings.select"
    for call in (
        lambda: eco.plan(some, 0.5, "random"),
        lambda: eco.score(NET, some, DATA, loss=loss),
        lambda: eco.Plan.keeping(some, {}),
    ):
        with pytest.raises(EcospaError) as refused:
            call()
        assert str(refused.value).startswith(text)


# -- units and widths by hand --------------------------------------------------------------------------------------

VO, HEADS = "layers.0.attention:vo", "layers.0.attention:heads"


@pytest.mark.parametrize(
    ("units", "keep"),
    [
        ([0, 3], ((0, 3), (0, 3))),
        ((3, 0), ((0, 3), (0, 3))),
        (torch.tensor([0, 3]), ((0, 3), (0, 3))),
        (torch.tensor([[0, 1], [2, 3]], dtype=torch.int32), ((0, 1), (2, 3))),
        ([[0, 1], [2]], ((0, 1), (2,))),
        ([True, False, False, True], ((0, 3), (0, 3))),
        (torch.tensor([[True, True, False, False], [False, False, True, True]]), ((0, 1), (2, 3))),
        (range(2), ((0, 1), (0, 1))),
        ([torch.tensor(0), torch.tensor(3)], ((0, 3), (0, 3))),
    ],
)
def test_units_that_are_named_stay(units: Any, keep: tuple[tuple[int, ...], ...]) -> None:
    plan = eco.Plan.keeping(TINY, {VO: units, HEADS: [1]})
    assert plan[VO].keep == keep
    assert plan[HEADS].keep == ((1,),)
    assert eco.Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        ({VO: [0, 4]}, f"coupling '{VO}' has no unit 4: give numbers from 0 to 3"),
        ({VO: [-1]}, f"coupling '{VO}' has no unit -1"),
        ({VO: [1, 1]}, f"units of coupling '{VO}' are named twice"),
        ({VO: []}, f"what coupling '{VO}' keeps is []: give numbers of units, at least one, or a mask of its 4 units"),
        ({VO: [0.5]}, f"what coupling '{VO}' keeps is [0.5]"),
        ({VO: 2}, f"what coupling '{VO}' keeps is 2"),
        ({VO: "all"}, f"what coupling '{VO}' keeps is "),
        ({VO: [[0], [1], [2]]}, f"coupling '{VO}' has 2 carriers and what to keep is given for 3"),
        ({VO: torch.ones(2, 4)}, f"what coupling '{VO}' keeps is of torch.float32 and shape [4]"),
        ({VO: torch.ones(5, dtype=torch.bool)}, f"what coupling '{VO}' keeps is of torch.bool and shape [5]"),
        ({VO: torch.zeros(4, dtype=torch.bool)}, f"the selection of coupling '{VO}' keeps no unit at all"),
        ({VO: torch.ones(4, dtype=torch.bool, device="meta")}, f"what coupling '{VO}' keeps is of torch.bool"),
        (
            {"layers.0.experts:experts": [[0], [0, 1]]},
            "the selection of coupling 'layers.0.experts:experts' keeps differ",
        ),
        (
            {"layers.0.attention:ov": [0]},
            "keep names 'layers.0.attention:ov', and no coupling is called that: near it are",
        ),
        ({":hidden": [0]}, "coupling ':hidden' cannot lose a unit: layer_norm takes statistics over this dim"),
        ([VO], "keep=['layers.0.attention:vo'] is no mapping"),
    ],
)
def test_units_that_do_not_fit_are_refused(wanted: Any, text: str) -> None:
    with pytest.raises(PlanError) as refused:
        eco.Plan.keeping(TINY, wanted)
    assert str(refused.value).startswith(text)


@pytest.mark.parametrize(
    "keep",
    [
        torch.tensor([[0, 3, 5, 9]]), torch.ones(20, dtype=torch.bool), torch.ones(1, 20), torch.ones(2, 20).bool(),
        torch.ones(1, 20, dtype=torch.uint8), torch.ones(1, 20, dtype=torch.bool, device="meta"), [[True] * 20], None,
    ],
)  # fmt: skip
def test_a_selection_wants_a_mask(keep: Any) -> None:
    with pytest.raises(
        PlanError, match=r"^what coupling 'layers\.0\.ffn' keeps is .*: give a BoolTensor of shape \[1, 20\]"
    ):
        eco.Selection.of(COUPLINGS[NAMES[0]], keep)


def test_a_plan_by_hand_equals_masking() -> None:
    plan = eco.Plan.keeping(COUPLINGS, {NAMES[0]: [0, 5, 9], NAMES[2]: torch.arange(20) > 12})
    assert kept(plan) == {NAMES[0]: 3, NAMES[2]: 7}
    assert masked_error(NET, eco.shrink(NET, plan, (X,)), plan, (X,)) <= 1e-12
    assert len(eco.Plan.keeping(COUPLINGS, {})) == 0  # nothing is said, so everything stays


def test_widths_by_name() -> None:
    plan = eco.plan(COUPLINGS, widths={"layers.*.ffn": 7, NAMES[1]: 12}, scores=SCORES, exclude=["layers.3"])
    assert kept(plan) == dict(zip(NAMES[:3], (7, 12, 7), strict=True))
    for name, width in kept(plan).items():
        best = SCORES[name][0].argsort(descending=True, stable=True)[:width]
        assert set(plan[name].keep[0]) == set(best.tolist())
    for method in ("second-order", "fisher"):
        some: dict[str, Any] = {"batches": DATA, "loss": loss, "method": method, "widths": {"*.ffn": 5, NAMES[3]: 20}}
        some |= {"distillation": 4} if method == "second-order" else {"steps": 2}
        small = eco.compress(NET, (X,), couplings=COUPLINGS, **some)
        assert [small.get_parameter(f"layers.{i}.up.weight").shape[0] for i in range(4)] == [5, 5, 5, 20]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"widths": {NAMES[0]: 21}}, "widths['layers.0.ffn']=21 is more than the 20 units of coupling 'layers.0.ffn'"),
        (
            {"widths": {NAMES[0]: 0}},
            "widths['layers.0.ffn']=0 is not a number of units to keep: give a whole number of at",
        ),
        ({"widths": {NAMES[0]: 2.0}}, "widths['layers.0.ffn']=2.0 is not a number of units to keep"),
        (
            {"widths": {"layers.0": 2}},
            "widths names 'layers.0', and no coupling is called that: near it are layers.0.ffn",
        ),
        ({"widths": {"layers.pair": 2}}, "widths names 'layers.pair', which cannot lose a unit: "),
        ({"widths": {"*.ffn": 2, "layers.*": 3}}, "widths says 2 ('*.ffn') and 3 ('layers.*') for coupling"),
        ({"widths": {}}, "widths={} is no mapping: give units to keep by name, like {'layers.0.ffn': 24}"),
        ({"widths": {"*.ffn": 2}, "ratio": 0.5}, "ratio= and widths= both say how much goes: give one of them"),
        ({"widths": {"*.ffn": 2}, "floor": 0.1}, "widths= says how many units stay, and floor= how a ratio is spread"),
        (
            {"widths": {"*.ffn": 2}, "limits": {"ffn": 1}},
            "widths= says how many units stay, and limits= how a ratio is",
        ),
    ],
)
def test_widths_that_make_no_sense_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(PlanError) as refused:
        eco.plan(COUPLINGS, scores=SCORES, **options)
    assert str(refused.value).startswith(text)


# -- scores of one's own -------------------------------------------------------------------------------------------


def test_scores_are_a_mapping() -> None:
    scores = eco.Scores("mine", SCORES)
    assert NAMES[0] in scores
    assert "nonsense" not in scores
    assert len(scores) == 4
    assert list(scores) == list(scores.keys()) == NAMES
    assert {name: value.sum() for name, value in scores.items()}.keys() == dict(scores).keys()
    with pytest.raises(KeyError, match=r"no scores of coupling 'layers\.0\.fnn'; near it: layers\.0\.ffn"):
        scores["layers.0.fnn"]


def test_a_plain_mapping_is_taken_wherever_scores_are() -> None:
    wanted = eco.plan(COUPLINGS, 0.5, eco.Scores("mine", SCORES))
    assert eco.plan(COUPLINGS, 0.5, SCORES) == wanted
    assert eco.plan(COUPLINGS, 0.5, {name: value.bfloat16() for name, value in SCORES.items()}).removed_parameters
    for method in ("magnitude", "taylor"):  # which need no data then
        small = eco.compress(NET, (X,), ratio=0.5, method=method, scores=SCORES, couplings=COUPLINGS)
        assert masked_error(NET, small, wanted, (X,)) <= 1e-12
    sparse = eco.SparseTraining(seeded(Net), (X,), scores=SCORES, schedule=eco.AtStart(), band=None)
    assert sparse.plan == wanted
    with pytest.raises(TrainingError, match=r"^scores= are tensors, which do not follow what training changes"):
        eco.SparseTraining(seeded(Net), (X,), scores=SCORES, schedule=eco.OneShot(1))


def test_what_stays_makes_up_for_what_the_scores_say() -> None:
    wanted = eco.plan(COUPLINGS, 0.5, SCORES, allocation="ragged")
    options: dict[str, Any] = {"batches": DATA, "loss": loss, "scores": SCORES, "distillation": 16}
    small = eco.compress(NET, (X,), ratio=0.5, **options)
    masked = eco.shrink(NET, wanted, (X,))
    assert {n: p.shape for n, p in small.named_parameters()} == {n: p.shape for n, p in masked.named_parameters()}
    dense = NET(X)
    assert (small(X) - dense).norm() < 0.5 * (masked(X) - dense).norm()
    with pytest.raises(PlanError, match=r"^scores= are of units as they are, and basis=True turns them first"):
        eco.compress(NET, (X,), ratio=0.5, basis=True, couplings=COUPLINGS, **options)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (
            {"layers.0.fnn": SCORES[NAMES[0]]},
            "scores name 'layers.0.fnn', and no coupling is called that: near it are layers.0",
        ),
        ({NAMES[0]: SCORES[NAMES[0]][0]}, "coupling 'layers.0.ffn' needs scores of shape (1, 20) and has shape (20,)"),
        ({NAMES[0]: [1.0] * 20}, "coupling 'layers.0.ffn' needs scores of shape (1, 20) and has a list"),
        ({NAMES[0]: torch.ones(1, 20, dtype=torch.long)}, "the scores of coupling 'layers.0.ffn' are torch.int64"),
        ({NAMES[0]: torch.ones(1, 20, dtype=torch.bool)}, "the scores of coupling 'layers.0.ffn' are torch.bool"),
        ({NAMES[0]: torch.full((1, 20), torch.inf)}, "the scores of coupling 'layers.0.ffn' are not all finite"),
        ({NAMES[0]: torch.ones(1, 20, device="meta")}, "the scores of coupling 'layers.0.ffn' are on meta"),
        ({NAMES[0]: None}, "coupling 'layers.0.ffn' needs scores of shape (1, 20) and has none"),
    ],
)
def test_scores_that_do_not_fit_are_refused_before_anything_slow(wrong: Mapping[str, Any], text: str) -> None:
    def never(*_: object) -> Tensor:
        raise AssertionError

    given = {**SCORES, **wrong}
    for call in (
        lambda: eco.plan(COUPLINGS, 0.5, given),
        lambda: eco.compress(NET, (X,), ratio=0.5, batches=DATA, loss=never, scores=given, couplings=COUPLINGS),
    ):
        with pytest.raises(EcospaError) as refused:
            call()
        assert str(refused.value).startswith(text)


# -- nothing offered -----------------------------------------------------------------------------------------------


def computed() -> nn.Module:
    """An MLP whose weights are computed, so that nothing can go."""
    return nn.Sequential(
        parametrizations.weight_norm(nn.Linear(8, 32)), nn.ReLU(), parametrizations.weight_norm(nn.Linear(32, 8))
    )


def normed() -> nn.Module:
    """A layer norm over the hidden units, where masking leaves 1 / 2."""
    return nn.Sequential(nn.Linear(8, 32), nn.Sigmoid(), nn.LayerNorm(32), nn.Linear(32, 8))


@pytest.mark.parametrize("build", [computed, normed])
def test_where_nothing_can_go_every_verb_says_why(build: Callable[[], nn.Module]) -> None:
    model = seeded(build)
    couplings = eco.detect(model, (X,))
    calls: list[tuple[str, Callable[[], object]]] = [
        ("remove", lambda: eco.plan(couplings, 0.5, "magnitude")),
        ("remove", lambda: eco.plan(couplings, 0.5, "random", kinds=["ffn"])),
        ("remove", lambda: eco.plan(couplings, widths={"*": 2}, scores="magnitude")),
        ("shrink", lambda: eco.SparseTraining(model, (X,), schedule=eco.OneShot(1))),
        ("shrink", lambda: eco.SparseTraining(model, (X,), schedule=eco.OneShot(1), kinds=["ffn"])),
    ]
    for method in ("second-order", "gate-fisher", "magnitude"):
        some: dict[str, Any] = {"ratio": 0.5, "batches": DATA, "loss": loss, "method": method}
        calls.append(("remove", lambda some=some: eco.compress(model, (X,), couplings=couplings, **some)))  # type: ignore[misc]
    calls.append(("score", lambda: eco.score(model, couplings, DATA, loss=loss)))
    calls.append(("score", lambda: eco.score(model, couplings, method="magnitude")))
    for verb, call in calls:
        with pytest.raises(EcospaError) as refused:
            call()
        assert str(refused.value).startswith(f"there is nothing to {verb} because no coupling is offered: ")
        assert "loss" not in str(refused.value)


def test_single_units_have_to_stay() -> None:
    single = coupling("a:ffn", [member("embed.weight", 1, "producer", [box()], 1, 1)], 11)
    with pytest.raises(PlanError, match=r"^there is nothing to remove because each of the 1 offered couplings has one"):
        eco.plan(Couplings([single], MODEL), 0.5, "random")
    with pytest.raises(
        PlanError, match=r"^there is nothing to remove because no coupling was found: no two weights of"
    ):
        eco.plan(Couplings([], MODEL), 0.5, "random")


def test_the_most_common_reason_comes_first() -> None:
    model = seeded(lambda: nn.Sequential(*itertools.chain(*((nn.Linear(8, 8), nn.Softmax(-1)) for _ in range(3)))))
    couplings = eco.detect(model, (X,))
    messages = [c.blocked.message for c in couplings if c.blocked is not None]
    most = max(messages, key=messages.count)
    with pytest.raises(PlanError) as refused:
        eco.plan(couplings, 0.5, "magnitude")
    counted = f"({messages.count(most)} of {len(couplings)} couplings)"
    assert str(refused.value).startswith(f"there is nothing to remove because no coupling is offered: {most} {counted}")


def test_a_selection_of_nothing_says_so() -> None:
    nothing = COUPLINGS.select(predicate=lambda c: c.blocked is not None)
    for couplings in (nothing, COUPLINGS.select(predicate=lambda c: False)):
        with pytest.raises(
            PlanError, match=r"^there is nothing to remove because no coupling that is offered is among the"
        ):
            eco.plan(couplings, 0.5, "magnitude")
        with pytest.raises(
            ScoreError, match=r"^there is nothing to score because no coupling that is offered is among"
        ):
            eco.score(NET, couplings, DATA, loss=loss)
        with pytest.raises(TrainingError, match=r"^there is nothing to shrink because no coupling that is offered is "):
            eco.SparseTraining(seeded(Net), (X,), couplings=couplings, schedule=eco.OneShot(1))


# -- training ------------------------------------------------------------------------------------------------------


def test_training_leaves_modules_out_and_keeps_to_limits() -> None:
    """Within the default band, whose middle is what uniform allocation within these limits keeps."""
    model = seeded(Net)
    options: dict[str, Any] = {"exclude": ["layers.0"], "limits": {"layers.1": 0.1, "ffn": 0.9}}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparse = eco.SparseTraining(model, (X,), optimizer=optimizer, target=0.5, schedule=eco.Linear(1, 2, 1), **options)
    for _ in range(2):
        torch.autograd.backward(sparse.model(X).square().mean())
        sparse.step()
        optimizer.step()
        optimizer.zero_grad()
    widths = kept(sparse.plan)
    assert set(widths) == set(NAMES[1:])
    assert widths["layers.1.ffn"] >= 18
    assert sparse.removed == pytest.approx(0.5, abs=0.02)  # of what may go


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"limits": {"ffn": 0.2}}, r"out of reach because .*limits=\{'ffn': 0\.2\} and round_to"),
        ({"exclude": "layer.0"}, r"^exclude='layer\.0' matches no module"),
        ({"limits": {"nonsense": 0.2}}, r"^limits names 'nonsense', which is no kind that is chosen \(ffn\)"),
        ({"kinds": "vo"}, r"^no offered coupling is of kind 'vo': use some of ffn$"),
        ({"exclude": "*"}, r"^there is nothing to shrink because exclude='\*' matches all 1 couplings"),
        (
            {"scores": {"nonsense.ffn": SCORES[NAMES[0]]}, "schedule": eco.AtStart()},
            r"^scores name 'nonsense\.ffn', and no coupling is called that",
        ),
    ],
)
def test_training_refuses_what_plan_refuses(options: dict[str, Any], text: str) -> None:
    with pytest.raises(TrainingError, match=text):
        eco.SparseTraining(seeded(Block), (X,), **{"schedule": eco.OneShot(1), **options})


# -- without scores ------------------------------------------------------------------------------------------------


def test_a_plan_without_scores_is_warned_of(recwarn: pytest.WarningsRecorder) -> None:
    """Magnitude is the worst score by far: it has to be meant. The warning points to the line that forgot."""
    with pytest.warns(UserWarning, match=r"^plan\(\) has no scores=, so that units go by their magnitude") as warned:
        plan = eco.plan(COUPLINGS, 0.5)
    assert [w.filename for w in warned] == [__file__]
    assert plan == eco.plan(COUPLINGS, 0.5, "magnitude")
    for scores in ("magnitude", "random", SCORES):
        eco.plan(COUPLINGS, 0.5, scores)
    eco.compress(NET, (X,), ratio=0.5, method="magnitude")
    assert not [w for w in recwarn if "scores=" in str(w.message)]
