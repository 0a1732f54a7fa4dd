"""From scratch on real text: the target size is reached near the dense loss, and the optimizer holds less."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import ecospa_fx as eco
from ecospa_fx import demo
from ecospa_fx.training.optimizer_surgery import optimizer_bytes

STEPS, BATCH, LENGTH, WIDTH, HEADS = 160, 12, 32, 48, 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.ffn = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(batch, length, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, WIDTH))
        out: Tensor = x + self.ffn(self.norms[1](x))
        return out


class Language(nn.Module):
    """A byte-level GPT of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, WIDTH)
        self.places = nn.Parameter(torch.zeros(LENGTH, WIDTH))
        self.blocks = nn.Sequential(Block(), Block())
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.blocks(self.embedding(ids) + self.places)))
        return logits


def trained(sparse_to: float | None) -> tuple[float, nn.Module, torch.optim.Optimizer, eco.SparseTraining | None]:
    """One run from scratch. Returns the loss on held-out text, the model, the optimizer and the driver."""
    torch.manual_seed(0)
    model: nn.Module = Language()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=STEPS)
    text, valid = (demo.encode(part) for part in demo.texts())
    source, sparse = torch.Generator().manual_seed(1), None
    if sparse_to is not None:
        ids = (text[: BATCH * LENGTH].view(BATCH, LENGTH),)
        sparse = eco.SparseTraining(model, ids, optimizer=optimizer, target=sparse_to, total_steps=STEPS)
        model = sparse.model
    for _ in range(STEPS):
        starts = torch.randint(len(text) - LENGTH, (BATCH, 1), generator=source)
        window = text[starts + torch.arange(LENGTH + 1)]
        torch.autograd.backward(cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten()))
        if sparse is not None:
            sparse.step()
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
    model.eval()
    held = valid[: 128 * (LENGTH + 1)].view(128, LENGTH + 1)
    with torch.no_grad():
        loss = cross_entropy(model(held[:, :-1]).flatten(0, 1), held[:, 1:].flatten())
    return loss.item(), model, optimizer, sparse


@pytest.mark.slow
def test_half_the_size_costs_at_most_two_percent_of_the_loss() -> None:
    dense_loss, dense, dense_optimizer, _ = trained(None)
    loss, model, optimizer, sparse = trained(0.5)
    assert sparse is not None
    assert dense_loss < 2.6, "the dense model has not learnt anything to lose"
    assert loss <= 1.02 * dense_loss, f"{loss:.4f} after shrinking, {dense_loss:.4f} dense"
    assert abs(sparse.removed - 0.5) < 0.01
    assert len(sparse.history) == 11
    parameters, before = (sum(p.numel() for p in m.parameters()) for m in (model, dense))
    gone = sparse.plan.removed_parameters
    assert parameters == before - gone
    tensors = len(list(model.parameters()))
    assert optimizer_bytes([dense_optimizer]) == 2 * 4 * before + 4 * tensors
    assert optimizer_bytes([optimizer]) == 2 * 4 * parameters + 4 * tensors
    assert optimizer_bytes([optimizer]) < 0.75 * optimizer_bytes([dense_optimizer])
