"""Tables as notebooks show them: what `_repr_html_` returns."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape

from tabulate import tabulate


def html_table(rows: Iterable[Sequence[object]], head: Sequence[str], align: Sequence[str], note: str) -> str:
    """A table in HTML with a line below it; all texts are escaped. align: "left" or "right" per column."""
    table = tabulate(rows, headers=head, colalign=align, disable_numparse=True, tablefmt="html")
    trimmed = re.sub(r" +(?=</)|(?<=>) +", "", table)  # cells come padded to their columns' widths
    return f"{trimmed}\n{html_paragraph(note)}"


def html_paragraph(text: str) -> str:
    """A line of text in HTML, escaped."""
    return f"<p>{escape(text)}</p>"
