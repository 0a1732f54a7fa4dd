"""Couplings for people and for machines: a table, the evidence of one coupling, and JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from math import prod
from textwrap import dedent, indent
from typing import TYPE_CHECKING, Literal

from tabulate import tabulate

from ecospa_fx.coupling.types import Box, Coupling, EvidenceStep, Member, Refusal
from ecospa_fx.coupling.unit_elements import coupled_elements
from ecospa_fx.notebook import html_paragraph, html_table

if TYPE_CHECKING:
    from ecospa_fx.coupling.couplings import Couplings

FORMAT = "ecospa-fx-couplings"
VERSION = 1

NOTHING = "No coupling was found, and none was refused."
HEAD = ("layer", "kind", "units × carriers", "symmetry", "parameters", "blocked because")
ALIGN = ("left", "left", "right", "left", "right", "left")

Ranges = tuple[tuple[int, int], ...]
"""The numbers in a layer's name, each as (first, last)."""


# -- the table ---------------------------------------------------------------------------------------------------


def coupling_table(couplings: Couplings) -> str:
    """A table of all couplings, refusals included, and a line of totals.

    Rows that differ in nothing but one consecutive number of their layer are folded into one, like
    ``model.layers.{0..31}.mlp``; its parameters read ``32 × 135,266,304``. The totals count each element once.
    """
    if not len(couplings):
        return NOTHING
    rows = [_cells(row) for row in _folded(couplings)]
    return f"{tabulate(rows, headers=HEAD, colalign=ALIGN, disable_numparse=True)}\n{_totals(couplings)}"


def coupling_table_html(couplings: Couplings) -> str:
    """The same table for notebooks."""
    if not len(couplings):
        return html_paragraph(NOTHING)
    return html_table([_cells(row) for row in _folded(couplings)], HEAD, ALIGN, _totals(couplings))


def covered_parameters(couplings: Couplings) -> int:
    """Elements that the offered couplings hold, each counted once however many hold it."""
    return coupled_elements(couplings.shapes, (c.members for c in couplings.offered))


def _totals(couplings: Couplings) -> str:
    covered, whole = covered_parameters(couplings), _parameters(couplings)
    return (
        f"{len(couplings.offered):,} couplings offered, {len(couplings.blocked):,} blocked, "
        f"{covered:,} of {whole:,} parameters covered ({covered / max(whole, 1):.1%})"
    )


def _parameters(couplings: Couplings) -> int:
    return sum(prod(shape) for shape in couplings.shapes.values())


@dataclass(frozen=True, slots=True)
class _Row:
    """Couplings folded into one line: the layer's parts, None for a number; a range per number; first and last."""

    template: tuple[str | None, ...]
    ranges: Ranges
    first: Coupling
    last: Coupling
    count: int = 1

    def joined(self, other: _Row, i: int) -> _Row | None:
        """Both rows as one, where `other` continues this one in number `i` and agrees in the others."""
        mine, theirs = self.ranges, other.ranges
        if mine[i][1] + 1 != theirs[i][0] or (*mine[:i], *mine[i + 1 :]) != (*theirs[:i], *theirs[i + 1 :]):
            return None
        ranges = (*mine[:i], (mine[i][0], theirs[i][1]), *mine[i + 1 :])
        return _Row(self.template, ranges, self.first, other.last, self.count + other.count)


def _folded(couplings: Iterable[Coupling]) -> list[_Row]:
    """The rows of the table, in the order in which each kind of row comes first."""
    groups: dict[tuple[object, ...], list[_Row]] = {}
    seen: Counter[tuple[object, ...]] = Counter()
    for c in couplings:
        parts = c.layer.split(".")
        template = tuple(None if part.isdecimal() else part for part in parts)
        numbers = [int(part) for part in parts if part.isdecimal()]
        refused = tuple(note.operator if note else None for note in (c.blocked, c.inexact, c.resized))
        key = (template, c.kind, c.size, c.carriers, c.symmetry, c.parameters, refused)
        seen[(*key, *numbers)] += 1  # like couplings of one layer are never folded into each other
        group = groups.setdefault((*key, seen[(*key, *numbers)]), [])
        group.append(_Row(template, tuple((n, n) for n in numbers), c, c))
    return [row for group in groups.values() for row in _fold(group)]


def _fold(rows: list[_Row]) -> list[_Row]:
    """Join runs of consecutive numbers, the last number of a name first."""
    for i in reversed(range(len(rows[0].ranges))):
        rows.sort(key=lambda row: (row.ranges[:i], row.ranges[i + 1 :], row.ranges[i]))
        folded: list[_Row] = []
        for row in rows:
            joined = folded[-1].joined(row, i) if folded else None
            if joined is None:
                folded.append(row)
            else:
                folded[-1] = joined
        rows = folded
    return sorted(rows, key=lambda row: row.ranges)


def _cells(row: _Row) -> list[str]:
    c = row.first
    numbers = (str(a) if a == b else f"{{{a}..{b}}}" for a, b in row.ranges)
    layer = ".".join(next(numbers) if part is None else part for part in row.template)
    parameters = f"{c.parameters:,}" if row.count == 1 else f"{row.count:,} × {c.parameters:,}"
    return [layer or "(root)", c.kind, f"{c.size:,} × {c.carriers:,}", c.symmetry, parameters, _because(row)]


