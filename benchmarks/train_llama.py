"""What sparse training saves on a LLaMA of 1.3 billion parameters: time of a step, memory, and a whole run of one hour.

    python benchmarks/train_llama.py --device cuda --json train-llama.json
    python benchmarks/train_llama.py --model tiny --device cpu --backend eager

In one call: the dense module; the same weights in graph form under `SparseTraining`, with and without scores being
gathered; every shrink, the recompilation after it and the steps at each size; a module written by hand at the final
widths. Each is compiled layer by layer; bf16 with AdamW in bf16, random tokens. Medians over `--steps` steps. All
layers get the same widths (uniform allocation, rounded). At the end the measured pieces are put together to a run of
`--hours` whose schedule ends at a quarter of the steps, with everything that the run needs besides its steps. The table
and the JSON are written after every stage, so that nothing is lost when time runs out.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.functional import cross_entropy
from torch.optim import AdamW, Optimizer

import ecospa_fx as eco

MODELS: dict[str, dict[str, Any]] = {
    "llama-1b": {
        "vocabulary": 32000, "hidden": 2048, "layers": 24, "heads": 32, "head_dim": 64, "ffn": 5461,
        "small": {"head_dim": 32, "ffn": 2048}, "batch": 64, "length": 256, "round_to": 16,
    },
    "tiny": {
        "vocabulary": 512, "hidden": 64, "layers": 3, "heads": 2, "head_dim": 32, "ffn": 176,
        "small": {"head_dim": 16, "ffn": 64}, "batch": 4, "length": 32, "round_to": 8,
    },
}  # fmt: skip
GIB = 2**30


class Results:
    """Stages by name; printed and written as they come."""

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self.path, self.begin = path, time.perf_counter()
        self.stages: dict[str, Any] = {"settings": dict(settings)}

    def add(self, stage: str, **numbers: Any) -> dict[str, Any]:
        """Note a stage, print it and write everything so far."""
        self.stages[stage] = {**numbers, "at_seconds": round(time.perf_counter() - self.begin, 1)}
        print(stage, json.dumps(self.stages[stage]), flush=True)
        if self.path is not None:
            self.path.write_text(json.dumps(self.stages, indent=1) + "\n", encoding="utf-8")
        return dict(self.stages[stage])


class Loop:
    """A training loop over one batch, and what it measures."""

    def __init__(self, optimizer: Optimizer, ids: Tensor, after_backward: Callable[[], None] = lambda: None) -> None:
        self.optimizer, self.ids, self.after_backward = optimizer, ids, after_backward

    def step(self, module: nn.Module) -> None:
        """One step of the optimizer."""
        logits = module(input_ids=self.ids, use_cache=False).logits
        torch.autograd.backward(cross_entropy(logits[:, :-1].flatten(0, 1).float(), self.ids[:, 1:].flatten()))
        self.after_backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def seconds(self, module: nn.Module, steps: int) -> list[float]:
        """Of each of some steps, on the device's clock where it has one."""
        if not self.ids.is_cuda:
            return [_clocked(lambda: self.step(module), self.ids) for _ in range(steps)]
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
        marks[0].record()
        for mark in marks[1:]:
            self.step(module)
            mark.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)]

    def measured(self, module: nn.Module, steps: int, warm: int = 2) -> dict[str, Any]:
        """Step time, tokens per second and memory; the seconds that the first steps took beyond that."""
        first = _clocked(lambda: self.seconds(module, warm), self.ids)
        if self.ids.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        times = self.seconds(module, steps)
        middle = median(times)
        return {
            "parameters": sum(p.numel() for p in module.parameters()),
            "step_seconds": middle,
            "least_and_most": [min(times), max(times)],
            "tokens_per_second": self.ids.numel() / middle,
            "peak_gib": torch.cuda.max_memory_allocated() / GIB if self.ids.is_cuda else None,
            **held_gib(module, self.optimizer),
            "compile_seconds": first - warm * middle,
            "graphs_compiled": int(counters["stats"]["unique_graphs"]),
        }


def held_gib(module: nn.Module, optimizer: Optimizer) -> dict[str, float]:
    """GiB of weights, of their gradients while there are any, and of the optimizer's state."""
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    states = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
    kept = sum(t.numel() * t.element_size() for t in states)
    return {
        "weights_gib": weights / GIB,
        "gradients_gib": weights / GIB,
        "optimizer_gib": kept / GIB,
        "weights_gradients_optimizer_gib": (2 * weights + kept) / GIB,
    }


