"""Which functions of the library each test calls: a plugin for pytest, for Python 3.12 and later.

    TOUCHED=touched.json pytest -p benchmarks.touched
    TOUCHED=touched.json pytest -p benchmarks.touched -n 8      # touched-gw0.json and so on, one per worker

`benchmarks/mutation.py --touched touched*.json` then tries a change on the tests that call what was changed, the
quickest first. Each file has ``functions``, a list of "path:first line:qualified name" with paths relative to the
checkout, and ``tests``: per test its seconds and the numbers of the functions that were called while it ran, fixtures
included. What a test calls in processes of its own is not seen.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = tuple(f"{ROOT / name}{os.sep}" for name in ("ecospa_fx", "passes"))
FUNCTIONS: dict[str, int] = {}
CALLED: set[int] = set()
TESTS: dict[str, tuple[float, list[int]]] = {}


def _begins(code: CodeType, offset: int) -> Any:
    """Note a function once; until the next test, Python then calls it without telling."""
    if code.co_filename.startswith(FOLDERS):
        name = f"{Path(code.co_filename).relative_to(ROOT)}:{code.co_firstlineno}:{code.co_qualname}"
        CALLED.add(FUNCTIONS.setdefault(name, len(FUNCTIONS)))
    return sys.monitoring.DISABLE


def pytest_configure(config: pytest.Config) -> None:
    """Listen to the beginning of every function."""
    monitoring = sys.monitoring
    monitoring.use_tool_id(monitoring.COVERAGE_ID, "touched")
    monitoring.register_callback(monitoring.COVERAGE_ID, monitoring.events.PY_START, _begins)
    monitoring.set_events(monitoring.COVERAGE_ID, monitoring.events.PY_START)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """What is called between a test's first fixture and its last."""
    CALLED.clear()
    sys.monitoring.restart_events()
    start = time.process_time()
    result = yield
    TESTS[item.nodeid] = (round(time.process_time() - start, 2), sorted(CALLED))
    return result


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the file of this process."""
    sys.monitoring.free_tool_id(sys.monitoring.COVERAGE_ID)
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    path = Path(os.environ.get("TOUCHED", "touched.json"))
    if TESTS:
        target = path.with_stem(f"{path.stem}-{worker}") if worker else path
        target.write_text(json.dumps({"functions": list(FUNCTIONS), "tests": TESTS}))
