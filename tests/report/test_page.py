"""The page as a parser reads it: what stands where, that it needs nothing from outside, and that texts are texts."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bs4 import BeautifulSoup
from torch import nn

import ecospa_fx as eco
from ecospa_fx.coupling.couplings import Couplings
from ecospa_fx.coupling.types import Refusal
from ecospa_fx.errors import PlanError, StorageError
from ecospa_fx.export.certificate import Exactness
from ecospa_fx.report import verb
from ecospa_fx.report.layer_rows import folded, row_of
from tests.support.pages import FIGURES, RATIOS, couplings_and_plan, written

COUPLINGS, PLAN = couplings_and_plan()


@pytest.fixture(autouse=True)
def without_vega(monkeypatch: pytest.MonkeyPatch) -> None:
    """The script that draws charts takes seconds to bundle, and the browser's test has it."""
    monkeypatch.setattr(verb, "_vega", lambda: "")


def soup(path: Path) -> BeautifulSoup:
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


def data(page: BeautifulSoup) -> Any:
    script = page.find(id="data")
    assert script is not None
    return json.loads(script.get_text())


@pytest.fixture
def page(tmp_path: Path) -> BeautifulSoup:
    return soup(written(tmp_path / "report.html"))


def test_what_stands_on_it(page: BeautifulSoup) -> None:
    heads = [h.get_text() for h in page.find_all("h2")]
    assert heads == ["What is kept", "Exactness", "What removing costs", "Over training", "Measured", "Who reads what",
                     "Couplings"]  # fmt: skip
    tiles = {d.dt.get_text(): " ".join(d.dd.get_text().split()) for d in page.select(".tiles div") if d.dt and d.dd}
    assert tiles["Couplings"] == "15 1 refused"
    assert tiles["Parameters"] == "2.92 k 95% in couplings"
    left = 2920 - PLAN.removed_parameters
    assert tiles["The plan leaves"] == f"{left / 1000:.3g} k {left / 2920:.1%} of the parameters"
    assert tiles["Removing = masking"] == "2.5e-15 largest relative error, float64"
    assert "with the removed units masked, both run in float64" in " ".join(page.get_text().split())


def test_the_heat_map(page: BeautifulSoup) -> None:
    table = page.select_one(".heat")
    assert table is not None
    assert [th.get_text() for th in table.select("thead th")] == [
        "layer",
        "qk",
        "vo",
        "heads",
        "ffn",
        "experts",
        "hidden",
    ]
    assert [th.get_text() for th in table.select("tbody th")] == ["layers.0", "layers.1", "layers.2", "(root)"]
    cells = {str(a["title"]): a for a in table.select("a")}
    assert list(cells) != []
    for s in PLAN:
        kept = sum(map(len, s.keep)) / (s.size * s.carriers)
        assert cells[s.name].get_text() == f"{100 * kept:.0f}"
        assert cells[s.name]["style"] == f"--kept:{kept:.4f}"
        assert cells[s.name]["aria-label"] == f"{s.name}: {100 * kept:.0f}% kept"
    assert cells["layers.0.attention:heads"].get_text() == "100"
    assert "refused" in cells[":hidden"]["class"]
    assert "style" not in cells[":hidden"].attrs
    assert page.find(id=str(cells[":hidden"]["href"])[1:]) is not None


def test_a_card_per_coupling(page: BeautifulSoup) -> None:
    cards, shown = page.select("#cards details"), data(page)
    assert [card.select_one(".name").get_text() for card in cards] == [c.name for c in COUPLINGS]  # type: ignore[union-attr]
    assert not any(card.has_attr("open") for card in cards)
    ffn = next(card for card in shown["cards"] if card["name"] == "layers.1.ffn:ffn")
    kept = PLAN["layers.1.ffn:ffn"].kept
    assert ffn["units"] == [kept, kept]
    assert ffn["members"][0][:5] == ["layers.1.ffn.fused.weight", 0, "producer", [24, 8], [2 * kept, 8]]
    assert ffn["members"][2][:5] == ["layers.1.ffn.down.weight", 1, "consumer", [8, 12], [8, kept]]
    assert [shown["steps"][number][0] for _, number in ffn["path"]] == [
        s.operator for s in COUPLINGS["layers.1.ffn:ffn"].path
    ]
    assert shown["steps"][ffn["path"][0][1]][3] == "gate, up = self.fused(x).chunk(2, -1)"
    hidden = shown["cards"][-1]
    assert hidden["blocked"]["operator"] == "aten.layer_norm.default"
    assert hidden["kept"] is None


