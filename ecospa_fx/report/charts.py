"""The charts as Altair specifications: of the page, where colours are CSS variables, and of pictures."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import altair as alt

from ecospa_fx.report.content import Content, Replanning, kept_share
from ecospa_fx.report.layer_rows import row_of
from ecospa_fx.training.history import Shrink

Whole = TypeVar("Whole", alt.LayerChart, alt.HConcatChart)

PERCENT, SCIENTIFIC = alt.Axis(format="%", tickCount=6), alt.Axis(format="~e", tickCount=5)
SHORT, WHOLE = alt.Axis(format="~s", tickCount=4), alt.Scale(domain=[0, 1])

KINDS = ("#2f6fde", "#d9730d", "#1a9a76", "#b8479b", "#7a5af0", "#b38600", "#d64550", "#4d8f2e")
"""Colours of kinds of couplings in pictures; on the page they are ``--kind-0`` and so on."""


@dataclass(frozen=True, slots=True)
class Palette:
    """Colours."""

    kinds: tuple[str, ...]
    """Of kinds, one after the other, again from the start where there are more."""
    text: str
    """Of letters and axes."""
    grid: str
    """Of the lines behind."""
    accent: str
    """Of what is chosen."""
    paper: str
    """Behind everything."""


PAGE = Palette(
    tuple(f"var(--kind-{i})" for i in range(len(KINDS))), "var(--text)", "var(--line)", "var(--accent)", "transparent"
)
PICTURE = Palette(KINDS, "#1d2430", "#dde2ea", "#111827", "#ffffff")


def by_kind(kinds: Sequence[str], shown: Collection[str], palette: Palette) -> alt.Color:
    """Colour by the field "kind", the same for a kind in every chart; the legend has those that are shown."""
    colours = {kind: palette.kinds[i % len(palette.kinds)] for i, kind in enumerate(kinds)}
    drawn = [kind for kind in kinds if kind in shown]
    scale = alt.Scale(domain=drawn, range=[colours[kind] for kind in drawn])
    return alt.Color("kind:N", scale=scale, legend=alt.Legend(title=None, orient="top", symbolOpacity=1))


def finished(chart: alt.LayerChart, palette: Palette) -> alt.LayerChart:
    """A chart as wide as its place on the page, in the colours and letters of a palette."""
    return configured(chart.properties(width="container", height=260), palette)


def configured(chart: Whole, palette: Palette) -> Whole:
    """The chart with everything that is the same in all of them."""
    axis = {"labelColor": palette.text, "titleColor": palette.text, "gridColor": palette.grid}
    lines = {"domainColor": palette.grid, "tickColor": palette.grid}
    letters = {"labelFontSize": 11, "titleFontSize": 12, "titleFontWeight": "normal"}
    result: Whole = (
        chart.configure(background=palette.paper, font="system-ui, sans-serif")
        .configure_axis(**axis, **lines, **letters)
        .configure_view(stroke=None)
        .configure_legend(labelColor=palette.text, titleColor=palette.text, labelFontSize=11)
        .configure_title(color=palette.text, anchor="start", fontSize=13)
    )
    return result


def _layered(*charts: alt.Chart) -> alt.LayerChart:
    return alt.LayerChart(layer=list(charts))


def table(rows: Iterable[Mapping[str, object]], name: str | None = None) -> alt.InlineData:
    """Rows as Altair takes them; with a name, what the page's script may exchange."""
    values = [dict(row) for row in rows]
    return alt.InlineData(values=values, name=name) if name else alt.InlineData(values=values)


# -- what a ratio does ------------------------------------------------------------------------------------------


