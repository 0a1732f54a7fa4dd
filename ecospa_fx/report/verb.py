"""The verb `report`: one page that shows couplings, a plan, scores and what was measured."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from ecospa_fx.budget.allocate import NestedPlans
from ecospa_fx.checks import is_number
from ecospa_fx.coupling.couplings import Couplings, check_couplings
from ecospa_fx.errors import PlanError, StorageError
from ecospa_fx.export.certificate import Exactness
from ecospa_fx.importance.scores import Given
from ecospa_fx.plan import Plan, check_plan
from ecospa_fx.report.content import PERCENTS, Content, Json, check_same_model, content
from ecospa_fx.report.drawing import WIDTH, drawings
from ecospa_fx.report.layer_rows import row_of
from ecospa_fx.report.model_explorer import node_data
from ecospa_fx.training.history import Shrink
from ecospa_fx.version import __version__

if TYPE_CHECKING:
    from altair import LayerChart

Figures = Mapping[str, Mapping[str, float]]
"""By name of a model what was measured of it, by name of the measure; "parameters" is one of these."""

PICTURES, NODE_DATA = (".png", ".svg"), ".json"


@dataclass(frozen=True, slots=True)
class ChartSection:
    """A chart with what stands above it."""

    key: str
    """Where it goes."""
    title: str
    """Its heading."""
    note: str
    """What it shows."""
    specification: Json
    """In Vega-Lite."""


def report(
    couplings: Couplings,
    *,
    plan: Plan | None = None,
    scores: Given | None = None,
    history: Sequence[Shrink] = (),
    figures: Figures | None = None,
    exactness: Exactness | float | None = None,
    path: str | os.PathLike[str] = "report.html",
) -> Path:
    """Write a page to look at: one file that needs no network, works from disk, in dark and light, and on a phone.

    It shows layers × kinds of what is kept, a card per coupling with its evidence or refusal, and who reads what on a
    drawing of each layer. With scores, a slider chooses among the plans that ``plan(couplings, ratio, scores)`` makes
    at every percent; computing these takes most of the time, about half a minute for 7 billion parameters.
    Needs the extra ``report``.

    Args:
        couplings: what `detect` returned.
        plan: what is kept; by default None, everything.
        scores: what `score` returned, a mapping, or the name of a method, as `plan` takes them. By default None: no
            score curves and no slider.
        history: of a training, `SparseTraining.history`; by default none.
        figures: what was measured, by model and measure, each with "parameters"; by default nothing.
        exactness: the largest relative error against masking, in float64, as `ecospa_fx.verify.masked_error` gives it,
            or what a certificate says. By default None.
        path: the file to write, "report.html" by default, in place of one that is there. With .png or .svg, a picture
            of the main figures instead. With .json, node data that Model Explorer lays over the exported program.

    Returns:
        The path of the file.

    Raises:
        PlanError: the plan or the scores do not belong to the couplings; figures without "parameters".
        StorageError: the extra is not installed, or the file cannot be written.

    Example:
        >>> import torch, ecospa_fx as eco
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 8))
        >>> couplings = eco.detect(mlp, (torch.randn(2, 8),))
        >>> plan = eco.plan(couplings, ratio=0.5, scores="magnitude")
        >>> eco.report(couplings, plan=plan, scores="magnitude", path="report.html")  # doctest: +SKIP
        PosixPath('report.html')
    """
    check_couplings(couplings, PlanError)
    if plan is not None:
        check_plan(plan)
    target, measured = check_path(path), _checked(figures or {})
    if target.suffix == NODE_DATA:
        check_same_model(couplings, plan)
        _write(target, json.dumps(node_data(couplings, plan)))
        return target
    shown = content(couplings, plan, None if scores is None else NestedPlans.of(couplings, scores, PERCENTS))
    if target.suffix in PICTURES:
        _write_picture(shown, history, target)
        return target
    sections = _sections(shown, history, measured)
    _write(target, _page(shown, sections, measured, _exactness(exactness)))
    return target


def check_path(path: object) -> Path:
    """The path that a report is written to. Raises StorageError for one that it cannot be, or without the extra."""
    if not isinstance(path, str | os.PathLike):
        raise StorageError(f"path={path!r:.60} is no path: give a file that ends in .html, .png, .svg or .json")
    target = Path(path)
    if target.suffix not in (".html", *PICTURES, NODE_DATA):
        raise StorageError(f"path={str(path)!r:.60} is no .html, .png, .svg or .json: end it in one of these")
    if target.suffix != NODE_DATA:
        _check_extra()
    return target


def _checked(figures: Figures) -> Figures:
    for model, values in figures.items():
        if not isinstance(values, Mapping) or "parameters" not in values:
            raise PlanError(f"figures of {model!r:.60} have no 'parameters': give a mapping of numbers by measure")
        for measure, value in values.items():
            if not is_number(value) or not math.isfinite(value):
                raise PlanError(f"figures[{model!r}][{measure!r}]={value!r:.60} is no finite number: leave it out")
    return figures


def _exactness(exactness: Exactness | float | None) -> Exactness | None:
    if exactness is None or isinstance(exactness, Exactness):
        return exactness
    if not is_number(exactness):
        raise PlanError(f"exactness={exactness!r:.60} is no error: pass what ecospa_fx.verify.masked_error returned")
    return Exactness(against="masking", error=float(exactness), dtype="float64")


def _check_extra() -> None:
    try:
        import altair  # noqa: F401
        import jinja2  # noqa: F401
        import vl_convert  # noqa: F401
    except ImportError as error:
        raise StorageError(f'report() needs {error.name}: pip install "ecospa-fx[report]"') from error


def _sections(shown: Content, history: Sequence[Shrink], figures: Figures) -> list[ChartSection]:
    """The charts of the page, those for which there are numbers."""
    from ecospa_fx.report import charts  # which imports Altair

    colours, r = charts.PAGE, shown.replanning
    chosen: list[tuple[str, str, str, LayerChart]] = []
    if r is not None and r.curves:
        note = (
            "A line per coupling: the score of the units that would go next, over the share that is gone. A plan for a "
            "ratio removes the lowest scores per parameter first, of all couplings together; dots mark where it stops. "
            "The slider chooses among plans that ecospa_fx.plan(couplings, ratio, scores) made at every percent with "
            "its default options; they remove ever more of one order. A plan that was given may have been made "
            "differently."
        )
        chosen.append(("curves", "What removing costs", note, charts.score_curves(r, shown.kinds, colours)))
    if shown.flops is not None or (r is not None and r.flops):
        note = "Parameters of the whole model against FLOPs of the example call, in the products that couplings narrow."
        chosen.append(("sizes", "Size against FLOPs", note, charts.size_and_flops(shown, colours)))
    for number, measure in enumerate(m for m in _measures(figures) if m != "parameters"):
        chart = charts.measured(figures, measure, colours)
        chosen.append((f"measure-{number}", f"{measure} against parameters", "", chart))
    if history:
        note = "Share of units kept after each shrink: the mean of a kind, and the range of its couplings."
        chosen.append(("history", "Over training", note, charts.over_training(history, shown, colours)))
    return [ChartSection(key, title, note, charts.finished(c, colours).to_dict()) for key, title, note, c in chosen]


def _measures(figures: Figures) -> list[str]:
    return list(dict.fromkeys(["parameters", *(m for values in figures.values() for m in values)])) if figures else []


# -- the page ----------------------------------------------------------------------------------------------------


def _page(shown: Content, sections: Sequence[ChartSection], figures: Figures, exactness: Exactness | None) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("ecospa_fx.report", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(short=_short, number=_number)
    cells: dict[tuple[str, str], list[int]] = {}
    for number, c in enumerate(shown.couplings):
        cells.setdefault((row_of(c.layer), c.kind), []).append(number)
    data = {**shown.script_data(), "charts": {s.key: s.specification for s in sections}}
    return environment.get_template("page.html.jinja").render(
        content=shown, charts=sections, figures=figures, measures=_measures(figures), exactness=exactness, cells=cells,
        drawings=drawings(shown.couplings, shown.small), box_width=WIDTH, version=__version__, kept_text=_kept_text,
        data=Markup(_json(data)), style=Markup(_resource("page.css")), script=Markup(_resource("page.js")),
        vega=Markup(_vega()),
    )  # fmt: skip


def _json(data: object) -> str:
    """JSON that can stand in a script element: no character in it begins a tag."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c").replace(">", "\\u003e")