def test_the_slider_chooses_among_plans(page: BeautifulSoup) -> None:
    slider, plans = page.find(id="ratio"), data(page)["replanning"]
    assert slider is not None
    assert (slider["min"], slider["max"]) == ("0", str(len(RATIOS)))
    assert plans["ratios"] == list(RATIOS)
    scores = {c.name: torch.linspace(1, 2, c.carriers * c.size).view(c.carriers, -1) for c in COUPLINGS.offered}
    for i, ratio in enumerate(RATIOS):
        want = eco.plan(COUPLINGS, ratio, scores)
        shown = {data(page)["cards"][int(n)]["name"]: widths[i] for n, widths in plans["widths"].items()}
        assert shown == {s.name: s.kept for s in want}
        assert plans["removed"][i] == want.removed_parameters
    assert plans["flops"] == []
    marginal = [x for values in plans["marginal"].values() for x in values]
    assert all(x is None or x > 0 for x in marginal)


def test_the_curves_are_those_of_the_scores(page: BeautifulSoup) -> None:
    curves = data(page)["charts"]["curves"]
    rows = next(values for name, values in curves["datasets"].items() if name != "cut")
    assert {row["coupling"] for row in rows} == {c.name for c in COUPLINGS.offered if not c.contains}
    ffn = [row for row in rows if row["coupling"] == "layers.0.ffn:ffn"]
    assert [row["share"] for row in ffn] == [round(n / 12, 4) for n in range(1, 12)]
    assert ffn[0]["score"] == pytest.approx(1 / (312 / 12), rel=1e-3)


def test_what_was_measured(page: BeautifulSoup) -> None:
    table = page.select_one("table.figures")
    assert table is not None
    rows = [[cell.get_text() for cell in row.find_all(["th", "td"])] for row in table.find_all("tr")]
    assert rows == [
        ["model", "parameters", "perplexity", "tokens/s"], ["dense", "2,920", "11.25", "420"],
        ["small", "1,700", "12.5", ""],
    ]  # fmt: skip
    charts = data(page)["charts"]
    assert set(charts) == {"curves", "measure-0", "measure-1", "history"}
    assert all(page.find(id=key) for key in charts)


def test_drawings_without_a_graph(page: BeautifulSoup) -> None:
    figures = page.find_all("figure")
    assert [f.figcaption.get_text().split()[0] for f in figures if f.figcaption] == ["layers.{0..2}"]
    texts = [t.get_text() for t in figures[0].find_all("text")]
    assert {"q", "k", "v", "o", "fused", "down", "experts"} <= set(texts)
    assert "ffn.down.weight" in texts
    assert len(figures[0].select("path.arrow")) == 3  # q to k, v to o, fused to down


def test_nothing_is_fetched(page: BeautifulSoup) -> None:
    for tag in page.find_all(True):
        for name in ("src", "href", "srcset", "action"):
            assert str(tag.get(name, "#")).startswith(("#", "data:")), tag.name
    assert not re.search(r"@import|url\(\s*[\"']?http", str(page))


def test_little_stands_on_it_where_little_is_known(tmp_path: Path) -> None:
    page = soup(eco.report(COUPLINGS, path=tmp_path / "a.html"))
    assert page.find(id="ratio") is None
    assert data(page)["charts"] == {}
    assert "No scores were given" in page.get_text()
    assert "No check was given" in page.get_text()
    assert soup(eco.report(Couplings([], nn.ReLU()), path=tmp_path / "b.html")).select("details") == []


