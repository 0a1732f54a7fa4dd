"""Seconds and memory of a run on the GPU or the CPU, and how two series of them compare."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch


def memory(run: Callable[[], None]) -> float:
    """GiB that a run needs beyond what is held before it; NaN where torch does not count."""
    if not torch.cuda.is_initialized():
        return float("nan")
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - held) / 2**30


def seconds(run: Callable[[], None], steps: int) -> float:
    if not torch.cuda.is_initialized():
        began = time.perf_counter()
        for _ in range(steps):
            run()
        return (time.perf_counter() - began) / steps
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(steps):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / steps


def ratio(one: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """How many times as fast one series is as another: median, least and most over neighbours in time."""
    pairs = sorted(b / a for a, b in zip(one, other, strict=True))
    return {"median": statistics.median(pairs), "least": pairs[0], "most": pairs[-1]}


def told(found: dict[str, float]) -> str:
    """A ratio with its spread."""
    return f"{found['median']:.3f} [{found['least']:.3f}, {found['most']:.3f}]"
