"""The layers: a module imports its own layer and lower ones, at the top of its file, and packages form no cycle.

Imports in functions and under TYPE_CHECKING count like any others. ``python -m tests.whole.test_layers`` draws the
picture in ``docs/architecture.md`` from the code.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

GROUND = (
    "checks", "errors", "example_inputs", "holders", "module_modes", "notebook", "progress", "relative_error",
    "snapshot", "strict_json", "version", "wrappers",
)  # fmt: skip

LAYERS: tuple[tuple[str, ...], ...] = (
    GROUND,
    ("ir",),
    ("indexing",),
    ("axes",),
    ("coupling",),
    ("plan", "plan_json"),
    ("runtime",),
    ("importance",),
    ("passes",),
    ("budget",),
    ("capture",),
    ("origin", "rewrite", "trace_check", "verify"),
    ("inplace",),
    ("planning", "sensitivity_search", "torch_compile"),
    ("training",),
    ("distillation",),
    ("compression", "recipe"),
    ("huggingface", "storage"),
    ("export",),
    ("report",),
    ("api",),
    ("",),
    ("cli", "demo"),
)
"""Lowest first; "" is the package itself, whose names are the public verbs."""

PICTURE = re.compile(r"(?<=```mermaid\n).*?(?=```)", re.DOTALL)
"""The picture in `ARCHITECTURE`."""

ARCHITECTURE = ROOT / "docs" / "architecture.md"

RANK = {member: rank for rank, members in enumerate(LAYERS) for member in members}


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of the library by its name without the package's, the passes under theirs."""
    found = {}
    for folder in ("ecospa_fx", "passes"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if parts[:2] != ("ecospa_fx", "passes"):  # a link to the folder
                parts = parts[1:] if folder == "ecospa_fx" else parts
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(_source(path).read_text())
    return found


def _source(path: Path) -> Path:
    """What says what a module imports: beside one that imports lazily, its stub."""
    stub = path.with_suffix(".pyi")
    return stub if stub.exists() else path


def imports(tree: ast.Module) -> Iterator[tuple[str, ast.stmt]]:
    """The library's modules that a module imports, wherever it does so, with the statement."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, inner = name.partition(".")
            if package == "ecospa_fx":
                yield inner if inner in modules() else inner.rpartition(".")[0], node


def layer(module: str) -> int:
    """The layer of a module, by the first part of its name."""
    return RANK[module.partition(".")[0]]


@pytest.mark.parametrize("module", modules())
def test_a_module_imports_its_own_layer_and_lower_ones_at_its_top(module: str) -> None:
    tree = modules()[module]
    top = {id(node) for node in tree.body}
    for target, node in imports(tree):
        assert layer(target) <= layer(module), f"line {node.lineno}: {module} imports {target}, of a layer above"
        assert id(node) in top or target.partition(".")[0] == module.partition(".")[0], (
            f"line {node.lineno}: {module} imports {target} in a function"
        )


def packages() -> dict[str, set[str]]:
    """By package, or module at the top, those that it imports; the ground is one, because all stand on it."""
    edges: dict[str, set[str]] = {}
    for module, tree in modules().items():
        importing = _package(module)
        edges.setdefault(importing, set()).update(_package(target) for target, _ in imports(tree))
        edges[importing].discard(importing)
    return edges


def _package(module: str) -> str:
    first = module.partition(".")[0]
    return "ground" if first in GROUND else first or "ecospa_fx"


def test_packages_form_no_cycle() -> None:
    list(TopologicalSorter(packages()).static_order())


# -- the picture -------------------------------------------------------------------------------------------------


def picture() -> str:
    """The packages as a Mermaid diagram, lowest last; an arrow means "imports", those that others imply left out."""
    edges = packages()
    order = [name for name in TopologicalSorter(edges).static_order() if name != "ground"]
    reach: dict[str, set[str]] = {}
    for name in ["ground", *order]:
        reach[name] = set().union(*({other} | reach[other] for other in edges[name]))
    lines = ["flowchart TB"]
    for name in reversed(order):
        implied = set().union(*(reach[other] for other in edges[name]))
        lines += [f"    {name} --> {other}" for other in sorted(edges[name] - implied)]
    return "\n".join(lines) + "\n"


def test_the_picture_shows_the_code() -> None:
    assert PICTURE.findall(ARCHITECTURE.read_text()) == [picture()]


if __name__ == "__main__":
    ARCHITECTURE.write_text(PICTURE.sub(picture(), ARCHITECTURE.read_text()))
