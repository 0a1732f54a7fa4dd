"""A small drawing of a layer: the operators that read its parameters or meet its units, and who reads what.

Boxes are calls, with the parameters that they read; an arrow leads from a call to the next one that does something to
the units, over whatever only moves them. Where no graph is known, boxes are modules and arrows lead from the producers
of a coupling to its consumers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from torch import fx

from ecospa_fx.axes.findings import Value
from ecospa_fx.coupling.couplings import Couplings
from ecospa_fx.coupling.types import RESIDUAL, Coupling
from ecospa_fx.ir.provenance import operator_of
from ecospa_fx.report.layer_rows import ROOT, folded, row_of

PASSIVE = frozenset(["passes", "produced", "multiplied", "contracts ones", "paired"])
"""What is not worth a box."""

WIDTH, GAP, LINE, MARGIN = 176, 56, 15, 12
"""Sizes in units of the picture: of boxes, between columns, of lines of text, around everything."""
LETTERS = 25
"""Of a line in a box."""
MOST = 6
"""Drawings on a page."""


@dataclass(frozen=True, slots=True)
class CallBox:
    """One call, or one module."""

    title: str
    """The operator, or the module."""
    lines: tuple[str, ...]
    """Parameters with their shapes."""
    x: float
    """Left edge."""
    y: float
    """Upper edge."""
    height: float
    """Of the box."""

    def shown(self, line: str) -> str:
        """A line as far as it fits."""
        return line if len(line) <= LETTERS else f"…{line[1 - LETTERS :]}"


@dataclass(frozen=True, slots=True)
class Arrow:
    """From one box to another."""

    start: tuple[float, float]
    """Where it leaves."""
    end: tuple[float, float]
    """Where it arrives."""
    kind: str
    """Of the coupling whose units go along it."""

    @property
    def curve(self) -> str:
        """The arrow as an SVG path."""
        (x, y), (u, v) = self.start, self.end
        bend = max((u - x) / 2, 20)
        return f"M{x:g},{y:g}C{x + bend:g},{y:g} {u - bend:g},{v:g} {u:g},{v:g}"


@dataclass(frozen=True, slots=True)
class Drawing:
    """One layer."""

    title: str
    """The layers that look like this."""
    width: float
    """Of the picture."""
    height: float
    """Of the picture."""
    boxes: tuple[CallBox, ...]
    """Calls."""
    arrows: tuple[Arrow, ...]
    """Who reads what."""
    kinds: tuple[str, ...]
    """Kinds of the arrows."""


@dataclass(slots=True)
class _Net:
    """Calls by a key of theirs, before they have places."""

    titles: dict[str, str]
    parameters: dict[str, list[str]]
    arrows: dict[tuple[str, str], str]


def drawings(couplings: Couplings, small: Mapping[str, tuple[int, ...]]) -> list[Drawing]:
    """One drawing for all layers in which the same couplings are offered, of the first `MOST` kinds of layers.

    small: shapes of the parameters that get smaller; layers that keep different ones are drawn by their dense shapes.
    """
    layers: dict[str, list[Coupling]] = {}
    for c in couplings:
        if c.kind != RESIDUAL and c.blocked is None:
            layers.setdefault(row_of(c.layer), []).append(c)
    alike: dict[tuple[object, ...], list[str]] = {}
    for row, inside in layers.items():
        alike.setdefault(tuple(_outline(c, row) for c in inside), []).append(row)
    graph = _Graph.of(couplings)
    result: list[Drawing] = []
    for rows in alike.values():
        net = graph.net(layers[rows[0]]) if graph is not None else _modules(layers[rows[0]])
        if net.titles and len(result) < MOST:
            result.append(_placed(net, rows, couplings.shapes, small if len(rows) == 1 else {}))
    return result


def _outline(coupling: Coupling, row: str) -> tuple[object, ...]:
    c = coupling
    return c.kind, c.layer.removeprefix(row), c.size, c.carriers, len(c.members)


def _modules(couplings: Iterable[Coupling]) -> _Net:
    """Without a graph: modules, and arrows from producers to consumers."""
    net = _Net({}, {}, {})
    for c in (c for c in couplings if not c.contains):  # whole heads go along the arrows of what is in them
        for m in c.members:
            key = _module(m.parameter)
            net.titles[key] = key.rpartition(".")[2] or m.parameter
            listed = net.parameters.setdefault(key, [])
            listed += [m.parameter] * (m.parameter not in listed)
        makers, readers = ([_module(m.parameter) for m in c.members if m.role == r] for r in ("producer", "consumer"))
        for maker in dict.fromkeys(makers):
            for reader in dict.fromkeys(readers):
                if maker != reader and (reader, maker) not in net.arrows:
                    net.arrows.setdefault((maker, reader), c.kind)
    return net


def _module(parameter: str) -> str:
    return parameter.rpartition(".")[0] or parameter


class _Graph:
    """The graph that couplings were detected in."""

    @classmethod
    def of(cls, couplings: Couplings) -> _Graph | None:
        """None where it is not known."""
        if couplings.analysis is None or not couplings.analysis.flow.values:
            return None
        return cls(couplings.analysis.flow.values)

    def __init__(self, values: Mapping[fx.Node, object]) -> None:
        graph = next(iter(values)).graph
        self._by_name = {node.name: node for node in graph.nodes}
        self._order = {node: i for i, node in enumerate(graph.nodes)}
        self._weights = {
            node: value.weights[0]
            for node, value in values.items()
            if node.op == "placeholder" and isinstance(value, Value) and value.weights
        }

    def net(self, couplings: Sequence[Coupling]) -> _Net:
        """The calls of some couplings; of several that go along an arrow, the one that is not a whole head counts."""
        members = {m.parameter for c in couplings for m in c.members}
        net = _Net({}, {}, {})
        for c in sorted(couplings, key=lambda c: bool(c.contains)):
            nodes = {self._by_name[s.node]: s.action for s in c.path if s.node in self._by_name}
            boxes = {n for n, action in nodes.items() if self._is_box(n, action, members)}
            for node in sorted(boxes, key=self._order.__getitem__):
                net.titles.setdefault(node.name, operator_of(node).rpartition(".")[2])
                net.parameters.setdefault(node.name, [p for p in self._reads(node) if p in members])
                for source in self._sources(node, nodes, boxes):
                    net.arrows.setdefault((source.name, node.name), c.kind)
        return net

    def _is_box(self, node: fx.Node, action: str, members: set[str]) -> bool:
        active = not PASSIVE.issuperset(action.split(", "))
        return active or any(p in members for p in self._reads(node))

    def _reads(self, node: fx.Node) -> list[str]:
        """The parameters that a call reads, as they are or viewed differently."""
        result = []
        for operand in node.all_input_nodes:
            if operand in self._weights:
                result.append(self._weights[operand])
        return result

    def _sources(self, node: fx.Node, nodes: Mapping[fx.Node, str], boxes: set[fx.Node]) -> list[fx.Node]:
        """The boxes that units come from, over nodes that only move them."""
        sources, waiting, seen = [], list(node.all_input_nodes), set[fx.Node]()
        while waiting:
            operand = waiting.pop()
            if operand in seen or operand not in nodes:
                continue
            seen.add(operand)
            if operand in boxes:
                sources.append(operand)
            else:
                waiting += operand.all_input_nodes
        return sources


Shapes = Mapping[str, tuple[int, ...]]


def _placed(net: _Net, rows: list[str], shapes: Shapes, small: Shapes) -> Drawing:
    """Boxes in columns: each right of all that it reads, and near their height."""
    sources: dict[str, list[str]] = {key: [] for key in net.titles}
    for start, end in net.arrows:
        sources[end].append(start)
    column: dict[str, int] = {}
    waiting = list(net.titles)
    for _ in range(len(waiting)):
        for key in waiting:
            column[key] = max((column.get(s, 0) + 1 for s in sources[key]), default=0)
    for key in waiting:  # what nothing is read by stands left of its reader
        readers = [column[end] for start, end in net.arrows if start == key]
        column[key] = max(column[key], min(readers) - 1) if readers and not sources[key] else column[key]
    prefix = "" if rows[0] == ROOT else f"{rows[0]}."
    lines = {
        k: [(p.removeprefix(prefix), _shape(p, shapes, small)) for p in net.parameters.get(k, ())] for k in net.titles
    }
    heights = {key: (1 + 2 * len(lines[key])) * LINE + 12 for key in net.titles}
    middles: dict[str, float] = {}
    boxes: dict[str, CallBox] = {}
    for number in range(max(column.values()) + 1):
        keys = [key for key in net.titles if column[key] == number]
        wish = {k: sum(m) / len(m) if (m := [middles[s] for s in sources[k] if s in middles]) else None for k in keys}
        y = float(MARGIN)
        for key in sorted(keys, key=lambda k: -1.0 if wish[k] is None else float(wish[k] or 0)):
            y = max(y, (wish[key] or 0) - heights[key] / 2)
            x = MARGIN + number * (WIDTH + GAP)
            boxes[key] = CallBox(net.titles[key], tuple(t for pair in lines[key] for t in pair), x, y, heights[key])
            middles[key] = y + heights[key] / 2
            y += heights[key] + 14
    arrows = [
        Arrow((boxes[a].x + WIDTH, middles[a]), (boxes[b].x - 5, middles[b]), kind)
        for (a, b), kind in net.arrows.items()
    ]
    width = max(b.x for b in boxes.values()) + WIDTH + MARGIN
    height = max(b.y + b.height for b in boxes.values()) + MARGIN
    kinds = tuple(dict.fromkeys(arrow.kind for arrow in arrows))
    return Drawing(folded(rows), ceil(width), ceil(height), tuple(boxes.values()), tuple(arrows), kinds)


def _shape(name: str, shapes: Shapes, small: Shapes) -> str:
    """The dense shape of a parameter, and the smaller one where there is one."""
    both = [shapes[name], *([small[name]] if name in small else [])]
    return " → ".join(" × ".join(f"{size:,}" for size in shape) for shape in both)
