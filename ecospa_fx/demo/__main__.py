"""Compresses the embedded model without retraining and prints size, perplexity and time: `python -m ecospa_fx.demo`."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from typing import Any

from tabulate import tabulate
from torch import Tensor, nn

import ecospa_fx as eco
from ecospa_fx import demo
from ecospa_fx.compression import CompressOptions
from ecospa_fx.importance.second_order import SECOND_ORDER
from ecospa_fx.origin import origin_of
from ecospa_fx.plan import Plan
from ecospa_fx.progress import TimedSteps
from ecospa_fx.verify import masked_error

WINDOW = 512
VALID_WINDOWS = 64
TOLERANCE = 1e-9


def exactness(plan: Plan, ids: Tensor) -> float:
    """Greatest relative difference, in float64, between the shrunk model and the dense one with masked weights."""
    model = demo.load().double()
    small = eco.shrink(model, plan, (ids,), {})
    return masked_error(model, small, plan, (ids,), {})


def size(model: nn.Module) -> int:
    """Parameters, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def size_in_bytes(model: nn.Module) -> int:
    """Bytes of the parameters, tied ones once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def report(models: Sequence[nn.Module], perplexities: Sequence[float], error: float, watch: TimedSteps) -> str:
    """The closing tables."""
    rows = [
        ["parameters", *(f"{size(m):,}" for m in models)],
        ["bytes", *(f"{size_in_bytes(m):,}" for m in models)],
        ["perplexity per byte", *(f"{p:.4f}" for p in perplexities)],
        ["bits per byte", *(f"{math.log2(p):.4f}" for p in perplexities)],
    ]
    figures = tabulate(rows, ["", "dense", "small"], colalign=("left", "right", "right"), disable_numparse=True)
    seconds = ", ".join(f"{step} {spent:.1f} s" for step, spent in watch.seconds.items())
    verdict = "exact" if error <= TOLERANCE else f"NOT EXACT, the limit is {TOLERANCE:.0e}"
    return f"{figures}\n\nremoving against masking in float64: {error:.1e} ({verdict})\n{seconds}\n"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m ecospa_fx.demo", description=__doc__)
    parser.add_argument("--ratio", type=float, default=0.2, help="share of the couplings' parameters to remove")
    parser.add_argument("--method", default=SECOND_ORDER, help="or one that only removes: gate-fisher, magnitude …")
    parser.add_argument("--passes", type=int, default=4, help="scoring passes of the methods that only remove")
    parser.add_argument("--windows", type=int, default=64, help="calibration windows, of 512 bytes each")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demonstration; 0 if the shrunk model is exact."""
    arguments, watch = parse(argv), TimedSteps()
    model, (calibration, valid) = watch("load", demo.load), demo.texts()
    pieces = demo.windows(calibration, WINDOW, arguments.windows)[:, :-1]
    held_out = demo.windows(valid, WINDOW, VALID_WINDOWS)
    example = pieces[:2, :64]

    couplings = watch("detect", eco.detect, model, (example,), {})
    sys.stdout.write(f"{couplings}\n\n")
    batches: list[tuple[tuple[Tensor], dict[str, Any]]] = [((piece[None],), {}) for piece in pieces]
    options: CompressOptions = {}
    if arguments.method != SECOND_ORDER:
        options["steps"] = 1 if arguments.method == "magnitude" else arguments.passes
    ratio: float = arguments.ratio

    def smaller() -> nn.Module:
        call: dict[str, Any] = {"batches": batches, "loss": demo.next_byte_loss, "method": arguments.method}
        return eco.compress(model, (example,), ratio=ratio, couplings=couplings, **call, **options)

    small = watch("compress", smaller)
    plan = origin_of(small).plan
    sys.stdout.write(f"{plan}\n\n")
    perplexities = [watch("perplexity", demo.perplexity, m, held_out) for m in (model, small)]
    error = watch("check", exactness, plan, example)
    sys.stdout.write(report((model, small), perplexities, error, watch))
    return 0 if error <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
