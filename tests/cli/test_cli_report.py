"""Pages from the command line: of a model, of a plan, and of what compress wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bs4 import BeautifulSoup

import ecospa_fx as eco
from ecospa_fx.cli import main as cli
from ecospa_fx.cli.main import main
from ecospa_fx.report import verb
from tests.support.cli import Capture, compress_arguments, refused

pytest.importorskip("altair")


@pytest.fixture(autouse=True)
def without_vega(monkeypatch: pytest.MonkeyPatch) -> None:
    """The script that draws charts takes seconds to bundle, and the browser's test has it."""
    monkeypatch.setattr(verb, "_vega", lambda: "")


def tiles(path: Path) -> dict[str, str]:
    page = BeautifulSoup(path.read_text(), "html.parser")
    return {d.dt.get_text(): " ".join(d.dd.get_text().split()) for d in page.select(".tiles div") if d.dt and d.dd}


def test_inspect_writes_a_page_too(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    page = tmp_path / "page.html"
    assert main(["inspect", str(folder / "model"), "--html", str(page), "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["parameters"] > 0
    assert printed.err.splitlines()[-1] == f"report: {page}"
    assert set(tiles(page)) == {"Couplings", "Parameters"}


@pytest.mark.slow
def test_a_compressed_model_and_its_plan(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    page, small, again = tmp_path / "page.html", tmp_path / "small", tmp_path / "again.html"
    arguments = compress_arguments(folder, small, "--method", "magnitude", "--passes", "1", "--html", str(page))
    assert main(arguments) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {page}"
    plan = eco.Plan.from_json((small / "plan.json").read_text())
    shown = tiles(page)
    assert set(shown) == {"Couplings", "Parameters", "The plan leaves", "FLOPs left", "Removing = masking"}
    assert shown["Removing = masking"].endswith("largest relative error, float64")
    measured = BeautifulSoup(page.read_text(), "html.parser").select("table.figures tr")
    assert [row.th.get_text() for row in measured if row.th] == ["model", "dense", "small"]
    assert [th.get_text() for th in measured[0].select("th")][-1] == "perplexity"
    assert main(["report", str(small), "--output", str(again)]) == 0
    assert tiles(again) == {name: text for name, text in shown.items() if name != "Removing = masking"}
    elsewhere = tmp_path / "elsewhere.json"
    assert main(["report", str(folder / "model"), "--plan", str(small / "plan.json"), "--output", str(elsewhere)]) == 0
    values = [result["value"] for result in json.loads(elsewhere.read_text())["results"].values()]
    assert min(values) == min(round(s.kept / s.size, 4) for s in plan)


def test_figures_of_a_table() -> None:
    rows = [["parameters", "1,000", "700", "70.0%"], ["perplexity", "12.50", "13.25", "106.0%"]]
    assert cli.figures(rows) == {
        "dense": {"parameters": 1000.0, "perplexity": 12.5}, "small": {"parameters": 700.0, "perplexity": 13.25},
    }  # fmt: skip


def test_what_is_refused(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    model = str(folder / "model")
    assert "no .html" in refused(capsys, ["inspect", "nowhere", "--html", "page.pdf"])
    assert "no .html" in refused(capsys, ["report", "nowhere", "--output", "page.pdf"])
    assert "no .html" in refused(capsys, compress_arguments(folder, tmp_path / "small", "--html", "page.pdf"))
    nothing = ["report", model, "--plan", str(tmp_path / "none.json"), "--output", str(tmp_path / "page.html")]
    assert "there is no readable plan" in refused(capsys, nothing)
    assert list(tmp_path.iterdir()) == []
