"""What compression without retraining costs by the default recipe and without each of its parts.

    python benchmarks/quality.py --models MODEL … --data DATA            # the table: default recipe, four ratios
    python benchmarks/quality.py … --variants default no-distillation no-basis  # an ablation
    python benchmarks/quality.py … --seeds 0 1 2 3 4 --windows 128 32    # how much is luck, how much data
    python benchmarks/quality.py --digits                                # a small vision transformer, accuracy
    python benchmarks/quality.py --words --data DATA --device cuda       # a BERT that tells masked words, accuracy

MODEL is a Hugging Face folder of a causal language model, DATA a folder with train-0.txt.xz, valid.txt.xz and
tokenizer.json; data and protocol are those of `scores.py` (calibration on text of train, one window of 512 tokens per
batch; widths in single units; perplexity on the first 64 windows of valid; of train with ``--eval-on train``).
``--digits`` needs scikit-learn. Every row is one call of `ecospa_fx.compress`, of which seconds and memory are; FLOPs
are counted per token, latency is that of a forward pass of four windows, in turns with the dense model. Prints tables,
and writes ``benchmarks/results/quality.json`` with curves beside it as PNG and SVG (matplotlib).
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent))
from encoders import Encoder, digits, label_loss, masked_words
from scores import WINDOW, load_data, load_model, next_token_loss, perplexity

import ecospa_fx as eco
from ecospa_fx.origin import origin_of

RESULTS = Path(__file__).resolve().parent / "results"
NO_CACHE = {"use_cache": False}

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "even": {"allocation": "global"},
    "uniform": {"uniform": True},
    "no-distillation": {"distillation": 0},
    "longer": {"distillation": 512},  # than 224, of 128 windows; 32 have 640 anyway
    "no-predictions": {"predicted": 0.0},
    "no-mix": {"mixed": 0.0, "predicted": 0.0},
    "sensitivity": {"allocation": "sensitivity"},
    "sensitivity-no-distillation": {"allocation": "sensitivity", "distillation": 0},
    "in-turn": {"least_squares": "in turn"},
    "no-least-squares": {"distillation": 0, "least_squares": False},
    "no-gates": {"gates": False},
    "no-loss": {"loss": None},  # of encoders
    "no-basis": {"basis": False},
    "scores-only": {"distillation": 0, "least_squares": False, "gates": False, "basis": False},
    "gate-fisher": {"method": "gate-fisher"},
}
"""Options of `compress` by name."""


class Plain(nn.Module):
    """A causal language model that keeps no cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Any:
        return self.model(ids, **NO_CACHE)


def figures(model: nn.Module, sample: Tensor, tokens: int) -> dict[str, Any]:
    """Size and work; `sample` is what one forward pass reads, `tokens` how many there are in it."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(sample)
    parameters = sum(p.numel() for p in model.parameters())
    return {"parameters": parameters, "flops per token": counter.get_total_flops() / tokens}


@torch.no_grad()
def paced(dense: nn.Module, small: nn.Module, sample: Tensor, rounds: int = 11) -> dict[str, float]:
    """Seconds of a forward pass, and how many of the dense model's: medians of rounds in which each runs once."""

    def seconds(model: nn.Module) -> float:
        begin = time.perf_counter()
        model(sample)
        if sample.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    pairs = [(seconds(dense), seconds(small)) for _ in range(rounds + 2)][2:]
    return {
        "latency": statistics.median(own for _, own in pairs),
        "latency over dense": statistics.median(own / other for other, own in pairs),
    }


