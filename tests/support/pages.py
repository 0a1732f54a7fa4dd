"""The README and the pages of docs: the Python in them, and what they say that it prints."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```$(?:\n\n^```text\n(?P<shown>.*?)^```$)?", re.DOTALL | re.MULTILINE)


class Snippet(NamedTuple):
    """A block of Python in a page."""

    code: str
    """What is run, in the scope that the blocks before it left."""
    shown: str | None
    """What stands below it as its output, if anything does."""


SMALLER = {
    "8, 127  # or a folder": "3, 16  # or a folder",
    "WINDOWS, LENGTH, SAMPLES = 16, 256, 64": "WINDOWS, LENGTH, SAMPLES = 3, 16, 4",
}
"""What is run in place of a line, so that it takes less time."""


def pages() -> list[Path]:
    """The README and every page of docs."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def snippets(text: str) -> list[Snippet]:
    """The blocks of Python in a page."""
    return [Snippet(match["code"], match["shown"]) for match in BLOCK.finditer(text)]


def run(text: str, name: str, scope: dict[str, Any]) -> Iterator[tuple[Snippet, str]]:
    """Every snippet of a page with what it prints, in one scope, whose names are there afterwards."""
    scope["__name__"] = name
    for line, smaller in SMALLER.items():
        text = text.replace(line, smaller)
    for snippet in snippets(text):
        printed = io.StringIO()
        with redirect_stdout(printed):
            exec(compile(snippet.code, name, "exec"), scope)
        yield snippet, "".join(f"{line.rstrip()}\n" for line in printed.getvalue().splitlines())


def blocks(language: str, text: str) -> list[str]:
    """The blocks of a language in a page."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def links(text: str) -> list[tuple[str, str]]:
    """(path, anchor) of every link within the repository, images included; blocks of code have none."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"\]\(([^)#:\s]*)(?:#([^)\s]+))?\)", prose)


def anchors(text: str) -> set[str]:
    """Names by which links find the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
