"""Products in bfloat16 on CPUs that are quick at it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import linear

import ecospa_fx as eco
from ecospa_fx.capture.export import capture
from ecospa_fx.distillation.distill import Distill
from ecospa_fx.importance.curvature import Collector
from ecospa_fx.runtime import bfloat16 as module
from ecospa_fx.runtime.bfloat16 import FEW_ROWS, _Rounded, in_bfloat16, medium_precision
from ecospa_fx.runtime.interpreter import PartialInterpreter
from tests.support.counting import data, loss_of, mean_loss


@pytest.fixture(autouse=True)
def any_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this machine be one that multiplies bfloat16 fast; what cannot, computes the same in its own time."""
    monkeypatch.setattr(module, "_multiplies_bfloat16", lambda: True)


def rounded(tensor: Tensor) -> Tensor:
    return tensor.bfloat16().double()


@settings(max_examples=60, deadline=None)
@given(
    lead=st.lists(st.integers(0, 4), max_size=2).map(tuple), n=st.integers(1, 9), m=st.integers(1, 9),
    bias=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_factors_and_results_are_rounded_and_sums_are_not(
    lead: tuple[int, ...], n: int, m: int, bias: bool, seed: int
) -> None:
    source = torch.Generator().manual_seed(seed)
    x, matrix = (torch.randn(*s, generator=source).requires_grad_() for s in ((*lead, n), (m, n)))
    added = torch.randn(m, generator=source).requires_grad_() if bias else None
    result: Tensor = _Rounded.apply(x, matrix, added)  # type: ignore[no-untyped-call]
    gradient = torch.randn(result.shape, generator=source)
    result.backward(gradient)  # type: ignore[no-untyped-call]
    shift = added.double() if added is not None else 0
    one_rounding: dict[str, Any] = {"rtol": 2**-8, "atol": 1e-4}
    torch.testing.assert_close(result.double() - shift, linear(rounded(x), rounded(matrix)), **one_rounding)
    assert result.dtype == torch.float32
    assert x.grad is not None
    assert matrix.grad is not None
    torch.testing.assert_close(x.grad.double(), rounded(gradient) @ rounded(matrix), **one_rounding)
    flat = rounded(gradient).reshape(-1, m), rounded(x).reshape(-1, n)
    torch.testing.assert_close(matrix.grad.double(), flat[0].T @ flat[1], **one_rounding)
    if added is not None:
        torch.testing.assert_close(added.grad, gradient.reshape(-1, m).sum(0))


def test_factors_that_differ_by_less_than_rounding_make_no_difference() -> None:
    x, matrix = torch.full((1, 1), 1.001), torch.ones(1, 1)
    result: Tensor = _Rounded.apply(x, matrix, None)  # type: ignore[no-untyped-call]
    assert float(result) == 1.0


class Mixed(nn.Module):
    """Linear layers, a transposed matrix, and results that are overwritten."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8, bias=False)
        self.other = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        h.mul_(2.0)
        return torch.mm(self.down(h.relu_()), self.other.t())


NAMES = ["up.weight", "down.weight", "other"]


def evaluator(model: nn.Module, x: Tensor) -> PartialInterpreter:
    return PartialInterpreter(capture(model, (x,), {}, dynamic=False), model, (x,), {})


def result(found: PartialInterpreter, x: Tensor) -> Tensor:
    values = {**found.start((x,), {}), **found.weights()}
    found.run(found.order, values)
    answer: Tensor = found.returned(values, (x,), {})
    return answer


def test_products_by_the_named_matrices_are_rounded_and_no_others() -> None:
    model, x = Mixed().eval(), torch.randn(FEW_ROWS + 1, 8)
    exact = evaluator(model, x)
    assert len(in_bfloat16(exact, NAMES).instead) == 2  # not the one behind a transposition
    (node,) = in_bfloat16(exact, ["down.weight"]).instead
    assert any(read.name.endswith("down_weight") for read in node.all_input_nodes)
    assert result(in_bfloat16(exact, []), x).equal(model(x))
    near, want = result(in_bfloat16(exact, NAMES), x), model(x)
    assert not near.equal(want)
    torch.testing.assert_close(near, want, rtol=0.02, atol=0.05)
    assert result(exact, x).equal(want)  # what it was made from stays as it was
    few = x[:FEW_ROWS]
    assert result(in_bfloat16(evaluator(model, few), NAMES), few).equal(model(few))


@pytest.mark.slow
def test_compression_measures_and_learns_with_them(monkeypatch: pytest.MonkeyPatch, trained: nn.Module) -> None:
    """Whatever this machine can do: with few rows counted as many, the same model comes out, to rounding."""
    monkeypatch.setattr(module, "FEW_ROWS", 0)
    used: dict[str, int] = {}
    for owner, name in ((Collector, "watch"), (Distill, "_descend")):
        own = getattr(owner, name)

        def spied(self: Any, *args: Any, own: Any = own, name: str = name) -> Any:
            evaluators = (self.evaluator,) if name == "watch" else (args[0].dense, args[0].small)
            used[name] = min(len(evaluator.instead) for evaluator in evaluators)
            return own(self, *args)

        monkeypatch.setattr(owner, name, spied)
    options: dict[str, Any] = {"ratio": 0.4, "batches": data(), "loss": loss_of, "distillation": 16}
    small = eco.compress(trained, data()[0][0], **options)
    assert used["watch"] > 0
    assert used["_descend"] > 0
    monkeypatch.setattr(module, "_multiplies_bfloat16", lambda: False)
    exact = eco.compress(trained, data()[0][0], **options)
    assert used == {"watch": 0, "_descend": 0}
    assert mean_loss(small, data()) == pytest.approx(mean_loss(exact, data()), rel=0.1, abs=0.05)


def test_nothing_changes_where_nothing_is_to_be_gained(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        x = torch.randn(4, 8, dtype=dtype)
        assert not in_bfloat16(evaluator(Mixed().to(dtype).eval(), x), NAMES).instead
    x = torch.randn(4, 8)
    found = evaluator(Mixed().eval(), x)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_multiplies_bfloat16", lambda: False)
        assert in_bfloat16(found, NAMES) is found
    with monkeypatch.context() as patch:
        patch.setattr(module, "may_choose_precision", lambda: False)
        assert in_bfloat16(found, NAMES) is found


PLACES = ("generic", "all"), ("mkldnn", "all"), ("cuda", "all"), ("mkldnn", "matmul"), ("cuda", "matmul")
CHOICES: list[tuple[str, dict[tuple[str, str], str]]] = [
    ("highest", {}), ("high", {}), ("medium", {}), ("highest", {PLACES[0]: "ieee"}), ("highest", {PLACES[2]: "ieee"}),
    ("highest", {PLACES[1]: "bf16", PLACES[3]: "ieee"}), ("medium", {PLACES[0]: "bf16", PLACES[4]: "none"}),
    ("highest", {PLACES[0]: "tf32"}),
]  # fmt: skip


@pytest.fixture
def no_choice() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    for place in PLACES:
        torch._C._set_fp32_precision_setter(*place, "none")


@pytest.mark.usefixtures("no_choice")
@pytest.mark.parametrize(("precision", "places"), CHOICES)
def test_settings_of_precision_are_what_they_were_and_later_ones_reach_as_far(
    precision: str, places: dict[tuple[str, str], str]
) -> None:
    def begin() -> None:
        for place in PLACES:
            torch._C._set_fp32_precision_setter(*place, "none")
        torch.set_float32_matmul_precision(precision)
        for place in PLACES:
            torch._C._set_fp32_precision_setter(*place, places.get(place, "none"))

    def shown() -> list[str]:
        found = [torch._C._get_fp32_precision_getter(*place) for place in PLACES]
        try:
            return [*found, torch.get_float32_matmul_precision()]
        except RuntimeError:
            return found

    def later() -> list[list[str]]:
        found = [shown()]
        for place, value in ((PLACES[0], "none"), (PLACES[0], "tf32"), (PLACES[1], "bf16"), (PLACES[2], "tf32")):
            torch._C._set_fp32_precision_setter(*place, value)
            found.append(shown())
        return found

    begin()
    want = later()
    begin()
    with medium_precision():
        inside = shown()
    assert later() == want
    assert (inside[-1] == "medium") is may_choose(want[0])


def may_choose(shown: list[str]) -> bool:
    """Whether PyTorch tells one precision for all devices."""
    return len(shown) > len(PLACES)


def test_where_pytorch_has_no_settings_per_device_there_is_nothing_to_restore(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_setting", None)
    with medium_precision():
        assert torch.get_float32_matmul_precision() == "medium"
    assert torch.get_float32_matmul_precision() == "highest"
