"""What comes back from a graph is a tree of ordinary modules: compiled, checkpointed, copied and pickled as such."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn.functional import scaled_dot_product_attention as attend
from torch.utils.checkpoint import checkpoint

import ecospa_fx as eco
from ecospa_fx.errors import InputError
from ecospa_fx.plan import Plan
from ecospa_fx.runtime.layer import GraphLayer
from tests.support.attention import CAUSAL

HEADS, GROUPS, WIDTH, HIDDEN, FFN, DEPTH = 4, 2, 8, 16, 24, 3


class Layer(nn.Module):
    """Grouped-query attention with a mask as a tensor, repeated keys and dropout, and a feed-forward network."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(HIDDEN, HEADS * WIDTH), nn.Linear(HEADS * WIDTH, HIDDEN)
        self.k, self.v = nn.Linear(HIDDEN, GROUPS * WIDTH), nn.Linear(HIDDEN, GROUPS * WIDTH)
        self.norm, self.up, self.down = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, FFN), nn.Linear(FFN, HIDDEN)
        self.drop = nn.Dropout(0.1)
        self.add_module("self", nn.Identity())
        self.add_module("key", nn.Identity())

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.get_submodule("key")(self.get_submodule("self")(self.norm(x))).to(x.dtype)
        q, k, v = (f(h).view(*h.shape[:2], -1, WIDTH).transpose(1, 2) for f in (self.q, self.k, self.v))
        k, v = (y.repeat_interleave(HEADS // GROUPS, 1) for y in (k, v))
        p = 0.1 if self.training else 0.0
        x = x + self.o(attend(q, k, v, attn_mask=mask, dropout_p=p).transpose(1, 2).flatten(2))
        result: Tensor = x + self.drop(self.down(self.up(self.norm(x)).relu()))
        return result


class Model(nn.Module):
    """Some layers; the result is a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(DEPTH))

    def forward(self, x: Tensor, double: bool = False, *, bias: Tensor | None = None) -> dict[str, Tensor]:
        mask = CAUSAL["compared"](x[:, None])
        for layer in self.layers:
            x = layer(x, mask)
        x = x if bias is None else x + bias
        return {"out": 2 * x if double else x}


def data(batch: int = 2, length: int = 5) -> Tensor:
    return torch.randn(batch, length, HIDDEN, generator=torch.Generator().manual_seed(0)).double()


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    return Model().double().eval()


@pytest.fixture(scope="module")
def plan(model: Model) -> Plan:
    return eco.plan(eco.detect(model, (data(),)), ratio=0.4, scores="random", uniform=True)


@pytest.fixture(scope="module")
def shrunk(model: Model, plan: Plan) -> nn.Module:
    return eco.shrink(copy.deepcopy(model), plan, (data(),))


@pytest.fixture
def small(shrunk: nn.Module) -> Any:
    """A smaller model for every test to change."""
    torch.compiler.reset()
    return copy.deepcopy(shrunk)


@pytest.mark.slow
def test_the_cleanup_is_on_by_default_and_can_be_left_out(model: Model, plan: Plan, small: Any) -> None:
    source = small.layers[0]._graph_code.source
    assert "is_causal = True" in source
    assert "enable_gqa = True" in source
    plain: Any = eco.shrink(model, plan, (data(),), passes=())
    assert "repeat_interleave" in plain.layers[0]._graph_code.source
    with torch.no_grad():
        for size in ((2, 5), (3, 9)):
            assert torch.allclose(plain(data(*size))["out"], small(data(*size))["out"], rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_the_whole_compiles_without_a_break(small: Any) -> None:
    compiled: Any = torch.compile(small, fullgraph=True, backend="aot_eager")
    want, got = small(data())["out"], compiled(data())["out"]
    assert torch.allclose(got, want, rtol=1e-12, atol=1e-12)
    got.sum().backward()
    assert all(p.grad is not None for p in small.parameters())


@pytest.mark.slow
def test_equal_layers_are_compiled_once_and_others_apart(model: Model, small: Any) -> None:
    kinds = [type(layer) for layer in small.layers]
    assert isinstance(small.layers, nn.ModuleList)
    assert len(set(kinds)) == 1
    plan = eco.plan(eco.detect(model, (data(),)), ratio=0.4, scores="random", seed=3)
    others: Any = eco.shrink(model, plan, (data(),))
    widths = {layer.up.weight.shape for layer in others.layers}
    assert len({type(layer) for layer in others.layers}) >= len(widths) > 1


@pytest.mark.slow
def test_layers_compile_by_themselves(small: Any) -> None:
    count = CompileCounter()
    with torch.no_grad():
        want = small(data())["out"]
        for layer in small.layers:
            layer.compile(backend=count, fullgraph=True)
        assert torch.allclose(small(data())["out"], want, rtol=1e-12, atol=1e-12)
    assert count.frame_count == 1


def test_functions_of_all_layers_live_in_one_scope_also_after_pickling(small: Any) -> None:
    """A compiled layer checks every scope that its functions live in, each time it is called."""
    for model in (small, pickle.loads(pickle.dumps(small))):
        layers = [m for m in model.layers.modules() if isinstance(m, GraphLayer)]
        assert len(layers) > 3
        assert len({id(type(m).forward.__globals__) for m in layers}) == 1


@pytest.mark.slow
def test_layers_can_be_checkpointed(small: Any) -> None:
    small(data())["out"].sum().backward()
    want = {n: p.grad.clone() for n, p in small.named_parameters()}
    small.zero_grad()
    for layer in small.layers:
        forward = layer.forward
        layer.forward = lambda *args, forward=forward: checkpoint(forward, *args, use_reentrant=False)
    small(data())["out"].sum().backward()
    assert all(torch.equal(want[n], p.grad) for n, p in small.named_parameters())


@pytest.mark.slow
def test_copies_and_pickles_compute_the_same(small: Any) -> None:
    want = small(data())["out"]
    for twin in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert torch.equal(twin(data())["out"], want)
        assert all(a is not b for a, b in zip(twin.parameters(), small.parameters(), strict=True))
        assert not twin.training
        assert twin.train().layers[1].drop.training


@pytest.mark.slow
def test_what_the_graph_was_not_made_for_is_refused(model: Model, plan: Plan, small: Any) -> None:
    x = data()
    assert torch.equal(small(x=x)["out"], small(x)["out"])
    with pytest.raises(TypeError, match="double unknown"):
        small(x, double=True)
    with pytest.raises(TypeError, match="x missing"):
        small()
    with pytest.raises(InputError, match=r"of shape \[any, any, 16\], not \[5, 16\]"):
        small(x[0])
    with pytest.raises(InputError, match=r"of shape \[any, any, 16\], not \[2, 5, 15\]"):
        small(x[..., 1:])
    constant = eco.shrink(model, plan, (x, True), {"bias": x})
    with pytest.raises(InputError, match="argument double is False, but the graph was made with True"):
        constant(x, False, bias=x)
    with pytest.raises(InputError, match="argument bias has size 3 in axis 0, another argument 2"):
        constant(x, True, bias=torch.cat([x, x])[:3])


@pytest.mark.slow
def test_export_of_a_shrunk_model_saves_and_loads(small: Any, tmp_path: Any) -> None:
    shapes = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
    program = torch.export.export(small, (data(),), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "small.pt2")
    loaded = torch.export.load(tmp_path / "small.pt2").module()
    for size in ((2, 5), (3, 7)):
        assert torch.equal(loaded(data(*size))["out"], small(data(*size))["out"])


class Skipping(nn.Module):
    """Dropout on the way, and another argument in its second call."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, FFN), nn.Linear(FFN, HIDDEN)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        y: Tensor = self.down(nn.functional.dropout(self.up(x).relu(), 0.5, self.training))
        return y if skip is None else y + skip


class CalledTwice(nn.Module):
    """One module whose two calls are two graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Skipping()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(self.layer(x), x)
        return y


@pytest.mark.parametrize("mode", [True, False])
def test_all_calls_of_a_module_follow_its_mode(mode: bool) -> None:
    model, x = CalledTwice().double().train(mode), torch.randn(2, 5, HIDDEN, dtype=torch.float64)
    small = eco.shrink(model, eco.plan(eco.detect(model, (x,)), ratio=0.4, scores="magnitude"), (x,))
    for tree in (small, copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        tree.eval()
        assert torch.equal(tree(x), tree(x))
        tree.train()
        assert not torch.equal(tree(x), tree(x))
        seen = []
        for layer in tree.modules():
            if "up" in dict(layer.named_children()):
                layer.eval()
                seen.append(layer)
        assert len(seen) == 1
        assert torch.equal(tree(x), tree(x))


class Positions(nn.Module):
    """What the code makes is on the device of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, FFN), nn.Linear(FFN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.arange(x.shape[1], device=x.device, dtype=x.dtype)[:, None]
        y: Tensor = self.down(self.up(x).relu())
        return y


class Deep(nn.Module):
    """One module called on two lengths, so that it is two graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Positions()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(self.layer(x)[:, :3])
        return y


@pytest.mark.parametrize("kind", [Positions, Deep])
def test_what_the_code_makes_moves_with_the_module(kind: type[nn.Module]) -> None:
    model, x = kind().double().eval(), torch.randn(2, 5, HIDDEN, dtype=torch.float64)
    small = eco.shrink(model, eco.plan(eco.detect(model, (x,)), ratio=0.4, scores="magnitude"), (x,))
    expected = small(x)
    for tree in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert torch.equal(tree(x), expected)
        assert tree.to("meta")(x.to("meta")).device.type == "meta"
    compiled: Any = torch.compile(small, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), expected)
