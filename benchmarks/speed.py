"""What graph form costs, and what a smaller model saves: training steps and prefill, side by side on one machine.

    python benchmarks/speed.py --model llama-1b gpt2-medium --device cuda --json speed.json
    python benchmarks/speed.py --model llama-tiny --device cpu

Per model: the dense module, the dense graph without and with cleanup passes, a shrunk graph (every head and every KV
head keeps its own dimensions, drawn at random), and a module written by hand at the shrunk widths; each compiled layer
by layer. The variants take turns, so that a ratio compares neighbours in time. Weights are random, nothing is
downloaded. Memory is what a step needs beyond what is held before it.
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
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import ecospa_fx as eco
from ecospa_fx.plan import Plan, Selection

MODELS: dict[str, dict[str, Any]] = {
    "llama-1b": {
        "family": "llama", "hidden": 2048, "layers": 24, "heads": 32, "ffn": 5461, "vocabulary": 32000,
        "head_dim": 64, "small": {"head_dim": 32, "ffn": 2752}, "train": (64, 256), "prefill": (8, 2048),
    },
    "gpt2-medium": {
        "family": "gpt2", "hidden": 1024, "layers": 24, "heads": 16, "ffn": 4096, "vocabulary": 50257,
        "head_dim": 64, "small": {"head_dim": 32, "ffn": 2048}, "train": (32, 512), "prefill": (8, 1024),
    },
    "llama-tiny": {
        "family": "llama", "hidden": 256, "layers": 4, "heads": 4, "ffn": 688, "vocabulary": 1000,
        "head_dim": 64, "small": {"head_dim": 32, "ffn": 344}, "train": (4, 128), "prefill": (4, 256),
    },
    "gpt2-tiny": {
        "family": "gpt2", "hidden": 256, "layers": 4, "heads": 4, "ffn": 1024, "vocabulary": 1000,
        "head_dim": 64, "small": {"head_dim": 32, "ffn": 512}, "train": (4, 128), "prefill": (4, 256),
    },
}  # fmt: skip


class Block(nn.Module):
    """A GPT-2 block whose heads may be narrower than its residual width."""

    def __init__(self, hidden: int, heads: int, head_dim: int, ffn: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, 1 / 8
        self.before, self.after = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv, self.out = nn.Linear(hidden, 3 * heads * head_dim), nn.Linear(heads * head_dim, hidden)
        self.up, self.down = nn.Linear(hidden, ffn), nn.Linear(ffn, hidden)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(self.before(x)).chunk(3, -1))
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        result: Tensor = x + self.down(nn.functional.gelu(self.up(self.after(x)), approximate="tanh"))
        return result


class HandGpt2(nn.Module):
    """A GPT-2 written by hand."""

    def __init__(self, shape: dict[str, Any]) -> None:
        super().__init__()
        hidden = shape["hidden"]
        self.tokens, self.places = nn.Embedding(shape["vocabulary"], hidden), nn.Embedding(2048, hidden)
        self.layers = nn.ModuleList(
            Block(hidden, shape["heads"], shape["head_dim"], shape["ffn"]) for _ in range(shape["layers"])
        )
        self.norm = nn.LayerNorm(hidden)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        x = self.tokens(input_ids) + self.places(torch.arange(input_ids.shape[1], device=input_ids.device))
        for layer in self.layers:
            x = layer(x)
        return argparse.Namespace(logits=self.norm(x) @ self.tokens.weight.T)


def dense(shape: dict[str, Any]) -> nn.Module:
    """The transformers module of a shape."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    if shape["family"] == "llama":
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=shape["vocabulary"], hidden_size=shape["hidden"], intermediate_size=shape["ffn"],
                num_hidden_layers=shape["layers"], num_attention_heads=shape["heads"], head_dim=shape["head_dim"],
                num_key_value_heads=shape["heads"], attn_implementation="sdpa", max_position_embeddings=4096,
            )
        )  # fmt: skip
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=shape["vocabulary"], n_embd=shape["hidden"], n_layer=shape["layers"], n_head=shape["heads"],
            n_inner=shape["ffn"], n_positions=2048, attn_implementation="sdpa", bos_token_id=0, eos_token_id=0,
            attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0,
        )
    )  # fmt: skip


