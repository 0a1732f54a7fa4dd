"""What people see of an object: a short `repr`, and a table in a notebook in which all texts are escaped."""

from __future__ import annotations

from dataclasses import replace

import torch

import ecospa_fx as eco
from ecospa_fx.coupling.couplings import Couplings
from ecospa_fx.training import history
from tests.support.tiny import tiny, tiny_couplings

MODEL = tiny(1)
COUPLINGS = tiny_couplings(MODEL)
PLAN = eco.plan(COUPLINGS, 0.5, "magnitude")


def html(shown: object) -> str:
    """What a notebook asks an object for."""
    text: str = shown._repr_html_()  # type: ignore[attr-defined]
    return text


def test_short_texts() -> None:
    assert repr(COUPLINGS) == "Couplings(Tiny, 5 offered, 1 blocked)"
    assert repr(COUPLINGS["layers.0.attention:vo"]) == (
        "Coupling('layers.0.attention:vo', 4 units × 2 carriers, 3 members, 200 parameters)"
    )
    assert repr(COUPLINGS[":hidden"]) == (
        "Coupling(':hidden', 8 units, 1 member, 88 parameters, blocked by aten.layer_norm.default at layer_norm)"
    )
    scores = eco.Scores("mine", {"layers.0.ffn:ffn": torch.ones(1, 12), "layers.0.attention:vo": torch.ones(2, 4)})
    assert repr(scores) == "Scores('mine', 2 couplings, 20 units)"
    assert repr(PLAN).startswith("Plan(4 couplings, removes ")


def test_tables() -> None:
    for shown in (COUPLINGS, PLAN):
        table = html(shown)
        assert table.count("<tr>") == len(str(shown).splitlines()) - 2
        assert str(shown).splitlines()[-1] in table
        assert 'style="text-align: right;"' in table
    assert "<td>layers.0.ffn</td>" in html(PLAN)
    scores = eco.Scores("mine", {"a": torch.tensor([[3.0, 1.0, 2.0]]), "b": torch.ones(2, 2, device="meta")})
    assert [cell in html(scores) for cell in (">1</td>", ">2</td>", ">3</td>")] == [True] * 3
    assert "Scores('mine', 2 couplings, 7 units)" in html(scores).replace("&#x27;", "'")


def test_what_is_empty() -> None:
    assert html(Couplings([], MODEL)) == "<p>No coupling was found, and none was refused.</p>"
    assert html(eco.Plan((), ())) == "<p>An empty plan: nothing is removed.</p>"
    assert html(eco.Scores("mine", {"a": torch.ones(1, 0)})).count("<td") == 5
    assert history.table_html([], {}, "step <0>") == "<p>step &lt;0&gt;</p>"


def test_texts_are_escaped() -> None:
    name = "<script>alert(1)</script>"
    bad = replace(COUPLINGS[0], name=name, layer=name, kind=name)
    couplings = Couplings([bad], MODEL)
    plan = eco.plan(couplings, 0.5, {name: torch.rand(2, 2)}, kinds=name)
    for shown in (couplings, bad, plan, eco.Scores(name, {name: torch.ones(1, 1)})):
        assert "&lt;script&gt;" in html(shown)
        assert "<script" not in html(shown)


def test_a_training_tells_its_history() -> None:
    mlp = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 4))
    x, optimizer = torch.randn(2, 4), torch.optim.SGD(mlp.parameters(), 0.1)
    sparse = eco.SparseTraining(mlp, (x,), optimizer=optimizer, target=0.5, schedule=eco.OneShot(1))
    assert repr(sparse).startswith("SparseTraining(step 0: 0 of at most 1 shrinks done, 0.0% of the couplings'")
    assert html(sparse).startswith("<p>step 0")
    sparse.model(x).square().mean().backward()
    sparse.step()
    assert ">ffn kept</th>" in html(sparse)
    assert "50% (50% to 50%)</td>" in html(sparse)
    assert "1 of at most 1 shrinks done" in html(sparse)
