"""The page on axes: every snippet runs, and prints what stands below it.

`python -m tests.whole.test_axes_page` writes the outputs anew.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "axes.md"
SNIPPET = re.compile(r"^```python\n(.*?)^```\n\n^```text\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


def outputs(page: str) -> Iterator[tuple[str, str]]:
    """What each snippet of a page prints, and what the page says that it does."""
    scope: dict[str, Any] = {"__name__": "axes"}
    torch.manual_seed(0)
    for code, shown in SNIPPET.findall(page):
        printed = io.StringIO()
        with redirect_stdout(printed):
            exec(compile(code, "axes.md", "exec"), scope)
        yield "".join(f"{line.rstrip()}\n" for line in printed.getvalue().splitlines()), shown


def test_snippets_print_what_the_page_shows() -> None:
    page = PAGE.read_text(encoding="utf-8")
    results = list(outputs(page))
    assert len(results) == page.count("```python")
    for printed, shown in results:
        assert printed == shown


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    fresh = iter(printed for printed, _ in outputs(text))
    PAGE.write_text(
        SNIPPET.sub(lambda match: f"```python\n{match[1]}```\n\n```text\n{next(fresh)}```", text), encoding="utf-8"
    )
