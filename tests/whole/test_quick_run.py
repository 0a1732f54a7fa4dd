"""The quick run, `pytest -m "not slow"`: no part of the library is left out of it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.whole.test_layers import modules

TESTS = Path(__file__).resolve().parents[1]
ELSEWHERE = {"demo": "whole"}
"""Packages whose tests are in another folder."""


def quick(path: Path) -> Iterator[str]:
    """Tests at the top of a file that are not marked slow."""
    functions = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)]
    for function in functions:
        slow = "pytest.mark.slow" in map(ast.unparse, function.decorator_list)
        if function.name.startswith("test_") and not slow:
            yield function.name


@pytest.mark.parametrize("package", sorted({name.partition(".")[0] for name in modules() if "." in name}))
def test_every_package_has_a_folder_of_tests_with_quick_ones(package: str) -> None:
    folder = TESTS / ELSEWHERE.get(package, package)
    assert any(name for path in folder.glob("test_*.py") for name in quick(path))


def test_a_slow_test_is_not_quick(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("@pytest.mark.slow\ndef test_a(): ...\ndef test_b(): ...\n")
    assert list(quick(tmp_path / "test_it.py")) == ["test_b"]
