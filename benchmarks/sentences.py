"""What compression of a sentence encoder costs where nobody has a loss: how similarities among sentences are kept.

    python benchmarks/sentences.py MODEL DATA                    # no loss, 20, 30 and 50 %: an hour on two cores
    python benchmarks/sentences.py MODEL DATA --losses none projections square --seeds 0 1 2 --device cuda
    python benchmarks/sentences.py MODEL DATA --choose --probes 1 4        # settings are chosen on other sentences

MODEL is a Hugging Face folder of an encoder, such as all-MiniLM-L6-v2, DATA a folder with train-0.txt.xz,
train-1.txt.xz and valid.txt.xz; ``--documents`` is a folder of technical texts, by default Debian's. A sentence is
embedded by the mean of its tokens' last states, of length 1. Calibration: sentences drawn from the books of train-0 and
from every third document, ``--batch`` of them per batch. Figure: Spearman's rank correlation of all cosine similarities
among 500 sentences with those of the dense model, on books of valid, of other authors, and on other documents, of which
nothing was calibrated on. ``--choose`` takes 500 sentences of train-1, a last third of the documents and other seeds
instead. Prints a table, and writes JSON after every run.
"""

from __future__ import annotations

import argparse
import gzip
import json
import platform
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from scores import read_text
from tabulate import tabulate
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

import ecospa_fx as eco

RESULTS = Path(__file__).resolve().parent / "results"
SENTENCE = re.compile(r"[A-Z][^.!?\n]*(?:\n[^.!?\n]+)*[.!?](?=\s)")
WORDS = 6, 32
CHARACTERS = 8_000_000
JUDGED = 500
CHOOSING = 1000
"""What is added to seeds with ``--choose``."""


class Embedding(nn.Module):
    """The mean of an encoder's last states over a sentence's tokens, of length 1."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask[..., None].to(states.dtype)
        return nn.functional.normalize((states * weights).sum(1) / weights.sum(1), dim=-1)


# -- sentences ---------------------------------------------------------------------------------------------------


def sentences(text: str) -> list[str]:
    """Those of 6 to 32 words, each once, in an order drawn with seed 0."""
    whole = (" ".join(match.group().split()) for match in SENTENCE.finditer(text))
    kept = sorted({s for s in whole if WORDS[0] <= len(s.split()) <= WORDS[1]})
    random.Random(0).shuffle(kept)
    return kept


def documents(folder: Path, part: int) -> str:
    """Every third file of a folder's READMEs, news and questions: 0 to report on, 1 to choose by, 2 to calibrate on."""

    def texts() -> Iterator[str]:
        paths = sorted(p for name in ("README*", "NEWS*", "*FAQ*", "*.txt*") for p in folder.rglob(name))
        for path in dict.fromkeys(p for p in paths if p.is_file() and p.suffix in ("", ".gz", ".txt", ".md")):
            read = gzip.open if path.suffix == ".gz" else open
            with read(path, "rb") as file:
                yield file.read(400_000).decode(errors="ignore")

    return "\n\n".join(text for i, text in enumerate(texts()) if i % 3 == part)


def tokens(texts: Sequence[str], tokenizer: Any, device: str) -> tuple[Tensor, Tensor]:
    coded = tokenizer(list(texts), padding=True, truncation=True, max_length=64, return_tensors="pt")
    return coded["input_ids"].to(device), coded["attention_mask"].to(device)


# -- losses that somebody would have to invent -------------------------------------------------------------------


def projections(width: int, device: str) -> Callable[[Tensor, Any, Any], Tensor]:
    """The mean square of 32 random projections of the embedding."""
    directions = torch.randn(width, 32, generator=torch.Generator().manual_seed(0)).to(device)
    return lambda output, args, kwargs: (output @ directions).square().mean()


def square(output: Tensor, args: Any, kwargs: Any) -> Tensor:
    return output.square().mean()