def _resource(name: str) -> str:
    return files("ecospa_fx.report").joinpath(name).read_text(encoding="utf-8")


@cache
def _vega() -> str:
    """Vega, Vega-Lite and their embedding as one script, as vl-convert ships them."""
    import vl_convert

    bundle: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return bundle


def _kept_text(units: tuple[int, int], kept: float) -> str:
    least, most = units
    return f"keeps {least:,}{'' if least == most else f'–{most:,}'} ({kept:.0%})"


def _short(number: int) -> str:
    """A count in three digits."""
    for factor, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g} {letter}"
    return str(number)


def _number(value: float) -> str:
    """A measured number: whole ones as they are, others in four digits."""
    return f"{int(value):,}" if float(value).is_integer() else f"{value:,.4g}"


# -- files -------------------------------------------------------------------------------------------------------


def _write_picture(shown: Content, history: Sequence[Shrink], target: Path) -> None:
    import vl_convert

    from ecospa_fx.report import charts  # which imports Altair

    specification = charts.picture(shown, history).to_dict()
    if target.suffix == ".png":
        _write(target, vl_convert.vegalite_to_png(specification, scale=2))
    else:
        _write(target, vl_convert.vegalite_to_svg(specification))


def _write(target: Path, text: str | bytes) -> None:
    try:
        if isinstance(text, bytes):
            target.write_bytes(text)
        else:
            target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{target} cannot be written: {error.strerror or error}") from error
