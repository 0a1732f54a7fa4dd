"""Processes that begin with everything imported: a server, started once, that forks one for each argument list.

    python -m tests.support.processes

It reads a job per line from its input: a module with a function `begin`, argument lists, a variable of the environment
and where errors go. It answers with the exit codes, in a line.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 900


@cache
def server() -> subprocess.Popen[str]:
    """From the root of the checkout, so that it imports this one, installed or not. Ends with its input."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.processes"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def together(
    folder: Path, module: str, arguments: Sequence[Sequence[str]], device: str = "cpu"
) -> list[tuple[int, str]]:
    """Run a process for each argument list, all at once; the exit code and the error output of each."""
    errors = [folder / f"error-{rank}" for rank in range(len(arguments))]
    job = {"module": module, "arguments": arguments, "device": device, "errors": [str(path) for path in errors]}
    source, target = server().stdout, server().stdin
    assert source is not None
    assert target is not None
    target.write(f"{json.dumps(job)}\n")
    target.flush()
    codes = json.loads(source.readline())
    return [(code, path.read_text()) for code, path in zip(codes, errors, strict=True)]


def forked(job: dict[str, Any], rank: int) -> int:
    """Start one process of a job. Returns its number; in the process itself, it does not return."""
    number = os.fork()
    if number:
        return number
    code = 1
    try:
        signal.alarm(SECONDS)
        os.environ["PARALLEL_DEVICE"] = job["device"]
        output, error = os.open(os.devnull, os.O_WRONLY), os.open(job["errors"][rank], os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(error, 2)
        sys.argv = [job["module"], *job["arguments"][rank]]
        importlib.import_module(job["module"]).begin()
        code = 0
    finally:
        if code:
            sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
        os._exit(code)


def serve() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        job = json.loads(line)
        importlib.import_module(job["module"])
        numbers = [forked(job, rank) for rank in range(len(job["arguments"]))]
        codes = [os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) for number in numbers]
        sys.stdout.write(f"{json.dumps(codes)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
