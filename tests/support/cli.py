"""What the tests of the command line run it on, and what a refusal looks like."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from ecospa_fx.cli.main import main

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

Capture = pytest.CaptureFixture[str]


def prose(words: int, seed: int) -> str:
    """Words of a small vocabulary in lines of ten."""
    chosen = random.Random(seed).choices(["the", "cat", "sat", "on", "a", "mat", "and", "purred", "softly"], k=words)
    return "\n".join(" ".join(chosen[at : at + 10]) for at in range(0, words, 10))


def tiny_config(**changes: Any) -> Any:
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaConfig(
        **{"num_hidden_layers": 2, "vocab_size": 64, "max_position_embeddings": 32, **sizes, **changes}
    )


def written(root: Path) -> Path:
    """A Hugging Face folder in bfloat16, its tokenizer and a text."""
    (root / "text.txt").write_text(prose(6000, seed=0))
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    tokenizer.train_from_iterator([prose(200, seed=1)], tokenizers.trainers.BpeTrainer(vocab_size=64))
    tokenizer.save(str(root / "tokenizer.json"))
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(tiny_config()).bfloat16().save_pretrained(root / "model")
    return root


def compress_arguments(folder: Path, output: Path, *more: str) -> list[str]:
    calibration = ["--calibration", str(folder / "text.txt"), "--output", str(output)]
    return ["compress", str(folder / "model"), "--ratio", "0.3", *calibration, "--windows", "4", *more]


def refused(capsys: Capture, arguments: Sequence[str]) -> str:
    """The one sentence of a refusal."""
    assert main(arguments) == 2
    sentence = capsys.readouterr().err.strip().splitlines()[-1]
    assert sentence.startswith("ecospa-fx: ")
    assert "Traceback" not in sentence
    return sentence


FACTORIES = """
import torch
from torch import nn

class Refuses(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x

class Bytes(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(256, 16), nn.Linear(16, 256)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, ids):
        x = self.embed(ids)
        return self.head(x + self.down(torch.relu(self.up(x))))

class Normed(Bytes):
    def __init__(self):
        super().__init__()
        self.norm, self.free, self.back = nn.LayerNorm(32), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, ids):
        x = self.embed(ids)
        x = x + self.back(torch.relu(self.free(x)))
        return self.head(x + self.down(self.norm(self.up(x).sigmoid()).relu()))

class Both(Bytes):
    def forward(self, ids):
        x = self.embed(ids)
        x = x + x.mean(1, keepdim=True)
        return self.head(x + self.down(torch.relu(self.up(x))))

def good(): return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)), (torch.randn(2, 4),), {}
def lm(): return Bytes(), (torch.zeros(2, 16, dtype=torch.long),), {}
def both(): return Both(), (torch.zeros(2, 16, dtype=torch.long),), {}
def normed(): return Normed(), (torch.zeros(2, 16, dtype=torch.long),), {}
def wrong(): return nn.Linear(4, 4)
def fails(): raise RuntimeError("no disk")
def seen():
    from tests.support.seeing import call, seeing
    return seeing(), call(), {}
def branches(): return Refuses(), (torch.randn(2, 4),), {}
"""
