"""Sparse training under transformers.Trainer, with checkpoints."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import ecospa_fx as eco
from ecospa_fx.errors import TrainingError

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


def rows(count: int) -> list[dict[str, torch.Tensor]]:
    source = torch.Generator().manual_seed(0)
    found = [torch.randint(5, 60, (9,), generator=source) for _ in range(count)]
    return [{"input_ids": ids, "labels": ids} for ids in found]


def trainer(folder: Path, steps: int, tied: bool = False, **options: Any) -> tuple[eco.SparseTraining, Any]:
    from ecospa_fx.training.callback import SparseCallback

    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, use_cache=False, attention_dropout=0.1, tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    batch = {name: torch.stack([row[name] for row in rows(2)]) for name in ("input_ids", "labels")}
    sparse = eco.SparseTraining(model, (), batch, schedule=eco.Linear(start=2, end=5, every=3), total_steps=6)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        save_steps=options.pop("save_steps", 3), **options,
        report_to=[], remove_unused_columns=False, label_names=["labels"], use_cpu=True,
        disable_tqdm=True, logging_steps=2,
    )  # fmt: skip
    data = rows(24)
    return sparse, transformers.Trainer(
        sparse.model, arguments, train_dataset=data, eval_dataset=data[:4], callbacks=[SparseCallback(sparse)]
    )


@pytest.mark.slow
def test_a_trainer_shrinks_its_model_and_resumes(tmp_path: Path) -> None:
    """Of tied weights, which a checkpoint has once; the best checkpoint, below, is one of others."""
    from ecospa_fx.training.callback import load_checkpoint

    sparse, first = trainer(tmp_path / "a", 6, tied=True)
    first.train()
    assert [s.step for s in sparse.history] == [2, 5]
    assert sparse.removed == pytest.approx(0.5, abs=0.03)
    assert first.evaluate()["eval_loss"] > 0
    again, second = trainer(tmp_path / "b", 6, tied=True)
    load_checkpoint(again, tmp_path / "a" / "checkpoint-3")
    assert len(again.history) == 1
    second.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert again.plan == sparse.plan
    assert len(pickle.dumps(first.model)) > 0
    for name, weight in sparse.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name]), name
    with pytest.raises(TrainingError, match=r"there is no sparse_training\.pt"):
        load_checkpoint(again, tmp_path)


@pytest.mark.slow
def test_the_best_checkpoint_is_one_of_the_final_size(tmp_path: Path) -> None:
    """A rate that does harm makes the first checkpoint the best one, and it is too large."""
    sparse, own = trainer(
        tmp_path, 6, save_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, learning_rate=0.5
    )
    own.train()
    assert sparse.finished
    assert own.state.best_global_step >= 5
    assert sparse.removed == pytest.approx(0.5, abs=0.03)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_checkpointing_that_needs_a_model_of_transformers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="gradient_checkpointing"):
        trainer(tmp_path, 6, gradient_checkpointing=True)
