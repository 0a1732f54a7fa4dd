"""Ragged plans: heads keep different numbers of units, and everything equals masking."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

import ecospa_fx as eco
from ecospa_fx.coupling.couplings import Couplings
from ecospa_fx.errors import PlanError
from ecospa_fx.passes import ShrinkCouplings
from ecospa_fx.plan import Plan
from ecospa_fx.verify import masked, masked_error

HEADS, WIDTH, HIDDEN = 4, 6, 16
EXACT = 1e-9


class Attention(nn.Module):
    """Queries, keys and values in one matrix, all with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HEADS * WIDTH), nn.Linear(HEADS * WIDTH, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for p in self.qkv(x).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        result: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return result


class Einsum(nn.Module):
    """The same heads, read by other operators than matrix products with a stored matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.randn(HIDDEN, HEADS * WIDTH))
        self.scale, self.out = nn.Parameter(torch.randn(HEADS * WIDTH)), nn.Linear(HEADS * WIDTH, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        v = torch.einsum("bth,hd->btd", x, self.value) * self.scale
        v = v.view(*x.shape[:2], HEADS, WIDTH)
        v = torch.einsum("bthd,buhd->bhtu", v, v) @ v.transpose(1, 2)
        result: Tensor = self.out(v.transpose(1, 2).flatten(2))
        return result


def made(kind: type[nn.Module]) -> tuple[nn.Module, Couplings, tuple[Tensor]]:
    torch.manual_seed(0)
    model, args = kind().double(), (torch.randn(2, 5, HIDDEN, dtype=torch.float64),)
    return model, eco.detect(model, args), args


def drawn(couplings: Couplings, seed: int) -> Plan:
    return eco.plan(couplings, ratio=0.4, scores="random", seed=seed, allocation="ragged", floor=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Attention, Einsum])
@pytest.mark.parametrize("seed", range(4))
def test_equal_to_masking_with_gradients(kind: type[nn.Module], seed: int) -> None:
    model, couplings, args = made(kind)
    plan = drawn(couplings, seed)
    small = eco.shrink(model, plan, args)
    other = torch.randn(3, 7, HIDDEN, dtype=torch.float64)
    assert plan.ragged
    assert masked_error(model, small, plan, (other,)) <= EXACT
    small(other).square().sum().backward()
    with masked(model, plan):
        model(other).square().sum().backward()
    for name, mask in plan.masks(model).items():
        own, dense = small.get_parameter(name), model.get_parameter(name)
        assert own.grad is not None
        assert dense.grad is not None
        torch.testing.assert_close(own.grad.flatten(), dense.grad[mask], rtol=1e-9, atol=1e-9)


def test_products_run_at_the_width_of_what_is_kept() -> None:
    model, couplings, args = made(Attention)
    plan = drawn(couplings, 1)
    graph = torch.export.export(model, args).module()
    assert isinstance(graph, fx.GraphModule)
    small = ShrinkCouplings(plan).run(graph).graph_module
    products = [n for n in small.graph.nodes if n.target is torch.ops.aten.linear.default]
    weights = [tuple(n.args[1].meta["val"].shape) for n in products]
    assert weights == [tuple(small.get_parameter(n).shape) for n in ("qkv.weight", "out.weight")]
    assert [n.meta["val"].shape[-1] for n in products] == [w[0] for w in weights]
    assert masked_error(model, small, plan, args) <= EXACT


def test_a_ragged_plan_is_kept_saved_and_loaded(tmp_path: Path) -> None:
    model, couplings, args = made(Attention)
    plan = drawn(couplings, 2)
    assert Plan.from_json(plan.to_json()) == plan
    assert "–" in str(plan)
    small = eco.shrink(model, plan, args)
    eco.save(small, tmp_path / "saved")
    loaded = eco.load(tmp_path / "saved", model=lambda: Attention().double())
    assert torch.equal(loaded(*args), small(*args))


def test_in_front_of_compile() -> None:
    model, couplings, args = made(Attention)
    plan = drawn(couplings, 3)
    compiled = torch.compile(model, backend=eco.backend(plan, compiler="eager"))
    with masked(model, plan):
        want = model(*args)
    torch.testing.assert_close(compiled(*args), want, rtol=EXACT, atol=EXACT)
    torch.compiler.reset()


def test_a_module_cannot_carry_it() -> None:
    model, couplings, args = made(Attention)
    with pytest.raises(PlanError, match="ragged"):
        eco.shrink_(model, drawn(couplings, 0), args)


def test_even_adds_units_and_takes_none() -> None:
    _, couplings, _ = made(Attention)
    plan = drawn(couplings, 0)
    for ragged, even in zip(plan, plan.even(), strict=True):
        assert not even.ragged
        assert even.kept == ragged.kept
        assert not (even.removed & ~ragged.removed).any()
