"""Trains the model that ships in `ecospa_fx.demo`, and cuts the texts that ship beside it.

    python benchmarks/train_demo.py texts DATA ecospa_fx/demo
    python benchmarks/train_demo.py train DATA ecospa_fx/demo/weights.pt --compile --device cuda

DATA is a folder with train-0.txt.xz and valid.txt.xz: books in plain text, separated by two blank lines. Trains on
the bytes of train-0 in windows drawn at random; AdamW, warm-up, cosine decay, bf16 on CUDA. Weights are written as
float16, during the run too. The loss on valid is reported and decides nothing.

The weights that ship: the command above on one H200 with torch 2.11, 384 seconds, 3.0 GB of text read (28 epochs).
Loss in nats per byte 0.984 on train, 1.078 on valid (1.556 bits, perplexity 2.940); 1,802,304 parameters.
"""

from __future__ import annotations

import argparse
import copy
import json
import lzma
import math
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ecospa_fx.demo.model import LAYERS, ByteLM

CALIBRATION_BOOKS = (
    "Barchester Towers",
    "Bleak House",
    "Gulliver's Travels",
    "Jane Eyre",
    "Jude the Obscure",
    "Kidnapped",
    "Lord Jim",
    "Middlemarch",
    "Persuasion",
    "The Innocents Abroad",
    "The Invisible Man",
    "The Last Man",
)
VALID_BOOKS = (
    "Confessions of St. Augustine",
    "Madame Bovary",
    "The Autobiography of Benjamin Franklin",
    "The Clue of the Twisted Candle",
    "The Red and the Black",
)
CALIBRATION_BYTES, VALID_BYTES = 10_000, 12_000
EVALUATION_WINDOWS = 512


def read(path: Path) -> str:
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return file.read()


# -- texts ---------------------------------------------------------------------------------------------------------


def excerpt(book: str, size: int) -> str:
    """Whole paragraphs of prose from the middle of a book, at most `size` bytes of UTF-8."""
    paragraphs = [p.strip() for p in book[int(0.4 * len(book)) :].split("\n\n")[1:]]
    taken: list[str] = []
    for paragraph in paragraphs:
        if len(paragraph) < 40 or paragraph[0] in "#_*-|":
            continue
        if len("\n\n".join([*taken, paragraph]).encode()) > size:
            break
        taken.append(paragraph)
    return "\n\n".join(taken)


def excerpts(text: str, titles: Sequence[str], size: int) -> str:
    """An excerpt of each titled book. Raises KeyError for a title that the text does not hold."""
    books = {b.split("\n", 1)[0].removeprefix("# Title: "): b for b in text.split("\n\n\n")}
    return "\n\n".join(excerpt(books[title], size) for title in titles) + "\n"


def write_texts(data: Path, folder: Path) -> None:
    for name, source, titles, size in (
        ("calibration", "train-0", CALIBRATION_BOOKS, CALIBRATION_BYTES),
        ("valid", "valid", VALID_BOOKS, VALID_BYTES),
    ):
        cut = excerpts(read(data / f"{source}.txt.xz"), titles, size)
        (folder / f"{name}.txt").write_text(cut, encoding="utf-8")
        print(f"{name}.txt: {len(cut.encode()):,} bytes")


# -- training ------------------------------------------------------------------------------------------------------


def initialise(model: ByteLM) -> None:
    """Normal weights of deviation 0.02, those that write into the residual stream scaled down by depth."""
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            output = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(weight, std=0.02 / math.sqrt(2 * LAYERS) if output else 0.02)


def bytes_of(path: Path, device: torch.device) -> Tensor:
    """Uint8 [n], the file's bytes, on the device."""
    return torch.frombuffer(bytearray(read(path).encode()), dtype=torch.uint8).to(device)


def draw(data: Tensor, batch: int, length: int, generator: torch.Generator) -> Tensor:
    """LongTensor [batch, length + 1] of windows at random places."""
    starts = torch.randint(len(data) - length, (batch, 1), generator=generator, device=data.device)
    return data[starts + torch.arange(length + 1, device=data.device)].long()


