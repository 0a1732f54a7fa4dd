"""How much of the loss comes back when a compressed model is trained on: at once against gradually, against dense.

    python benchmarks/finetune_books.py MODEL --data DATA --cache /tmp/books --jobs 3 --json finetune.json

MODEL is a Hugging Face folder of a causal language model. Each variant trains for `--tokens` tokens, the same ones:

    dense          the model itself, nothing removed
    compressed     `compress` with its defaults first, then training
    removed        `compress(method="gate-fisher")` first, then training
    start          `SparseTraining` with data before the first step, then training
    gradual        `SparseTraining` over the first half of the steps
    gradual+solve  the same with compensate=True
    gradual+second the same with scores="second-order" and compensate=True

AdamW, linear decay to zero, float32 with TF32, nothing compiled: widths differ in every layer. Losses in nats on the
first 64 windows of valid, before anything, after removal, and at the end. Runs may share a device with --jobs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jobs
import torch
from books import Windows, first_windows, tokens
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import ecospa_fx as eco

VARIANTS = ("dense", "compressed", "removed", "start", "gradual", "gradual+solve", "gradual+second")
PLAIN = {"use_cache": False}


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean next-token cross-entropy of windows [n, length + 1]."""
    logits = model(ids[:, :-1], **PLAIN).logits
    return cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def calibration_loss(output: Any, args: Sequence[Any], kwargs: Any) -> Tensor:
    """The same from an output, for `eco.score`."""
    return cross_entropy(output.logits[:, :-1].flatten(0, 1).float(), args[0][:, 1:].flatten())


@torch.no_grad()
def evaluated(model: nn.Module, windows: Tensor) -> float:
    """Mean loss in eval mode; float32 without TF32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    model.eval()
    loss = torch.stack([loss_of(model, part) for part in windows.split(8)]).mean()
    model.train()
    torch.backends.cuda.matmul.allow_tf32 = True
    return float(loss)


class FineTuning:
    """One variant: what is removed, and the training after or meanwhile."""

    def __init__(self, variant: str, options: argparse.Namespace) -> None:
        from transformers import AutoModelForCausalLM

        self.variant, self.options, self.device = variant, options, torch.device(options.device)
        train, valid = tokens(options.data, options.cache, options.shards)
        self.windows = Windows(train.to(self.device), options.length, options.batch, options.seed)
        self.valid = first_windows(valid, options.length, options.held).to(self.device)
        self.model: nn.Module = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
        self.model = self.model.to(self.device).train()
        self.steps = int(options.tokens / (options.batch * options.length))
        source = Windows(train.to(self.device), options.length, options.calibration, options.seed + 1)
        rows = next(iter(source))[:, :-1]
        self.calibration: list[Any] = [((row[None],), PLAIN) for row in rows]
        self.grouped: list[Any] = [((part,), PLAIN) for part in rows.split(8)]
        self.sparse: eco.SparseTraining | None = None

    def result(self) -> dict[str, Any]:
        begin, before = time.perf_counter(), evaluated(self.model, self.valid)
        self._compress()
        compressing, after = time.perf_counter() - begin, evaluated(self.model, self.valid)
        optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=self.options.lr, betas=(0.9, 0.95), weight_decay=0.1,
            fused=self.device.type == "cuda",
        )  # fmt: skip
        self._attach(optimizer)
        begin = time.perf_counter()
        self._train(optimizer)
        training = time.perf_counter() - begin
        return {
            "variant": self.variant, "before": before, "after_removal": after,
            "at_end": evaluated(self.model, self.valid), "parameters": sum(p.numel() for p in self.model.parameters()),
            "compressing_seconds": compressing, "training_seconds": training, "steps": self.steps,
        }  # fmt: skip

    def _compress(self) -> None:
        if self.variant == "start":
            self.sparse = self._sparse(None, eco.AtStart(), solve=True, second=True)
            self.model = self.sparse.model
        if self.variant not in ("compressed", "removed"):
            return
        method = {"method": "gate-fisher"} if self.variant == "removed" else {}
        self.model = eco.compress(
            self.model.eval(), *self.calibration[0], ratio=self.options.ratio, batches=self.calibration,
            loss=calibration_loss, **method,
        ).train()  # fmt: skip

    def _attach(self, optimizer: torch.optim.Optimizer) -> None:
        if self.sparse is not None:
            self.sparse.attach(optimizer)
        if not self.variant.startswith("gradual"):
            return
        first, last = max(1, self.steps // 20), max(2, self.steps // 2)
        schedule = eco.Linear(first, last, max(1, (last - first) // (self.options.shrinks - 1)))
        solve, second = self.variant != "gradual", self.variant.endswith("second")
        self.sparse = self._sparse(optimizer, schedule, solve=solve, second=second)
        self.model = self.sparse.model

    def _sparse(
        self, optimizer: torch.optim.Optimizer | None, schedule: Any, *, solve: bool, second: bool
    ) -> eco.SparseTraining:
        ids = next(iter(self.windows))[:, :-1]
        return eco.SparseTraining(
            self.model, (ids,), PLAIN, optimizer=optimizer, target=self.options.ratio, compensate=solve,
            schedule=schedule, batches=self.grouped if solve else None, loss=calibration_loss,
            scores="second-order" if second else "gate-fisher",
        )  # fmt: skip

    def _train(self, optimizer: torch.optim.Optimizer) -> None:
        rise = max(1, self.steps // 50)
        for step, ids in zip(range(self.steps), self.windows, strict=False):
            for group in optimizer.param_groups:
                group["lr"] = self.options.lr * min(1.0, (step + 1) / rise) * (1 - step / self.steps)
            loss = loss_of(self.model, ids)
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            if self.sparse is not None:
                self.sparse.step()
            optimizer.step()
            optimizer.zero_grad()


def table(found: Sequence[dict[str, Any]]) -> str:
    rows = [
        [r["variant"], f"{r['parameters']:,}", *(f"{r[k]:.4f}" for k in ("before", "after_removal", "at_end"))]
        for r in found
        if "at_end" in r
    ]
    return tabulate(rows, ["variant", "parameters", "before", "after removal", "at end"], disable_numparse=True)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--cache", type=Path, default=Path("/tmp/books-tokens"))
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--tokens", type=float, default=20e6)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--calibration", type=int, default=128, help="windows")
    parser.add_argument("--held", type=int, default=64, help="windows of each evaluation")
    parser.add_argument("--shrinks", type=int, default=6)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    jobs.Limits.options(parser)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", choices=VARIANTS, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main() -> None:
    options = parse()
    if options.one is not None:
        print(json.dumps(FineTuning(options.one, options).result()))
        return
    tokens(options.data, options.cache, options.shards)
    found: list[dict[str, Any]] = []
    told = {"torch": torch.__version__, **{k: str(v) for k, v in vars(options).items()}}
    todo: list[jobs.Task] = [({"variant": v}, [*sys.argv[1:], "--one", v]) for v in options.variants]
    limits = jobs.Limits(options.jobs, options.limit, options.total)
    for result in jobs.results(__file__, todo, options.device, limits):
        found.append(result)
        print(json.dumps({k: v for k, v in result.items() if k != "progress"}), flush=True)
        jobs.write(options.json, told, found)
    print(table(found))


if __name__ == "__main__":
    main()