def score_curves(replanning: Replanning, kinds: Sequence[str], palette: Palette) -> alt.LayerChart:
    """The score of the next unit of every coupling over the share that is gone; the page's script marks a ratio."""
    points = [
        {"coupling": p.coupling, "kind": p.kind, "share": round(p.share, 4), "score": float(f"{p.score:.4g}")}
        for p in replanning.curves
    ]
    scale = _scores_scale([p.score for p in replanning.curves])
    x = alt.X("share:Q", title="share of the coupling's units removed", axis=PERCENT, scale=WHOLE)
    y = alt.Y("score:Q", title="score of the next units, per parameter", axis=SCIENTIFIC, scale=scale)
    tips = ["coupling:N", "kind:N", alt.Tooltip("share:Q", format=".0%"), alt.Tooltip("score:Q", format=".3e")]
    colour = by_kind(kinds, {p.kind for p in replanning.curves}, palette)
    lines = alt.Chart(table(points)).mark_line(strokeWidth=1.3, opacity=0.55).encode(
        x=x, y=y, color=colour, detail="coupling:N", tooltip=tips
    )  # fmt: skip
    dots = alt.Chart(table([], "cut")).mark_circle(size=38, opacity=1).encode(
        x=x, y=y, color=colour, tooltip=tips
    )  # fmt: skip
    return _layered(lines, dots)


def _scores_scale(scores: Sequence[float]) -> alt.Scale:
    """Logarithmic, but near 0 where some are 0 or less."""
    positive = [score for score in scores if score > 0]
    domain = [min(scores), max(scores)]
    if len(positive) == len(scores):
        return alt.Scale(type="log", nice=False, domain=domain)
    return alt.Scale(type="symlog", constant=min(positive, default=1.0), domain=domain)


def size_and_flops(content: Content, palette: Palette) -> alt.LayerChart:
    """Parameters left against FLOPs left, over all ratios and for the plan."""
    r, rows, marks = content.replanning, [], []
    if r is not None and r.flops:
        rows = [
            {"parameters": 1 - n / content.parameters, "FLOPs": left, "ratio": ratio}
            for ratio, n, left in zip((0.0, *r.ratios), (0, *r.removed), (1.0, *r.flops), strict=True)
        ]
    if content.plan is not None and content.flops is not None:
        left = 1 - content.plan.removed_parameters / content.parameters
        marks = [{"parameters": left, "FLOPs": content.flops, "what": "the plan"}]
    x = alt.X("parameters:Q", title="parameters left, of the whole model", axis=PERCENT, scale=WHOLE)
    y = alt.Y("FLOPs:Q", title="FLOPs left, of the narrowed products", axis=PERCENT, scale=WHOLE)
    percent = [alt.Tooltip("parameters:Q", format=".1%"), alt.Tooltip("FLOPs:Q", format=".1%")]
    line = alt.Chart(table(rows)).mark_line(color=palette.kinds[0], strokeWidth=2).encode(
        x=x, y=y, order="ratio:Q", tooltip=[alt.Tooltip("ratio:Q", format=".0%"), *percent]
    )  # fmt: skip
    here = alt.Chart(table([], "here")).mark_circle(size=90, color=palette.accent).encode(x=x, y=y, tooltip=percent)
    plan = alt.Chart(table(marks)).encode(x=x, y=y, tooltip=["what:N", *percent])
    point = plan.mark_point(shape="diamond", size=130, filled=True, color=palette.kinds[1])
    label = plan.mark_text(align="left", dx=10, color=palette.text).encode(text="what:N")
    return _layered(line, here, point, label)


# -- what was measured -------------------------------------------------------------------------------------------


def measured(figures: Mapping[str, Mapping[str, float]], measure: str, palette: Palette) -> alt.LayerChart:
    """One measure of several models against their parameters."""
    rows = [
        {"model": model, "parameters": values["parameters"], "value": values[measure]}
        for model, values in figures.items()
        if measure in values
    ]
    x = alt.X("parameters:Q", title="parameters", axis=SHORT, scale=alt.Scale(zero=False, padding=40))
    y = alt.Y("value:Q", title=measure, axis=SHORT, scale=alt.Scale(zero=False, padding=20))
    base = alt.Chart(table(rows)).encode(x=x, y=y, tooltip=["model:N", "parameters:Q", alt.Tooltip("value:Q")])
    line = base.mark_line(color=palette.kinds[0], strokeWidth=1.5, strokeDash=[4, 3])
    dots = base.mark_circle(size=80, color=palette.kinds[0], opacity=1)
    names = base.mark_text(dy=-12, color=palette.text).encode(text="model:N")
    return _layered(line, dots, names)


