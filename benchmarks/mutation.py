"""How strong the tests are: small wrong changes are put into the code one at a time, and tests run until one fails.

    pip install cosmic-ray
    TOUCHED=touched.json pytest -p benchmarks.touched          # which test calls what; Python 3.12 or later
    python benchmarks/mutation.py --touched touched.json --sample 200 --seed 0 --jobs 2

Cosmic Ray lists and makes the changes: comparisons turned or moved by one, conditions negated, `and` for `or`, numbers
off by one, `True` for `False`, sums for differences, loops that do not run. Annotations, docstrings and messages are
left out. A sample of all changes is drawn, the same for the same code and seed. Each job works in a copy of the
checkout. On a change in a function run the tests that call it, nearest and quickest first; on one outside of functions,
or without ``--touched``, the tests of its package (`TESTS`). A change survives that none of them notices in ``--limit``
seconds of the processor; a test that does not end in three times as many is counted apart, as a timeout. Writes
``benchmarks/results/mutation.json`` and prints a table and the survivors, each of which needs a test or a reason why it
changes nothing.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import platform
import queue
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from difflib import unified_diff
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tabulate import tabulate

ROOT = Path(__file__).resolve().parent.parent

WHOLE = ("whole/test_architectures.py", "whole/test_random_graphs_found.py", "whole/test_beyond.py")
"""Files about what is found and removed in whole models."""

TESTS: dict[str, Sequence[str]] = {
    "ecospa_fx/axes": ("axes", "coupling", "passes/test_pass_shrink_couplings.py", "capture/test_programs.py", *WHOLE),
    "ecospa_fx/coupling": ("coupling", "whole/test_plan.py", "axes", *WHOLE),
    "ecospa_fx/budget": ("budget", "whole/test_plan.py", "importance/test_sensitivity.py"),
    "ecospa_fx/importance": ("importance", "whole/test_recipe.py"),
    "ecospa_fx/inplace": ("inplace", "storage/test_storage_edited.py", "whole/test_users_tools.py"),
    "ecospa_fx/training/tensor_cuts.py": ("training/test_surgery.py", "training/test_sparse.py", "training"),
    "ecospa_fx/storage": ("storage", "training/test_resume.py"),
    "ecospa_fx/distillation": ("distillation", "whole/test_recipe.py"),
    "passes/lossy": ("importance/test_second_order.py", "distillation", "whole/test_recipe.py"),
    "passes": (
        "passes",
        "budget/test_ragged.py",
        "runtime",
        "whole/test_caches.py",
        "whole/test_renormalise.py",
        *WHOLE,
    ),
}
"""By folder or file, the first that fits: the tests whose business it is, in ``tests/``, the nearest ones first."""

OPERATORS = (
    "AddNot", "ReplaceAndWithOr", "ReplaceOrWithAnd", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "NumberReplacer",
    "ZeroIterationForLoop", "ReplaceUnaryOperator_Delete_Not", "ReplaceUnaryOperator_Delete_USub",
    "ReplaceComparisonOperator_Eq_NotEq", "ReplaceComparisonOperator_NotEq_Eq", "ReplaceComparisonOperator_Is_IsNot",
    "ReplaceComparisonOperator_IsNot_Is", "ReplaceComparisonOperator_Lt_LtE", "ReplaceComparisonOperator_LtE_Lt",
    "ReplaceComparisonOperator_Gt_GtE", "ReplaceComparisonOperator_GtE_Gt", "ReplaceComparisonOperator_Lt_Gt",
    "ReplaceBinaryOperator_Add_Sub", "ReplaceBinaryOperator_Sub_Add", "ReplaceBinaryOperator_Mul_Div",
    "ReplaceBinaryOperator_Div_Mul", "ReplaceBinaryOperator_FloorDiv_Mul", "ReplaceBinaryOperator_Mod_Mul",
    "ReplaceBinaryOperator_BitOr_BitAnd", "ReplaceBinaryOperator_BitAnd_BitOr", "ReplaceBinaryOperator_Pow_Mul",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Change:
    """One small wrong change, and what became of it."""

    path: str
    operator: str
    occurrence: int
    line: int
    arguments: tuple[tuple[str, Any], ...] = ()
    outcome: str = ""
    seconds: float = 0.0
    diff: str = ""
    tests: int = 0


def folder_of(path: str) -> str:
    """The entry of `TESTS` that a file belongs to."""
    return next((name for name in TESTS if path == name or path.startswith(f"{name}/")), "")


def not_code(path: Path) -> set[int]:
    """Lines of annotations, raised messages and ``__repr__``, where a change says nothing about the tests."""
    tree, lines = ast.parse(path.read_text(encoding="utf-8")), set()
    for node in ast.walk(tree):
        parts: list[ast.AST] = []
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
            parts.append(node.annotation)
        if isinstance(node, ast.FunctionDef):
            parts += [node.returns] if node.returns is not None else []
            parts += [node] if node.name in ("__repr__", "__str__") else []
        if isinstance(node, ast.Raise | ast.JoinedStr) or (isinstance(node, ast.If) and _type_checking(node)):
            parts.append(node)
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and _is_type_alias(node):
            parts.append(node)
        for part in parts:
            first, last = getattr(part, "lineno", 0), getattr(part, "end_lineno", 0) or 0
            lines |= set(range(first, last + 1))
    return lines


def _type_checking(node: ast.If) -> bool:
    return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _is_type_alias(node: ast.Assign) -> bool:
    target, value = node.targets[0], node.value
    return isinstance(target, ast.Name) and target.id[:1].isupper() and isinstance(value, ast.BinOp | ast.Subscript)


def changes() -> list[Change]:
    """Every change that the operators can make."""
    from cosmic_ray.commands.init import _all_work_items

    paths = [p for name in TESTS for p in ([ROOT / name] if name.endswith(".py") else (ROOT / name).rglob("*.py"))]
    unique = sorted({p.relative_to(ROOT) for p in paths})
    os.chdir(ROOT)
    found, skipped = [], {path: not_code(path) for path in unique}
    for item in _all_work_items(unique, {}):
        (spec,) = item.mutations
        name, line = spec.operator_name.removeprefix("core/"), spec.start_pos[0]
        if name in OPERATORS and line not in skipped[spec.module_path]:
            arguments = tuple(spec.operator_args.items())
            found.append(Change(str(spec.module_path), name, spec.occurrence, line, arguments))
    return found


def sampled(found: Sequence[Change], size: int, seed: int) -> list[Change]:
    """A sample of all changes, in random order, so that a run that ends early is a sample too."""
    return random.Random(seed).sample(list(found), min(size, len(found)))


def function_at(path: str, line: int) -> str:
    """The qualified name of the innermost function around a line; "" outside of functions."""
    name = ""
    scopes: list[tuple[ast.AST, str]] = [(ast.parse((ROOT / path).read_text(encoding="utf-8")), "")]
    while scopes:
        scope, prefix = scopes.pop()
        for node in ast.iter_child_nodes(scope):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                inside = node.body[0].lineno <= line <= (node.end_lineno or 0)
                if inside and isinstance(node, ast.FunctionDef):
                    name = f"{prefix}{node.name}"
                deeper = ".<locals>." if isinstance(node, ast.FunctionDef) else "."
                scopes += [(node, f"{prefix}{node.name}{deeper}")] if inside else []
            else:
                scopes.append((node, prefix))
    return name


def touching(files: Sequence[str]) -> dict[tuple[str, str], list[tuple[float, str]]]:
    """Per path and qualified name of a function the tests that call it, with their seconds."""
    calling: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for file in files:
        record = json.loads(Path(file).read_text())
        names = [tuple(name.split(":", 2)) for name in record["functions"]]
        for test, (seconds, numbers) in record["tests"].items():
            for path, _, name in {names[number] for number in numbers}:
                calling.setdefault((path, name), []).append((seconds, test))
    return calling


def tests_of(change: Change, calling: dict[tuple[str, str], list[tuple[float, str]]], limit: float) -> list[str]:
    """The arguments that pytest gets for a change: tests in the order in which they are to run."""
    package = [f"tests/{name}" for name in TESTS[folder_of(change.path)]]
    tests = calling.get((change.path, function_at(change.path, change.line)), [])
    near = Path(change.path).stem.strip("_")
    ordered = sorted(tests, key=lambda t: (near not in t[1], not t[1].startswith(package[0]), t[0]))
    chosen, total = [], 0.0
    for seconds, test in ordered:
        total += seconds
        if chosen and total > limit:
            break
        chosen.append(test)
    return chosen or package


def tried(copy: str, change: Change, tests: Sequence[str], limit: float) -> None:
    """Run the tests on a change in a copy of the checkout; ends this process with pytest's exit code."""
    import cosmic_ray.plugins
    import pytest
    from cosmic_ray.mutating import use_mutation

    os.chdir(copy)
    sys.path.insert(0, copy)
    os.environ.update(PYTHONPATH=copy, OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1", CHOSEN="chosen.txt")
    seconds = int(3 * limit)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    Path("chosen.txt").write_text("\n".join(tests))
    operator = cosmic_ray.plugins.get_operator(f"core/{change.operator}")(**dict(change.arguments))
    with use_mutation(Path(change.path), operator, change.occurrence) as (before, after):
        lines = [text.splitlines(keepends=True) for text in (before, after or before)]
        Path("diff.txt").write_text("".join(unified_diff(*lines, change.path, change.path, n=2)))
        files = list(dict.fromkeys(test.split("::")[0] for test in tests))
        code = pytest.main([*PYTEST, *files])
    os._exit(int(code))


def outcome_of(copy: str, change: Change, tests: Sequence[str], limit: float) -> Change:
    """What becomes of one change."""
    start = time.monotonic()
    original = (ROOT / change.path).read_bytes()
    process = get_context("forkserver").Process(target=tried, args=(copy, change, tests, limit))
    process.start()
    process.join()
    (Path(copy) / change.path).write_bytes(original)
    timeout = process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL)
    outcome = "timeout" if timeout else "survived" if process.exitcode == 0 else "killed"
    diff = (Path(copy) / "diff.txt").read_text()
    seconds = round(time.monotonic() - start, 1)
    return replace(change, outcome=outcome, diff=diff, seconds=seconds, tests=len(tests))


