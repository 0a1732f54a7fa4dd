"""What graph form costs, and what a smaller model saves: training, prefill and decoding, side by side on one machine.

    python benchmarks/speed.py --model llama-1b gpt2-medium --device cuda --json speed.json
    python benchmarks/speed.py --model llama-1b --what prefill decode --variants "dense module" "shrunk graph" "by hand"
    python benchmarks/speed.py --model llama-tiny --device cpu

Per model: the dense module, the dense graph without and with cleanup passes, a shrunk graph (every head and every KV
head keeps its own dimensions, drawn at random), and a module written by hand at the shrunk widths; each compiled layer
by layer. Decoding adds a shrunk module (half of the heads and FFN units, edited in place). The variants take turns, so
that a ratio compares neighbours in time. Weights are random, nothing is downloaded. Memory is what a step needs beyond
what is held before it. The JSON is written after every stage; stages that would begin after ``--seconds`` are left out.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from decoding import ROOM, Decoder, builders
from shapes import MODELS, by_hand, dense, half, layers_of
from tabulate import tabulate
from timing import memory, ratio, seconds, told
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import ecospa_fx as eco
from ecospa_fx.plan import Plan

COMPARED = (
    ("dense graph, no cleanup", "dense module"), ("dense graph", "dense module"),
    ("shrunk graph", "by hand"), ("shrunk graph", "dense module"), ("by hand", "dense module"),
    ("shrunk module", "dense module"),
)  # fmt: skip


class Variant:
    """One module with its optimizer, and what was measured of it."""

    def __init__(self, name: str, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.name, self.module, self.optimizer = name, module, optimizer
        self.seconds: dict[str, list[float]] = {}
        self.memory: dict[str, float] = {}

    def turn(self, training: bool) -> None:
        """To training mode or out of it, once: that walk over all modules is not part of a step."""
        if self.module.training != training:
            self.module.train(training)

    def train(self, ids: Tensor) -> None:
        """One optimizer step."""
        self.turn(True)
        logits = self.module(input_ids=ids, use_cache=False).logits
        cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def prefill(self, ids: Tensor) -> None:
        """All tokens of a prompt at once."""
        self.turn(False)
        self.module(input_ids=ids, use_cache=False)


def variants(model: nn.Module, shape: dict[str, Any], options: Any) -> list[Variant]:
    """All variants of a model, compiled layer by layer; the dense ones share their weights and their optimizer."""
    device = options.device
    args, kwargs = (), {"input_ids": torch.zeros(2, 8, dtype=torch.long, device=device), "use_cache": False}
    couplings = eco.detect(model, args, kwargs)
    nothing = Plan((), tuple(couplings.shapes.items()))
    made: dict[str, Callable[[], nn.Module]] = {
        "dense module": lambda: model,
        "dense graph, no cleanup": lambda: eco.shrink(model, nothing, args, kwargs, passes=()),
        "dense graph": lambda: eco.shrink(model, nothing, args, kwargs),
        "shrunk graph": lambda: eco.shrink(model, half(couplings, shape), args, kwargs),
        "by hand": lambda: by_hand(shape).to(device),
    }
    found, shared = [], torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    for name in (name for name in made if name in options.variants):
        began = time.perf_counter()
        module = made[name]().to(next(model.parameters()).dtype)
        own = None if name.startswith("dense") else torch.optim.AdamW(module.parameters(), lr=1e-5, fused=True)
        found.append(Variant(name, module, own or shared))
        for layer in layers_of(module):
            layer.compile(dynamic=False)
        print(f"built {name}: {time.perf_counter() - began:.1f} s", flush=True)
    return found


def measure(found: Sequence[Variant], what: str, shape: dict[str, Any], options: Any) -> None:
    """Let the variants take turns."""
    ids = torch.randint(0, shape["vocabulary"], shape[what], device=options.device)
    for variant in found:
        began = time.perf_counter()
        for _ in range(3):
            getattr(variant, what)(ids)
        variant.memory[what] = memory(lambda v=variant: getattr(v, what)(ids))  # type: ignore[misc]  # bound at once
        variant.seconds[what] = []
        print(f"warm {what} {variant.name}: {time.perf_counter() - began:.1f} s", flush=True)
    for _ in range(options.repeats):
        for variant in found:
            variant.seconds[what].append(seconds(lambda v=variant: getattr(v, what)(ids), options.steps))  # type: ignore[misc]


def compared(series: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """The ratios of the pairs that were measured."""
    return {f"{a} / {b}": ratio(series[a], series[b]) for a, b in COMPARED if a in series and b in series}


def report(what: str, found: Sequence[Variant], shape: dict[str, Any]) -> dict[str, Any]:
    """Print the table of training or prefill, and return its numbers."""
    tokens, series = shape[what][0] * shape[what][1], {v.name: v.seconds[what] for v in found}
    rows = [
        [
            v.name,
            f"{parameters(v.module):,}",
            f"{tokens / statistics.median(v.seconds[what]):,.0f}",
            f"{v.memory[what]:.2f}",
        ]
        for v in found
    ]
    print_tables(f"{what}, {shape['layers']} layers, {shape[what]}", rows, ["tokens/s", "GiB"], compared(series))
    measured = {v.name: {"seconds": v.seconds[what], "memory_gib": v.memory[what]} for v in found}
    return {
        "variants": measured,
        "ratios": compared(series),
        "parameters": {v.name: parameters(v.module) for v in found},
    }


def print_tables(title: str, rows: list[list[Any]], head: list[str], pairs: dict[str, dict[str, float]]) -> None:
    """One line per variant, and one per pair."""
    print(f"\n{title}\n{tabulate(rows, ['variant', 'parameters', *head], disable_numparse=True)}")
    print(tabulate([[name, told(found)] for name, found in pairs.items()], ["speed of / over", "ratio"]), flush=True)


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def decode(model: nn.Module, shape: dict[str, Any], options: Any, write: Callable[[dict[str, Any]], None]) -> None:
    """Measure decoding; what is there is written after every variant, because the last ones take longest to build."""
    device, dtype, found = options.device, next(model.parameters()).dtype, list[Decoder]()
    makers = builders(model, lambda: by_hand(shape).to(device, dtype).eval(), shape, device)
    for name in (name for name in makers if name in options.variants and time.perf_counter() < options.until):
        began = time.perf_counter()
        found.append(makers[name]())
        print(f"built {name}: {time.perf_counter() - began:.1f} s", flush=True)
        began = time.perf_counter()
        found[-1].prepare()
        print(f"warm decode {name}: {time.perf_counter() - began:.1f} s", flush=True)
        for decoder in found:
            decoder.seconds.clear()
        for _ in range(options.repeats):
            for decoder in found:
                decoder.measure(ROOM - 1)
        write(decoded(found, shape))


def decoded(found: Sequence[Decoder], shape: dict[str, Any]) -> dict[str, Any]:
    """Print the table of decoding, and return its numbers."""
    series, rows = {d.name: d.seconds for d in found}, []
    for d in found:
        rate = shape["decode"][0] / statistics.median(d.seconds)
        rows.append(
            [
                d.name,
                f"{parameters(d.module):,}",
                f"{rate:,.0f}",
                f"{d.bytes / 2**20:,.1f}",
                "yes" if d.graphed else "no",
            ]
        )
    head = ["tokens/s", "cache MiB", "CUDA graph"]
    print_tables(f"decode, {shape['layers']} layers, {shape['decode']}", rows, head, compared(series))
    measured = {d.name: {"seconds": d.seconds, "cache_bytes": d.bytes, "cuda_graph": d.graphed} for d in found}
    return {
        "variants": measured,
        "ratios": compared(series),
        "parameters": {d.name: parameters(d.module) for d in found},
    }


@torch.no_grad()
def difference(found: Sequence[Variant], shape: dict[str, Any]) -> dict[str, float]:
    """Largest difference of the dense graphs' logits from the module's, relative to the largest logit."""
    device = next(found[0].module.parameters()).device
    ids = torch.randint(0, shape["vocabulary"], (2, 64), device=device)
    logits = {
        v.name: v.module.eval()(input_ids=ids, use_cache=False).logits.float() for v in found if "dense" in v.name
    }
    want = logits.pop("dense module", None)
    return {n: float((got - want).abs().max() / want.abs().max()) for n, got in logits.items() if want is not None}


def main() -> None:
    """Measure what the command line names."""
    options = parsed()
    warnings.simplefilter("ignore")
    torch._dynamo.config.recompile_limit = 512  # code that reads its layer's number is compiled once per layer
    torch._dynamo.config.accumulated_recompile_limit = 2048
    options.until = time.perf_counter() + options.seconds
    device = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    result: dict[str, Any] = {"torch": torch.__version__, "device": device, "models": {}}

    def write(name: str, what: str, numbers: Any) -> None:
        result["models"][name][what] = numbers
        if options.json:
            options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    for name in options.model:
        shape = {**MODELS[name], **({"layers": options.layers} if options.layers else {})}
        result["models"][name] = {"shape": shape}
        model_stages(shape, options, lambda what, numbers, name=name: write(name, what, numbers))  # type: ignore[misc]
        torch._dynamo.reset()
        if options.device == "cuda":
            torch.cuda.empty_cache()


def model_stages(shape: dict[str, Any], options: Any, write: Callable[[str, Any], None]) -> None:
    """Every stage of one model that there is time for."""
    torch.manual_seed(0)
    with torch.device(options.device):
        model = dense(shape).to(torch.bfloat16 if options.device == "cuda" else torch.float32)
    found: list[Variant] = []
    for what in options.what:
        if what not in shape or time.perf_counter() > options.until:
            print(f"no {what}: {'out of time' if what in shape else 'not of this model'}", flush=True)
        elif what == "decode":
            found.clear()  # their memory
            decode(model, shape, options, lambda numbers: write("decode", numbers))
        else:
            found = found or variants(model, shape, options)
            measure(found, what, shape, options)
            write(what, {**report(what, found, shape), "difference": difference(found, shape)})


def parsed() -> Any:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["llama-1b"])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--what", nargs="+", choices=["train", "prefill", "decode"], default=["train", "prefill"])
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--variants", nargs="+", default=[a for pair in COMPARED for a in pair])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="runs per measurement")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no stage begins after these")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
