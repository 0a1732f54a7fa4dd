"""The layers: a module imports its own layer and lower ones, at the top of its file, and packages form no cycle.

Imports in functions and under TYPE_CHECKING count like any others.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

GROUND = (
    "checks", "errors", "example_inputs", "holders", "progress", "relative_error", "snapshot", "strict_json", "version",
    "wrappers",
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
    ("api",),
    ("",),
    ("cli", "demo"),
)
"""Lowest first; "" is the package itself, whose names are the public verbs."""

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
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text())
    return found


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


def test_packages_form_no_cycle() -> None:
    edges: dict[str, set[str]] = {}
    for module, tree in modules().items():
        own = module.partition(".")[0]
        edges.setdefault(own, set()).update(t.partition(".")[0] for t, _ in imports(tree))
        edges[own].discard(own)
    list(TopologicalSorter(edges).static_order())
