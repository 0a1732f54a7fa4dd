"""The README and docs: their Python runs and prints what they show, links lead somewhere, and the site can be built.

`python -m tests.whole.test_pages PAGE …` writes the outputs of pages anew.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from ecospa_fx.axes import registry
from tests.support import stand_ins
from tests.support.pages import BLOCK, ROOT, anchors, blocks, links, pages, run, snippets

README = (ROOT / "README.md").read_text(encoding="utf-8")
ELSEWHERE = {"calibration", "parts", "report", "serving"}
"""Pages whose snippets are not run; other tests make such calls: calibration, whole/test_parts, report and export."""
WITH_PYTHON = [page for page in pages() if snippets(page.read_text(encoding="utf-8")) and page.stem not in ELSEWHERE]
QUICK = {"axes", "couplings", "exactness", "fx-pipeline", "operator-rule"}
"""Pages whose snippets take less than two seconds."""


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def marked(page: Path) -> object:
    """A page as a case, slow where it takes long."""
    return pytest.param(page, id=named(page), marks=[] if page.stem in QUICK else pytest.mark.slow)


@pytest.mark.filterwarnings("ignore:config.intermediate_size = ")  # compress_ says what save_pretrained cannot do
@pytest.mark.usefixtures("shallow", "brief")
@pytest.mark.parametrize("page", [marked(page) for page in WITH_PYTHON])
def test_snippets_run_and_print_what_the_page_shows(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = page.read_text(encoding="utf-8")
    if "transformers import" in text:
        pytest.importorskip("transformers")
        stand_ins.make(text, tmp_path)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    try:
        scope: dict[str, Any] = {}
        for snippet, printed in run(text, named(page), scope):
            assert snippet.shown in (None, printed)
        if page.stem in CHECKS:
            CHECKS[page.stem](scope)
    finally:
        cleaned()


def the_steps(scope: dict[str, Any]) -> None:
    sizes = [sum(p.numel() for p in scope[name].parameters()) for name in ("model", "small")]
    assert sizes[0] - sizes[1] == scope["plan"].removed_parameters > 0
    assert Path("smaller", "manifest.json").is_file()


def the_order(scope: dict[str, Any]) -> None:
    dense, small, own = (sum(p.numel() for p in scope[name].parameters()) for name in ("model", "small", "adapted"))
    assert dense > own
    assert dense - small == scope["plan"].removed_parameters
    assert len(scope["ranks"]) == len(scope["model"].layers)
    assert all(c.blocked is None for c in scope["ranks"])
    assert Path("small.pt2").is_file()


def what_is_served(scope: dict[str, Any]) -> None:
    ids = torch.ones(1, 3, dtype=torch.long)
    assert torch.equal(scope["served"](ids).logits, scope["model"](ids).logits)
    assert Path("smaller.gguf").is_file()


CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {
    "steps": the_steps,
    "order": the_order,
    "language-model": what_is_served,
}
"""What is looked at after the snippets of a page."""


def cleaned() -> None:
    """Take back what snippets leave in the process."""
    if "mylib.double" in registry.operators():
        registry.unregister("mylib.double")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    torch._dynamo.reset()


def test_a_snippet_that_prints_something_else_is_seen() -> None:
    text = "```python\nprint(1)\n```\n\n```text\n2\n```\n\n```python\nprint(3)\n```\n"
    assert [(snippet.shown, printed) for snippet, printed in run(text, "page", {})] == [("2\n", "1\n"), (None, "3\n")]


# -- links and form ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", pages(), ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for path, anchor in links(text):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"{path}#{anchor}"


def test_a_link_to_nothing_is_seen() -> None:
    text = (
        "# A heading, with `code`\n\n[a](b.md#c) [d](#e)\n\n```python\nx[0](1)\n```\n\nhttps://x.y [z](https://x.y)\n"
    )
    assert links(text) == [("b.md", "c"), ("", "e")]
    assert anchors(text) == {"a-heading-with-code"}


def test_the_readme_is_one_screen_of_each() -> None:
    lines = README.splitlines()
    assert len(lines) <= 130
    assert not [line for line in lines if len(line) > 120 and not line.startswith("|")]
    cells = [cell for line in lines if line.startswith("|") for cell in line.split("|")]
    assert not [cell for cell in cells if len(re.sub(r"\]\([^)]*\)", "", cell).split()) > 12]
    assert README.index("pip install") < README.index("\n".join(lines[30:]))


def test_there_are_two_commands_of_one_line() -> None:
    commands = blocks("sh", README)
    assert len(commands) == 2
    assert all(command.count("\n") == 1 for command in commands)
    assert "python -m ecospa_fx.demo" in commands[0]


def test_prose_has_no_line_over_the_limit() -> None:
    for page in pages():
        prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        long = [line for line in prose.splitlines() if len(line) > 140 and not line.startswith(("|", "[", "-"))]
        assert not long, f"{named(page)}: {long[0]}"


# -- the site ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(find_spec("material") is None or find_spec("mkdocstrings") is None, reason="needs the extra docs")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::PendingDeprecationWarning")
def test_the_site_is_built_without_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = import_module("mkdocs.config").load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path))
    with caplog.at_level(logging.WARNING, "mkdocs"):
        import_module("mkdocs.commands.build").build(config)
    assert not caplog.messages
    page = (tmp_path / "reference" / "python.html").read_text(encoding="utf-8")
    assert 'id="ecospa_fx.api.detect"' in page
    assert (tmp_path / "index.html").is_file()


def written(path: Path) -> str:
    """A page with what its snippets print now, where it shows that."""
    text = path.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        stand_ins.make(text, Path(folder))
        os.chdir(folder)
        torch.manual_seed(0)
        outputs = iter([output for _, output in run(text, path.name, {})])
        os.chdir(ROOT)

    def block(match: re.Match[str]) -> str:
        output = next(outputs)
        return f"```python\n{match['code']}```" + (f"\n\n```text\n{output}```" if match["shown"] is not None else "")

    return BLOCK.sub(block, text)


if __name__ == "__main__":
    for page in [Path(argument).resolve() for argument in sys.argv[1:]]:
        page.write_text(written(page), encoding="utf-8")
