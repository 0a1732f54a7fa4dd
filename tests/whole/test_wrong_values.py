"""Each option of each verb, given something else than it takes: one sentence, and nothing of the user's has changed."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from inspect import signature
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ecospa_fx as eco
from ecospa_fx.axes.registry import refuse
from ecospa_fx.axes.resize import resize_rule
from ecospa_fx.budget.settings import PlanOptions, PlanSettings
from ecospa_fx.compression import APART, CompressOptions
from ecospa_fx.errors import EcospaError
from ecospa_fx.recipe import Recipe
from ecospa_fx.training.settings import Settings, TrainingOptions

X = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
BATCHES: list[Any] = [((X[:1],), {}), ((X[1:],), {})]


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))


def loss(output: Tensor, args: object, kwargs: object) -> Tensor:
    return output.square().mean()


MODEL = mlp()
COUPLINGS = eco.detect(MODEL, (X,))
PLAN = eco.plan(COUPLINGS, 0.5, "magnitude")
SMALL = eco.shrink(MODEL, PLAN, (X,))
WRONG: dict[str, Any] = {
    "None": None, "a text": "nonsense", "a negative number": -1, "NaN": float("nan"), "a list": ["nonsense"],
    "a mapping": {"nonsense": -1}, "an object": object(),
}  # fmt: skip
CALLED: dict[str, Any] = {"model": MODEL, "args": (X,), "kwargs": {}}
TRAINED: dict[str, Any] = {"optimizer": None, "target": 0.5, "schedule": eco.OneShot(2), "scores": None, "state": None}
ALL = torch.ones(1, 12, dtype=torch.bool)


def options(kind: Any) -> dict[str, Any]:
    return dict.fromkeys(sorted(kind.__optional_keys__))


CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "detect": (eco.detect, {**CALLED, "allow": ()}),
    "plan": (
        eco.plan,
        {"couplings": COUPLINGS, "ratio": 0.5, "scores": "magnitude", "seed": 0, "round_to": 1, **options(PlanOptions)},
    ),
    "score": (
        eco.score,
        {
            "model": MODEL,
            "couplings": COUPLINGS,
            "batches": BATCHES,
            "loss": loss,
            "method": "fisher",
            "progress": False,
        },
    ),
    "compress": (
        eco.compress,
        {**CALLED, "ratio": 0.5, "batches": BATCHES, "loss": loss, "method": "second-order", "couplings": COUPLINGS}
        | {"scores": None, **options(CompressOptions)},
    ),
    "shrink": (eco.shrink, {**CALLED, "plan": PLAN, "passes": None}),
    "shrink_": (eco.shrink_, {**CALLED, "plan": PLAN}),
    "SparseTraining": (eco.SparseTraining, {**CALLED, **TRAINED, **options(TrainingOptions)}),
    "Plan.keeping": (eco.Plan.keeping, {"couplings": COUPLINGS, "keep": {"ffn": [0, 1]}}),
    "Plan.masks": (PLAN.masks, {"model": MODEL}),
    "Selection.of": (eco.Selection.of, {"coupling": COUPLINGS["ffn"], "keep": ALL}),
    "select": (COUPLINGS.select, dict.fromkeys(signature(COUPLINGS.select).parameters)),
    "save": (eco.save, {"small": SMALL, "path": "folder", "origin": None, "dtypes": None}),
    "load": (eco.load, {"path": "folder", "model": mlp, "dtype": None}),
    "axis_rule": (eco.axis_rule, {"": "mylib.my_op"}),
    "backend": (eco.backend, {"plan": PLAN, "compiler": "eager", "model": MODEL}),
    "Cubic": (eco.Cubic, {"start": 1, "end": 9, "every": 2}),
    "Linear": (eco.Linear, {"start": 1, "end": 9, "every": 2}),
    "OneShot": (eco.OneShot, {"step": 1}),
    "Constant": (eco.Constant, {"every": 2, "part": 0.5, "start": None}),
    "Scores": (eco.Scores, {"method": "mine", "values": {"ffn": torch.ones(1, 12)}}),
}
FINE = {
    *((verb, "kwargs", "None") for verb in ("detect", "compress", "shrink", "shrink_", "SparseTraining")),
    *(("plan", name, "None") for name in ("scores", "round_to", "kinds", "widths", "within", "limits")),
    *(("plan", "expressible_in", "None"), ("score", "loss", "None"), ("compress", "loss", "None")),
    *(("compress", name, "None") for name in ("couplings", "scores", "distillation", "limits", "round_to", "kinds")),
    *(("compress", name, "None") for name in ("expressible_in", "allocation", "generated_share", "within")),
    *(("SparseTraining", name, "None") for name in ("optimizer", "scores", "state")),
    *(("SparseTraining", name, "None") for name in ("total_steps", "band", "round_to", "kinds", "limits", "couplings")),
    *(("SparseTraining", name, "None") for name in ("compensate", "batches", "loss", "wrap")),
    *(("SparseTraining", "group", wrong) for wrong in WRONG),  # a group of torch.distributed, which knows its types
    *(("select", name, "None") for name in ("kinds", "names", "modules", "predicate")),
    *((verb, "seed", "a negative number") for verb in ("plan", "compress")),
    ("shrink_", "args", "a list"), ("shrink_", "kwargs", "a mapping"),  # of which the model's own code says something
    ("shrink", "passes", "None"), ("save", "path", "a text"), ("save", "origin", "None"), ("save", "dtypes", "None"),
    ("load", "dtype", "None"), ("load", "path", "a text"), ("backend", "model", "None"),
    ("backend", "compiler", "a text"), ("Constant", "start", "None"), ("Scores", "method", "a text"),
}  # fmt: skip


def cases() -> list[tuple[str, str]]:
    return [(verb, option) for verb, (_, usual) in CALLS.items() for option in usual]


def arguments(verb: str, option: str, wrong: Any) -> dict[str, Any]:
    """What a verb is called with: what is usual, and one wrong value."""
    found = {name: value for name, value in CALLS[verb][1].items() if value is not None}
    if option in ("widths", "within"):
        del found["ratio"]
    if (verb, option) == ("compress", "allow"):
        del found["couplings"]
    if (verb, option) == ("compress", "steps"):
        found["method"] = "fisher"
    if verb in ("shrink_", "SparseTraining"):
        found["model"] = copy.deepcopy(MODEL)
    return {**found, option: wrong}


def state(model: nn.Module) -> list[object]:
    return [(name, p.detach().clone(), p._version, p.requires_grad) for name, p in model.named_parameters()]


@pytest.mark.slow
@pytest.mark.parametrize(("verb", "option"), cases())
def test_one_sentence_and_nothing_changed(
    verb: str, option: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = state(MODEL)
    for label, wrong in WRONG.items():
        if (verb, option, label) in FINE:
            continue
        given = arguments(verb, option, wrong)
        models = [value for name, value in given.items() if name == "model" and isinstance(value, nn.Module)]
        own = [state(model) for model in models]
        positional = [given.pop("")] if "" in given else []
        with pytest.raises(EcospaError) as refused:
            CALLS[verb][0](*positional, **given)
        text = str(refused.value)
        assert text
        assert "\n" not in text
        assert len(text) < 400, text
        assert not list(tmp_path.iterdir())
        assert all(same(state(model), known) for model, known in zip(models, own, strict=True))
    assert same(state(MODEL), before)


def same(first: list[Any], second: list[Any]) -> bool:
    return all(torch.equal(a[1], b[1]) and (a[0], *a[2:]) == (b[0], *b[2:]) for a, b in zip(first, second, strict=True))


PLANNED, COMPRESSED, TRAINING = (CALLS[verb][0] for verb in ("plan", "compress", "SparseTraining"))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: PLANNED(COUPLINGS, alocation="uniform"),
            "plan() has no option 'alocation': did you mean 'allocation'?",
        ),
        (lambda: PLANNED(COUPLINGS, score="random"), "plan() has no option 'score': did you mean 'scores'?"),
        (
            lambda: COMPRESSED(MODEL, (X,), ratio=0.5, batchs=[]),
            "compress() has no option 'batchs': did you mean 'batches'?",
        ),
        (
            lambda: TRAINING(MODEL, (X,), kind="ffn"),
            "SparseTraining() has no option 'kind': did you mean 'kinds'?",
        ),
        (
            lambda: eco.compress(MODEL, (X,), ratio=0.5, method="fisher", gates=False),
            "compress() takes gates= with method='second-order' only, and method='fisher' only removes: leave it out",
        ),
        (
            lambda: eco.compress(MODEL, (X,), ratio=0.5, steps=2),
            "compress() takes steps= with methods that only remove, and method='second-order' scores once: leave",
        ),
        (
            lambda: eco.compress(MODEL, (X,)),
            "compress() needs ratio=, the share of the couplings' parameters to remove, or",
        ),
    ],
)
def test_an_option_that_is_not_there(call: Callable[[], Any], text: str) -> None:
    """It names itself, the verb that was called, and the nearest one there is; a TypeError, as in any function."""
    with pytest.raises(TypeError) as refused:
        call()
    assert isinstance(refused.value, EcospaError)
    assert str(refused.value).startswith(text)


def test_options_that_are_typed_are_those_that_are_read() -> None:
    """What editors are told agrees with the classes that hold the defaults."""
    planned = set(PlanSettings.__dataclass_fields__) - {"ratio", "scores", "seed", "round_to"}
    assert set(PlanOptions.__optional_keys__) == planned
    assert set(TrainingOptions.__optional_keys__) == set(Settings.__dataclass_fields__)
    assert set(CompressOptions.__optional_keys__) == {
        *Recipe.__dataclass_fields__, *planned, *APART, "seed", "round_to"
    }  # fmt: skip


def test_the_methods_of_a_verb_are_all_listed() -> None:
    with pytest.raises(EcospaError) as refused:
        eco.compress(MODEL, (X,), ratio=0.5, method="secondorder")
    assert str(refused.value) == (
        "no scoring method is called 'secondorder': use one of second-order, fisher, gate-fisher, magnitude, taylor; "
        "near it is 'second-order'"
    )
    with pytest.raises(EcospaError, match=r"use one of second-order, gate-fisher, fisher, taylor$"):
        eco.SparseTraining(MODEL, (X,), scores="fischer", schedule=eco.OneShot(1))


def test_a_model_that_is_built_already_is_not_called(tmp_path: Any) -> None:
    eco.save(SMALL, tmp_path / "saved")
    with pytest.raises(EcospaError, match=r"^model= is a Sequential that is built already: pass a function"):
        eco.load(tmp_path / "saved", model=mlp())
    loaded = eco.load(tmp_path / "saved", model=mlp)
    assert torch.equal(loaded(X), SMALL(X))


@pytest.mark.parametrize("missing", ["matplotlib", "matplotlib.figure"])
def test_a_plot_without_matplotlib_names_the_extra(
    missing: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sparse = eco.SparseTraining(mlp(), (X,), schedule=eco.OneShot(1))
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(EcospaError, match=r'pip install "ecospa-fx\[report\]"'):
        sparse.plot(tmp_path / "widths.svg")


@pytest.mark.parametrize("operator", ["swishy", "mylib::my_op", "aten.relu.default", "my lib.op", ".op", "op."])
def test_a_rule_for_what_no_operator_is_called_is_refused(operator: str) -> None:
    for register in (eco.axis_rule, resize_rule, lambda name: refuse("no reason", name)):
        with pytest.raises(ValueError, match=r" names no operator: write its namespace and name ") as refused:
            register(operator)
        assert isinstance(refused.value, EcospaError)
