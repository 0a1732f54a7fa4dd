"""What the optimal brain surgeon takes to put the units of a layer in order, beside what its matrix products need.

    python benchmarks/surgeon.py --device cuda    # 1,024 to 28,672 units, alone and side by side, in under four minutes
    python benchmarks/surgeon.py                  # on the CPU, up to 2,048

A layer has n hidden units as inputs and n / 4 outputs; its matrices are random, and all layers that go side by side
have the same ones. Beside the seconds per layer, the inverse of H included, stands the floor: the longer of the
operations at the rate of a square matrix product and of the bytes at the rate of a copy, both measured on the spot. On
a CPU seconds are those of the process, so that others on the machine do not count. Sizes that would not end before
``--seconds`` are left out, which is said. Prints a table, and writes JSON after every size.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from ecospa_fx.importance import brain_surgeon
from ecospa_fx.importance.brain_surgeon import PENDING, Layer, Removal, removals

RESULTS = Path(__file__).resolve().parent / "results"
SIZES = {"cuda": [1024, 2048, 4096, 8192, 14336, 28672], "cpu": [512, 1024, 2048]}
DTYPES = {"float64": torch.float64, "float32": torch.float32}


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Of one call, to its end on the device."""
    if device.type != "cuda":
        begin = time.process_time()
        run()
        return time.process_time() - begin
    torch.cuda.synchronize(device)
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def rates(size: int, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Operations per second of a square matrix product, bytes per second of a copy: medians of five."""
    matrix, other = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    result = torch.empty_like(matrix)
    product = [seconds(lambda: torch.mm(matrix, other, out=result), device) for _ in range(6)][1:]
    copy = [seconds(lambda: result.copy_(matrix), device) for _ in range(6)][1:]
    return {
        "operations": 2 * size**3 / statistics.median(product),
        "bytes": 2 * matrix.nbytes / statistics.median(copy),
    }


def work(size: int, dtype: torch.dtype) -> dict[str, float]:
    """What a layer of n units needs, were removed units dropped at once.

    Operations: n³ for the inverse by Cholesky; 2 m² and 4 m² for what one of m units does to H⁻¹ and to G. Bytes: both
    matrices read and written once per `PENDING` units, and at every unit two factors of half as many rows read.
    """
    updates = sum(6 * m**2 for m in range(size))
    moved = sum(4 * m**2 for m in range(0, size, PENDING)) + sum(PENDING * m for m in range(size))
    return {"operations": float(size**3 + updates), "bytes": float(moved * dtype.itemsize)}


def problem(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """H and G [1, n, n] of inputs whose scales differ by a factor of 30."""
    source = torch.Generator(device).manual_seed(size)
    scales = torch.logspace(-1, 0.5, size, dtype=dtype, device=device)
    rows = torch.randn(size, size, generator=source, dtype=dtype, device=device) * scales
    hessian = rows.T @ rows / size
    hessian.diagonal().add_(0.01 * float(hessian.diagonal().mean()))
    weight = torch.randn(size // 4, size, generator=source, dtype=dtype, device=device)
    return hessian[None], (weight.T @ weight)[None]


def ordered(layers: list[Layer]) -> list[Removal]:
    """The removals, after looking that all are whole and, since all layers are alike, equal."""
    result = [removal for _, removal in removals(layers)]
    units = torch.arange(layers[0].units, device=layers[0].device)
    for removal in result:
        if not removal.order.sort(1).values.equal(units[None]) or not removal.order.equal(result[0].order):
            raise SystemExit("orders of equal layers differ, or leave units out: these figures mean nothing")
    return result


def together(layer: Layer, most: int) -> int:
    """How many layers like this one go side by side where there are so many."""
    room = brain_surgeon._room(layer.device)
    return brain_surgeon._fitting([layer.bytes] * most, room)


def measured(
    size: int, counts: list[int], repeats: int, rate: dict[str, float], dtype: torch.dtype, device: torch.device
) -> list[dict[str, Any]]:
    """A row per number of layers."""
    hessian, gram = problem(size, dtype, device)
    layer = Layer(1, size, 1, dtype, device, lambda: (hessian, gram))
    needed, rows = work(size, dtype), []
    floors = {f"floor by {what}": needed[what] / rate[what] for what in needed}
    for count in dict.fromkeys(together(layer, count) for count in counts):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        runs = [seconds(partial(ordered, [layer] * count), device) for _ in range(repeats)]
        peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
        row = {"units": size, "layers": count, "seconds per layer": min(runs) / count, "runs": runs}
        rows.append({**row, **needed, **floors, "peak GiB": peak})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    head = [
        "units",
        "layers",
        "s per layer",
        "operations",
        "GB moved",
        "floor, s",
        "over floor",
        "s / (n/1000)³",
        "GiB",
    ]
    lines = []
    for row in rows:
        took, floor = row["seconds per layer"], max(row["floor by operations"], row["floor by bytes"])
        lines.append([
            row["units"], row["layers"], f"{took:.3f}", f"{row['operations']:.1e}", f"{row['bytes'] / 1e9:.1f}",
            f"{floor:.3f}", f"{took / floor:.1f}", f"{took / (row['units'] / 1000) ** 3:.5f}",
            "" if row["peak GiB"] is None else f"{row['peak GiB']:.1f}",
        ])  # fmt: skip
    return tabulate(lines, head, disable_numparse=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sizes", type=int, nargs="+", help="units; by default what the device is good for")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 8], help="how many go side by side, if they fit")
    parser.add_argument("--dtype", choices=DTYPES, default="float64", help="float64 is what compression uses")
    parser.add_argument("--repeats", type=int, default=3, help="runs of less than 8,192 units; the least counts")
    parser.add_argument("--seconds", type=float, default=200, help="no size begins that might end later")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--json", type=Path, default=RESULTS / "surgeon.json")
    return parser.parse_args()


def main() -> None:
    arguments, begin = parse(), time.monotonic()
    torch.set_num_threads(arguments.threads)
    device, dtype = torch.device(arguments.device), DTYPES[arguments.dtype]
    sizes = arguments.sizes or SIZES.get(device.type, SIZES["cpu"])
    ordered([Layer(1, 300, 1, dtype, device, lambda: problem(300, dtype, device))])  # what a first call loads
    rate = rates(8192 if device.type == "cuda" else 1024, dtype, device)
    rows: list[dict[str, Any]] = []
    skipped: list[int] = []
    last = (sizes[0], 0.0)
    environment = {
        "torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{arguments.threads} threads",
    }  # fmt: skip
    settings = {key: value for key, value in vars(arguments).items() if key != "json"}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    for size in sizes:
        since = time.monotonic()
        if since - begin + last[1] * (size / last[0]) ** 3 > arguments.seconds:
            skipped.append(size)
            continue
        repeats = arguments.repeats if size < 8192 else 1
        rows += measured(size, arguments.layers, repeats, rate, dtype, device)
        last = (size, time.monotonic() - since)
        result = {"rows": rows, "left out": skipped, "rates": rate, "settings": settings, "environment": environment}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{rate['operations'] / 1e12:.2f} TFLOP/s, {rate['bytes'] / 1e9:.0f} GB/s")
    print(table(rows))
    if skipped:
        print(f"left out for want of time: {skipped}")


if __name__ == "__main__":
    main()
