"""llama.cpp, where the package xllamacpp is installed: the logits and the tokens that it makes of a GGUF file."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from ecospa_fx.errors import StorageError

SCRIPT = Path(__file__).with_name("llama_cpp_process.py")
SECONDS = 600


def is_installed() -> bool:
    """Whether llama.cpp can be run here."""
    return find_spec("xllamacpp") is not None


def run(file: Path, tokens: Sequence[int] = (), texts: Sequence[str] = ()) -> tuple[Tensor, list[list[int]]]:
    """Logits [tokens, vocabulary] of tokens decoded one at a time with the cache, and the tokens of each text.

    In a process of its own, which may end where a file is wrong. Raises StorageError where it does.
    """
    with TemporaryDirectory() as folder:
        output = Path(folder) / "logits.npy"
        done = subprocess.run(
            [sys.executable, str(SCRIPT), str(file), str(output)],
            input=json.dumps({"tokens": list(tokens), "texts": list(texts)}),
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line.lower() or "assert" in line.lower()]
            raise StorageError(f"llama.cpp does not read {file.name}: {' '.join(lines[:1]) or done.stderr[-200:]}")
        logits = torch.from_numpy(import_module("numpy").load(output))
    return logits, json.loads(done.stdout)