def language(path: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows of one language model."""
    model = load_model(path, arguments.device)
    rows: list[dict[str, Any]] = []
    for seed in arguments.seeds:
        for windows in arguments.windows:
            calibrate, evaluate = load_data(arguments.data, windows, seed, arguments.eval_on)
            evaluate = evaluate[: arguments.evaluate].to(arguments.device)
            sample = evaluate[:4, :WINDOW].contiguous()
            if not rows:
                dense = {
                    **figures(Plain(model), sample, sample.numel()),
                    **paced(Plain(model), Plain(model), sample),
                    "perplexity": perplexity(Plain(model), evaluate),
                }
                rows.append({"model": path.name, "variant": "dense", "ratio": 0.0, **dense})
                print(f"{path.name} dense {dense['perplexity']:.2f}", flush=True)
            batches = [((window[None, :WINDOW],), NO_CACHE) for window in calibrate.to(arguments.device)]
            example = (calibrate[:2, :64].to(arguments.device),)
            for variant in arguments.variants:
                for ratio in arguments.ratios:
                    row = {"model": path.name, "variant": variant, "seed": seed, "windows": windows, "ratio": ratio}
                    rows.append({**row, **compressed(model, example, batches, evaluate, ratio, variant, arguments)})
                    print(
                        f"{path.name} {variant} seed {seed}, {windows} windows, {ratio:.0%}: "
                        f"{rows[-1]['perplexity']:.2f} in {rows[-1]['seconds']:.0f} s",
                        flush=True,
                    )
    return rows


def compressed(
    model: nn.Module,
    example: tuple[Tensor],
    batches: Sequence[Any],
    evaluate: Tensor,
    ratio: float,
    variant: str,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """One call of `compress` and what became of the model."""
    begin = time.perf_counter()
    small = eco.compress(
        model, example, NO_CACHE, ratio=ratio, batches=batches, loss=next_token_loss, round_to=1, **VARIANTS[variant]
    )
    seconds, plan = time.perf_counter() - begin, origin_of(small).plan
    widths: dict[str, list[float]] = {}
    for selection in plan:
        widths.setdefault(selection.kind, []).append(round(selection.kept / selection.size, 3))
    sample = evaluate[:4, :WINDOW].contiguous()
    return {
        "removed": plan.removed_parameters / plan.coupled_parameters,
        "perplexity": perplexity(Plain(small), evaluate),
        "seconds": seconds,
        "peak GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "kept": widths,
        **figures(Plain(small), sample, sample.numel()),
        **paced(Plain(model), Plain(small), sample),
    }


# -- encoders ----------------------------------------------------------------------------------------------------


def classified(encoder: Encoder, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Accuracy of an encoder against the share that was removed."""
    dense = {"variant": "dense", "ratio": 0.0, "accuracy": encoder.accuracy(encoder.model)}
    rows: list[dict[str, Any]] = [{"model": encoder.name, **dense}]
    print(f"{encoder.name} dense: {dense['accuracy']:.3f}", flush=True)
    for variant in arguments.variants:
        for ratio in arguments.ratios:
            options = {"ratio": ratio, "loss": label_loss, "round_to": 1, **VARIANTS[variant]}
            small = eco.compress(encoder.model, encoder.example, batches=encoder.batches, **options)
            found = {"variant": variant, "ratio": ratio, "accuracy": encoder.accuracy(small)}
            rows.append({"model": encoder.name, **found})
            print(f"{encoder.name} {variant} {ratio:.0%}: {rows[-1]['accuracy']:.3f}", flush=True)
    return rows


# -- what is shown -----------------------------------------------------------------------------------------------


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line per model, variant, seed and number of windows; a column per ratio."""
    ratios = sorted({row["ratio"] for row in rows})
    lines: dict[tuple[Any, ...], dict[float, str]] = {}
    for row in rows:
        key = (row["model"], row["variant"], row.get("seed", ""), row.get("windows", ""))
        score = f"{row['perplexity']:.2f}" if "perplexity" in row else f"{row['accuracy']:.1%}"
        lines.setdefault(key, {})[row["ratio"]] = score
    head = ["model", "variant", "seed", "windows", *(f"{ratio:.0%}" for ratio in ratios)]
    return tabulate(
        [[*key, *(cells.get(r, "") for r in ratios)] for key, cells in lines.items()], head, disable_numparse=True
    )


def removal_alone(model: str) -> list[tuple[float, float]]:
    """Ratio and perplexity of the best scores of `scores.py`, where its results are there."""
    path = RESULTS / f"scores-{model}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    best = {"method": "gate-fisher", "steps": 4, "allocation": "global"}
    return [(row["ratio"], row["perplexity"]) for row in rows if all(row.get(k) == v for k, v in best.items())]


def relative(row: dict[str, Any], dense: dict[str, Any], what: str) -> float:
    """How much of the dense model's."""
    share: float = row["latency over dense"] if what == "latency" else row[what] / dense[what]
    return share


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Perplexity against parameters, FLOPs and latency, each relative to the dense model."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import ScalarFormatter

    shown = [row for row in rows if "perplexity" in row]
    panels = [what for what in ("parameters", "flops per token", "latency") if all(what in row for row in shown)]
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 4), sharey=True)
    for axis, what in zip(axes, panels, strict=True):
        for model in dict.fromkeys(row["model"] for row in shown):
            (dense,) = (row for row in shown if row["model"] == model and row["variant"] == "dense")
            for variant in dict.fromkeys(row["variant"] for row in shown if row["variant"] != "dense"):
                line = [dense, *(r for r in shown if (r["model"], r["variant"]) == (model, variant))]
                points = [(relative(row, dense, what), row["perplexity"]) for row in line]
                axis.plot(*zip(*points, strict=True), marker="o", label=f"{model}, {variant}")
        axis.set_xlabel(f"{what} / dense")
        axis.grid(alpha=0.3)
        axis.invert_xaxis()
    for model in dict.fromkeys(row["model"] for row in shown):
        sizes = {row["ratio"]: row["parameters"] for row in shown if row["model"] == model}
        removed = [(sizes[ratio] / sizes[0.0], loss) for ratio, loss in removal_alone(model) if ratio in sizes]
        if removed:
            axes[0].plot(*zip(*removed, strict=True), "--", alpha=0.5, label=f"{model}, gate Fisher, removal alone")
    axes[0].set_ylabel("perplexity, held-out books")
    axes[0].set_yscale("log")
    for which in (axes[0].yaxis.set_major_formatter, axes[0].yaxis.set_minor_formatter):
        which(ScalarFormatter())
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    for suffix in (".png", ".svg"):
        figure.savefig(path.with_suffix(suffix), dpi=110)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, nargs="*", default=[])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.3, 0.4, 0.5])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["default"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--windows", type=int, nargs="+", default=[128])
    parser.add_argument("--evaluate", type=int, default=64, help="windows of held-out text")
    parser.add_argument("--eval-on", choices=["valid", "train"], default="valid")
    parser.add_argument("--digits", action="store_true")
    parser.add_argument("--words", action="store_true")
    parser.add_argument("--word-steps", type=int, default=4000, help="training steps of the BERT, 128 windows each")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=RESULTS / "quality.json")
    return parser.parse_args(argv)


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    if (arguments.models or arguments.words) and arguments.data is None:
        raise SystemExit("--models and --words need --data DIR, a folder with the calibration and the held-out text")
    rows: list[dict[str, Any]] = []
    for path in arguments.models:
        rows += language(path, arguments)
    if arguments.digits:
        rows += classified(digits(arguments.device), arguments)
    if arguments.words:
        rows += classified(masked_words(arguments.device, arguments.data, arguments.word_steps), arguments)
    print(table(rows))
    settings = {
        k: str(v) if isinstance(v, Path) else v
        for k, v in vars(arguments).items()
        if k not in {"models", "data", "json"}
    }
    versions = {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(
        json.dumps({"rows": rows, "settings": settings, "environment": versions}, indent=1) + "\n"
    )
    if any("perplexity" in row for row in rows):
        draw(rows, arguments.json)


if __name__ == "__main__":
    main()