def check_unchanged(copy: str, change: Change, tests: Sequence[str], limit: float) -> None:
    """The tests pass where nothing is changed; SystemExit with what pytest printed where they do not."""
    if outcome_of(copy, replace(change, occurrence=1_000_000), tests[:20], limit).outcome != "survived":
        raise SystemExit(f"the tests fail on the code as it is:\n{(Path(copy) / 'log.txt').read_text()[-3000:]}")


PYTEST = ("-qx", "-pno:cacheprovider", "-pbenchmarks.chosen", "-Wignore::pytest.PytestAssertRewriteWarning")
"""Options of pytest; that modules are imported already is what the server of processes is for."""

Task = tuple[Change, Sequence[str]]


def run(tasks: Sequence[Task], jobs: int, limit: float, total: float) -> Iterator[Change]:
    """The outcome of each change, as they come. total: seconds after which no more are begun."""
    copies: queue.SimpleQueue[str] = queue.SimpleQueue()
    end = time.monotonic() + total
    get_context("forkserver").set_forkserver_preload(["torch", "transformers", "hypothesis", "pytest"])
    with tempfile.TemporaryDirectory() as folder:
        for i in range(jobs):
            copy = Path(folder) / str(i)
            shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(".git", "results", ".*cache"))
            (copy / "benchmarks" / "results").mkdir(parents=True, exist_ok=True)
            copies.put(str(copy))
        check_unchanged(str(copy), *tasks[0], limit)

        def one(task: Task) -> Change | None:
            if time.monotonic() > end:
                return None
            copy = copies.get()
            try:
                return outcome_of(copy, *task, limit)
            finally:
                copies.put(copy)

        with ThreadPoolExecutor(jobs) as pool:
            for result in pool.map(one, tasks):
                if result is not None:
                    yield result