# -- measuring ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def similarities(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """All cosines among sentences, each pair once."""
    embedded = torch.cat([model(*part) for part in zip(*(t.split(50) for t in batch), strict=True)])
    return (embedded @ embedded.T)[tuple(torch.triu_indices(len(embedded), len(embedded), 1))]


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Spearman's, which is Pearson's of the ranks."""
    ranks = [values.double().argsort().argsort().double() for values in (first, second)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def runs(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row per loss, number of probes and seed, with all ratios from one measurement."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    encoder = AutoModel.from_pretrained(arguments.model, dtype=torch.float32, add_pooling_layer=False)
    model = Embedding(encoder).to(arguments.device).eval()
    part = int(arguments.choose)
    pools = [sentences(read_text(arguments.data / "train-0.txt.xz", CHARACTERS))]
    if arguments.calibrate == "both":
        pools.append(sentences(documents(arguments.documents, 2)))
    books = sentences(read_text(arguments.data / f"{'train-1' if part else 'valid'}.txt.xz", CHARACTERS))
    judged = {"books": books[:JUDGED], "documents": sentences(documents(arguments.documents, part))[:JUDGED]}
    inputs = {name: tokens(texts, tokenizer, arguments.device) for name, texts in judged.items()}
    dense = {name: similarities(model, batch) for name, batch in inputs.items()}
    width = model.encoder.config.hidden_size
    for seed in arguments.seeds:
        source, count = random.Random(seed + CHOOSING * part), arguments.batches * arguments.batch
        drawn = [text for pool in pools for text in source.sample(pool, count // len(pools))]
        source.shuffle(drawn)
        groups = [drawn[i : i + arguments.batch] for i in range(0, len(drawn), arguments.batch)]
        batches = [(tokens(group, tokenizer, arguments.device), {}) for group in groups]
        example = tokens(drawn[:2], tokenizer, arguments.device)
        for name in arguments.losses:
            for probes in arguments.probes if name == "none" else [0]:
                loss = {
                    "none": eco.OutputDistance(max(probes, 1), seed), "square": square,
                    "projections": projections(width, arguments.device),
                }[name]  # fmt: skip
                begin = time.perf_counter(), time.process_time()
                smaller = eco.compress(
                    model, example, ratio=arguments.ratios, batches=batches, loss=loss, **arguments.options
                )
                took = time.perf_counter() - begin[0], time.process_time() - begin[1]
                for ratio, small in zip(arguments.ratios, smaller, strict=True):
                    kept = {n: rank_correlation(similarities(small, inputs[n]), dense[n]) for n in inputs}
                    yield {
                        "loss": name, "probes": probes, "seed": seed, "ratio": ratio, **kept,
                        "seconds": took[0], "CPU seconds": took[1],
                    }  # fmt: skip


def table(rows: Sequence[Mapping[str, Any]], ratios: Sequence[float]) -> str:
    """Mean over seeds, and least to most where there are several, per loss and ratio."""
    lines = []
    for key in dict.fromkeys((row["loss"], row["probes"]) for row in rows):
        for text in ("books", "documents"):
            cells = []
            for ratio in ratios:
                values = [r[text] for r in rows if (r["loss"], r["probes"], r["ratio"]) == (*key, ratio)]
                spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
                cells.append(f"{sum(values) / len(values):.3f}{spread}" if values else "")
            lines.append([key[0], key[1] or "", text, *cells])
    return tabulate(lines, ["loss", "probes", "text", *(f"{ratio:.0%}" for ratio in ratios)], disable_numparse=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--documents", type=Path, default=Path("/usr/share/doc"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.3, 0.5], help="ascending")
    parser.add_argument("--losses", nargs="+", choices=("none", "projections", "square"), default=["none"])
    parser.add_argument("--probes", type=int, nargs="+", default=[1], help="per sample, where there is no loss")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of calibration and probes")
    parser.add_argument("--calibrate", choices=("books", "both"), default="both", help="on books, or half on documents")
    parser.add_argument("--batches", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1, help="sentences per batch")
    parser.add_argument("--choose", action="store_true")
    parser.add_argument("--options", type=json.loads, default={}, help="more of compress, as JSON")
    parser.add_argument("--json", type=Path, default=RESULTS / "sentences.json")
    return parser.parse_args()


def main() -> None:
    arguments, rows = parse(), list[dict[str, Any]]()
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items() if k != "json"}
    on_gpu = arguments.device.startswith("cuda")
    environment = {
        "torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine(),
        "device": torch.cuda.get_device_name(arguments.device) if on_gpu else f"{torch.get_num_threads()} threads",
    }  # fmt: skip
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    for row in runs(arguments):
        rows.append(row)
        result = {"rows": rows, "settings": settings, "environment": environment}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(table(rows, arguments.ratios))


if __name__ == "__main__":
    main()
