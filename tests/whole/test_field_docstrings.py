"""Each field of a public dataclass says in a docstring of its own what it holds, in the packages that keep to this."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2] / "ecospa_fx"
PLACES = ("axes", "coupling", "plan.py")


def public_dataclasses(path: Path) -> Iterator[ast.ClassDef]:
    """The classes of a file that are dataclasses and have a public name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        decorators = node.decorator_list if isinstance(node, ast.ClassDef) and not node.name.startswith("_") else []
        if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(decorator) for decorator in decorators):
            yield node


def undocumented(definition: ast.ClassDef) -> Iterator[str]:
    """The fields of a dataclass that no docstring follows."""
    for statement, after in pairwise([*definition.body, ast.Pass()]):
        text = after.value if isinstance(after, ast.Expr) else None
        documented = isinstance(text, ast.Constant) and isinstance(text.value, str)
        field = isinstance(statement, ast.AnnAssign) and "ClassVar" not in ast.unparse(statement.annotation)
        if isinstance(statement, ast.AnnAssign) and field and not documented:
            yield f"{definition.name}.{ast.unparse(statement.target)}"


@pytest.mark.parametrize("place", PLACES)
def test_fields_have_docstrings(place: str) -> None:
    paths = [ROOT / place] if place.endswith(".py") else sorted((ROOT / place).rglob("*.py"))
    definitions = [definition for path in paths for definition in public_dataclasses(path)]
    assert definitions
    assert [name for definition in definitions for name in undocumented(definition)] == []


def test_a_field_without_a_docstring_is_reported() -> None:
    (definition,) = ast.parse('class A:\n    x: int\n    y: int\n    """What y is."""').body
    assert isinstance(definition, ast.ClassDef)
    assert list(undocumented(definition)) == ["A.x"]
