"""Plans written back into modules: equal to masking, and the module untouched where that cannot be."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import ecospa_fx as eco
from ecospa_fx.errors import PlanError
from ecospa_fx.inplace.calls import has_varied_tensor
from ecospa_fx.inplace.equivalence import EquivalenceCheck
from ecospa_fx.plan import Plan
from tests.support.hugging import tiny
from tests.support.inplace import assert_same, half, kept, largest, masked_twin, plan_of, state, uneven
from tests.whole.test_beyond import WIDTH as GROUP_WIDTH
from tests.whole.test_beyond import Cached, noise, write_rows

HIDDEN, HEADS, WIDTH = 24, 4, 6


class Attention(nn.Module):
    """Attention whose attributes carry its heads and its split; `how`: where its head dimension comes from."""

    def __init__(self, how: str = "attribute", number: int = 0) -> None:
        super().__init__()
        self.how, self.heads, self.head_dim, self.split = how, HEADS, WIDTH, HEADS * WIDTH
        self.layer_idx = number  # equals the number of heads in one layer, by chance
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HEADS * WIDTH), nn.Linear(HEADS * WIDTH, HIDDEN)

    def forward(self, x: Tensor, double: bool = False) -> Tensor:
        batch, length, width = x.shape
        split = self.split if self.how == "attribute" else width
        width = self.head_dim if self.how == "attribute" else width // self.heads
        q, k, v = (y.view(batch, length, -1, width).transpose(1, 2) for y in self.qkv(x).split(split, -1))
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True, scale=1 / WIDTH)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, -1))
        return out * 2 if double else out


class Model(nn.Module):
    def __init__(self, how: str = "attribute", layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention(how, i) for i in range(layers))
        self.up, self.down = nn.Linear(HIDDEN, 40), nn.Linear(40, HIDDEN)

    def forward(self, x: Tensor, double: bool = False) -> Tensor:
        for layer in self.layers:
            x = x + layer(x, double)
        out: Tensor = x + self.down(self.up(x).relu())
        return out


def example() -> tuple[Tensor, ...]:
    return (torch.randn(2, 5, HIDDEN, dtype=torch.float64),)


# -- a module of one's own ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [["ffn"], ["heads"], ["qk", "vo"], ["ffn", "heads"]])
def test_attributes_follow(kinds: list[str]) -> None:
    model, args = Model().double(), example()
    dense = copy.deepcopy(model)
    plan = plan_of(eco.detect(model, args), kinds, half if "qk" in kinds else uneven)
    assert eco.shrink_(model, plan, args) is model
    twin = masked_twin(dense, plan)
    for x in (args[0], torch.randn(3, 7, HIDDEN, dtype=torch.float64)):
        assert largest(model(x), twin(x)) < 1e-12
        assert largest(model(x, double=True), twin(x, double=True)) < 1e-12
    assert {n: p.numel() for n, p in model.named_parameters()} == {
        n: int(plan.masks(dense)[n].sum()) if n in plan.masks(dense) else p.numel() for n, p in dense.named_parameters()
    }


@pytest.mark.slow
def test_what_describes_follows_and_what_happens_to_be_equal_does_not() -> None:
    model, args = Model(layers=5).double(), example()
    plan = plan_of(eco.detect(model, args), ["heads", "ffn"], half)
    eco.shrink_(model, plan, args)
    layers: Any = model.layers
    first = layers[0]
    assert [layer.layer_idx for layer in layers] == [0, 1, 2, 3, 4]
    assert (first.split, first.head_dim, first.heads) == (12, WIDTH, 2)
    assert (first.qkv.in_features, first.qkv.out_features, first.out.in_features) == (HIDDEN, 36, 12)
    assert (first.out.out_features, model.up.out_features, model.down.in_features) == (HIDDEN, 20, 20)


@pytest.mark.parametrize("bias", [True, False])
def test_a_square_weight_is_told_by_its_constructor(bias: bool) -> None:
    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 8, bias), nn.Linear(8, 8, bias)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.down(self.up(x).relu())
            return out

    model, args = Square().double(), (torch.randn(3, 8, dtype=torch.float64),)
    eco.shrink_(model, plan_of(eco.detect(model, args), ["ffn"], half), args)
    assert (model.up.in_features, model.up.out_features) == (8, 4)
    assert (model.down.in_features, model.down.out_features) == (4, 8)


def test_what_the_code_takes_from_its_input_cannot_be_carried() -> None:
    model, args = Model("input").double(), example()
    couplings = eco.detect(model, args)
    model(*args).sum().backward()
    model.layers[1].eval()
    before = state(model)
    plan = plan_of(couplings, ["heads", "ffn"], half)
    with pytest.raises(PlanError, match=r"'layers.0.heads' \(and 1 like it\) cannot be written back .*expressible_in"):
        eco.shrink_(model, plan, args)
    assert_same(model, before)


def test_weights_of_zero_hide_nothing() -> None:
    model, args = Model("input").double(), example()
    plan = plan_of(eco.detect(model, args), ["qk", "vo"], half)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    with pytest.raises(PlanError, match="cannot be written back"):
        eco.shrink_(model, plan, args)


@pytest.mark.slow
def test_inputs_that_are_all_the_same_hide_nothing() -> None:
    """Over equal tokens any attention gives the same: half of the heads would pass for half of every head."""
    model, kwargs = tiny("llama", num_key_value_heads=4)
    zeros = {**kwargs, "input_ids": torch.zeros_like(kwargs["input_ids"])}
    plan = plan_of(eco.detect(model, (), kwargs), ["heads"], half)
    twin: Any = masked_twin(model, plan)
    config: Any = eco.shrink_(model, plan, (), zeros).config
    assert (config.num_attention_heads, config.head_dim) == (2, 16)
    assert largest(model(**kwargs).logits, twin(**kwargs).logits) < 1e-12
    bench = EquivalenceCheck(Model().double(), (torch.ones_like(example()[0]),), {})
    assert any(has_varied_tensor(call) for call in bench.calls)


def test_inputs_that_cannot_differ_are_refused() -> None:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.up, self.down = nn.Embedding(1, 8), nn.Linear(8, 12), nn.Linear(12, 8)

        def forward(self, ids: Tensor) -> Tensor:
            out: Tensor = self.down(self.up(self.table(ids)).relu())
            return out

    model, args = First().double(), (torch.zeros(2, 3, dtype=torch.long),)
    before = state(model)
    with pytest.raises(PlanError, match="hold the same number everywhere"):
        eco.shrink_(model, plan_of(eco.detect(model, args), ["ffn"], half), args)
    assert_same(model, before)


def test_a_failure_in_the_users_own_module_is_taken_back() -> None:
    class Guarded(Model):
        def forward(self, x: Tensor, double: bool = False) -> Tensor:
            if x.dtype is torch.float32 and self.up.weight.shape[0] < 40:  # the copy computes in float64
                raise RuntimeError("too narrow")
            return super().forward(x, double)

    model, args = Guarded(), (example()[0].float(),)
    plan = plan_of(eco.detect(model, args), ["ffn"], half)
    before = state(model)
    with pytest.raises(RuntimeError, match="too narrow"):
        eco.shrink_(model, plan, args)
    assert_same(model, before)


def test_parameters_stay_objects_with_gradients_hooks_and_modes() -> None:
    model, args = Model().double().train(), example()
    plan = plan_of(eco.detect(model, args), ["ffn"], half)
    weight, called = model.up.weight, []
    model.up.register_forward_hook(lambda *_: called.append(1))
    model(*args).sum().backward()
    assert weight.grad is not None
    grad = weight.grad.clone()
    eco.shrink_(model, plan, args)
    assert model.up.weight is weight
    assert torch.equal(weight.grad, grad[list(plan.selections[0].keep[0])])
    assert model.training
    called.clear()
    optimizer = torch.optim.AdamW(model.parameters())
    model(*args).square().mean().backward()
    optimizer.step()
    assert called == [1]


def test_tied_parameters_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.again, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
            self.again.weight = self.up.weight

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.down(self.up(x).relu() + self.again(x).relu())
            return out

    model, args = Tied().double(), (torch.randn(3, 8, dtype=torch.float64),)
    plan = plan_of(eco.detect(model, args), ["ffn"], half)
    twin = masked_twin(model, plan)
    eco.shrink_(model, plan, args)
    assert model.again.weight is model.up.weight
    assert largest(model(*args), twin(*args)) < 1e-12


class Wide(Cached):
    """With the widths of its heads in attributes."""

    def __init__(self, write: Any) -> None:
        super().__init__(write)
        self.width, self.other = GROUP_WIDTH, GROUP_WIDTH

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        q, k = (f(x).unflatten(-1, (-1, self.width)).transpose(1, 2) for f in (self.q, self.k))
        v = self.v(x).unflatten(-1, (-1, self.other)).transpose(1, 2)
        self.write(self.keys, at, k)
        self.write(self.values, at, v)
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (self.keys, self.values))
        mixed = scaled_dot_product_attention(q, k, v, scale=0.4)
        out: Tensor = self.o(mixed.transpose(1, 2).flatten(2))
        return out


@pytest.mark.slow
def test_caches_in_buffers_follow() -> None:
    torch.manual_seed(0)
    args = noise(2, 1, 12), torch.tensor([3])
    model = Wide(write_rows).double()
    couplings = eco.detect(model, args)
    plan = Plan((kept(couplings["qk"], 4),), tuple(couplings.shapes.items()))
    twin = masked_twin(model, plan)
    eco.shrink_(model, plan, args)
    assert largest(model(*args), twin(*args)) < 1e-9
    assert (model.keys.shape[-1], model.width, model.other) == (4, 4, GROUP_WIDTH)


def test_another_model_and_weights_on_meta_are_refused() -> None:
    model, args = Model().double(), example()
    plan = plan_of(eco.detect(model, args), ["ffn"], half)
    with pytest.raises(PlanError, match="made for another model"):
        eco.shrink_(Model(layers=1).double(), plan, args)
    with pytest.raises(PlanError, match="on meta, where no edit can be proven"):
        eco.shrink_(Model().to("meta"), plan, args)


@pytest.mark.slow
def test_a_plan_after_another_and_saving() -> None:
    model, args = Model().double(), example()
    eco.shrink_(model, plan_of(eco.detect(model, args), ["ffn"], half), args)
    assert hasattr(model, "ecospa_origin")
    plan = plan_of(eco.detect(model, args), ["heads"], half)
    twin = masked_twin(model, plan)
    eco.shrink_(model, plan, args)
    assert largest(model(*args), twin(*args)) < 1e-12
    assert not hasattr(model, "ecospa_origin")
