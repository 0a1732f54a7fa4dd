"""What compression without retraining costs, per score and allocation: perplexity of a language model on books.

    python benchmarks/scores.py MODEL DATA --ratios 0.2 0.5 --methods gate-fisher fisher --allocations global uniform

MODEL is a Hugging Face folder of a causal language model, DATA a folder with train-0.txt.xz, valid.txt.xz and
tokenizer.json. Calibration: 128 windows of 512 tokens drawn with seed 0 from the first 20 MB of train-0, one window
per batch. Evaluation: the first 64 windows of 512 + 1 tokens of valid, each beginning with
the last token of the one before (``--eval-on train`` takes them from the end of
the same 20 MB instead, away from the calibration windows, for choosing settings without looking at valid). Everything
in float32. The compressed model is the dense one with masked parameters; `ratio` counts the couplings' parameters.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import platform
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from ecospa_fx.api import scored
from ecospa_fx.coupling.couplings import Couplings
from ecospa_fx.importance.score import Batch, score
from ecospa_fx.importance.scores import Scores
from ecospa_fx.planning import plan
from ecospa_fx.verify import masked

WINDOW = 512
TRAIN_CHARACTERS = 20_000_000
HELD_OUT_TOKENS = 64 * WINDOW + 1


def tokens_of(text: str, tokenizer: Tokenizer) -> Tensor:
    """Token ids of a text, tokenised in pieces: split at two blank lines, then every 50,000 characters."""
    books = text.split("\n\n\n")
    pieces = [book[at : at + 50_000] for book in books for at in range(0, len(book), 50_000)]
    return torch.tensor([i for coded in tokenizer.encode_batch(pieces) for i in coded.ids])


def read_text(path: Path, characters: int = -1) -> str:
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return file.read(characters)


def calibration(train: Tensor, windows: int, seed: int) -> Tensor:
    """[windows, 513] token ids drawn from the training tokens."""
    generator = torch.manual_seed(seed)
    starts = torch.randint(0, len(train) - WINDOW - 1, (windows,), generator=generator)
    return torch.stack([train[s : s + WINDOW + 1] for s in starts.tolist()])


def next_token_loss(output: Any, args: Sequence[Any], kwargs: Any) -> Tensor:
    """Mean cross-entropy in nats; the labels travel as a keyword that the model is not given."""
    return cross_entropy(output.logits[0, :-1], args[0][0, 1:])


@torch.no_grad()
def perplexity(model: nn.Module, windows: Tensor) -> float:
    """exp of the mean next-token cross-entropy over [n, 513] token ids."""
    total = 0.0
    for window in torch.split(windows, 4):
        logits = model(window[:, :-1]).logits
        total += cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten(), reduction="sum").item()
    return math.exp(total / (windows.shape[0] * WINDOW))


def run(
    model: nn.Module, couplings: Couplings, data: tuple[Tensor, Tensor], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """One row per method, number of scoring passes, allocation and ratio."""
    calibrate, evaluate = data
    batches: list[Batch] = [((window[None, :WINDOW],), {}) for window in calibrate]
    rows: list[dict[str, Any]] = [{"method": "dense", "perplexity": perplexity(model, evaluate)}]
    print(f"dense {rows[0]['perplexity']:.2f}", flush=True)
    known: dict[str, Scores] = {}
    for method, steps, allocation, ratio in product(
        arguments.methods, arguments.steps, arguments.allocations, arguments.ratios
    ):
        begin, options = time.perf_counter(), {"uniform": allocation == "uniform", "floor": arguments.floor}
        if steps > 1:
            scores = scored(
                model, couplings, batches, ratio=ratio, loss=next_token_loss, method=method, steps=steps, **options
            )
        else:
            scores = known.get(method) or score(model, couplings, batches, loss=next_token_loss, method=method)
            known[method] = scores
        seconds, made = time.perf_counter() - begin, plan(couplings, ratio, scores, **options)
        with masked(model, made):
            value = perplexity(model, evaluate)
        share = made.removed_parameters / made.coupled_parameters
        row = {"method": method, "steps": steps, "allocation": allocation, "ratio": ratio, "removed": share}
        rows.append({**row, "perplexity": value, "score_seconds": seconds})
        print(f"{method} × {steps} {allocation} {ratio:.0%} {value:.2f}", flush=True)
    return rows


def table(rows: Sequence[dict[str, Any]], ratios: Sequence[float]) -> str:
    lines: dict[tuple[str, int, str], dict[float, str]] = {}
    for row in rows[1:]:
        lines.setdefault((row["method"], row["steps"], row["allocation"]), {})[row["ratio"]] = (
            f"{row['perplexity']:.1f}"
        )
    body = [[*key, *(cells[r] for r in ratios)] for key, cells in lines.items()]
    head = ["method", "passes", "allocation", *(f"{r:.0%}" for r in ratios)]
    return tabulate(body, headers=head, disable_numparse=True)


def load_data(folder: Path, windows: int, seed: int, eval_on: str) -> tuple[Tensor, Tensor]:
    """Calibration and evaluation windows, each [n, 513]."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    train = tokens_of(read_text(folder / "train-0.txt.xz", TRAIN_CHARACTERS), tokenizer)
    if eval_on == "train":
        train, held_out = train[:-HELD_OUT_TOKENS], train[-HELD_OUT_TOKENS:]
    else:
        held_out = tokens_of(read_text(folder / "valid.txt.xz"), tokenizer)[:HELD_OUT_TOKENS]
    return calibration(train, windows, seed), held_out.unfold(0, WINDOW + 1, WINDOW)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.3, 0.4, 0.5])
    parser.add_argument("--methods", nargs="+", default=["gate-fisher", "fisher", "taylor", "magnitude"])
    parser.add_argument("--steps", type=int, nargs="+", default=[1], help="scoring passes, each on what is left")
    parser.add_argument("--allocations", nargs="+", choices=["global", "uniform"], default=["global", "uniform"])
    parser.add_argument("--floor", type=float, default=0.05)
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eval-on", choices=["valid", "train"], default="valid")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write rows, settings and environment here")
    return parser.parse_args(argv)


def load_model(path: Path, device: str = "cpu") -> nn.Module:
    model: nn.Module = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.eval().to(device)


def report(rows: Sequence[dict[str, Any]], arguments: argparse.Namespace) -> None:
    print(table(rows, arguments.ratios))
    if arguments.json is not None:
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items()}
        environment = {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}
        arguments.json.write_text(
            json.dumps({"rows": rows, "settings": settings, "environment": environment}, indent=1)
        )


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    import ecospa_fx as eco

    model = load_model(arguments.model, arguments.device)
    loaded = load_data(arguments.data, arguments.windows, arguments.seed, arguments.eval_on)
    data = (loaded[0].to(arguments.device), loaded[1].to(arguments.device))
    couplings = eco.detect(model, (data[0][:2, :WINDOW],), {"use_cache": False})
    report(run(model, couplings, data, arguments), arguments)


if __name__ == "__main__":
    main()
