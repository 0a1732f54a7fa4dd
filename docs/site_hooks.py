"""The pages of the repository that stand outside of docs/, as pages of the site; README.md is its start.

Links are written for readers of the repository. Those that leave it for a file that is no page of the site, such as a
module, keep their text alone.
"""

from __future__ import annotations

import posixpath
import re
from html import unescape
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = {
    "README.md": "index.md",
    **{
        path: path
        for path in (
            "CHANGELOG.md", "CODE_OF_CONDUCT.md", "CONTRIBUTING.md", "LICENSE", "SECURITY.md", "benchmarks/README.md",
            "benchmarks/from-scratch.md",
        )
    },
}  # fmt: skip
"""Where files of the repository stand in the site."""

FORMULA = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<path>[^)#:\s]+)(?P<anchor>#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what stands outside of docs/."""
    for path, place in OUTSIDE.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links between files of the repository become links between pages."""
    here = repository_path(page.file.src_uri)
    return LINK.sub(lambda link: rewritten(link, here, page.file.src_uri), markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Formulas become MathML, which browsers draw by themselves."""
    return FORMULA.sub(lambda formula: convert(unescape(formula[1])), html)


def repository_path(place: str) -> str:
    """Where a page of the site stands in the repository."""
    return {place: path for path, place in OUTSIDE.items()}.get(place, f"docs/{place}")


def rewritten(link: re.Match[str], here: str, place: str) -> str:
    """A link of the file `here`, for the page `place`."""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(here), link["path"]))
    goal = target.removeprefix("docs/") if target.startswith("docs/") else OUTSIDE.get(target)
    if goal is None:
        return link["text"] if (ROOT / target).exists() else link[0]
    relative = posixpath.relpath(goal, posixpath.dirname(place) or ".")
    return f"{link['image']}[{link['text']}]({relative}{link['anchor'] or ''})"