def by_hand(shape: dict[str, Any]) -> nn.Module:
    """A module at the shrunk widths."""
    small = {**shape, **shape["small"]}
    return dense(small) if shape["family"] == "llama" else HandGpt2(small)


def narrowed(model: nn.Module, shape: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Plan:
    """A plan with the small widths everywhere; which units stay is drawn per carrier."""
    couplings, generator = eco.detect(model, args, kwargs), torch.Generator().manual_seed(0)
    share = shape["small"]["head_dim"] / shape["head_dim"]
    selections = []
    for c in couplings.offered:
        if c.kind not in {"qk", "vo", "ffn"}:
            continue
        kept = shape["small"]["ffn"] if c.kind == "ffn" else int(c.size * share)
        drawn = (torch.randperm(c.size, generator=generator)[:kept].sort().values for _ in range(c.carriers))
        keep = tuple(tuple(d.tolist()) for d in drawn)
        selections.append(Selection(c.name, c.kind, c.layer, c.size, c.carriers, c.members, keep))
    return Plan(tuple(selections), tuple(couplings.shapes.items()))


class Variant:
    """One module with its optimizer, and what was measured of it."""

    def __init__(self, name: str, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.name, self.module, self.optimizer = name, module, optimizer
        self.seconds: dict[str, list[float]] = {"train": [], "prefill": []}
        self.memory: dict[str, float] = {}
        for layer in layers_of(module):
            layer.compile(dynamic=False)

    def train(self, ids: Tensor) -> None:
        """One optimizer step."""
        self.module.train()
        logits = self.module(input_ids=ids, use_cache=False).logits
        cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def prefill(self, ids: Tensor) -> None:
        """All tokens of a prompt at once."""
        self.module.eval()
        self.module(input_ids=ids, use_cache=False)


def layers_of(module: nn.Module) -> list[nn.Module]:
    """The modules of the longest list in a model."""
    lists = [m for m in module.modules() if isinstance(m, nn.ModuleList)]
    return list(max(lists, key=len))


def variants(shape: dict[str, Any], device: str, wanted: Sequence[str]) -> list[Variant]:
    """All variants of a model; the dense ones share their weights and their optimizer."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        model = dense(shape).to(dtype)
    args, kwargs = (), {"input_ids": torch.zeros(2, 8, dtype=torch.long, device=device), "use_cache": False}
    nothing = Plan((), tuple(eco.detect(model, args, kwargs).shapes.items()))
    builders: dict[str, Callable[[], nn.Module]] = {
        "dense module": lambda: model,
        "dense graph, no cleanup": lambda: eco.shrink(model, nothing, args, kwargs, passes=()),
        "dense graph": lambda: eco.shrink(model, nothing, args, kwargs),
        "shrunk graph": lambda: eco.shrink(model, narrowed(model, shape, args, kwargs), args, kwargs),
        "by hand": lambda: by_hand(shape).to(device),
    }
    found, shared = [], torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    for name, build in builders.items():
        if name not in wanted:
            continue
        began = time.perf_counter()
        module = build().to(dtype)
        own = None if name.startswith("dense") else torch.optim.AdamW(module.parameters(), lr=1e-5, fused=True)
        found.append(Variant(name, module, own or shared))
        print(f"built {name}: {time.perf_counter() - began:.1f} s", flush=True)
    return found


def measure(found: Sequence[Variant], what: str, size: tuple[int, int], shape: dict[str, Any], options: Any) -> None:
    """Let the variants take turns."""
    ids = torch.randint(0, shape["vocabulary"], size, device=options.device)
    for variant in found:
        began = time.perf_counter()
        for _ in range(3):
            getattr(variant, what)(ids)
        variant.memory[what] = _memory(lambda v=variant: getattr(v, what)(ids))  # type: ignore[misc]  # bound at once
        print(f"warm {what} {variant.name}: {time.perf_counter() - began:.1f} s", flush=True)
    for _ in range(options.repeats):
        for variant in found:
            variant.seconds[what].append(_seconds(lambda v=variant: getattr(v, what)(ids), options.steps))  # type: ignore[misc]


def _memory(run: Callable[[], None]) -> float:
    """GiB that a run needs beyond what is held before it; NaN where torch does not count."""
    if not torch.cuda.is_initialized():
        return float("nan")
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - held) / 2**30


def _seconds(run: Callable[[], None], steps: int) -> float:
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


def ratios(one: Variant, other: Variant, what: str) -> dict[str, float]:
    """How many times as fast one variant is as another: median, least and most over the repeats."""
    pairs = sorted(b / a for a, b in zip(one.seconds[what], other.seconds[what], strict=True))
    return {"median": statistics.median(pairs), "least": pairs[0], "most": pairs[-1]}


COMPARED = (
    ("dense graph, no cleanup", "dense module"), ("dense graph", "dense module"),
    ("shrunk graph", "by hand"), ("shrunk graph", "dense module"), ("by hand", "dense module"),
)  # fmt: skip


def report(name: str, shape: dict[str, Any], found: Sequence[Variant]) -> dict[str, Any]:
    """Print the tables of a model and return their numbers."""
    by_name, rows, compared = {v.name: v for v in found}, [], {}
    done = [what for what, seconds in found[0].seconds.items() if seconds]
    for v in found:
        row: list[Any] = [v.name, f"{sum(p.numel() for p in v.module.parameters()):,}"]
        for what in done:
            tokens = shape[what][0] * shape[what][1]
            row += [f"{tokens / statistics.median(v.seconds[what]):,.0f}", f"{v.memory.get(what, float('nan')):.2f}"]
        rows.append(row)
    print(f"\n{name}, {shape['layers']} layers, train {shape['train']}, prefill {shape['prefill']}")
    head = ["variant", "parameters", *(h for what in done for h in (f"{what} tokens/s", "GiB"))]
    print(tabulate(rows, head, disable_numparse=True))
    lines = []
    for a, b in COMPARED:
        if a in by_name and b in by_name:
            both = {what: ratios(by_name[a], by_name[b], what) for what in done}
            compared[f"{a} / {b}"] = both
            told = [f"{r['median']:.3f} [{r['least']:.3f}, {r['most']:.3f}]" for r in both.values()]
            lines.append([a, b, *told])
    print(tabulate(lines, ["speed of", "over", *done], disable_numparse=True), flush=True)
    measured = {v.name: {"seconds": v.seconds, "memory_gib": v.memory} for v in found}
    return {
        "shape": shape,
        "variants": measured,
        "ratios": compared,
        "difference": _difference(found, shape) if len(done) > 1 else {},
    }


@torch.no_grad()
def _difference(found: Sequence[Variant], shape: dict[str, Any]) -> dict[str, float]:
    """Largest difference of the logits from the dense module's, relative to the largest logit."""
    device = next(found[0].module.parameters()).device
    ids = torch.randint(0, shape["vocabulary"], (2, 64), device=device)
    want = found[0].module.eval()(input_ids=ids, use_cache=False).logits.float()
    result = {}
    for v in found[1:]:
        if v.name.startswith("dense"):
            got = v.module.eval()(input_ids=ids, use_cache=False).logits.float()
            result[v.name] = float((got - want).abs().max() / want.abs().max())
    print("relative difference of the logits:", result)
    return result


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["llama-1b"])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--variants", nargs="+", default=[a for pair in COMPARED for a in pair])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="runs per measurement")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch._dynamo.config.recompile_limit = 64
    device = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    result: dict[str, Any] = {"torch": torch.__version__, "device": device, "models": {}}
    for name in options.model:
        shape = {**MODELS[name], **({"layers": options.layers} if options.layers else {})}
        found = variants(shape, options.device, options.variants)
        for what in ("train", "prefill"):
            measure(found, what, shape[what], shape, options)
            result["models"][name] = report(name, shape, found)
            if options.json:
                options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        del found
        torch._dynamo.reset()


if __name__ == "__main__":
    main()