def table(results: Sequence[Change]) -> str:
    """Per package how many changes were tried and how many noticed."""
    rows = []
    for name in [*TESTS, ""]:
        own = [c for c in results if not name or folder_of(c.path) == name]
        noticed = sum(c.outcome != "survived" for c in own)
        if own:
            rows.append([name or "all", len(own), noticed, f"{noticed / len(own):.0%}"])
    return tabulate(rows, headers=["package", "changes", "noticed", "share"])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sample", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--limit", type=float, default=100.0, help="seconds of tests for one change")
    parser.add_argument("--touched", nargs="*", default=[], help="what benchmarks.touched wrote")
    parser.add_argument("--total", type=float, default=1e9, help="seconds after which no further change is begun")
    parser.add_argument("--only", default="", help="a folder or file of the table, for a part of the code")
    options = parser.parse_args()
    found = [c for c in changes() if c.path.startswith(options.only)]
    results: list[Change] = []
    calling = touching(options.touched)
    tasks = [(c, tests_of(c, calling, options.limit)) for c in sampled(found, options.sample, options.seed)]
    for change in run(tasks, options.jobs, options.limit, options.total):
        results.append(change)
        where = f"{change.path}:{change.line} {change.operator}"
        print(f"{len(results)} {change.outcome} {where} {change.seconds} s, {change.tests} tests", flush=True)
        print(change.diff if change.outcome == "survived" else "", end="", flush=True)
    survivors = [c for c in results if c.outcome == "survived"]
    record = {
        "sample": len(results), "of": len(found), "seed": options.seed, "only": options.only,
        "python": platform.python_version(), "noticed": len(results) - len(survivors),
        "timeouts": sum(c.outcome == "timeout" for c in results), "survivors": [asdict(c) for c in survivors],
    }  # fmt: skip
    (ROOT / "benchmarks" / "results" / "mutation.json").write_text(json.dumps(record, indent=1) + "\n")
    print(*(c.diff for c in survivors), table(results), sep="\n\n")


if __name__ == "__main__":
    main()
