"""The pass on an exported graph module: exact, repeatable, and nothing half done when a plan does not fit."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.functional import scaled_dot_product_attention as attend
from torch.nn.functional import silu

import ecospa_fx as eco
from ecospa_fx.coupling.couplings import Couplings
from ecospa_fx.errors import PlanError
from ecospa_fx.passes.shrink.shrink_couplings import ShrinkCouplings
from ecospa_fx.plan import Plan
from ecospa_fx.verify import masked, masked_error
from tests.support.rotary import rotated

HEADS, GROUPS, WIDTH, HIDDEN, FFN, WORDS = 4, 2, 8, 16, 24, 13
EXACT = 1e-9


class Layer(nn.Module):
    """Grouped-query attention with rotary embedding, and a gated feed-forward network."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = (nn.Linear(HIDDEN, HEADS * WIDTH, bias=False), nn.Linear(HEADS * WIDTH, HIDDEN, bias=False))
        self.k, self.v = (nn.Linear(HIDDEN, GROUPS * WIDTH, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(HIDDEN, FFN, bias=False) for _ in range(2))
        self.down = nn.Linear(FFN, HIDDEN, bias=False)
        self.norms = nn.ModuleList(nn.RMSNorm(HIDDEN) for _ in range(2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = self.norms[0](x)
        q, k, v = (f(h).unflatten(-1, (-1, WIDTH)).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        k, v = (y.repeat_interleave(HEADS // GROUPS, 1) for y in (k, v))
        x = x + self.o(attend(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        h = self.norms[1](x)
        result: Tensor = x + self.down(silu(self.gate(h)) * self.up(h))
        return result


class Llama(nn.Module):
    """Two layers, tied embeddings, dims named as nowhere else."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(WORDS, HIDDEN), nn.Linear(HIDDEN, WORDS, bias=False)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.head.weight = self.embed.weight
        self.register_buffer("frequencies", 1 / 100 ** (torch.arange(0, WIDTH, 2) / WIDTH))

    def forward(self, ids: Tensor) -> Tensor:
        angles = torch.outer(torch.arange(ids.shape[1], device=ids.device), self.get_buffer("frequencies"))
        angles = torch.cat([angles, angles], -1)
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, angles.cos(), angles.sin())
        result: Tensor = self.head(x)
        return result


def ids(batch: int = 2, length: int = 5) -> Tensor:
    return torch.randint(0, WORDS, (batch, length), generator=torch.Generator().manual_seed(batch + length))


@pytest.fixture(scope="module")
def model() -> Llama:
    torch.manual_seed(0)
    return Llama().double()


@pytest.fixture(scope="module")
def couplings(model: Llama) -> Couplings:
    return eco.detect(model, (ids(),))


@pytest.fixture(scope="module")
def plan(couplings: Couplings) -> Plan:
    return eco.plan(couplings, ratio=0.5, scores="random", seed=3)


def traced(model: nn.Module) -> fx.GraphModule:
    """The exported graph of a copy, batch and length symbolic; another one for every test to change."""
    return copy.deepcopy(_traced(model))


@cache
def _traced(model: nn.Module) -> fx.GraphModule:
    shapes = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
    graph = torch.export.export(copy.deepcopy(model), (ids(),), dynamic_shapes=shapes).module()
    assert isinstance(graph, fx.GraphModule)
    return graph


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


GOLDEN = """\
model      kind      units kept x carriers
---------
           residual  16
layers.0   ffn       24
layers.0   heads     2
layers.0   heads     2 x 2
layers.0   qk        4 x 2
layers.0   vo        8 x 2
layers.1   ffn       24
layers.1   heads     2
layers.1   heads     2 x 2
layers.1   qk        4 x 2
layers.1   vo        8 x 2"""


def summary(couplings: Couplings) -> str:
    sizes = {1: "{0.size}"}
    found = [(c.layer, c.kind, sizes.get(c.carriers, "{0.size} x {0.carriers}").format(c)) for c in couplings.offered]
    head = f"{'model':10} {'kind':9} units kept x carriers\n---------"
    return "\n".join([head, *(f"{layer:10} {kind:9} {size}" for layer, kind, size in sorted(found))])


# -- golden, twin, equivalence, repetition -------------------------------------------------------------------------


def test_golden_couplings(couplings: Couplings) -> None:
    assert summary(couplings) == GOLDEN


def test_golden_shapes(model: Llama, couplings: Couplings) -> None:
    plan = eco.plan(couplings, ratio=0.5, scores="random", seed=1, kinds=["qk", "vo", "ffn"], uniform=True)
    result = ShrinkCouplings(plan).run(traced(model))
    layer = result.graph_module.get_submodule("layers.0")
    shapes = {n: tuple(p.shape) for n, p in layer.named_parameters()}
    assert shapes == {
        "q.weight": (16, 16), "k.weight": (8, 16), "v.weight": (8, 16), "o.weight": (16, 16), "gate.weight": (12, 16),
        "up.weight": (12, 16), "down.weight": (16, 12), "norms.0.weight": (16,), "norms.1.weight": (16,),
    }  # fmt: skip
    assert result.modified
    assert result.reasons == ()


def test_twin_nothing_to_remove_leaves_the_graph_as_it_is(model: Llama, couplings: Couplings) -> None:
    graph = traced(model)
    before, code = state(graph), str(graph.graph)
    result = ShrinkCouplings(Plan((), tuple(couplings.shapes.items()))).run(graph)
    assert (result.changes, result.modified) == (0, False)
    assert str(result.graph_module.graph) == code
    assert all(torch.equal(before[n], p) for n, p in result.graph_module.named_parameters())


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_equal_to_masking(model: Llama, couplings: Couplings, seed: int) -> None:
    plan = eco.plan(couplings, ratio=0.5, scores="random", seed=seed)
    small = ShrinkCouplings(plan).run(traced(model)).graph_module
    for batch, length in ((2, 5), (5, 5), (3, 11)):
        assert masked_error(model, small, plan, (ids(batch, length),)) <= EXACT
    masks = plan.masks(model)
    for name, p in small.named_parameters():
        assert p.numel() == (int(masks[name].sum()) if name in masks else model.get_parameter(name).numel())


def test_again_is_refused_and_changes_nothing(model: Llama, plan: Plan) -> None:
    once = ShrinkCouplings(plan).run(traced(model)).graph_module
    before, code = state(once), str(once.graph)
    with pytest.raises(PlanError):
        ShrinkCouplings(plan).run(once)
    assert str(once.graph) == code
    assert all(torch.equal(before[n], p) for n, p in once.named_parameters())


# -- what else must hold -------------------------------------------------------------------------------------------


def test_every_kv_head_keeps_its_own_rotary_pairs(model: Llama, couplings: Couplings) -> None:
    qk = next(c for c in couplings.offered if c.kind == "qk")
    assert (qk.size, qk.carriers, qk.symmetry) == (WIDTH // 2, GROUPS, "rotary")
    plan = eco.plan(couplings, ratio=0.5, scores="random", seed=5, kinds=["qk"])
    assert any(s.keep[0] != s.keep[1] for s in plan)
    small = ShrinkCouplings(plan).run(traced(model)).graph_module
    assert masked_error(model, small, plan, (ids(3, 9),)) <= EXACT


def test_the_scale_stays_that_of_the_dense_heads(model: Llama, couplings: Couplings) -> None:
    plan = eco.plan(couplings, ratio=0.5, scores="random", kinds=["qk"], uniform=True)
    small = ShrinkCouplings(plan).run(traced(model)).graph_module
    nodes = [n for n in small.graph.nodes if n.target is torch.ops.aten.scaled_dot_product_attention.default]
    assert [n.kwargs["scale"] for n in nodes] == [pytest.approx(WIDTH**-0.5)] * 2


def test_works_under_compile(model: Llama, plan: Plan) -> None:
    small = ShrinkCouplings(plan).run(traced(model)).graph_module
    compiled: Any = torch.compile(small, backend="eager")
    with torch.no_grad(), masked(model, plan):
        assert torch.allclose(compiled(ids()), model(ids()), rtol=EXACT, atol=EXACT)
    torch.compiler.reset()


def test_tied_parameters_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.down = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 6)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.down(self.a(x).relu() * self.b(x))
            return result

    model, x = Tied().double(), torch.randn(2, 6).double()
    plan = eco.plan(eco.detect(model, (x,)), ratio=0.5, scores="random")
    graph: Any = torch.export.export(model, (x,)).module()
    small = ShrinkCouplings(plan).run(graph).graph_module
    assert small.get_parameter("a.weight") is small.get_parameter("b.weight")
    assert masked_error(model, small, plan, (x,)) <= EXACT
    shrunk = eco.shrink(model, plan, (x,))
    assert shrunk.get_parameter("a.weight") is shrunk.get_parameter("b.weight")


def test_a_plan_for_another_model_is_refused(plan: Plan) -> None:
    other = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))
    graph: Any = torch.export.export(other, (torch.randn(2, 6),)).module()
    before, code = state(graph), str(graph.graph)
    with pytest.raises(PlanError, match="detect and plan again"):
        ShrinkCouplings(plan).run(graph)
    assert str(graph.graph) == code
    assert all(torch.equal(before[n], p) for n, p in graph.named_parameters())


@pytest.mark.slow
def test_the_callers_model_is_untouched(model: Llama, plan: Plan) -> None:
    before, mode = state(model), model.training
    small = eco.shrink(model, plan, (ids(),))
    assert masked_error(model, small, plan, (ids(4, 7),)) <= EXACT
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in before.items()}
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    assert model.training is mode
    assert set(small.state_dict()) == set(model.state_dict())


@pytest.mark.slow
def test_the_small_model_trains(model: Llama, plan: Plan) -> None:
    small = eco.shrink(copy.deepcopy(model), plan, (ids(),))
    small.train()
    assert small.training
    small(ids(3, 6)).square().mean().backward()
    missing = [n for n, p in small.named_parameters() if p.grad is None or p.grad.shape != p.shape]
    assert missing == []
    assert all(p.grad is None for p in model.parameters())
    assert not small.eval().training


@pytest.mark.slow
def test_the_small_model_can_be_copied(model: Llama, plan: Plan) -> None:
    small = eco.shrink(model, plan, (ids(),))
    twin = copy.deepcopy(small)
    with torch.no_grad():
        assert torch.equal(twin(ids()), small(ids()))
    assert all(a is not b for a, b in zip(small.parameters(), twin.parameters(), strict=True))


class WithEmptyRest(nn.Module):
    """Cuts off what lies behind the last position along an axis, as rotary embeddings of a whole width do: nothing."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.up, self.down, self.axis = nn.Linear(6, 24), nn.Linear(24, 6), axis

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x).unflatten(-1, (4, 6)).transpose(1, 2)
        rest = hidden.narrow(self.axis, hidden.shape[self.axis] - 0, 0)
        whole = torch.cat([hidden.relu(), rest], self.axis)
        out: Tensor = self.down(whole.transpose(1, 2).flatten(2))
        return out


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_parts_without_positions_stay_empty(axis: int) -> None:
    torch.manual_seed(0)
    dense, x = WithEmptyRest(axis).double(), torch.randn(2, 5, 6, dtype=torch.float64)
    plan = eco.plan(eco.detect(dense, (x,)), ratio=0.4, scores="random", seed=1)
    assert plan.removed_parameters > 0
    assert masked_error(dense, eco.shrink(dense, plan, (x,)), plan, (x,)) <= 1e-12
