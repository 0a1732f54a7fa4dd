"""Random programs in bulk: whatever is offered must be exact, and every planted coupling must be found.

    python benchmarks/fuzz.py --graphs 10000 --seed 0 --processes 8

Program n of a run has seed ``--seed`` + n, whatever the number of processes. Each is checked as
`tests/support/fuzz/check.py` says; every ``--whole``-th also goes through `ecospa_fx.shrink` with a symbolic batch and
is run at another batch size. Prints each failure as Python source, reduced to what it takes, and writes counts to
``benchmarks/results/``. Exits with status 1 where anything failed. ``--seconds`` ends a run early; the counts say how
far it came.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import multiprocessing
import platform
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def run(task: tuple[int, bool]) -> dict[str, Any]:
    """What became of one seed, as plain data."""
    from tests.support.fuzz.check import Failure, check
    from tests.support.fuzz.generate import seeded

    seed, whole = task
    start, program = time.process_time(), seeded(seed)
    row: dict[str, Any] = {
        "seed": seed,
        "steps": len(program.steps),
        "operators": Counter(step.operator for step in program.steps),
        "planted": Counter(planted.kind for planted in program.planted),
    }
    try:
        outcome = check(program, whole=whole)
        row |= {
            "offered": outcome.offered, "blocked": outcome.blocked, "found": outcome.planted, "plans": outcome.plans,
            "removed": outcome.removed, "whole": outcome.whole,
        }  # fmt: skip
    except Failure as failure:
        row |= {"failure": failure.kind, "detail": failure.detail[:2000]}
    except Exception as error:
        row |= {"failure": "harness", "detail": repr(error)[:2000]}
    return {**row, "seconds": time.process_time() - start}


def quiet() -> None:
    """One thread per process, and nothing from torch about what cannot be changed."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)


def smallest(seed: int, whole: bool) -> str:
    """The source of the smallest program that fails as the seed's does."""
    from tests.support.fuzz.check import failure_of, reduced
    from tests.support.fuzz.generate import seeded

    failure = failure_of(seeded(seed), whole=whole)
    return reduced(seeded(seed), failure, whole=whole)[0].reproducer if failure is not None else ""


def collect(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of all seeds, or of as many as the time allows."""
    end = time.monotonic() + options.seconds
    tasks = ((options.seed + n, bool(options.whole) and n % options.whole == 0) for n in range(options.graphs))
    rows: list[dict[str, Any]] = []
    with multiprocessing.get_context("spawn").Pool(options.processes, quiet) as pool:
        for row in pool.imap_unordered(run, tasks):
            rows.append(row)
            if "failure" in row:
                print(f"seed {row['seed']}: {row['failure']}: {row['detail'][:300]}", flush=True)
            if len(rows) % 500 == 0:
                print(f"{len(rows)} graphs", flush=True)
            if time.monotonic() > end:
                pool.terminate()
                break
    return sorted(rows, key=lambda row: int(row["seed"]))


def added(rows: list[dict[str, Any]], name: str) -> dict[str, int]:
    """The sum of a counter over all rows, most first."""
    total: Counter[str] = Counter()
    for row in rows:
        total.update(row.get(name, {}))
    return dict(total.most_common())


def summary(rows: list[dict[str, Any]], options: argparse.Namespace, wall: float) -> dict[str, Any]:
    """What is kept of a run."""
    failed = [row for row in rows if "failure" in row]
    passed = [row for row in rows if "failure" not in row]
    done = {row["seed"] for row in rows}
    first_missing = next((s for s in range(options.seed, options.seed + options.graphs) if s not in done), None)
    return {
        "graphs": len(rows),
        "first seed": options.seed,
        "all seeds below": first_missing if first_missing is not None else options.seed + options.graphs,
        "failures": len(failed),
        "failures by kind": dict(Counter(row["failure"] for row in failed)),
        "with something offered": sum(bool(row["offered"]) for row in passed),
        "with nothing offered": sum(not row["offered"] for row in passed),
        "couplings offered": added(passed, "offered"),
        "couplings blocked": sum(row["blocked"] for row in passed),
        "planted": added(rows, "planted"),
        "planted and found": added(passed, "found"),
        "plans checked": sum(row["plans"] for row in passed),
        "elements removed": sum(row["removed"] for row in passed),
        "through shrink": dict(Counter(row["whole"] for row in passed)),
        "steps": sum(row["steps"] for row in rows),
        "operators": added(rows, "operators"),
        "cpu seconds per graph": round(sum(row["seconds"] for row in rows) / max(len(rows), 1), 3),
        "wall seconds": round(wall, 1),
        "processes": options.processes,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "failed": failed,
    }


def main() -> int:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--whole", type=int, default=3, help="every how many-th program goes through shrink; 0: none")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--reduce", type=int, default=5, help="how many failures are reduced and printed")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "fuzz.json")
    options = parser.parse_args()
    quiet()
    start = time.monotonic()
    rows = collect(options)
    found = summary(rows, options, time.monotonic() - start)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({k: v for k, v in found.items() if k not in {"operators", "failed"}}, indent=1))
    for row in found["failed"][: options.reduce]:
        with contextlib.redirect_stderr(None):
            source = smallest(row["seed"], bool(options.whole))
        print(f"\n# seed {row['seed']}: {row['failure']}: {row['detail'][:300]}\n{source}", flush=True)
    return 1 if found["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