def test_texts_of_the_user_stay_texts(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script>\"'><b>&amp;"
    refusal = Refusal(evil, evil, evil, evil, evil)
    path = tuple(replace(s, source=evil, module=evil) for s in COUPLINGS["layers.0.ffn:ffn"].path)
    bad = replace(COUPLINGS["layers.0.ffn:ffn"], name=evil, kind=evil, layer=evil, path=path)
    couplings = Couplings([bad, replace(bad, name=evil + "2", blocked=refusal)], COUPLINGS.model)
    scores = {evil: torch.rand(1, 12)}
    figures = {evil: {"parameters": 1, evil: 2}}
    target = eco.report(couplings, plan=eco.plan(couplings, 0.5, scores, kinds=evil), scores=scores, figures=figures,
                        path=tmp_path / "a.html")  # fmt: skip
    page = soup(target)
    assert len(page.find_all("script")) == 3
    assert page.find_all("b") == []
    assert "alert(1)</script>" not in target.read_text()
    assert page.select("#cards .name")[0].get_text() == evil
    assert data(page)["cards"][1]["blocked"]["message"] == evil
    assert evil in [th.get_text() for th in page.select(".heat th, .figures th")]


def test_certificates_and_inexact_couplings_are_told(tmp_path: Path) -> None:
    noted = replace(COUPLINGS["layers.0.ffn:ffn"], inexact=Refusal("a norm runs over it", "n", "aten.norm"))
    exactness = Exactness(against="graph", error=1e-7, dtype="float32")
    couplings = Couplings([noted], COUPLINGS.model)
    text = " ".join(soup(eco.report(couplings, exactness=exactness, path=tmp_path / "a.html")).get_text().split())
    assert "the smaller graph with the same weights, both run in float32" in text
    assert "1 couplings were allowed to be inexact" in text


@pytest.mark.parametrize(
    ("path", "row"),
    [("", "(root)"), ("head", "head"), ("h.3", "h.3"), ("e.block.3.layer.0.x", "e.block.3"), ("2.x", "2"), ("0", "0")],
)
def test_layers_come_from_numbers(path: str, row: str) -> None:
    assert row_of(path) == row


def test_layers_alike_have_one_name() -> None:
    assert folded(["0", "1", "2"]) == "{0..2}"
    assert folded(["h.1", "h.2"]) == "h.{1..2}"
    assert folded(["h.1", "h.3"]) == "h.1 and 1 more"
    assert folded(["a", "b", "c"]) == "a and 2 more"
    assert folded(["h.4"]) == "h.4"


# -- refusals ----------------------------------------------------------------------------------------------------


def test_what_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "a.html"
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (StorageError, "is no .html, .png, .svg or .json", {"path": tmp_path / "a.pdf"}),
        (StorageError, "is no path", {"path": 3}),
        (StorageError, "cannot be written", {"path": tmp_path / "none" / "a.html"}),
        (PlanError, "is none: pass what", {"plan": "mine"}),
        (PlanError, "have no 'parameters'", {"figures": {"dense": {"perplexity": 3.0}}}),
        (PlanError, "is no finite number", {"figures": {"dense": {"parameters": float("nan")}}}),
        (PlanError, "is no error", {"exactness": "small"}),
        (PlanError, "needs scores of shape", {"scores": {"layers.0.ffn:ffn": torch.ones(1, 12)}}),
        (PlanError, "not among the couplings", {"plan": couplings_and_plan(4)[1]}),
        (PlanError, "model of other sizes", {"plan": replace(PLAN, shapes=(*PLAN.shapes, ("x", (2,))))}),
    ]  # fmt: skip
    for error, message, options in cases:
        with pytest.raises(error, match=message):
            eco.report(COUPLINGS, **{"path": target, **options})
    with pytest.raises(PlanError, match="couplings is a list"):
        eco.report([], path=target)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_the_extra_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "altair", None)
    with pytest.raises(StorageError, match=r'needs altair: pip install "ecospa-fx\[report\]"'):
        eco.report(COUPLINGS, path=tmp_path / "a.html")
    assert eco.report(COUPLINGS, path=tmp_path / "a.json").exists()  # which needs no chart


def test_figures_keep_their_numbers() -> None:
    assert FIGURES["dense"]["parameters"] == 2920
    assert [verb._number(x) for x in (1339.0, 0.123456, 12345.678)] == ["1,339", "0.1235", "1.235e+04"]
    assert [verb._short(x) for x in (999, 1000, 1_500_000, 2_000_000_000)] == ["999", "1 k", "1.5 M", "2 B"]
