"""What detection costs beside the export that it needs: LLaMA of 1, 10 and 100 layers, and the 70B and 405B shapes.

    python benchmarks/detection.py --json detection.json

Weights are on ``meta``, nothing is downloaded: the shapes are written out below. Every model is measured in a process
of its own: seconds of ``torch.export``, seconds of detection with export included (a fresh one), their ratio, and peak
memory.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import resource
import statistics
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

SHAPES: dict[str, dict[str, int]] = {
    "1 layer": {"layers": 1, "hidden": 4096, "ffn": 14336, "heads": 32, "groups": 8},
    "10 layers": {"layers": 10, "hidden": 4096, "ffn": 14336, "heads": 32, "groups": 8},
    "100 layers": {"layers": 100, "hidden": 4096, "ffn": 14336, "heads": 32, "groups": 8},
    "LLaMA-70B": {"layers": 80, "hidden": 8192, "ffn": 28672, "heads": 64, "groups": 8},
    "LLaMA-405B": {"layers": 126, "hidden": 16384, "ffn": 53248, "heads": 128, "groups": 8},
}


def build(shape: dict[str, int]) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...], dict[str, Any]]:
    """A LLaMA on meta and its example inputs."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=shape["hidden"],
        intermediate_size=shape["ffn"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["groups"],
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).eval()
        ids = torch.zeros(2, 16, dtype=torch.long)
    return model, (ids,), {"use_cache": False}


def measure(name: str, repeats: int) -> dict[str, Any]:
    """Times of one model, in this process."""
    import ecospa_fx as eco

    warnings.filterwarnings("ignore")
    torch.set_num_threads(2)
    exports, detections, found = [], [], 0
    model, args, kwargs = build(SHAPES[name])
    warm, warm_args, warm_kwargs = build(SHAPES["1 layer"])
    eco.detect(warm, warm_args, warm_kwargs)  # imports and caches of torch.export are paid once per process
    for _ in range(repeats):
        begin = time.perf_counter()
        torch.export.export(model, args, kwargs, strict=False)
        middle = time.perf_counter()
        found = len(eco.detect(model, args, kwargs).offered)
        exports.append(middle - begin)
        detections.append(time.perf_counter() - middle)
    ratios = [d / e for d, e in zip(detections, exports, strict=True)]
    return {
        "model": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "couplings": found,
        "export_s": statistics.median(exports),
        "detect_s": statistics.median(detections),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "peak_GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(SHAPES), help=f"some of: {', '.join(SHAPES)}")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    rows = []
    for name in arguments.models:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows.append(pool.apply(measure, (name, arguments.repeats)))
    print(tabulate(rows, headers="keys", floatfmt=".2f", intfmt=","))
    if arguments.json is not None:
        environment = {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}
        arguments.json.write_text(json.dumps({"rows": rows, "environment": environment}, indent=1))


if __name__ == "__main__":
    main()
