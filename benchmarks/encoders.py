"""Encoders for `quality.py`: a vision transformer on scikit-learn's digits, a BERT that learns masked words of books.

Both are trained here, on the device that is asked for, before anything is compressed: the first takes half a minute on
a CPU, the second two minutes on a GPU and an hour on two cores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scores import TRAIN_CHARACTERS, read_text, tokens_of
from tokenizers import Tokenizer
from torch import Tensor, nn

LENGTH, SHARE, IGNORED = 128, 0.15, -100


@dataclass(frozen=True, slots=True, eq=False)
class Encoder:
    """A trained encoder. Batches are ((inputs, labels), {}), of which the model itself reads the inputs only."""

    name: str
    model: nn.Module
    example: tuple[Tensor, Tensor]
    batches: list[Any]
    accuracy: Callable[[nn.Module], float]


def label_loss(output: Tensor, args: Any, kwargs: Any) -> Tensor:
    """Mean cross-entropy of logits [..., classes] with the labels that the call was given."""
    return nn.functional.cross_entropy(output.flatten(0, -2), args[1].flatten(), ignore_index=IGNORED)


def _fit(model: nn.Module, batches: Callable[[int], tuple[Tensor, Tensor]], steps: int, rate: float) -> None:
    """AdamW over `steps` batches, the rate rising to `rate` and falling to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for step in range(steps):
        inputs, labels = batches(step)
        optimizer.zero_grad()
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=inputs.is_cuda):
            output = model(inputs, labels)
        torch.autograd.backward(label_loss(output.float(), (inputs, labels), {}))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def _accuracy(inputs: Tensor, labels: Tensor) -> Callable[[nn.Module], float]:
    """The share of labels that a model's largest logit names."""

    def measured(model: nn.Module) -> float:
        with torch.no_grad():
            parts = zip(inputs.split(256), labels.split(256), strict=True)
            hits = [(model(x, y).argmax(-1) == y)[y != IGNORED] for x, y in parts]
        return float(torch.cat([h.flatten() for h in hits]).float().mean())

    return measured


# -- vision ------------------------------------------------------------------------------------------------------


class Patches(nn.Module):
    """A vision transformer for 8 × 8 images: 16 patches, four layers of PyTorch's own encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Linear(4, 64), nn.Parameter(torch.randn(16, 64) / 8)
        layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        patches = images.unfold(1, 2, 2).unfold(2, 2, 2).flatten(1, 2).flatten(2)
        out: Tensor = self.head(self.encoder(self.embed(patches) + self.place).mean(1))
        return out


def digits(device: str) -> Encoder:
    """Trained on 1,200 of scikit-learn's digits, judged on the other 597, calibrated on 512 of the first."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32, device=device) / 16
    labels = torch.tensor(data.target, device=device)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).to(device)
    train, test = order[:1200], order[1200:]
    torch.manual_seed(0)
    model, source = Patches().to(device), torch.Generator().manual_seed(1)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        chosen = train[torch.randint(len(train), (64,), generator=source)]
        return images[chosen], labels[chosen]

    _fit(model, batch, 1140, 2e-3)
    batches = [((images[i][None], labels[i][None]), {}) for i in train[:512]]
    return Encoder("digits", model, (images[:2], labels[:2]), batches, _accuracy(images[test], labels[test]))


# -- masked words ------------------------------------------------------------------------------------------------


class Masked(nn.Module):
    """A BERT of 4 layers, hidden 256, 4 heads, that tells masked tokens; the vocabulary's last token is the mask."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        from transformers import BertConfig, BertForMaskedLM

        sizes = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
        quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        self.bert = BertForMaskedLM(BertConfig(vocab_size=vocabulary, max_position_embeddings=LENGTH, **sizes, **quiet))

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        logits: Tensor = self.bert(ids).logits
        return logits


def masked_words(device: str, data: Path, steps: int) -> Encoder:
    """Trained on the first 20 million characters of train, judged on 512 windows of valid."""
    tokenizer = Tokenizer.from_file(str(data / "tokenizer.json"))
    mask = tokenizer.get_vocab_size()
    train, valid = (
        tokens_of(read_text(data / name, most), tokenizer).unfold(0, LENGTH, LENGTH)
        for name, most in (("train-0.txt.xz", TRAIN_CHARACTERS), ("valid.txt.xz", TRAIN_CHARACTERS))
    )
    source = torch.Generator().manual_seed(0)

    def hidden(windows: Tensor) -> tuple[Tensor, Tensor]:
        chosen = torch.rand(windows.shape, generator=source) < SHARE
        ids, labels = windows.masked_fill(chosen, mask), windows.masked_fill(~chosen, IGNORED)
        return ids.to(device), labels.to(device)

    torch.manual_seed(0)
    model = Masked(mask + 1).to(device)
    _fit(model, lambda step: hidden(train[torch.randint(len(train), (128,), generator=source)]), steps, 1e-3)
    batches = [(hidden(w[None]), {}) for w in train[torch.randint(len(train), (256,), generator=source)]]
    example = hidden(train[:2])
    return Encoder("masked words", model, example, batches, _accuracy(*hidden(valid[:512])))
