"""Sparse training from scratch on books, against dense models: which recipe beats a small model trained from the start.

    python benchmarks/train_books.py --data DATA --cache /tmp/books --jobs 2 --runs dense small late own
    python benchmarks/train_books.py --cache /tmp/books --time
    python benchmarks/train_books.py --cache /tmp/books --runs "own distill=0.5" "late band=0.4,2" --seeds 0 1

A LLaMA with hidden 512, 8 layers, 8 heads, FFN 1,408 (25.7 M parameters in its layers), brought to 36.7 % of them, the
widths of the variant `small`: head dimension 24, FFN 512. All variants of a seed see the same windows in the same
order; `small*1.3` gets 1.3 times the tokens. The dense and the small model hold their learning rate until 70 % of the
steps, as ours does until 60 %: a rate that only falls would be a weaker opponent. A run is a name from RECIPES and
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
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from statistics import mean, median
from typing import Any

import jobs
import torch
from books import Gpt, Llama, Shape, Windows, evaluate, first_windows, head_loss, spread, taught_loss, tokens
from books_recipes import RECIPES, Due, Recipe, recipe_of
from masked import MaskedTraining, Options
from tabulate import tabulate
from torch import Tensor, nn

import ecospa_fx as eco

SIZES = {
    "books": (Shape(), (24, 512)),
    "tiny": (Shape(hidden=96, layers=4, heads=3, head_dim=32, ffn=256), (12, 96)),
    "half": (Shape(hidden=256, layers=6, heads=4, head_dim=64, ffn=704), (24, 256)),
    "gpt2-medium": (Shape(hidden=1024, layers=24, heads=16, head_dim=64, ffn=4096, gated=False), (28, 1792)),
    "bytes": (Shape(vocabulary=256, hidden=128, layers=4, heads=4, head_dim=32, ffn=352), (12, 128)),
}
ASIDE = 0.01
"""Share of the training tokens, the last ones, that is kept aside."""


# -- one run -------------------------------------------------------------------------------------------------------


class Run:
    """One model trained by one recipe."""

    def __init__(self, recipe: Recipe, seed: int, options: argparse.Namespace) -> None:
        self.recipe, self.options, self.device = recipe, options, torch.device(options.device)
        train, valid = tokens(options.data, options.cache, options.shards)
        kept = int(len(train) * (1 - ASIDE))
        used = min(kept, options.unique or kept)
        self.windows = Windows(train[:used].to(self.device), options.length, options.batch, seed)
        self.aside = spread(train[kept:], options.length, options.held).to(self.device)
        self.first = first_windows(valid, options.length, min(64, options.held)).to(self.device)
        self.valid = spread(valid, options.length, options.held).to(self.device)
        dense, small = SIZES[options.size]
        torch.manual_seed(seed)
        self.shape = dense.at(*small) if recipe.kind == "small" else dense
        self.model: nn.Module = self._built(self.shape)
        self.steps = int(options.tokens * recipe.more / (options.batch * options.length))
        self.optimizer = self._optimizer()
        self.masked: MaskedTraining | None = None
        self.sparse: eco.SparseTraining | None = None
        self.teacher: nn.Module | None = None
        self.ready = False
        target = 1 - dense.at(*small).block_parameters / dense.block_parameters
        if recipe.kind == "sparse" and options.graph:
            self.sparse = self._sparse(target)
            self.model = self.sparse.model
        elif recipe.kind == "sparse":
            self.masked = self._masked(target)
            self.teacher = deepcopy(self.model).requires_grad_(False) if recipe.distill else None
        self.loss, self.taught = head_loss, taught_loss
        if options.compile:
            self.loss, self.taught = (torch.compile(f, dynamic=False) for f in (head_loss, taught_loss))
            for model in (self.model, self.teacher):
                if model is not None:
                    self.compile_layers(model)
        self.shrinks: list[dict[str, float]] = []

    def _built(self, shape: Shape) -> nn.Module:
        made: nn.Module = (Llama if shape.gated else Gpt)(shape, self.options.length)
        return made.to(self.device)

    def compile_layers(self, model: nn.Module) -> None:
        for layer in model.get_submodule("layers").children():
            layer.compile(dynamic=False, mode=self.options.mode)

    def _optimizer(self) -> torch.optim.AdamW:
        """Groups have the key `reads`: what the width of their inputs is, where it shrinks."""
        found: dict[str, list[Tensor]] = {"": [], "heads": [], "ffn": [], "plain": []}
        for name, parameter in self.model.named_parameters():
            reads = {"o.weight": "heads", "down.weight": "ffn"}.get(".".join(name.split(".")[-2:]), "")
            found[reads if parameter.dim() == 2 else "plain"].append(parameter)
        groups = [
            {"params": own, "weight_decay": 0.0 if reads == "plain" else 0.1, "reads": reads}
            for reads, own in found.items()
        ]
        return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=self.device.type == "cuda")

    def _masked(self, target: float) -> MaskedTraining:
        r = self.recipe
        low, high = (float(x) for x in r.band.split(","))
        options = Options(
            target, r.scores, r.allocation, (low, high), self.options.round_to, self.options.window, r.compensate,
            r.damping, r.fade,
        )  # fmt: skip
        return MaskedTraining(self.model, next(iter(self.windows))[:, :-1], self.optimizer, options)

    def _sparse(self, target: float) -> eco.SparseTraining:
        r, options = self.recipe, self.options
        if r.fade or r.distill:
            raise SystemExit(f"{r.name!r} needs what only masked runs do: leave --graph out")
        low, high = (float(x) for x in r.band.split(","))
        source = Windows(self.windows.data, self.windows.length, 8, 1)
        given = [((w[:, :-1],), {}) for _, w in zip(range(options.measured), source, strict=False)]
        model = self.model

        def loss(output: Tensor, args: Sequence[Any], kwargs: Any) -> Tensor:
            return head_loss(output[:, :-1], model.get_parameter("embed.weight").detach(), args[0][:, 1:])

        return eco.SparseTraining(
            model, (next(iter(self.windows))[:, :-1],), optimizer=self.optimizer, target=target,
            schedule=Due(tuple(r.at(self.steps).items())), allocation=r.allocation, band=(low, high),
            scores="second-order" if r.compensate == "full" else r.scores, compensate=r.compensate != "none",
            batches=given, loss=loss, round_to=options.round_to, window=options.window,
        )  # fmt: skip

    def rate(self, step: int, shrinks: Sequence[int]) -> float:
        """Learning rate of a step, counted from 1."""
        r, rise = self.recipe, max(1, round(0.04 * self.steps))
        place = (step - 1) / self.steps
        left = {
            "linear": 1 - place,
            "cosine": 0.55 + 0.45 * torch.cos(torch.tensor(torch.pi * place)).item(),
            "flat": min(1.0, (1 - place) / (1 - r.flat)),
        }[r.decay]
        since = min((step - s for s in shrinks if s < step), default=self.steps)
        again = min(1.0, since / r.warm) if r.warm else 1.0
        return float(self.options.lr * r.rate * min(1.0, step / rise) * left * again)

    def consumers(self, share: float) -> dict[str, float]:
        """Factors of the learning rate of consumers, by what they read, at a share of the target."""
        recipe, (_, (head_dim, ffn)) = self.recipe, SIZES[self.options.size]
        found = {"heads": (self.shape.head_dim, head_dim), "ffn": (self.shape.ffn, ffn)}
        return {k: recipe.consumers * (b / (a + (b - a) * share)) ** recipe.fan for k, (a, b) in found.items()}

    def result(self) -> dict[str, Any]:
        """Train; the losses, and what happened on the way."""
        begin, curve, due = time.perf_counter(), [], self.recipe.at(self.steps)
        schedule = Due(tuple(due.items()))
        totals: list[Tensor] = []
        for step, ids in zip(range(1, self.steps + 1), self.windows, strict=False):
            rate, consumers = self.rate(step, list(due)), self.consumers(schedule.share(step - 1))
            for group in self.optimizer.param_groups:
                group["lr"] = rate * consumers.get(group["reads"], 1.0)
            totals.append(self.step(step, ids, due))
            if step % max(1, self.steps // 20) == 0:
                curve.append(round(torch.stack(totals).mean().item(), 4))
                totals.clear()
            if step % max(1, self.steps // 8) == 0 and step < self.steps:
                self._tell(step, curve, begin)
        seconds = time.perf_counter() - begin
        weight = self.model.get_parameter("embed.weight")
        losses = {k: evaluate(self.model, weight, getattr(self, k)) for k in ("first", "valid", "aside")}
        driver = self.masked or self.sparse
        kept = self.shape.block_parameters * (1 - (driver.removed if driver else 0))
        for record in self.sparse.history if self.sparse is not None else ():
            self.shrinks.append({"step": record.step, "removed": record.removed, "seconds": record.seconds})
        return {
            **losses, "block_parameters": round(kept), "steps": self.steps, "seconds": seconds, "train": curve,
            "tokens_per_second": round(self.steps * self.options.batch * self.options.length / seconds),
            "shrinks": self.shrinks, "widths": self.widths(), "recipe": asdict(self.recipe),
        }  # fmt: skip

    def _tell(self, step: int, curve: Sequence[float], begin: float) -> None:
        """Print how far it is."""
        first = evaluate(self.model, self.model.get_parameter("embed.weight"), self.first)
        told = {"progress": step, "first": round(first, 4), "train": curve[-1] if curve else None}
        print(json.dumps({**told, "seconds": round(time.perf_counter() - begin, 1)}), flush=True)

    def step(self, step: int, ids: Tensor, due: dict[int, float]) -> Tensor:
        """One step of the optimizer, and what comes after it."""
        with torch.autocast("cuda", torch.bfloat16) if ids.is_cuda else nullcontext():
            loss = self._loss(ids)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        near = [s for s in due if step <= s <= step + self.options.window]
        if self.masked is not None and near:
            self.masked.gather()
        if self.sparse is not None:
            self.sparse.step()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.masked is not None and due:
            self._after(step, due, self.masked)
        return loss.detach()

    def _loss(self, ids: Tensor) -> Tensor:
        hidden, weight = self.model(ids[:, :-1]), self.model.get_parameter("embed.weight")
        if self.teacher is None or not self.ready:
            return self.loss(hidden, weight, ids[:, 1:])
        with torch.no_grad():
            expected = self.teacher(ids[:, :-1])
        teacher = (expected, self.teacher.get_parameter("embed.weight"))
        return self.taught(hidden, weight, ids[:, 1:], teacher, self.recipe.distill)

    def _after(self, step: int, due: dict[int, float], masked: MaskedTraining) -> None:
        first, fade = min(due), self.recipe.fade
        if self.teacher is not None and step <= first:
            self._follow(step == first)
        for s, share in due.items():
            if fade and step == s - fade:
                masked.begin_fading(share)
            if fade and s - fade <= step < s:
                masked.fade()
        if step in due:
            with torch.random.fork_rng():
                self._shrink(step, due[step], masked)
            self.ready = self.ready or step == max(due)

    def _shrink(self, step: int, share: float, masked: MaskedTraining) -> None:
        part = self.aside[:64]
        before, begin = evaluate(self.model, self.model.get_parameter("embed.weight"), part), time.perf_counter()
        if self.recipe.fade:
            masked.end_fading()
        else:
            count = self.options.measured if self.recipe.compensate != "none" else 0
            source = Windows(self.windows.data, self.windows.length, 8, step)  # few at once: nothing is compiled here
            masked.shrink(share, [w for _, w in zip(range(count), source, strict=False)])
        seconds = time.perf_counter() - begin
        after = evaluate(self.model, self.model.get_parameter("embed.weight"), part)
        record = {"step": step, "removed": masked.removed, "seconds": seconds, "before": before, "after": after}
        self.shrinks.append({k: round(v, 4) for k, v in record.items()})

    @torch.no_grad()
    def _follow(self, last: bool) -> None:
        """Let the teacher be the weights before the first shrink, or their moving average."""
        assert self.teacher is not None
        if self.recipe.average:
            pairs = zip(self.teacher.parameters(), self.model.parameters(), strict=True)
            for own, new in pairs:
                own.lerp_(new, 1 - self.recipe.average)
        elif last:
            self.teacher.load_state_dict(self.model.state_dict())

    def widths(self) -> dict[str, list[int]]:
        """Units kept per layer, by kind."""
        found: dict[str, list[int]] = {}
        for selection in self.sparse.plan if self.sparse is not None else ():
            found.setdefault(selection.kind, []).append(selection.kept)
        for c in self.masked.couplings if self.masked is not None else ():
            assert self.masked is not None
            found.setdefault(c.kind, []).append(int(self.masked.keep[c.name][0].sum()))
        return found


# -- time ----------------------------------------------------------------------------------------------------------


def step_seconds(share: float, options: argparse.Namespace) -> dict[str, float]:
    """Step time of a model with a share of the target gone, at uniform widths, alone on the device."""
    dense, (head_dim, ffn) = SIZES[options.size]
    unit = 8 if 0 < share < 1 else 1
    head_dim = round((dense.head_dim + (head_dim - dense.head_dim) * share) / unit) * unit
    shape = dense.at(head_dim, round((dense.ffn + (ffn - dense.ffn) * share) / unit) * unit)
    run = Run(Recipe("time", kind="dense"), 0, options)
    run.model = run._built(shape)
    run.optimizer = run._optimizer()
    if options.compile:
        run.compile_layers(run.model)
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
        own, due = int(steps * recipe.more), recipe.at(int(steps * recipe.more))
        share, total = (1.0 if recipe.kind == "small" else 0.0), 0.0
        for step in range(own):
            share = due.get(step, share)
            total += _between(points, share)
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
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


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
