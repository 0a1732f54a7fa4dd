"""The picture at the top of the README, as SVG, from `results/smollm2.json`: `python benchmarks/front_picture.py`."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs" / "images" / "smollm2.svg"
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 720, 300, 60, 40, 250, 50
MOST_SHARE, MOST = 0.2, 2.5
SERIES = {
    "layers dropped": ("whole layers dropped", "#999999"),
    "books alone": ("compress, calibrated on books alone", "#d98c3f"),
    "own text": ("compress, on text it wrote itself", "#2a78b5"),
}
"""Rows of the results with their names in the picture and their colours."""


def place(share: float, mean: float) -> tuple[float, float]:
    """Where a point stands, in pixels."""
    x = LEFT + share / MOST_SHARE * (WIDTH - LEFT - RIGHT)
    y = HEIGHT - BOTTOM - (mean - 1) / (MOST - 1) * (HEIGHT - TOP - BOTTOM)
    return round(x, 1), round(y, 1)


def text(x: float, y: float, words: str, extra: str = "") -> str:
    return f'<text x="{x}" y="{y}" {extra}>{words}</text>'


def axes() -> list[str]:
    lines = []
    for mean in (1.0, 1.5, 2.0, 2.5):
        x, y = place(0, mean)
        lines.append(f'<line x1="{x}" y1="{y}" x2="{WIDTH - RIGHT}" y2="{y}" stroke="#8884"/>')
        lines.append(text(x - 8, y + 4, f"{mean:g}×", 'text-anchor="end"'))
    for share in (0, 0.05, 0.1, 0.15, 0.2):
        x, y = place(share, 1)
        lines.append(text(x, y + 20, f"{share:.0%}", 'text-anchor="middle"'))
    x, y = place(MOST_SHARE / 2, 1)
    lines.append(text(x, y + 40, "share of the blocks' parameters removed", 'text-anchor="middle"'))
    lines.append(text(LEFT, 22, "SmolLM2-135M: perplexity over dense, mean of books, documentation and code"))
    return lines


def curve(name: str, rows: list[dict[str, float]]) -> list[str]:
    label, colour = SERIES[name]
    points = [place(0, 1), *(place(row["share"], row["mean"]) for row in rows)]
    joined = " ".join(f"{x},{y}" for x, y in points)
    dots = [f'<circle cx="{x}" cy="{y}" r="4" fill="{colour}"/>' for x, y in points]
    x, y = points[-1]
    line = f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="2.5"/>'
    return [line, *dots, text(x + 10, y + 4, label, f'style="fill:{colour}"')]


def picture() -> str:
    """The whole SVG."""
    results = json.loads((ROOT / "benchmarks" / "results" / "smollm2.json").read_text(encoding="utf-8"))["rows"]
    curves = [line for name in SERIES for line in curve(name, [row for row in results if row["what"] == name])]
    style = "<style>text{font:13px sans-serif;fill:#888}</style>"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
    return "\n".join([head, style, *axes(), *curves, "</svg>"]) + "\n"


if __name__ == "__main__":
    TARGET.write_text(picture(), encoding="utf-8")
