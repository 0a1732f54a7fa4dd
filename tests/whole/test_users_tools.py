"""After a plan was written back into a module, the tools that people use on it go on working."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ecospa_fx as eco
from tests.support.hugging import couplings_of, tiny
from tests.support.inplace import assert_loaded, half, largest, masked_twin, plan_of, uneven

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"  # which peft reads
)
GREEDY = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


def edited(name: str = "llama", count: Any = uneven) -> tuple[Any, Any, dict[str, Any]]:
    """A model with fewer FFN units and KV groups, and its dense twin with the same units masked."""
    return copy.deepcopy(_edited(name, count))


@cache
def _edited(name: str, count: Any) -> tuple[Any, Any, dict[str, Any]]:
    model, kwargs = tiny(name)
    plan = plan_of(couplings_of(name), ["ffn", "heads"], count)
    twin = masked_twin(model, plan)
    with pytest.warns(UserWarning, match="cannot say how wide the layers") if count is uneven else nullcontext():
        return eco.shrink_(model, plan, (), kwargs), twin, kwargs


def rows(count: int) -> list[dict[str, Tensor]]:
    """Sequences of a pattern that is easy to learn."""
    starts = torch.randint(3, 40, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    return [{"input_ids": torch.arange(s, s + 12), "labels": torch.arange(s, s + 12)} for s in starts]


def train(model: Any, folder: Path, steps: int = 10) -> tuple[float, float]:
    """The loss before and after a short run of transformers.Trainer."""
    pytest.importorskip("accelerate")
    options: Any = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=8, learning_rate=1e-2, report_to=[],
        use_cpu=True, disable_tqdm=True, save_strategy="no", label_names=["labels"], remove_unused_columns=False,
    )  # fmt: skip
    trainer: Any = transformers.Trainer(model, options, train_dataset=rows(80), eval_dataset=rows(16))
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    return before, trainer.evaluate()["eval_loss"]


# -- generation --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def generating(request: pytest.FixtureRequest) -> tuple[Any, Any, Tensor]:
    """An edited model, its masked twin and a prompt."""
    torch.manual_seed(0)
    own, twin, kwargs = edited(request.param)
    return own, twin, kwargs["input_ids"][:1, :4]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"use_cache": False}, {}, {"cache_implementation": "static"}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 2}],
    ids=["no cache", "cache", "static cache", "beams", "looked up"],
)
def test_generation(generating: tuple[Any, Any, Tensor], options: dict[str, Any]) -> None:
    own, twin, prompt = generating
    assert torch.equal(own.generate(prompt, **GREEDY, **options), twin.generate(prompt, **GREEDY, **options))


def test_generation_with_the_model_as_its_own_assistant(generating: tuple[Any, Any, Tensor]) -> None:
    own, twin, prompt = generating
    assert torch.equal(
        own.generate(prompt, **GREEDY, assistant_model=copy.deepcopy(own)), twin.generate(prompt, **GREEDY)
    )


# -- training ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_trainer_trains_and_what_it_saves_is_a_standard_checkpoint(tmp_path: Path) -> None:
    own, _, kwargs = edited(count=half)
    before, after = train(own, tmp_path / "runs")
    assert after < 0.7 * before
    own.save_pretrained(tmp_path / "saved")
    loaded = type(own).from_pretrained(tmp_path / "saved", dtype=torch.float64).eval()
    assert_loaded(loaded, own.eval(), kwargs)


@pytest.mark.slow
def test_other_widths_in_each_layer_train_and_are_saved_by_this_library(tmp_path: Path) -> None:
    own, _, kwargs = edited()
    before, after = train(own, tmp_path / "runs")
    assert after < 0.7 * before
    eco.save(own, tmp_path / "saved")
    loaded = eco.load(tmp_path / "saved")
    assert_loaded(loaded, own.eval(), kwargs)


# -- adapters ----------------------------------------------------------------------------------------------------


def adapters() -> Any:
    """The package; its tests are skipped where it is not there."""
    return pytest.importorskip("peft")


def adapted(model: nn.Module) -> Any:
    """The model with low-rank adapters that do something."""
    peft = adapters()
    found: Any = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM")
    ).double()
    with torch.no_grad():
        for key, parameter in found.named_parameters():
            if "lora_B" in key:
                parameter.copy_(torch.randn(parameter.shape, dtype=parameter.dtype))
    return found


@pytest.mark.slow
def test_adapters_on_an_edited_module(tmp_path: Path) -> None:
    own, _, kwargs = edited()
    base = copy.deepcopy(own)
    model = adapted(own)
    before, after = train(model, tmp_path / "runs")
    assert after < before
    frozen = dict(base.named_parameters())
    for name, parameter in model.base_model.model.named_parameters():
        if "lora" not in name:
            assert torch.equal(parameter, frozen[name.replace(".base_layer", "")])
    model.save_pretrained(tmp_path / "adapter")
    again: Any = adapters().PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        want = model.eval()(**kwargs).logits
        assert torch.equal(again(**kwargs).logits, want)
        assert largest(again.merge_and_unload()(**kwargs).logits, want) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("form", ["graph", "module"])
def test_a_model_with_adapters_is_made_smaller_with_them(form: str) -> None:
    dense, kwargs = tiny("llama", num_hidden_layers=1)
    model = adapted(dense).eval()
    plan = plan_of(eco.detect(model, (), kwargs), ["ffn", "heads", "pair"], uneven)
    twin = masked_twin(model, plan)
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    small: Any = (eco.shrink if form == "graph" else eco.shrink_)(model, plan, (), kwargs)
    assert {name: parameter.requires_grad for name, parameter in small.named_parameters()} == trainable
    with torch.no_grad():
        want = twin(**kwargs).logits
        assert largest(small(**kwargs).logits, want) < 1e-12
        if form == "module":
            assert largest(small.merge_and_unload()(**kwargs).logits, want) < 1e-9


@pytest.mark.slow
def test_what_adapters_say_of_themselves_follows_so_that_more_can_be_added() -> None:
    dense, kwargs = tiny("llama", num_hidden_layers=1)
    model = adapted(dense).eval()
    eco.shrink_(model, plan_of(eco.detect(model, (), kwargs), ["ffn", "heads"], half), (), kwargs)
    model.add_adapter("more", adapters().LoraConfig(r=2, target_modules=TARGETS, task_type="CAUSAL_LM"))
    model.set_adapter("more")
    model.double()(**kwargs).logits.sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora" in n and ".more." in n)


# -- after the whole recipe ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_compressed_model_trains_and_takes_adapters(tmp_path: Path) -> None:
    """`compress_` leaves an object that the tools of its library take, with the weights that it was given."""
    own, kwargs = tiny("llama", num_hidden_layers=1)
    batches: list[Any] = [((), {**kwargs, "input_ids": kwargs["input_ids"].roll(i, -1)}) for i in range(3)]
    options: dict[str, Any] = {"ratio": 0.3, "batches": batches, "kinds": ["ffn"], "distillation": 2}

    def loss(output: Any, args: Any, kwargs: Any) -> Tensor:
        return nn.functional.cross_entropy(output.logits.flatten(0, 1), kwargs["input_ids"].flatten())

    assert eco.compress_(own, (), kwargs, loss=loss, uniform=True, **options) is own
    assert own.get_parameter("model.layers.0.mlp.up_proj.weight").shape[0] < 112
    model, base = adapted(copy.deepcopy(own)).eval(), copy.deepcopy(own)
    model.save_pretrained(tmp_path / "adapter")
    again: Any = adapters().PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        want = model(**kwargs).logits
        assert torch.equal(again(**kwargs).logits, want)
        assert largest(again.merge_and_unload()(**kwargs).logits, want) < 1e-9
    for trained in (model, own):
        before, after = train(trained, tmp_path / "runs", steps=6)
        assert after < before