def loss_of(model: nn.Module, window: Tensor) -> Tensor:
    """Mean next-byte cross-entropy in nats over windows [B, T + 1]; logits in float32."""
    mixed = torch.autocast("cuda", torch.bfloat16) if window.is_cuda else nullcontext()
    with mixed:
        logits = model(window[:, :-1])
    return cross_entropy(logits.flatten(0, 1).float(), window[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: nn.Module, data: Tensor, length: int, batch: int) -> float:
    """Mean loss in nats over windows spread evenly over the data."""
    stride = len(data) // EVALUATION_WINDOWS
    starts = torch.arange(EVALUATION_WINDOWS, device=data.device)[:, None] * stride
    rows = data[starts + torch.arange(length + 1, device=data.device)].long()
    total = 0.0
    for at in range(0, len(rows), batch):
        part = rows[at : at + batch]
        total += loss_of(model, part).item() * len(part)
    return total / len(rows)


def rate(step: int, arguments: argparse.Namespace) -> float:
    """Learning rate: linear warm-up, then a cosine to one hundredth."""
    warm = min(1.0, (step + 1) / arguments.warmup)
    progress = max(0.0, (step - arguments.warmup) / max(1, arguments.steps - arguments.warmup))
    return float(arguments.lr * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))))


def optimizer_for(model: nn.Module, arguments: argparse.Namespace) -> torch.optim.AdamW:
    decayed = [p for p in model.parameters() if p.dim() == 2]
    plain = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=arguments.lr, betas=(0.9, 0.95), fused=arguments.device == "cuda")


def save(model: nn.Module, path: Path) -> None:
    """Weights in float16, written beside the path first, so that a broken run leaves the last good file."""
    partial = path.with_suffix(".partial")
    torch.save(copy.deepcopy(model).half().cpu().state_dict(), partial)
    partial.replace(path)


def run(model: nn.Module, data: Tensor, arguments: argparse.Namespace) -> float:
    """All steps; prints a line every `--report` steps and returns the last printed mean loss."""
    stepped: Callable[..., Tensor] = torch.compile(loss_of) if arguments.compile else loss_of
    optimizer = optimizer_for(model, arguments)
    generator = torch.Generator(data.device).manual_seed(arguments.seed)
    begin, total, mean = time.perf_counter(), torch.zeros((), device=data.device), math.nan
    for step in range(arguments.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, arguments)
        loss = stepped(model, draw(data, arguments.batch, arguments.length, generator))
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        total += loss.detach()
        if (step + 1) % arguments.report == 0:
            mean = total.item() / arguments.report
            total.zero_()
            print(f"step {step + 1} train {mean:.4f} {time.perf_counter() - begin:.1f} s", flush=True)
        if (step + 1) % arguments.checkpoint == 0:
            save(model, arguments.output)
    return mean


def train(arguments: argparse.Namespace) -> None:
    """Train, save, and report the loss on valid as trained and as stored."""
    torch.manual_seed(arguments.seed)
    device = torch.device(arguments.device)
    data, valid = (bytes_of(arguments.data / f"{n}.txt.xz", device) for n in ("train-0", "valid"))
    model = ByteLM()
    initialise(model)
    model.to(device)
    begin = time.perf_counter()
    last = run(model, data, arguments)
    seconds = time.perf_counter() - begin
    save(model, arguments.output)
    trained = evaluate(model, valid, arguments.length, arguments.batch)
    model.half().float()
    stored = evaluate(model, valid, arguments.length, arguments.batch)
    row = {
        "train_loss": last,
        "valid_loss": trained,
        "valid_loss_stored": stored,
        "valid_perplexity_stored": math.exp(stored),
        "parameters": sum(p.numel() for p in model.parameters()),
        "file_bytes": arguments.output.stat().st_size,
        "seconds": seconds,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items()},
    }
    print(json.dumps(row, indent=1))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=["texts", "train"])
    parser.add_argument("data", type=Path, help="folder with train-0.txt.xz and valid.txt.xz")
    parser.add_argument("output", type=Path, help="texts: a folder; train: the file of the weights")
    parser.add_argument("--steps", type=int, default=23_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--warmup", type=int, default=300)
    parser.add_argument("--report", type=int, default=500)
    parser.add_argument("--checkpoint", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true")
    return parser.parse_args(argv)


def main() -> None:
    arguments = parse()
    if arguments.job == "texts":
        write_texts(arguments.data, arguments.output)
    else:
        train(arguments)


if __name__ == "__main__":
    main()
