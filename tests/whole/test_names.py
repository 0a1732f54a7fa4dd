"""One name, one meaning: no class is defined twice, and what has a name is called by it."""

from __future__ import annotations

import ast
from collections import defaultdict

from tests.whole.test_layers import modules


def test_no_class_name_is_defined_twice() -> None:
    defined = defaultdict(list)
    for module, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                defined[node.name].append(module)
    assert {name: places for name, places in defined.items() if len(places) > 1} == {}
