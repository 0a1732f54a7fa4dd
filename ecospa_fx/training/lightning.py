"""Sparse training under ``lightning.pytorch.Trainer``.

    sparse = eco.SparseTraining(network, (ids,), total_steps=1_000)
    module = MyLightningModule(sparse.model)
    lightning.Trainer(max_steps=1_000, callbacks=[SparseLightning(sparse)]).fit(module, loader)

The optimizers of the module hold parameters of `sparse.model` and no others. To resume, call `load_lightning` before
``fit(…, ckpt_path=path)``.
"""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from ecospa_fx.errors import TrainingError
from ecospa_fx.training.sparse import SparseTraining


class SparseLightning(Callback):
    """Steps `sparse` before every step of the optimizer, and keeps its state in the checkpoints."""

    def __init__(self, sparse: SparseTraining) -> None:
        self.sparse = sparse

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.sparse.attach(trainer.optimizers)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self.sparse.step()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, object]) -> None:
        checkpoint[KEY] = self.sparse.state_dict()


KEY = "ecospa_fx"
"""In every checkpoint, beside what Lightning writes."""


def load_lightning(sparse: SparseTraining, path: str | Path) -> None:
    """Bring the model to the sizes that it had when Lightning wrote a checkpoint."""
    state = torch.load(path, map_location="cpu", weights_only=True).get(KEY)
    if state is None:
        raise TrainingError(f"{path} holds no state of sparse training: it was not written with SparseLightning")
    sparse.load_state_dict(state)
