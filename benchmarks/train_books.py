"""Sparse training from scratch on books, against dense models: which recipe beats a small model trained from the start.

    python benchmarks/train_books.py --data DATA --cache /tmp/books --jobs 2 --runs dense small late own
    python benchmarks/train_books.py --cache /tmp/books --time
    python benchmarks/train_books.py --cache /tmp/books --runs "own distill=0.5" "late band=0.4,2" --seeds 0 1

A LLaMA with hidden 512, 8 layers, 8 heads, FFN 1,408 (25.7 M parameters in its layers), brought to 36.7 % of them, the
widths of the variant `small`: head dimension 24, FFN 512. All variants of a seed see the same windows in the same
order; `small*1.3` gets 1.3 times the tokens. The dense and the small model hold their learning rate until 70 % of the
steps, as ours does: a rate that only falls would be a weaker opponent. A run is a name from RECIPES and
settings that differ, as above. Losses in nats on the first 64 windows of valid (float32), on 256 windows of valid, and
on 256 of training text kept aside.

Sizes: `books` as above; `half`, hidden 256, 6 layers, 4 heads, FFN 704, which a single GPU trains on more tokens than
suit its size in a minute; `gpt2-medium`, 24 layers of hidden 1,024, 16 heads, FFN 4,096, GELU, biases and learned
positions, to 2.2 times fewer parameters in all; `bytes` and `tiny` for a CPU.

By default sparse runs are masked (`masked.py`): their losses are those of `SparseTraining`, and every layer is
compiled once, so that many recipes can be tried, several at once with --jobs. With --graph it is `SparseTraining` that
shrinks the model; `seconds` then is the time of the whole run, shrinks and compilation included, if nothing shares the
device. --time measures steps at the widths that a run goes through, and says what each schedule takes by those step
times. Runs are spread over all GPUs, --jobs at once on each; each result is written to --json when it comes.
With --pause and --checkpoints a run stops after so many seconds, and the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import jobs
import torch
from books import tokens
from books_recipes import RECIPES, Recipe, recipe_of
from books_run import SIZES, Run
from tabulate import tabulate

# -- time ----------------------------------------------------------------------------------------------------------


def step_seconds(share: float, options: argparse.Namespace) -> dict[str, float]:
    """Step time of a model with a share of the target gone, at uniform widths, alone on the device."""
    dense, (head_dim, ffn) = SIZES[options.size]
    unit = 8 if 0 < share < 1 else 1
    head_dim = round((dense.head_dim + (head_dim - dense.head_dim) * share) / unit) * unit
    shape = dense.at(head_dim, round((dense.ffn + (ffn - dense.ffn) * share) / unit) * unit)
    run = Run(Recipe("time", kind="dense"), 0, options, shape)
    ids = next(iter(run.windows))
    begin = time.perf_counter()
    for _ in range(3):
        float(run.step(1, ids, {}))
    compiled, times = time.perf_counter() - begin, []
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(4):
            loss = run.step(1, ids, {})
        float(loss)
        times.append((time.perf_counter() - begin) / 4)
    return {"seconds": median(times), "compile": compiled, "head_dim": shape.head_dim, "ffn": shape.ffn}


def timed(options: argparse.Namespace) -> dict[str, Any]:
    """Step times at several sizes, and what each recipe takes by them, without what shrinks and compilation take."""
    points = {share: step_seconds(share, options) for share in (0.0, 0.5, 1.0)}
    steps, found = int(options.tokens / (options.batch * options.length)), {}
    for text in options.runs:
        recipe = recipe_of(text)
        own = int(steps * recipe.more)
        schedule = recipe.schedule(own)
        shares = (1.0 if recipe.kind == "small" else schedule.share(step) for step in range(own))
        total = sum(_between(points, share) for share in shares)
        found[text] = {"seconds": total, "over_small": total / (steps * points[1.0]["seconds"])}
    return {"steps": steps, "points": points, "runs": found}


def _between(points: dict[float, dict[str, float]], share: float) -> float:
    low = max(p for p in points if p <= share)
    high = min(p for p in points if p >= share)
    part = (share - low) / (high - low) if high > low else 0.0
    return points[low]["seconds"] * (1 - part) + points[high]["seconds"] * part


# -- many runs -----------------------------------------------------------------------------------------------------


def results(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One result per recipe and seed, as they come; each run is a process of its own."""
    tokens(options.data, options.cache, options.shards)  # once, before anybody needs them
    base = sys.argv[1:]
    todo: list[jobs.Task] = [
        ({"run": run, "seed": seed}, [*base, "--one", run, "--seed", str(seed)])
        for seed in options.seeds
        for run in options.runs
    ]
    limits = jobs.Limits(options.jobs, options.limit, options.total)
    yield from jobs.results(__file__, todo, options.device, limits)


def table(found: Sequence[dict[str, Any]]) -> str:
    """Mean over the seeds and each seed's loss on the first windows of valid, then the other means."""
    rows = []
    for run in dict.fromkeys(r["run"] for r in found if "first" in r):
        own = [r for r in found if r["run"] == run and "first" in r]
        each = " / ".join(f"{r['first']:.3f}" for r in own)
        means = [f"{mean(r[k] for r in own):.4f}" for k in ("first", "valid", "aside")]
        spikes = " ".join(f"{s['after'] - s['before']:+.2f}" for s in own[0]["shrinks"] if "after" in s)
        rows.append([run, f"{own[0]['block_parameters']:,}", *means, each, spikes])
    head = ["run", "block parameters", "first 64", "valid", "aside", "per seed", "loss at shrinks"]
    return tabulate(rows, head, disable_numparse=True)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--cache", type=Path, default=Path("/tmp/books-tokens"))
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--size", choices=SIZES, default="books")
    parser.add_argument("--runs", nargs="+", default=list(RECIPES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    jobs.Limits.options(parser)
    parser.add_argument("--tokens", type=float, default=40e6)
    parser.add_argument("--unique", type=int, default=0, help="different tokens, 0 for all")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--window", type=int, default=50)
    parser.add_argument("--round-to", type=int, default=4)
    parser.add_argument("--measured", type=int, default=32, help="batches of 8 windows for compensation")
    parser.add_argument("--held", type=int, default=256, help="windows of each evaluation")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument("--mode", default="default", help="of torch.compile; reduce-overhead replays CUDA graphs")
    parser.add_argument("--graph", action="store_true", help="shrink for real, with SparseTraining")
    parser.add_argument("--time", action="store_true", help="measure step times instead of losses")
    parser.add_argument("--checkpoints", type=Path, help="where runs that pause are kept")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds after which a run stops for the time being")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    found = parser.parse_args(argv)
    if found.pause and found.checkpoints is None:
        parser.error("--pause needs --checkpoints, the folder where a run is kept until it goes on")
    return found


def main() -> None:
    options = parse()
    torch._dynamo.config.recompile_limit = 64
    if options.one is not None:
        print(json.dumps(Run(recipe_of(options.one), options.seed, options).result()))
        return
    where = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    told = {"device": where, "torch": torch.__version__, **{k: str(v) for k, v in vars(options).items()}}
    found: list[dict[str, Any]] = []
    for result in [timed(options)] if options.time else results(options):
        found.append(result)
        line = {k: v for k, v in result.items() if k not in {"train", "recipe", "progress", "widths"}}
        print(json.dumps(line), flush=True)
        jobs.write(options.json, told, found)
    if not options.time:
        print(table(found))


if __name__ == "__main__":
    main()
