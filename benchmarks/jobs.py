"""Many runs of one script at once: each in a process of its own, spread over the GPUs, in limits of time.

A run prints JSON lines: progress with the key "progress", and its result last. What a run that was stopped had printed
by then is kept.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Task = tuple[dict[str, Any], list[str]]
"""What the run is, for its record, and the arguments that it gets."""


@dataclass(frozen=True, slots=True)
class Limits:
    """jobs: runs at once per GPU (or in all, without one); each: seconds for one run; total: seconds for all, after
    which nothing goes on; 0 for no limit."""

    jobs: int = 1
    each: float = 0.0
    total: float = 0.0

    @staticmethod
    def options(parser: Any) -> None:
        """The options of a script that runs many."""
        parser.add_argument("--jobs", type=int, default=1, help="runs at once per GPU: for losses, not for time")
        parser.add_argument("--limit", type=float, default=0.0, help="seconds for one run, 0 for no limit")
        parser.add_argument("--total", type=float, default=0.0, help="seconds for all runs, 0 for no limit")


def results(script: str, tasks: Sequence[Task], device: str, limits: Limits) -> Iterator[dict[str, Any]]:
    """One record per task, as they come, in the order of the tasks as far as possible."""
    gpus: list[int | None] = list(range(torch.cuda.device_count())) if device == "cuda" else [None]
    slots: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    for slot in gpus * limits.jobs:
        slots.put(slot)
    count, end = len(gpus) * limits.jobs, time.monotonic() + (limits.total or 1e6)

    def one(task: Task) -> dict[str, Any]:
        told, arguments = task
        gpu = slots.get()
        try:
            left = min(limits.each or 1e6, end - time.monotonic())
            return {**told, **(_child([script, *arguments], gpu, count, left) if left > 5 else {"error": "no time"})}
        finally:
            slots.put(gpu)

    with ThreadPoolExecutor(count) as pool:
        for future in as_completed([pool.submit(one, task) for task in tasks]):
            yield future.result()


def _child(command: Sequence[str], gpu: int | None, count: int, left: float) -> dict[str, Any]:
    threads = max(1, (os.cpu_count() or 1) // count)
    own = {"OMP_NUM_THREADS": str(threads), "TORCHINDUCTOR_COMPILE_THREADS": str(threads)}
    environment = {**own, **os.environ}
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = _visible()[gpu]
    begin = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, check=False, env=environment, timeout=left
        )
        found, error = _lines(done.stdout), done.stderr[-1500:] if done.returncode else ""
    except subprocess.TimeoutExpired as stopped:
        text = stopped.stdout or b""
        found, error = _lines(text if isinstance(text, str) else text.decode()), f"stopped after {left:.0f} s"
    progress = [line for line in found if "progress" in line]
    finished = [line for line in found if "progress" not in line]
    record = dict(finished[-1]) if finished else {"error": error or "no result"}
    return {**record, "progress": progress, "wall": round(time.perf_counter() - begin, 1), "gpu": gpu}


def _visible() -> list[str]:
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]


def _lines(text: str) -> list[dict[str, Any]]:
    """The lines that are JSON objects; the last one of a run that was stopped may be half a line."""
    found = []
    for line in text.splitlines():
        if line.startswith("{"):
            with suppress(json.JSONDecodeError):
                found.append(json.loads(line))
    return found


def write(path: Path | None, settings: dict[str, Any], found: Sequence[dict[str, Any]]) -> None:
    """All results so far, to be called after each; a run that is killed in between leaves a whole file."""
    if path is not None:
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"settings": settings, "results": found}, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
