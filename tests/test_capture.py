"""From modules to graphs: what is symbolic, what is refused and with which sentence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import ecospa_fx as eco
from ecospa_fx.errors import CaptureError
from ecospa_fx.verify import masked_error


class Mlp(nn.Module):
    """Two linear layers around a nonlinearity."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 32)
        self.down = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.relu(self.up(x)))
        return y


class Branching(Mlp):
    """Python control flow that depends on data, which no graph can hold."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if y.sum() > 0:
            return y
        return -y


def test_a_batch_of_one_as_example_leaves_other_batches_possible() -> None:
    model, one, many = Mlp().double(), torch.randn(1, 8).double(), torch.randn(5, 8).double()
    plan = eco.plan(eco.detect(model, (one,)), 0.5)
    small = eco.shrink(model, plan, (one,))
    assert masked_error(model, small, plan, (many,)) <= 1e-9
    assert masked_error(model, small, plan, (one,)) <= 1e-9


def test_a_symbolically_traced_module_is_taken_like_its_original() -> None:
    model, x = Mlp().double(), torch.randn(3, 8).double()
    traced = torch.fx.symbolic_trace(model)
    plan = eco.plan(eco.detect(traced, (x,)), 0.5)
    small = eco.shrink(traced, plan, (x,))
    assert masked_error(traced, small, plan, (x,)) <= 1e-9
    assert {n: tuple(p.shape) for n, p in small.named_parameters()}["up.weight"] == (16, 8)


def test_a_module_that_does_not_export_is_refused_with_its_line() -> None:
    with pytest.raises(CaptureError, match=r"Branching cannot be exported at .*test_capture.py:\d+: if y.sum\(\) > 0"):
        eco.detect(Branching(), (torch.randn(2, 8),))


def test_arguments_that_are_no_tuple_are_refused() -> None:
    with pytest.raises(CaptureError, match=r"args must be a tuple .* write \(x,\)"):
        eco.detect(Mlp(), torch.randn(2, 8))  # type: ignore[arg-type]  # the mistake under test


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"function is not an nn\.Module"):
        eco.detect(lambda x: x, (torch.randn(2, 8),))  # type: ignore[arg-type]  # the mistake under test


class Options(Mlp):
    """Constants among the arguments."""

    def forward(self, x: Tensor, scale: float = 1.0, **more: bool) -> Tensor:
        y = super().forward(x) * scale
        return -y if more.get("negate") else y


def test_constants_may_be_left_out_and_arguments_named() -> None:
    model, x = Options().double(), torch.randn(3, 8).double()
    plan = eco.plan(eco.detect(model, (x,), {"scale": 2.0, "negate": True}), 0.5)
    small = eco.shrink(model, plan, (x,), {"scale": 2.0, "negate": True})
    want = small(x, scale=2.0, negate=True)
    assert torch.equal(small(x), want)
    assert torch.equal(small(x=x), want)
    assert torch.equal(small(negate=True, x=x), want)


def test_sharded_parameters_are_refused_by_name() -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
    try:
        model, args = Mlp(), (torch.randn(3, 8),)
        fully_shard(model)
        with pytest.raises(CaptureError, match=r"'up\.weight' is sharded over devices, .*: shrink the model first"):
            eco.detect(model, args)
    finally:
        dist.destroy_process_group()
