"""One name, one meaning; what has a name is called by it; types say what they are. ``python -m tests.whole.test_names``
prints the counts, module by module.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator

import pytest

from tests.whole.test_layers import modules

VAGUE = frozenset(["found", "held", "told", "made", "own", "at", "one", "several", "gone", "known", "given"])
"""Names that say nothing of what they name."""

PRECISE = ("ir", "axes", "coupling", "plan")
"""Packages in which no field of a dataclass may be anything."""


def vague_bindings(tree: ast.Module) -> Iterator[str]:
    """The vague names that a module binds: variables, loop variables and parameters."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.Lambda):
            positional = [*node.args.posonlyargs, *node.args.args, node.args.vararg]
            arguments = [*positional, *node.args.kwonlyargs, node.args.kwarg]
            yield from (argument.arg for argument in arguments if argument is not None and argument.arg in VAGUE)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in VAGUE:
            yield node.id
        elif isinstance(node, ast.ExceptHandler) and node.name in VAGUE:
            yield node.name


def anything(tree: ast.AST) -> int:
    """How often a module, or a part of one, names the type ``Any``."""
    return sum(isinstance(node, ast.Name) and node.id == "Any" for node in ast.walk(tree))


def test_no_class_name_is_defined_twice() -> None:
    defined = defaultdict(list)
    for module, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                defined[node.name].append(module)
    assert {name: places for name, places in defined.items() if len(places) > 1} == {}


def test_what_has_a_name_is_called_by_it() -> None:
    assert Counter(name for tree in modules().values() for name in vague_bindings(tree)) == {}


def test_few_values_may_be_anything() -> None:
    assert sum(map(anything, modules().values())) <= 250


@pytest.mark.parametrize("package", PRECISE)
def test_fields_of_dataclasses_have_types(package: str) -> None:
    for module, tree in modules().items():
        for kind in ast.walk(tree) if module.partition(".")[0] == package else ():
            if isinstance(kind, ast.ClassDef) and any("dataclass" in ast.unparse(d) for d in kind.decorator_list):
                fields = [field for field in kind.body if isinstance(field, ast.AnnAssign)]
                assert not [ast.unparse(field) for field in fields if anything(field.annotation)], module


if __name__ == "__main__":
    for name, parsed in modules().items():
        vague = len(list(vague_bindings(parsed)))
        sys.stdout.write(f"{vague:4} vague names {anything(parsed):4} times Any  {name}\n")
