"""Every verb takes a model with something around it as it takes the model, or says what to hand in."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import ecospa_fx as eco
from ecospa_fx.errors import CaptureError, EcospaError, PlanError, TrainingError
from ecospa_fx.verify import masked, masked_error
from ecospa_fx.wrappers import unwrapped

X = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))


def inside() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)).eval()


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    """A group of one process, for what distributes."""
    store: Any = torch._C._distributed_c10d.HashStore
    dist.init_process_group("gloo", store=store(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def beside(model: nn.Module) -> Tensor:
    """The input where the parameters are: `nn.DataParallel` puts them on the GPU if there is one."""
    return X.to(next(model.parameters()).device)


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


AROUND: dict[str, Callable[[nn.Module], Any]] = {
    "compiled": compiled,
    "data-parallel": lambda m: nn.DataParallel(m),
    "averaged": lambda m: AveragedModel(m),
    "distributed": lambda m: nn.parallel.DistributedDataParallel(m),
    "two": lambda m: nn.DataParallel(compiled(m)),
}


def loss(output: Tensor, args: Any, kwargs: Any) -> Tensor:
    return output.square().mean()


@pytest.mark.slow
@pytest.mark.parametrize("name", list(AROUND))
@pytest.mark.usefixtures("group")
def test_verbs_look_through(name: str, tmp_path: Path) -> None:
    model = inside()
    wrapped = AROUND[name](model)
    inner = unwrapped(wrapped)
    x = beside(inner)
    couplings = eco.detect(wrapped, (x,))
    assert couplings.model is inner
    assert list(couplings.shapes) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    plan = eco.plan(couplings, ratio=0.5, scores="magnitude", expressible_in="module")
    assert [s.kept for s in plan] == [16]
    assert plan.masks(wrapped).keys() == {"0.weight", "0.bias", "2.weight"}
    scores = eco.score(wrapped, couplings, [((x,), {})], loss=loss)
    assert {name: tuple(v.shape) for name, v in scores.values.items()} == {"ffn": (1, 32)}
    small = eco.shrink(wrapped, plan, (x,))
    assert list(small.state_dict()) == list(inner.state_dict())
    assert masked_error(wrapped, small, plan, (x,)) < 1e-5
    assert masked_error(wrapped, AROUND[name](small), plan, (x,)) < 1e-5
    with masked(wrapped, plan):
        assert inner.get_parameter("0.bias").count_nonzero() == 16
    assert inner.get_parameter("0.bias").count_nonzero() == 32
    eco.save(AROUND[name](small), tmp_path / "small")
    loaded = eco.load(tmp_path / "small", model=lambda: AROUND[name](inside()))
    assert torch.equal(loaded.to(x.device)(x), small(x))
    again = eco.compress(wrapped, (x,), ratio=0.5, method="magnitude")
    assert list(again.state_dict()) == list(inner.state_dict())


@pytest.mark.parametrize("name", ["compiled", "data-parallel", "averaged", "two"])
def test_edited_inside(name: str, tmp_path: Path) -> None:
    model = inside()
    wrapped = AROUND[name](model)
    inner: Any = unwrapped(wrapped)
    x = beside(inner)
    with torch.no_grad():
        wrapped(x)
    plan = eco.plan(eco.detect(wrapped, (x,)), ratio=0.5, scores="magnitude")
    with torch.no_grad(), masked(inner, plan):
        want = inner(x)
    assert eco.shrink_(wrapped, plan, (x,)) is wrapped
    assert (inner[0].weight.shape, inner[0].out_features) == ((16, 8), 16)
    with torch.no_grad():
        assert torch.allclose(wrapped(x), want, atol=1e-6)
    eco.save(wrapped, tmp_path / "small")
    assert type(eco.load(tmp_path / "small", model=inside)) is nn.Sequential


def test_layers_that_are_compiled_by_themselves() -> None:
    """The proof runs them as they were written; their names have what is around them in them."""
    model: Any = inside()
    model[0] = compiled(model[0])
    model.compile(backend="eager")
    plan = eco.plan(eco.detect(model, (X,)), ratio=0.5, scores="magnitude", expressible_in="module")
    assert masked_error(model, eco.shrink(model, plan, (X,)), plan, (X,)) < 1e-5
    eco.shrink_(model, plan, (X,))
    assert (model[0].out_features, model[2].in_features) == (16, 16)
    assert model(X).shape == (2, 8)


@pytest.mark.usefixtures("group")
def test_memory_of_the_old_shapes_is_told() -> None:
    wrapped: Any = AROUND["distributed"](inside())
    plan = eco.plan(eco.detect(wrapped, (X,)), ratio=0.5, scores="magnitude")
    told = (
        r"DistributedDataParallel holds memory for the shapes .*: pass the module inside it, and wrap the result anew"
    )
    with pytest.raises(PlanError, match=told):
        eco.shrink_(wrapped, plan, (X,))
    assert wrapped.module[0].weight.shape == (32, 8)
    with pytest.raises(TrainingError, match=told):
        eco.SparseTraining(wrapped, (X,), target=0.5, total_steps=100)


@pytest.mark.slow
def test_training_takes_the_model_inside() -> None:
    wrapped = compiled(inside().train())
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.01)
    sparse = eco.SparseTraining(
        wrapped, (X,), optimizer=optimizer, target=0.5, schedule=eco.OneShot(2), scores="gate-fisher"
    )
    for _ in range(3):
        sparse.model(X).square().mean().backward()
        sparse.step()
        optimizer.step()
        optimizer.zero_grad()
    assert tuple(sparse.model.get_parameter("0.weight").shape) == (16, 8)


def verbs(model: Any, plan: eco.Plan, couplings: Any, path: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    yield "detect", lambda: eco.detect(model, (X,))
    yield "shrink", lambda: eco.shrink(model, plan, (X,))
    yield "shrink_", lambda: eco.shrink_(model, plan, (X,))
    yield "compress", lambda: eco.compress(model, (X,), ratio=0.5, method="magnitude")
    yield "score", lambda: eco.score(model, couplings, [((X,), {})], loss=loss)
    yield "masks", lambda: plan.masks(model)
    yield "masked_error", lambda: masked_error(model, inside(), plan, (X,))
    yield "SparseTraining", lambda: eco.SparseTraining(model, (X,), target=0.5, total_steps=100)
    yield "backend", lambda: eco.backend(plan, model=model)
    yield "save", lambda: eco.save(model, path)


@pytest.mark.filterwarnings("ignore:`torch.jit.*is deprecated:DeprecationWarning", "ignore:FSDP is switching to use")
@pytest.mark.parametrize("how", ["script", "trace", "flat"])
@pytest.mark.usefixtures("group")
def test_what_no_verb_can_look_through(how: str, tmp_path: Path) -> None:
    dense = inside()
    couplings = eco.detect(dense, (X,))
    plan = eco.plan(couplings, ratio=0.5, scores="magnitude")
    model: Any
    if how == "flat":
        from torch.distributed.fsdp import FullyShardedDataParallel

        try:
            model = FullyShardedDataParallel(copy.deepcopy(dense), device_id=torch.device("cpu"))
        except (RuntimeError, ValueError) as error:  # some builds shard on accelerators only
            pytest.skip(str(error))
        told = r"parameter '.*' is a shard of several parameters in one: pass the module before it is wrapped"
    else:
        traced: Any = torch.jit.trace
        model = torch.jit.script(dense) if how == "script" else traced(dense, X)
        told = "this Sequential is a TorchScript module, .*: pass the nn.Module that it was made from"
    before = copy.deepcopy(model.state_dict()) if how != "flat" else {}
    for verb, call in verbs(model, plan, couplings, tmp_path / "small"):
        with pytest.raises(EcospaError, match=told):
            pytest.fail(f"{verb} returned {call()}")
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in before.items())
    with pytest.raises(CaptureError, match=told):
        unwrapped(model)


class Alone(nn.Module):
    """A module of the user's with one module inside is none that only stands around it."""

    def __init__(self) -> None:
        super().__init__()
        self.module = inside()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x - self.module(x)
        return out


