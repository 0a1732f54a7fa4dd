"""Sparse training under ``transformers.Trainer``.

    sparse = eco.SparseTraining(model, (), batch, total_steps=1_000)
    trainer = Trainer(sparse.model, arguments, train_dataset=data, callbacks=[SparseCallback(sparse)])
    trainer.train()

batch: a dictionary as the collator makes it, labels included, so that the graph computes the loss. The trainer sees a
module whose ``forward`` takes anything: tell it ``remove_unused_columns=False`` and, for evaluation,
``label_names=["labels"]`` in its arguments. To resume, call `load_checkpoint` before
``trainer.train(resume_from_checkpoint=folder)``. Of ``load_best_model_at_end``, checkpoints from before the last shrink
do not count: they are of a larger model. Tied parameters are in checkpoints once, as in those of transformers.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ecospa_fx.errors import TrainingError
from ecospa_fx.training.sparse import SparseTraining

FILE = "sparse_training.pt"
"""In every checkpoint folder, beside the trainer's own files."""


class SparseCallback(TrainerCallback):
    """Steps `sparse` before every step of the trainer's optimizer, and keeps its state in the checkpoints."""

    def __init__(self, sparse: SparseTraining) -> None:
        self.sparse = sparse
        # The graph takes the arguments of its example and no others, such as the number of labels in all micro-batches.
        sparse.model.__dict__["accepts_loss_kwargs"] = False
        _save_tied_once(sparse.model)

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if args.gradient_checkpointing:
            raise TrainingError(
                "gradient_checkpointing needs a model of transformers, and this is a graph: put checkpoint_wrapper of "
                "torch.distributed around the layers of sparse.model"
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **values: object
    ) -> None:
        optimizer = values.get("optimizer")
        inner = getattr(optimizer, "optimizer", optimizer)
        if not isinstance(inner, Optimizer):
            raise TrainingError(f"the trainer has an optimizer of type {type(inner).__name__}, which cannot be cut")
        self.sparse.attach(inner)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if not self.sparse.finished:
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self.sparse.step()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        folder = Path(args.output_dir or "") / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            torch.save(self.sparse.state_dict(), folder / FILE)


class _DropAliases:
    """Leaves further names of tied parameters out of a model's state. tied: these names, and those that stay."""

    def __init__(self, tied: dict[str, str]) -> None:
        self.tied = tied

    def __call__(self, _: nn.Module, state: dict[str, Tensor], prefix: str, *__: object) -> None:
        for name in self.tied:
            state.pop(prefix + name, None)


class _RestoreAliases(_DropAliases):
    """Reads states without these names."""

    def __call__(self, _: nn.Module, state: dict[str, Tensor], prefix: str, *__: object) -> None:
        for name, first in self.tied.items():
            if prefix + first in state:
                state.setdefault(prefix + name, state[prefix + first])


def _save_tied_once(model: nn.Module) -> None:
    """Let tied parameters be in a model's state once, as safetensors wants it."""
    first: dict[int, str] = {}
    names = {name: first.setdefault(id(t), name) for name, t in model.state_dict(keep_vars=True).items()}
    tied = {name: other for name, other in names.items() if name != other}
    if tied:
        model.register_state_dict_post_hook(_DropAliases(tied))  # type: ignore[no-untyped-call]
        model.register_load_state_dict_pre_hook(_RestoreAliases(tied))  # type: ignore[no-untyped-call]


def load_checkpoint(sparse: SparseTraining, folder: str | Path) -> None:
    """Bring the model to the sizes that it had when the trainer wrote a checkpoint."""
    path = Path(folder) / FILE
    if not path.is_file():
        raise TrainingError(f"there is no {FILE} in {folder}: it was not written by a trainer with SparseCallback")
    sparse.load_state_dict(torch.load(path, weights_only=True))
