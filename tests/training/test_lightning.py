"""Sparse training under Lightning, with checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ecospa_fx as eco
from ecospa_fx.errors import TrainingError

lightning: Any = pytest.importorskip("lightning")


def trainer(folder: Path, steps: int) -> tuple[eco.SparseTraining, Any, Any, Any]:
    """The driver, Lightning's trainer, its module and the data."""
    from ecospa_fx.training.lightning import SparseLightning

    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 24), nn.GELU(), nn.Linear(24, 3))
    sparse = eco.SparseTraining(network, (torch.zeros(8, 4),), schedule=eco.Linear(2, 5, 3), total_steps=6)

    class Module(lightning.LightningModule):  # type: ignore[misc]  # imported by this test alone
        def __init__(self) -> None:
            super().__init__()
            self.network = sparse.model

        def training_step(self, batch: list[Tensor], number: int) -> Tensor:
            squares: Tensor = (self.network(batch[0]) - batch[1]).square()
            return squares.mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    source = torch.Generator().manual_seed(0)
    # Every batch is the same: which ones come after a checkpoint, and how many to a step, is Lightning's affair.
    data = torch.utils.data.TensorDataset(*(torch.randn(8, n, generator=source).repeat(6, 1) for n in (4, 3)))
    checkpoints = lightning.pytorch.callbacks.ModelCheckpoint(folder, save_top_k=-1, save_on_train_epoch_end=True)
    run = lightning.Trainer(
        max_steps=steps, accelerator="cpu", accumulate_grad_batches=2, gradient_clip_val=1.0, logger=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[SparseLightning(sparse), checkpoints],
    )  # fmt: skip
    return sparse, run, Module(), torch.utils.data.DataLoader(data, batch_size=8)


@pytest.mark.filterwarnings("ignore")
def test_lightning_shrinks_its_module_and_resumes(tmp_path: Path) -> None:
    from ecospa_fx.training.lightning import load_lightning

    sparse, run, module, loader = trainer(tmp_path / "a", 6)
    run.fit(module, loader)
    assert [s.step for s in sparse.history] == [2, 5]
    assert sparse.removed == pytest.approx(0.5, abs=0.05)
    (written,) = (tmp_path / "a").glob("*step=3.ckpt")
    again, other, fresh, loader = trainer(tmp_path / "b", 6)
    load_lightning(again, written)
    assert len(again.history) == 1
    other.fit(fresh, loader, ckpt_path=written)
    assert again.plan == sparse.plan
    for name, weight in sparse.model.state_dict().items():
        assert weight.shape == again.model.state_dict()[name].shape, name
    torch.save({}, tmp_path / "empty.ckpt")
    with pytest.raises(TrainingError, match="holds no state of sparse training"):
        load_lightning(again, tmp_path / "empty.ckpt")