def test_what_computes_is_no_wrapper() -> None:
    for other in (
        Alone(),
        nn.Sequential(nn.Linear(8, 8)),
        nn.ModuleList([nn.Linear(8, 8)]),
        torch.fx.symbolic_trace(Alone()),
    ):
        assert unwrapped(other) is other
    assert unwrapped("no module") == "no module"
    model: Any = Alone()
    couplings = eco.detect(model, (X,))
    assert "module.0.weight" in couplings.shapes
    plan = eco.plan(couplings, ratio=0.5, scores="magnitude")
    eco.shrink_(compiled(model), plan, (X,))
    assert model.module[0].weight.shape == (16, 8)


def test_hooks_of_accelerate() -> None:
    hooks: Any = pytest.importorskip("accelerate.hooks")
    model: Any = inside()
    hooks.add_hook_to_module(model, hooks.ModelHook())
    hooks.add_hook_to_module(model[0], hooks.AlignDevicesHook(io_same_device=True))
    plan = eco.plan(eco.detect(model, (X,)), ratio=0.5, scores="magnitude", expressible_in="module")
    assert masked_error(model, eco.shrink(model, plan, (X,)), plan, (X,)) < 1e-5
    twin = copy.deepcopy(model)
    eco.shrink_(model, plan, (X,))
    with torch.no_grad(), masked(twin, plan):
        assert torch.allclose(model(X), twin(X), atol=1e-6)


def test_a_forward_that_no_copy_takes_along() -> None:
    """A function in place of forward goes on calling the original in every copy, so that no edit can be tried."""
    model: Any = inside()
    original = model.forward
    model.forward = lambda x: original(x)
    plan = eco.plan(eco.detect(model, (X,)), ratio=0.5, scores="magnitude")
    with pytest.raises(PlanError, match=r"Sequential\.forward was replaced by a function .*: take it away"):
        eco.shrink_(model, plan, (X,))
    assert model[0].weight.shape == (32, 8)
