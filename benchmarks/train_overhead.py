"""What gathering scores costs while training: time of ``SparseTraining.step()`` over the time of a whole step.

    python benchmarks/train_overhead.py --layers 4 --hidden 512 --batch 4 --length 128 --steps 9
    python benchmarks/train_overhead.py --device cuda --dtype bfloat16 --layers 24 --hidden 2048 --batch 64 --length 256

A LLaMA of random weights and tokens in graph form, AdamW. Every step lies in the window of a shrink, so each of them
gathers; most runs gather in some steps only. Medians over `--steps` steps after two for warming up; then one shrink to
half of the couplings' parameters, and the step after it.

On one thread of a shared CPU, 17 million parameters, 512 tokens a step, torch 2.13, share of a step's time (few tokens
make it large: what gathering takes does not depend on them). Median of five runs for gate-fisher, of three for the
others in bfloat16, one in float32:

    gate-fisher   1.4 % in float32   2.7 % in bfloat16   (with products in float32: 3.5 %)
    fisher        3.1 %              6.7 %               (7.5 %)
    taylor        2.8 %              5.8 %               (7.0 %)

On one H100 with the options of the second line above, a vocabulary of 32,000 and torch 2.11, gate-fisher takes 6.2 of
396 ms: 1.6 %.

What it takes is memory traffic: per weight 8 bytes in bfloat16, where products in float32 moved 28.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Sequence
from statistics import median

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

import ecospa_fx as eco
from ecospa_fx.training.schedule import OneShot


def built(arguments: argparse.Namespace) -> nn.Module:
    config = LlamaConfig(
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.hidden * 11 // 4,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 64,
    )
    torch.manual_seed(0)
    with torch.device(arguments.device):
        model: nn.Module = LlamaForCausalLM(config)
    return model.to(getattr(torch, arguments.dtype))


def one_step(sparse: eco.SparseTraining, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> tuple[float, float]:
    """Seconds of the whole step, and of ``sparse.step()`` in it."""
    begin = now(ids)
    logits = sparse.model(ids[:, :-1], use_cache=False).logits
    torch.autograd.backward(cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))
    before = now(ids)
    sparse.step()
    after = now(ids)
    optimizer.step()
    optimizer.zero_grad()
    return now(ids) - begin, after - before


def now(like: torch.Tensor) -> float:
    if like.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def measured(arguments: argparse.Namespace, method: str) -> dict[str, object]:
    model = built(arguments)
    parameters = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(0, arguments.vocabulary, (arguments.batch, arguments.length + 1), device=arguments.device)
    due = 3 + arguments.steps
    sparse = eco.SparseTraining(
        model, (ids[:, :-1],), {"use_cache": False}, optimizer=optimizer, schedule=OneShot(due), scores=method,
        window=due, round_to=arguments.round_to,
    )  # fmt: skip
    times = [one_step(sparse, optimizer, ids) for _ in range(due - 1)][2:]
    whole, gathering = (median(t[i] for t in times) for i in (0, 1))
    _, shrink = one_step(sparse, optimizer, ids)
    one_step(sparse, optimizer, ids)
    small = median(one_step(sparse, optimizer, ids)[0] for _ in range(3))
    return {
        "method": method,
        "parameters": parameters,
        "step_seconds": round(whole, 4),
        "gathering_seconds": round(gathering, 5),
        "overhead": round(gathering / (whole - gathering), 4),
        "shrink_seconds": round(shrink, 2),
        "step_seconds_at_half": round(small, 4),
    }


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--round-to", type=int, help="by default what the device likes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--methods", nargs="+", default=["gate-fisher", "fisher", "taylor"])
    return parser.parse_args(argv)


def main() -> None:
    arguments = parse()
    where = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else platform.machine()
    print(json.dumps({"device": where, "threads": torch.get_num_threads(), "torch": torch.__version__,
                      "dtype": arguments.dtype, "tokens": arguments.batch * arguments.length}))  # fmt: skip
    for method in arguments.methods:
        print(json.dumps(measured(arguments, method)))


if __name__ == "__main__":
    main()
