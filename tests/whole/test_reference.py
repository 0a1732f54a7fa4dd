"""The reference pages say what the code says.

`python -m tests.whole.test_reference` writes them anew.
"""

from __future__ import annotations

import os
import runpy

import pytest

from ecospa_fx import errors
from ecospa_fx.errors import EcospaError
from tests.support.pages import ROOT
from tests.support.reference import LIST, OPTIONS, PAGES, fields, refusals

FOLDER = ROOT / "docs" / "reference"


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_what_the_code_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert (FOLDER / f"{name}.md").read_text(encoding="utf-8") == PAGES[name](), "python -m tests.whole.test_reference"


def test_refused_operators_are_listed() -> None:
    assert LIST.findall((FOLDER / "refusals.md").read_text(encoding="utf-8")) == [refusals()]


def test_the_picture_shows_the_results() -> None:
    script = runpy.run_path(str(ROOT / "benchmarks" / "front_picture.py"))
    assert script["TARGET"].read_text(encoding="utf-8") == script["picture"]()


def test_every_option_has_a_default() -> None:
    for path in OPTIONS:
        options = list(fields(path))
        assert options
        assert not [name for name, _, text in options if "by default" not in text]


def test_every_error_is_explained() -> None:
    page = (FOLDER / "errors.md").read_text(encoding="utf-8")
    kinds = [name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, EcospaError)]
    assert len(kinds) > 5
    assert not [name for name in kinds if f"| `{name}` |" not in page]


if __name__ == "__main__":
    os.environ["COLUMNS"] = "80"
    for name, page in PAGES.items():
        (FOLDER / f"{name}.md").write_text(page(), encoding="utf-8")
    written = FOLDER / "refusals.md"
    written.write_text(LIST.sub(lambda _: refusals(), written.read_text(encoding="utf-8")), encoding="utf-8")
