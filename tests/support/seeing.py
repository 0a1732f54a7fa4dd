"""A model that looks at an image and reads: torch.export does not take the whole, because it loops over sizes."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor, nn

VOCABULARY, HIDDEN, FFN = 11, 8, 12


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, FFN), nn.Linear(FFN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(self.up(self.norm(x)).sigmoid())
        return out


class Language(nn.Module):
    """The part that can be exported; its embedding is for others to call."""

    limit = 64

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.unused = nn.ModuleDict({"dropout": nn.Dropout(0.5)})
        self.register_buffer("shift", torch.ones(HIDDEN))
        self.config = SimpleNamespace(width=HIDDEN)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def widths(self) -> list[int]:
        return [block.up.out_features for block in self.blocks if isinstance(block, Block)]

    def get_embedding(self) -> nn.Module:
        return self.embed

    def forward(self, embeds: Tensor, *, scale: float = 1.0) -> dict[str, Tensor]:
        x = embeds * scale + self.get_buffer("shift")
        for block in self.blocks:
            x = block(x)
        return {"states": x}


class Features(nn.Module):
    """What is seen in one image [patches, HIDDEN]."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, FFN), nn.Linear(FFN, HIDDEN)

    def forward(self, patches: Tensor) -> Tensor:
        out: Tensor = self.down(self.up(patches).sigmoid())
        return out


class Sight(nn.Module):
    """Patches of images in one tensor [patches, HIDDEN]; sizes [images] say how many each image has."""

    def __init__(self) -> None:
        super().__init__()
        self.features = Features()

    def forward(self, patches: Tensor, sizes: Tensor) -> Tensor:
        seen = [self.features(part) for part in torch.split(patches, sizes.tolist()) if bool(part.any())]
        return torch.stack([part.mean(0) for part in seen])


class Seeing(nn.Module):
    """Logits of tokens, to whose embeddings what is seen is added; `calls`: how often the language part is called."""

    def __init__(self, *, tied: bool = True, calls: int = 1) -> None:
        super().__init__()
        self.language, self.sight = Language(), Sight()
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.language.embed.weight
        self.calls = calls
        self.reader: nn.Module = self.language.embed

    def forward(self, ids: Tensor, patches: Tensor, sizes: Tensor) -> Tensor:
        x = self.language.get_embedding()(ids).to(self.language.dtype)
        x = x + self.sight(patches, sizes)[:, None] / self.language.config.width
        for _ in range(self.calls):
            x = self.language(x, scale=0.5)["states"][:, : self.language.limit]
        logits: Tensor = self.head(x)
        return logits


def seeing(*, tied: bool = True, calls: int = 1) -> Seeing:
    """The model in float64, of fixed weights, in training mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Seeing(tied=tied, calls=calls).double()


def call(length: int = 5, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments: two rows of tokens, and two images."""
    source = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (2, length), generator=source)
    return ids, torch.randn(7, HIDDEN, generator=source, dtype=torch.float64), torch.tensor([3, 4])


def loss(output: Tensor, args: Sequence[Tensor], kwargs: object) -> Tensor:
    """Cross-entropy of the next token."""
    return nn.functional.cross_entropy(output[:, :-1].flatten(0, 1), args[0][:, 1:].flatten())