def over_training(history: Sequence[Shrink], content: Content, palette: Palette) -> alt.LayerChart:
    """Share of units kept over the steps of a training: per kind the mean, and the range behind it."""
    dense = {c.name: (c.kind, c.size) for c in content.couplings}
    rows = []
    names = [name for name in (history[0].widths if history else ()) if name in dense]
    for step, widths in [(0, {n: dense[n][1] for n in names}), *((s.step, s.widths) for s in history)]:
        for kind in dict.fromkeys(dense[n][0] for n in names):
            kept = [widths[n] / dense[n][1] for n in names if dense[n][0] == kind]
            rows.append(
                {"step": step, "kind": kind, "kept": sum(kept) / len(kept), "least": min(kept), "most": max(kept)}
            )
    base = alt.Chart(table(rows)).encode(
        x=alt.X("step:Q"), color=by_kind(content.kinds, {dense[n][0] for n in names}, palette)
    )
    y = alt.Y("kept:Q", title="share of units kept", axis=alt.Axis(format="%"), scale=alt.Scale(domain=[0, 1]))
    band = base.mark_area(opacity=0.18, interpolate="step-after").encode(y="least:Q", y2="most:Q")
    line = base.mark_line(strokeWidth=2, interpolate="step-after", point=True).encode(y=y)
    return _layered(band, line)


# -- what is kept, as a picture ----------------------------------------------------------------------------------


def heat_map(content: Content) -> alt.LayerChart:
    """Layers × kinds: the share of units that is kept; several couplings of a cell by their mean."""
    keep = {s.name: s.keep for s in content.plan or ()}
    cells: dict[tuple[str, str], list[float]] = {}
    for c in content.couplings:
        share = kept_share(c, keep)
        if share is not None:
            cells.setdefault((row_of(c.layer), c.kind), []).append(share)
    rows = [{"layer": row, "kind": kind, "kept": sum(shares) / len(shares)} for (row, kind), shares in cells.items()]
    scale = alt.Scale(domain=[0, 1], range=["#f3e9d7", "#2f6fde"], interpolate="lab")
    base = alt.Chart(table(rows)).encode(
        x=alt.X("kind:N", sort=list(content.kinds), title=None, axis=alt.Axis(orient="top", labelAngle=0)),
        y=alt.Y("layer:N", sort=list(content.rows), title=None),
    )
    squares = base.mark_rect(stroke="#ffffff", strokeWidth=2).encode(
        color=alt.Color("kept:Q", scale=scale, legend=alt.Legend(title="units kept", format="%"))
    )
    ink = alt.condition("datum.kept > 0.55", alt.value("#ffffff"), alt.value("#1d2430"))
    texts = base.mark_text(fontSize=10).encode(text=alt.Text("kept:Q", format=".0%"), color=ink)
    return _layered(squares, texts).properties(
        title=f"{content.title}: units kept", width=alt.Step(56), height=alt.Step(20)
    )


def picture(content: Content, history: Sequence[Shrink]) -> alt.HConcatChart:
    """The main figures side by side."""
    parts = [heat_map(content)]
    side = []
    if content.replanning is not None and content.replanning.curves:
        side.append(score_curves(content.replanning, content.kinds, PICTURE).properties(width=380, height=220))
    sizes = size_and_flops(content, PICTURE)
    if content.flops is not None or (content.replanning is not None and content.replanning.flops):
        side.append(sizes.properties(width=380, height=220))
    if history:
        side.append(over_training(history, content, PICTURE).properties(width=380, height=220))
    if side:
        parts.append(alt.vconcat(*side).resolve_scale(color="independent"))
    whole: alt.HConcatChart = alt.hconcat(*parts).resolve_scale(color="independent")
    return configured(whole, PICTURE)
