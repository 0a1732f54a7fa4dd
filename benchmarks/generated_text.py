"""What calibrating the embedded byte model on its data, on text that it writes itself, and on half of each is worth.

    python benchmarks/generated_text.py [--ratio 0.3] [--windows 32] [--length 128] [--distillation 48]

Prints the perplexity per byte on held-out text, how far the result is from the dense model, and the seconds.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from tabulate import tabulate

import ecospa_fx as eco
from ecospa_fx import defaults, demo
from ecospa_fx.calibration.distances import noted_distances

HELD_OUT = 48


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratio", type=float, default=0.3, help="share of the couplings' parameters to remove")
    parser.add_argument("--windows", type=int, default=32, help="to calibrate on, in all")
    parser.add_argument("--length", type=int, default=128, help="bytes per window")
    parser.add_argument("--distillation", type=int, help="samples to distil on (default: that of the recipe)")
    asked = parser.parse_args()
    defaults.LENGTH = asked.length
    model, (calibration, valid) = demo.load(), demo.texts()
    held_out = demo.windows(valid, asked.length, HELD_OUT)
    batches: list[Any] = [((ids[None, :-1],), {}) for ids in demo.windows(calibration, asked.length, asked.windows)]
    variants: dict[str, dict[str, Any]] = {
        "its data": {"batches": batches, "generated_share": 0},
        "its own text": {"generated_windows": asked.windows},
        "half of each": {"batches": batches[: asked.windows // 2]},
    }
    rows = [["dense", demo.perplexity(model, held_out), None, None]]
    for name, data in variants.items():
        begin = time.perf_counter()
        small = eco.compress(model, ratio=asked.ratio, distillation=asked.distillation, **data)
        seconds = time.perf_counter() - begin
        rows.append([name, demo.perplexity(small, held_out), str(noted_distances(small) or ""), seconds])
    print(tabulate(rows, ["calibrated on", "perplexity", "nats per byte from the dense model", "s"], floatfmt=".4g"))


if __name__ == "__main__":
    main()