def _because(row: _Row) -> str:
    c, first, last = row.first, row.first.blocked, row.last.blocked
    if first is None or last is None:
        notes = [f"inexact: {c.inexact.operator} at {c.inexact.node}"] if c.inexact else []
        notes += [f"{c.resized.message} ({c.resized.node})"] if c.resized else []
        return f"offered, {'; '.join(notes)}" if notes else ""
    return f"{first.operator} at {first.node}" + (f" … {last.node}" if first.node != last.node else "")


# -- the evidence of one coupling ----------------------------------------------------------------------------------


def explain(coupling: Coupling) -> str:
    """Why these parameters shrink together: the path node by node with the user's source lines, then the members.

    For a refusal, first what refused it: message, operator, node and source line.
    """
    c = coupling
    parts = [
        f"{c.name}: {c.kind} of {c.layer or 'the root'}, {_counted(c.size, 'unit')} × "
        f"{_counted(c.carriers, 'carrier')}, symmetry {c.symmetry}, {c.parameters:,} parameters"
    ]
    if c.blocked is not None:
        parts.append(_refusal(c.blocked))
    if c.inexact is not None:
        parts.append(_refusal(c.inexact, "inexact"))
    if c.resized is not None:
        parts.append(_refusal(c.resized, "resized"))
    if c.path:
        parts.append("path\n" + "\n".join(_step(number, step) for number, step in enumerate(c.path, 1)))
    if c.members:
        rows = [[m.parameter, f"axis {m.axis}", m.role, positions(m)] for m in c.members]
        table = tabulate(rows, tablefmt="plain", disable_numparse=True)
        parts.append("members\n" + _indented(table, 2))
    if c.contains:
        parts.append("contains\n" + _indented("\n".join(c.contains), 2))
    return "\n".join(parts)


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _refusal(refusal: Refusal, what: str = "blocked") -> str:
    source = f"\n{_indented(refusal.source, 4)}" if refusal.source.strip() else ""
    return f"{what}: {refusal.message}\n  by {refusal.operator} at {refusal.node}{source}"


def _step(number: int, step: EvidenceStep) -> str:
    where = f" in {step.module}" if step.module else ""
    source = f"\n{_indented(step.source, 7)}" if step.source.strip() else ""
    return f"  {number:>2}. {step.node}: {step.operator} {step.action}{where}{source}"


def _indented(text: str, by: int) -> str:
    return indent(dedent(text.strip("\n")), " " * by)


def positions(member: Member) -> str:
    """The boxes in words: where they start, and the strides between carriers, units and along the width."""
    boxes = " and ".join(_box(box) for box in member.boxes)
    return boxes if member.carrier_axis is None else f"{boxes}, in each slice of axis {member.carrier_axis}"


def _box(box: Box) -> str:
    terms = [f"from {box.offset}", f"units by {box.unit}"]
    if box.carriers:
        terms.append(f"carriers {_strides(box.carriers)}")
    if box.width:
        terms.append(f"width {_strides(box.width)}")
    return ", ".join(terms)


def _strides(pairs: Sequence[tuple[int, int]]) -> str:
    return " · ".join(f"{size} by {stride}" for size, stride in pairs)


# -- for machines --------------------------------------------------------------------------------------------------


def couplings_data(couplings: Couplings) -> dict[str, object]:
    """What the table shows, and the members, as plain dictionaries, lists, texts and numbers."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "parameters": _parameters(couplings),
        "covered": covered_parameters(couplings),
        "couplings": [_coupling_data(c) for c in couplings],
    }


def couplings_json(couplings: Couplings) -> str:
    """`couplings_data` as JSON text."""
    return json.dumps(couplings_data(couplings))


def _coupling_data(coupling: Coupling) -> dict[str, object]:
    c = coupling
    return {
        "name": c.name,
        "kind": c.kind,
        "layer": c.layer,
        "size": c.size,
        "carriers": c.carriers,
        "symmetry": c.symmetry,
        "parameters": c.parameters,
        "blocked": None if c.blocked is None else asdict(c.blocked),
        **{name: asdict(note) for name, note in (("inexact", c.inexact), ("resized", c.resized)) if note is not None},
        "contains": list(c.contains),
        "members": [asdict(m) for m in c.members],
    }


def reason_lines(couplings: Couplings, what: Literal["blocked", "inexact"]) -> list[str]:
    """One line per reason: how many couplings it concerns, reason and remedy, the first operator, node and line."""
    grouped: dict[str, list[tuple[str, Refusal]]] = {}
    for c in couplings:
        refusal = c.blocked if what == "blocked" else c.inexact
        if refusal is not None:
            grouped.setdefault(refusal.message, []).append((c.name, refusal))
    lines = []
    for message, entries in grouped.items():
        name, first = entries[0]
        more = f" and {len(entries) - 1:,} more" if len(entries) > 1 else ""
        place = f"; {first.source}" if first.source else ""
        lines.append(f"{what}: {name}{more}: {message} ({first.operator} at node {first.node}{place})")
    return lines