def _clocked(run: Callable[[], object], like: Tensor) -> float:
    if like.is_cuda:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    if like.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def built(shape: Mapping[str, Any], device: str, dtype: torch.dtype) -> nn.Module:
    """The transformers module of a shape, of random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape["vocabulary"], hidden_size=shape["hidden"], intermediate_size=shape["ffn"],
        num_hidden_layers=shape["layers"], num_attention_heads=shape["heads"], head_dim=shape["head_dim"],
        num_key_value_heads=shape["heads"], attn_implementation="sdpa", max_position_embeddings=2048,
    )  # fmt: skip
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model: nn.Module = LlamaForCausalLM(config).train()
    finally:
        torch.set_default_dtype(default)
    return model


def compile_layers(module: nn.Module, backend: str) -> None:
    """Compile each module of the longest list in a model."""
    lists = [m for m in module.modules() if isinstance(m, nn.ModuleList)]
    for layer in max(lists, key=len):
        layer.compile(dynamic=False, backend=backend)


def block_parameters(shape: Mapping[str, Any]) -> int:
    """Elements of the matrices that attention and FFN couple."""
    attention = 4 * shape["hidden"] * shape["heads"] * shape["head_dim"]
    return int(shape["layers"] * (attention + 3 * shape["hidden"] * shape["ffn"]))


# -- stages --------------------------------------------------------------------------------------------------------


def run_dense(model: nn.Module, loop: Loop, options: argparse.Namespace, results: Results) -> None:
    compile_layers(model, options.backend)
    results.add("dense", **loop.measured(model, options.steps))
    for module in model.modules():
        module._compiled_call_impl = None
    torch._dynamo.reset()
    counters.clear()


def run_sparse(
    model: nn.Module, loop: Loop, shape: Mapping[str, Any], options: argparse.Namespace, results: Results
) -> eco.SparseTraining:
    """Graph form at full size, then shrink after shrink."""
    warm, steps = 2, options.steps
    first, every = warm + 2 * steps + 1, warm + steps + 1
    schedule = eco.Cubic(start=first, end=first + (options.shrinks - 1) * every, every=every)
    target = 1 - block_parameters({**shape, **shape["small"]}) / block_parameters(shape)
    begin = time.perf_counter()
    sparse = eco.SparseTraining(
        model, (), {"input_ids": loop.ids[:2, :32], "use_cache": False}, optimizer=loop.optimizer, target=target,
        schedule=schedule, allocation="uniform", round_to=shape["round_to"], window=steps,
    )  # fmt: skip
    building = time.perf_counter() - begin
    compile_layers(sparse.model, options.backend)
    loop.after_backward = sparse.step
    graph = loop.measured(sparse.model, steps, warm)
    gathering = median(loop.seconds(sparse.model, steps))
    results.add("graph", **graph, capture_seconds=building, step_seconds_gathering=gathering)
    for number in range(1, options.shrinks + 1):
        whole = _clocked(lambda: loop.step(sparse.model), loop.ids)
        after = loop.measured(sparse.model, steps, warm)
        record = sparse.history[-1]
        results.add(
            f"shrink {number}", **after, step=record.step, removed=record.removed, shrink_seconds=record.seconds,
            step_with_shrink_seconds=whole, modules_with_new_code=record.modules,
            widths=sorted({f"{c.kind} {record.widths[c.name]}" for c in sparse.couplings if c.name in record.widths}),
        )  # fmt: skip
    print(sparse.report(), flush=True)
    return sparse


def run_by_hand(ids: Tensor, shape: Mapping[str, Any], options: argparse.Namespace, results: Results) -> None:
    """A module of the final widths from transformers, which has never been anything else."""
    model = built({**shape, **shape["small"]}, options.device, dtype_of(options))
    compile_layers(model, options.backend)
    own = Loop(optimizer_of(model, options.device), ids)
    results.add("by hand", **own.measured(model, options.steps))


def dtype_of(options: argparse.Namespace) -> torch.dtype:
    return torch.bfloat16 if options.device == "cuda" else torch.float32


def optimizer_of(model: nn.Module, device: str) -> Optimizer:
    return AdamW(model.parameters(), lr=1e-5, fused=device == "cuda")


# -- a whole run ---------------------------------------------------------------------------------------------------


def extrapolated(stages: Mapping[str, Any], hours: float, start: float, end: float, window: int = 50) -> dict[str, Any]:
    """Speed of a whole sparse run over the dense one of as many steps, put together from measured pieces.

    The run lasts `hours`. The first shrink comes at the share `start` of its steps and the last one at `end`, the
    others evenly between. Scores are gathered in the `window` steps before each. Both runs pay for what they compile.
    """
    dense, graph = stages["dense"], stages["graph"]
    shrinks = [v for k, v in stages.items() if k.startswith("shrink ")]
    fixed = graph["capture_seconds"] + graph["compile_seconds"]
    fixed += sum(s["shrink_seconds"] + s["compile_seconds"] for s in shrinks)
    gathering = max(0.0, graph["step_seconds_gathering"] - graph["step_seconds"]) * window * len(shrinks)
    width = (end - start) / max(1, len(shrinks) - 1)
    shares = [start if len(shrinks) > 1 else end, *([width] * (len(shrinks) - 1)), 1 - end]
    times = [graph["step_seconds"], *(s["step_seconds"] for s in shrinks)]
    average = sum(share * seconds for share, seconds in zip(shares, times, strict=True))
    steps = (hours * 3600 - fixed - gathering) / average
    whole = dense["compile_seconds"] + steps * dense["step_seconds"]
    return {
        "hours": hours, "steps": int(steps), "shrinks": len(shrinks), "first_shrink_at": shares[0],
        "last_shrink_at": end, "fixed_seconds": fixed, "gathering_seconds": gathering, "dense_hours": whole / 3600,
        "speed_over_dense": whole / (hours * 3600),
    }  # fmt: skip


def summary(stages: Mapping[str, Any]) -> dict[str, Any]:
    """The ratios that matter, of those stages that are there."""
    dense, graph, hand = stages["dense"], stages["graph"], stages.get("by hand")
    last = [v for k, v in stages.items() if k.startswith("shrink ")][-1]
    key = "weights_gradients_optimizer_gib"
    found = {
        "parameters": last["parameters"],
        "sparse_over_dense_speed": dense["step_seconds"] / last["step_seconds"],
        "sparse_over_dense_held_memory": last[key] / dense[key],
        "graph_over_dense_speed": dense["step_seconds"] / graph["step_seconds"],
        "gathering_overhead": graph["step_seconds_gathering"] / graph["step_seconds"] - 1,
        "graphs_compiled": last["graphs_compiled"],
    }
    if last["peak_gib"]:
        found["sparse_over_dense_peak_memory"] = last["peak_gib"] / dense["peak_gib"]
    if hand is not None:
        found["by_hand_over_dense_speed"] = dense["step_seconds"] / hand["step_seconds"]
        found["sparse_over_by_hand_speed"] = hand["step_seconds"] / last["step_seconds"]
    return found


def table(stages: Mapping[str, Any]) -> str:
    rows, dense = [], stages["dense"]
    for name, s in stages.items():
        if "tokens_per_second" in s:
            held, peak = s["weights_gradients_optimizer_gib"], s["peak_gib"] or float("nan")
            rows.append([
                name, f"{s['parameters']:,}", f"{s['step_seconds'] * 1e3:.1f}", f"{s['tokens_per_second']:,.0f}",
                f"{dense['step_seconds'] / s['step_seconds']:.3f}", f"{held:.2f}", f"{peak:.2f}",
                f"{s['compile_seconds']:.1f}", f"{s.get('shrink_seconds', s.get('capture_seconds', 0.0)):.1f}",
            ])  # fmt: skip
    head = ["stage", "parameters", "step, ms", "tokens/s", "speed", "held GiB", "peak GiB", "compile s", "shrink s"]
    return tabulate(rows, head, disable_numparse=True)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="llama-1b")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--steps", type=int, default=10, help="measured steps per stage")
    parser.add_argument("--shrinks", type=int, default=3)
    parser.add_argument("--start", type=float, default=0.05, help="share of the run at which the first shrink comes")
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--json", type=Path)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    warnings.simplefilter("ignore")
    torch._dynamo.config.recompile_limit = 64
    shape = {**MODELS[options.model], **({"layers": options.layers} if options.layers else {})}
    where = torch.cuda.get_device_name() if options.device == "cuda" else platform.machine()
    told = {k: str(v) for k, v in vars(options).items()}
    results = Results(options.json, {**told, "shape": shape, "where": where, "torch": torch.__version__})
    model = built(shape, options.device, dtype_of(options))
    ids = torch.randint(0, shape["vocabulary"], (shape["batch"], shape["length"]), device=options.device)
    loop = Loop(optimizer_of(model, options.device), ids)
    run_dense(model, loop, options, results)
    sparse = run_sparse(model, loop, shape, options, results)
    print(table(results.stages), flush=True)
    results.add("summary", **summary(results.stages))
    results.add("whole run", **extrapolated(results.stages, options.hours, options.start, 0.25))
    del sparse, model, loop  # what is measured next shall have the memory alone
    gc.collect()
    run_by_hand(ids, shape, options, results)
    print(table(results.stages), flush=True)
    results.add("summary", **summary(results.stages))


if __name__ == "__main__":
    main()
