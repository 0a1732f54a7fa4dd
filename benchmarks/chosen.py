"""A plugin for pytest: the tests that the file ``$CHOSEN`` names, in its order (`benchmarks/mutation.py`).

A line is a test or the beginning of some, such as a folder.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what was not chosen, and order the others."""
    order = {name: i for i, name in enumerate(Path(os.environ["CHOSEN"]).read_text().splitlines())}
    folders = tuple(name for name in order if "::" not in name)
    chosen = [item for item in items if item.nodeid in order or item.nodeid.startswith(folders)]
    items[:] = sorted(chosen, key=lambda item: order.get(item.nodeid, len(order)))
