"""From modules to graphs: what is symbolic, what is refused and with which sentence."""

from __future__ import annotations

import logging
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ecospa_fx as eco
from ecospa_fx.capture.attempts import attempts
from ecospa_fx.capture.export import captures
from ecospa_fx.errors import CaptureError, EcospaError, TorchFailure
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
    plan = eco.plan(eco.detect(model, (one,)), 0.5, scores="magnitude")
    small = eco.shrink(model, plan, (one,))
    assert masked_error(model, small, plan, (many,)) <= 1e-9
    assert masked_error(model, small, plan, (one,)) <= 1e-9


def test_a_symbolically_traced_module_is_taken_like_its_original() -> None:
    model, x = Mlp().double(), torch.randn(3, 8).double()
    traced = torch.fx.symbolic_trace(model)
    plan = eco.plan(eco.detect(traced, (x,)), 0.5, scores="magnitude")
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
    plan = eco.plan(eco.detect(model, (x,), {"scale": 2.0, "negate": True}), 0.5, scores="magnitude")
    small = eco.shrink(model, plan, (x,), {"scale": 2.0, "negate": True})
    want = small(x, scale=2.0, negate=True)
    assert torch.equal(small(x), want)
    assert torch.equal(small(x=x), want)
    assert torch.equal(small(negate=True, x=x), want)


def test_sharded_parameters_are_refused_by_name() -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
    try:
        model, args = Mlp(), (torch.randn(3, 8),)
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(CaptureError, match=r"'up\.weight' is sharded over devices, .*: shrink the model first"):
            eco.detect(model, args)
    finally:
        dist.destroy_process_group()


class PerSample(Mlp):
    """A loop over the batch, whose size therefore is fixed."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([super(PerSample, self).forward(row) for row in x])


def test_a_batch_of_one_that_is_looped_over_stays_one() -> None:
    model, x = PerSample().double(), torch.randn(1, 3, 8).double()
    plan = eco.plan(eco.detect(model, (x,)), 0.5, scores="magnitude")
    small = eco.shrink(model, plan, (x,))
    for call in (x, torch.randn(1, 7, 8).double()):
        assert masked_error(model, small, plan, (call,)) < 1e-9


def test_captures_are_logged_once_each_whatever_it_took(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ecospa_fx.progress")
    model, x = PerSample(), torch.randn(1, 3, 8)
    fixed, symbolic = (list(captures(model, (x,), None, dynamic=dynamic)) for dynamic in (False, True))
    assert len(fixed) == 1 <= len(symbolic) < len(attempts(model, (x,), {}))  # the first attempt fails
    stages = ["capture at the example's sizes", *["capture with symbolic sizes"] * len(symbolic)]
    assert [message.split(":")[0] for message in caplog.messages] == stages
    with pytest.raises(CaptureError):
        eco.detect(Branching(), (x,))
    assert len(caplog.messages) == len(stages)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2])
def test_lengths_stay_free_where_batches_are_the_same_by_use_alone(batch: int) -> None:
    """torch gives the two batches a symbol each, and does not see that their products are the same."""
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 24, batch_first=True), 1).double().eval()

    def call(batch: int, own: int, memory: int) -> tuple[Tensor, Tensor]:
        return torch.randn(batch, own, 16).double(), torch.randn(batch, memory, 16).double()

    plan = eco.plan(eco.detect(model, call(batch, 6, 5)), 0.4, scores="magnitude")
    assert {s.kind for s in plan if s.kept < s.size} > {"ffn"}
    small = eco.shrink(model, plan, call(batch, 6, 5))
    for other in (call(batch, 6, 5), call(3, 4, 8)):
        assert masked_error(model, small, plan, other) < 1e-9


@pytest.mark.slow
def test_padding_is_compared_as_it_is_traced() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 1).double().eval()
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[0, 4:] = True
    given = (torch.randn(2, 6, 16).double(),), {"src_key_padding_mask": padding}
    plan = eco.plan(eco.detect(model, *given), 0.4, kinds=["ffn"], scores="magnitude")
    assert masked_error(model, eco.shrink(model, plan, *given), plan, *given) < 1e-9
    assert torch.backends.mha.get_fastpath_enabled()
    eco.shrink_(model, plan, *given)
    layer: nn.Module = model.layers[0]
    assert layer.get_parameter("linear1.weight").shape[0] < 24


class Writing(Mlp):
    """Code that changes a parameter when it is called, once or every time."""

    def __init__(self, factor: float, once: bool = False) -> None:
        super().__init__()
        self.factor, self.once, self.done = factor, once, False

    def forward(self, x: Tensor) -> Tensor:
        if not (self.once and self.done):
            with torch.no_grad():
                self.up.weight[1:].div_(self.factor)
            self.done = True
        return super().forward(x)


def test_code_that_writes_into_parameters_is_refused_with_its_line() -> None:
    x = torch.randn(3, 8)
    for model in (Writing(2.0), Writing(2.0, once=True)):
        before = model.up.weight.clone()
        with pytest.raises(CaptureError, match=r"parameter 'up\.weight' is written into .*test_capture\.py:\d+"):
            eco.detect(model, (x,))
        assert torch.equal(before, model.up.weight)
        assert not model.done


def test_code_that_writes_no_more_or_nothing_else_is_taken() -> None:
    x = torch.randn(3, 8).double()
    for model in (Writing(2.0, once=True), Writing(1.0)):
        model.double()(x)
        plan = eco.plan(eco.detect(model, (x,)), 0.5, scores="magnitude")
        small = eco.shrink(model, plan, (x,))
        assert masked_error(model, small, plan, (x,)) < 1e-9
        assert torch.equal(small(x), small(x))


def test_nothing_finite_is_no_proof() -> None:
    model, x = Mlp(), torch.full((3, 8), torch.nan)
    plan = eco.plan(eco.detect(model, (x,)), 0.5, scores="magnitude")
    small = eco.shrink(model, plan, (x,))
    with pytest.warns(UserWarning, match="24 of the 24 numbers in output 0 are NaN in the dense model"):
        assert masked_error(model, small, plan, (x,)) == torch.inf


class Linears(nn.Sequential):
    """Code of torch alone."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))


