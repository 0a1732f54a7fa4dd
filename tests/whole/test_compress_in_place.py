"""`compress_`: the whole recipe, written back into the user's own object."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ecospa_fx as eco
from ecospa_fx.errors import OptionError, PlanError
from ecospa_fx.importance.score import Batch
from ecospa_fx.inplace import shrink
from ecospa_fx.inplace.edits import Edits
from tests.support.hugging import tiny
from tests.support.inplace import assert_same, largest, state


class Residual(nn.Module):
    """Two MLPs, the second one's output weight tied to a head's."""

    def __init__(self) -> None:
        super().__init__()
        self.ups = nn.ModuleList(nn.Linear(8, 24) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(24, 8) for _ in range(2))
        self.norm, self.first, self.second = nn.LayerNorm(8), nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        for up, down in zip(self.ups, self.downs, strict=True):
            x = x + down(up(self.norm(x)).relu())
        out: Tensor = self.second(self.first(x).tanh())
        return out


def square(output: Tensor, args: Any, kwargs: Any) -> Tensor:
    return output.square().mean()


def rows(count: int = 6) -> list[Batch]:
    source = torch.Generator().manual_seed(0)
    return [((torch.randn(4, 8, generator=source),), {}) for _ in range(count)]


def compressed(model: nn.Module, **options: Any) -> nn.Module:
    batches = rows()
    given: dict[str, Any] = {"ratio": 0.4, "batches": batches, "loss": square, "distillation": 4, **options}
    return eco.compress_(model, batches[0][0], **given)


def test_a_module_of_ones_own_is_compressed_in_place() -> None:
    torch.manual_seed(0)
    model, calls = Residual().train(), list[object]()
    model.first.weight.requires_grad_(False)
    model.register_forward_hook(lambda *call: calls.append(call))
    dense, parameters = copy.deepcopy(model), dict(model.named_parameters(remove_duplicate=False))
    small = eco.compress(dense, rows()[0][0], ratio=0.4, batches=rows(), loss=square, distillation=4,
                         expressible_in="module")  # fmt: skip
    assert compressed(model) is model
    assert model.training
    assert dict(model.named_parameters(remove_duplicate=False)) == parameters  # the same objects
    assert model.first.weight is model.second.weight
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in dense.parameters()]
    for up, down in zip(model.ups, model.downs, strict=True):
        assert up.weight.shape[0] == up.out_features == down.in_features == down.weight.shape[1]  # type: ignore[index]
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in dense.parameters())
    calls.clear()
    x = torch.randn(5, 8)
    assert largest(model(x), small(x)) < 1e-6
    assert len(calls) == 1


def test_gradients_of_the_weights_before_are_dropped() -> None:
    model = Residual()
    model(rows()[0][0][0]).sum().backward()
    compressed(model)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("step", ["warn_of_stale", "_check_weights", "_check_outputs"])
def test_a_failure_leaves_the_model_as_it_was(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However late: also where all is written, and only a warning is left to give."""

    def broken(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    model = Residual().train()
    model(rows()[0][0][0]).sum().backward()
    before, gradients = state(model), {n: p.grad for n, p in model.named_parameters()}
    monkeypatch.setattr(shrink, step, broken)
    with pytest.raises(KeyboardInterrupt):
        compressed(model)
    assert_same(model, before)
    assert all(p.grad is gradients[n] for n, p in model.named_parameters())
    assert model.first.weight is model.second.weight


def test_weights_that_are_not_those_of_the_graph_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the copy, in float64, before anything is written."""
    model = Residual()
    before, weights = state(model), Edits.weights

    def shaken(edits: Edits, small: nn.Module, values: Any) -> None:
        weights(edits, small, {n: v + 1e-3 * isinstance(small, Residual) for n, v in values.items()})

    monkeypatch.setattr(Edits, "weights", shaken)
    with pytest.raises(PlanError, match="does not give what the compressed graph gives"):
        compressed(model)
    assert_same(model, before)


def test_what_the_code_cannot_carry_is_refused() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.down(self.up(x).relu().view(-1, 12))
            return out

    model = Fixed()
    before = state(model)
    with pytest.raises(PlanError, match="the code of Fixed can carry none of its couplings"):
        compressed(model)
    with pytest.raises(PlanError, match=r"coupling 'ffn' cannot be written back into the module: no edit .*\(.*\)"):
        compressed(model, ratio=None, widths={"ffn": 6})
    with pytest.raises(OptionError, match=r"compress_\(\).*bogus"):
        compressed(model, bogus=1)
    assert_same(model, before)


@pytest.mark.parametrize("scores", [None, {"ffn": torch.arange(24.0)[None], "ffn.2": torch.arange(24.0)[None]}])
def test_widths_are_tried_before_anything_slow(scores: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that the code cannot carry never reach the data; those that it can are made, whatever may be offered."""

    class Uneven(Residual):
        def forward(self, x: Tensor) -> Tensor:
            count = len(self.get_parameter("ups.0.weight"))
            return super().forward(x) if count in (24, 12) else super().forward(x) + 1e-3 * count

    read = list[object]()

    def counted(*call: Any) -> Tensor:
        read.append(call)
        return square(*call)

    model = Uneven()
    before, names = state(model), [c.name for c in eco.detect(model, rows()[0][0]).offered if c.kind == "ffn"]
    given = None if scores is None else dict(zip(names, scores.values(), strict=True))
    with pytest.raises(PlanError, match="cannot be written back"):
        compressed(model, ratio=None, widths={"ffn*": 8}, scores=given, loss=counted)
    assert not read
    assert_same(model, before)
    compressed(model, ratio=None, widths={"*": 12}, scores=given, loss=counted, kinds="ffn", allow="cache")
    assert read
    assert model.get_parameter("ups.1.weight").shape == (12, 8)


# -- models of transformers --------------------------------------------------------------------------------------


def shifted(output: Any, args: Any, kwargs: Any) -> Tensor:
    """Cross entropy with the inputs themselves, or a square where there are none."""
    logits = output.logits
    if "input_ids" not in kwargs:
        return square(logits, args, kwargs)
    return nn.functional.cross_entropy(logits.flatten(0, 1), kwargs["input_ids"].flatten())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "uniform"), [("llama", False), ("qwen3", True), ("gpt2", False), ("bert", False), ("vit", True)]
)
def test_models_of_transformers(name: str, uniform: bool) -> None:
    model, kwargs = tiny(name)
    dense, own = copy.deepcopy(model), model
    key = next(iter(kwargs))
    batches: list[Batch] = [((), {**kwargs, key: kwargs[key].roll(i, -1)}) for i in range(4)]
    options: Any = {"ratio": 0.3, "batches": batches, "loss": shifted, "distillation": 4, "uniform": uniform}
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        assert eco.compress_(own, (), kwargs, **options) is own
    assert any("cannot say how wide" in str(w.message) for w in noted) is not uniform
    assert sum(p.numel() for p in own.parameters()) < sum(p.numel() for p in dense.parameters())
    for path, module in own.named_modules():
        if isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features), path
    generating: Any = own
    if name in ("llama", "qwen3", "gpt2"):
        plain = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        prompt = kwargs["input_ids"][:, :4]
        tokens = generating.generate(prompt, **plain)
        assert torch.equal(tokens, generating.generate(prompt, **plain, use_cache=False))
        assert torch.equal(tokens, generating.generate(prompt, **plain, cache_implementation="static"))
        padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), prompt], 1)
        mask = torch.cat([torch.zeros(2, 3), torch.ones(2, 4)], 1).long()
        assert torch.equal(tokens[:, 4:], generating.generate(padded, attention_mask=mask, **plain)[:, 7:])
        assert generating.generate(prompt, num_beams=2, **plain).shape == (2, 10)
    if uniform:
        again: Any = type(own)(generating.config).double().eval()
        again.load_state_dict(own.state_dict())
        with torch.no_grad():
            assert largest(again(**kwargs).logits, generating(**kwargs).logits) < 1e-9
