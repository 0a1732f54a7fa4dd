"""Whether a budget in measured seconds buys more quality than one in parameters, at equal latency on this machine.

    python benchmarks/latency_allocation.py                              # the model that comes with the package
    python benchmarks/latency_allocation.py --recipe                     # the same, what stays making up for what goes
    python benchmarks/latency_allocation.py --model MODEL --data DATA    # a causal language model and books

Each plan in parameters is paired with one that spends the same seconds of the latency table, where these buy most.
Shown of each: the share of the parameters that went; the table's milliseconds; milliseconds of a forward pass of the
whole smaller model, the least of many rounds in which all take turns (processor time where there is one thread); the
loss that the scores predict; and the loss in nats on held-out text. Scores are gate Fisher, taken once, and nothing
makes up for what goes; with ``--recipe`` both are the default recipe of `compress` without its fit, and no prediction
is shown. Where a plan in parameters is slower than the dense model, its partner is the dense model.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).resolve().parent))

import ecospa_fx as eco
from ecospa_fx import demo
from ecospa_fx.budget.latency import Latency
from ecospa_fx.importance.scores import Scores
from ecospa_fx.origin import origin_of
from ecospa_fx.plan import Plan

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """A model, calibration and held-out token ids [n, T + 1], and the ids [B, T] of the call that is timed."""

    model: nn.Module
    calibrate: Tensor
    held_out: Tensor
    sample: Tensor


class Logits(nn.Module):
    """A causal language model that returns nothing but logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(ids, use_cache=False).logits
        return logits


def subject(arguments: argparse.Namespace) -> Subject:
    if arguments.model is None:
        first, second = (demo.windows(text, arguments.length, arguments.windows) for text in demo.texts())
        return Subject(demo.load(), first, second, first[: arguments.batch, :-1])
    from scores import load_data, load_model

    calibrate, held_out = load_data(arguments.data, arguments.windows, 0, "train")
    held_out = held_out[: arguments.windows]
    return Subject(Logits(load_model(arguments.model)), calibrate, held_out, calibrate[: arguments.batch, :-1])


@torch.no_grad()
def loss_of(model: nn.Module, windows: Tensor) -> float:
    """Mean next-token loss in nats."""
    total = 0.0
    for part in windows.split(4):
        total += cross_entropy(model(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
    return total / windows[:, 1:].numel()


@torch.no_grad()
def milliseconds(models: Sequence[nn.Module], sample: Tensor, rounds: int) -> list[float]:
    """The least of some rounds of each model's forward pass; they take turns."""
    clock = time.process_time if torch.get_num_threads() == 1 and not sample.is_cuda else time.perf_counter
    best = [float("inf")] * len(models)
    for number in range(rounds + 2):
        for i, model in enumerate(models):
            begin = clock()
            model(sample)
            if number >= 2:
                best[i] = min(best[i], 1e3 * (clock() - begin))
    return best


def predicted(scores: Scores, plan: Plan) -> float:
    """Sum of the scores of what goes."""
    return float(sum(scores[s.name][s.removed].sum() for s in plan))


PLANS: dict[str, dict[str, Any]] = {
    "parameters": {},
    "parameters, uniform": {"uniform": True},
    "parameters, FFN alone": {"kinds": ["ffn"]},
}
"""What a budget in seconds is compared with."""


class Comparison:
    """Plans and smaller models of one subject, and everything measured once."""

    def __init__(self, told: Subject, arguments: argparse.Namespace) -> None:
        self.told, self.arguments = told, arguments
        self.couplings = eco.detect(told.model, (told.sample,))
        self.batches: list[Any] = [((window[None, :-1],), {}) for window in told.calibrate]
        self.scores = eco.score(told.model, self.couplings, self.batches, loss=demo.next_byte_loss)
        self.unit, begin = Latency.of(self.couplings, arguments.round_to, arguments.cache), time.perf_counter()
        options = {"round_to": arguments.round_to, "budget": self.unit}
        chosen = eco.plan(self.couplings, 0.1, self.scores, **options)
        self.held = self.unit.total([self.couplings[s.name] for s in chosen])
        print(f"the table took {time.perf_counter() - begin:.1f} s: {1e3 * self.held:.1f} ms of products", flush=True)

    def made(self, ratio: float, **options: Any) -> tuple[Plan, nn.Module]:
        """A plan and the smaller model."""
        told, options = self.told, {"round_to": self.arguments.round_to, **options}
        if self.arguments.recipe:
            data = {"batches": self.batches, "loss": demo.next_byte_loss}
            small = eco.compress(told.model, (told.sample,), ratio=ratio, distillation=0, **data, **options)
            return origin_of(small).plan, small
        plan = eco.plan(self.couplings, ratio, self.scores, **options)
        return plan, eco.shrink(told.model, plan, (told.sample,))

    def freed(self, plan: Plan | None) -> float:
        """Seconds of the table."""
        return self.unit.removed({}, {s.name: s.kept for s in plan}) if plan is not None else 0.0

    def pair(self, name: str, ratio: float) -> list[dict[str, Any]]:
        """A plan in parameters and its equal in seconds."""
        plan, small = self.made(ratio, **PLANS[name])
        share = self.freed(plan) / self.held
        plans: dict[str, Plan | None] = {name: plan, "latency": None}
        models = [small, self.told.model]
        if share > 0:
            plans["latency"], models[1] = self.made(share, budget=self.unit)
        dense, *times = milliseconds([self.told.model, *models], self.told.sample, self.arguments.rounds)
        rows = []
        for (budget, plan), small, measured in zip(plans.items(), models, times, strict=True):
            row = {
                "ratio": ratio,
                "budget": budget if plan is not None else "none (dense)",
                "parameters removed": plan.removed_parameters / plan.coupled_parameters if plan is not None else 0.0,
                "table ms": 1e3 * (self.held - self.freed(plan)),
                "model ms": measured,
                "dense ms": dense,
                "predicted loss": "" if self.arguments.recipe else predicted(self.scores, plan) if plan else 0.0,
                "loss": loss_of(small, self.told.held_out),
            }
            rows.append(row)
            print(" ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{v}" for k, v in row.items()), flush=True)
        return rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--recipe", action="store_true", help="what stays makes up for what goes")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.4])
    parser.add_argument("--windows", type=int, default=32, help="of calibration and of held-out text")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4, help="windows of the call that is timed")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--round-to", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path, help="folder of the latency table")
    parser.add_argument("--json", type=Path, default=RESULTS / "latency-allocation.json")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    told = subject(arguments)
    dense = loss_of(told.model, told.held_out)
    comparison = Comparison(told, arguments)
    rows = [row for name in PLANS for ratio in arguments.ratios for row in comparison.pair(name, ratio)]
    shown = [[f"{v:.4g}" if isinstance(v, float) else v for v in row.values()] for row in rows]
    print(f"\ndense loss {dense:.4f}\n" + tabulate(shown, headers=list(rows[0]), disable_numparse=True))
    settings = {k: v for k, v in vars(arguments).items() if not isinstance(v, Path)}
    settings["model"] = arguments.model.name if arguments.model else "demo"
    environment = {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    told_all = {"dense loss": dense, "rows": rows, "settings": settings, "environment": environment}
    arguments.json.write_text(json.dumps(told_all, indent=1) + "\n")


if __name__ == "__main__":
    main()