def without_weights_refuses_a_float() -> bool:
    try:
        nn.Embedding(9, 8, device="meta")(torch.empty(2, device="meta"))
    except RuntimeError:
        return True
    return False


WRONG: dict[str, tuple[nn.Module, tuple[object, ...], str]] = {
    "size": (Linears(), (torch.randn(2, 9),), r"in module '0' \(Linear\), at .*test_capture.*\(2x9 and 8x16\)"),
    "size in code": (Mlp(), (torch.randn(2, 9),), r"at .*test_capture\.py:\d+: y: Tensor = .*\(2x9 and 8x32\)"),
    "rank": (nn.Sequential(nn.Conv2d(3, 4, 3)), (torch.randn(2, 8),), r"in module '0' \(Conv2d\), at .*\[2, 8\]"),
    "type": (nn.Sequential(nn.Embedding(9, 8), Mlp()), (torch.randn(2, 3),), r"Embedding\), at .*Long, Int"),
    "no tensor": (Linears(), ("x",), r"must be Tensor, not str"),
    "missing": (Mlp(), (), r"missing a required argument: 'x'"),
    "too many": (Mlp(), (torch.randn(2, 8), 3), r"too many positional arguments"),
}


@pytest.mark.parametrize(("model", "args", "said"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_told_by_the_line_of_the_user(model: nn.Module, args: Any, said: str) -> None:
    if "Long, Int" in said and not without_weights_refuses_a_float():
        pytest.skip("this torch lets tensors without data be indices of any type; `shrink` sees it")
    with pytest.raises(CaptureError, match=rf"does not take these arguments.*{said}") as refused:
        eco.detect(model, args)
    assert str(Path(eco.__file__).parent) not in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("model", [Branching(), Linears()], ids=["code that does not export", "wrong arguments"])
def test_an_error_that_nobody_catches_is_short_and_keeps_its_cause(model: nn.Module) -> None:
    args = (torch.randn(2, 8 if isinstance(model, Branching) else 9),)
    try:
        eco.detect(model, args)
    except CaptureError as error:
        shown, cause = traceback.format_exc(), error.__cause__
    assert f"{Path(torch.__file__).parent}" not in shown
    assert len(shown.splitlines()) < 30
    assert isinstance(cause, TorchFailure)
    assert traceback.extract_tb(cause.original.__traceback__)


def test_an_exported_program_is_no_module() -> None:
    program, args = torch.export.export(Mlp(), (torch.randn(2, 8),)), (torch.randn(2, 8),)
    model: Any = program
    plan = eco.plan(eco.detect(Mlp(), args), 0.5, scores="magnitude")
    for verb in (
        lambda: eco.detect(model, args), lambda: eco.shrink(model, plan, args), lambda: eco.shrink_(model, plan, args),
        lambda: eco.SparseTraining(model, args), lambda: masked_error(model, Mlp(), plan, args),
    ):  # fmt: skip
        with pytest.raises(EcospaError, match=r"pass program\.module\(\)"):
            verb()
    assert eco.detect(program.module(), args).offered
