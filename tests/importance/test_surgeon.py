"""The surgeon with updates that wait removes units in the order of one that applies each at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ecospa_fx.importance import brain_surgeon, lazy_updates
from ecospa_fx.importance.brain_surgeon import Layer, removals, remove_all
from ecospa_fx.importance.linalg import damped, inverse
from tests.support import immediate_surgeon

F32, F64 = torch.float32, torch.float64


def problem(
    carriers: int, units: int, width: int, out: int, dtype: torch.dtype, damping: float | None
) -> tuple[Tensor, Tensor]:
    """H and W of inputs whose scales differ by a factor of 30, as those of hidden units do."""
    size, source = units * width, torch.Generator().manual_seed(units * width + out)
    rows = torch.randn(carriers, 3 * size, size, generator=source, dtype=F64) * torch.logspace(-1, 0.5, size, dtype=F64)
    weight = torch.randn(carriers, out, size, generator=source, dtype=F64)
    hessian = rows.mT @ rows / rows.shape[1]
    return (hessian if damping is None else damped(hessian, damping)).to(dtype), weight.to(dtype)


SIZES = [
    (1, 1, 1, 3), (3, 2, 1, 1), (2, 129, 1, 40), (1, 300, 1, 1), (1, 512, 1, 96), (2, 100, 3, 20), (2, 4, 33, 9),
    (1, 3, 140, 7),
]  # fmt: skip
"""Carriers, units, width, outputs: none of the updates applied, some, more than fit; one right-hand side and many."""


@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-10), (F32, 1e-3)])
@pytest.mark.parametrize("damping", [None, 0.01])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_order_is_that_of_updates_that_are_applied_at_once(
    sizes: tuple[int, int, int, int], damping: float | None, dtype: torch.dtype, tolerance: float
) -> None:
    carriers, units, width, out = sizes
    hessian, weight = problem(carriers, units, width, out, dtype, damping)
    want = immediate_surgeon.remove_all(hessian, weight, width)
    removal = remove_all(hessian, weight.mT @ weight, width)
    assert removal.order.equal(want.order)
    torch.testing.assert_close(removal.cost, want.cost, rtol=tolerance, atol=0)


def test_of_equal_costs_the_first_goes_first() -> None:
    source = torch.Generator().manual_seed(0)
    weight = torch.randint(1, 4, (2, 1, 300), generator=source).double()
    hessian = torch.eye(300, dtype=F64).expand(2, -1, -1) / 4
    removal = remove_all(hessian, weight.mT * weight * torch.eye(300))
    assert removal.order.equal(weight[:, 0].argsort(dim=1, stable=True))
    assert removal.cost.equal(weight[:, 0].square().sort(1).values / 4)
    pairs = weight[:, :, :150].repeat_interleave(2, 2)  # units of two inputs each
    removal = remove_all(hessian, pairs.mT * pairs * torch.eye(300), 2)
    assert removal.order.equal(pairs[:, 0, ::2].argsort(dim=1, stable=True))


@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-12), (F32, 2e-4)])
@pytest.mark.parametrize("width", [1, 4])
def test_rounding_does_not_add_up(width: int, dtype: torch.dtype, tolerance: float) -> None:
    """After nine tenths of the units: what is left of H⁻¹ and G against what it is by definition."""
    units = 480 // width
    hessian, weight = problem(2, units, width, 32, dtype, 0.001)
    state = brain_surgeon._State([layer(hessian, weight, width)])
    for _ in range(units * 9 // 10):
        state.remove_best()
    state._compact()
    state.pair.apply()
    for carrier, numbers in enumerate(state.numbers):
        kept = torch.zeros(units, dtype=torch.bool).index_fill(0, numbers, True).repeat_interleave(width)
        exact, matrix = hessian[carrier].double(), weight[carrier].double()
        left = inverse(exact[kept][:, kept])
        solved = matrix[:, kept] + matrix[:, ~kept] @ exact[~kept][:, kept] @ left
        for found, want in zip(state.pair.matrices[:, carrier], (left, 2 * solved.T @ solved), strict=True):
            assert (found - want).norm() < tolerance * want.norm()


def layer(hessian: Tensor, weight: Tensor, width: int = 1) -> Layer:
    carriers, size = hessian.shape[:2]
    return Layer(carriers, size // width, width, hessian.dtype, hessian.device, lambda: (hessian, weight.mT @ weight))


def test_rounding_never_makes_a_cost_that_is_no_number() -> None:
    """Float32 holds nothing of what is left of such inputs once some are removed."""
    source = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 20, 160, generator=source)
    hessian, gram = damped(rows.mT @ rows, 1e-9), torch.ones(2, 160, 160)
    for width in (1, 4):
        removal = remove_all(hessian, gram, width)
        assert removal.cost.isfinite().all()
        assert removal.order.sort(1).values.equal(torch.arange(160 // width).expand(2, -1))


def test_blocks_without_a_root_have_that_of_their_diagonal() -> None:
    blocks = torch.tensor([[[4.0, 2.0], [2.0, 5.0]], [[4.0, 9.0], [9.0, -1.0]]])
    want = torch.tensor([[[2.0, 0.0], [1.0, 2.0]], [[2.0, 0.0], [0.0, 0.5]]])
    assert brain_surgeon._factor(blocks, torch.tensor([0.25, 0.25])).equal(want)


# -- side by side --------------------------------------------------------------------------------------------------


def test_layers_go_side_by_side_as_far_as_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [(1, 20, 1), (1, 20, 2), (2, 20, 1), (1, 40, 1), (1, 20, 1), (2, 20, 1)]
    problems = [problem(*size, 3, F64, 0.01) for size in sizes]
    layers = [layer(*problem, size[2]) for problem, size in zip(problems, sizes, strict=True)]
    together: list[list[int]] = []
    state = brain_surgeon._State

    def counted(layers: list[Layer]) -> brain_surgeon._State:
        together.append([layer.carriers for layer in layers])
        return state(layers)

    monkeypatch.setattr(brain_surgeon, "_State", counted)
    monkeypatch.setattr(brain_surgeon, "HOST_ROOM", 4 * layers[0].bytes)
    alone = [immediate_surgeon.remove_all(*problem, size[2]) for problem, size in zip(problems, sizes, strict=True)]
    numbers = []
    for number, removal in removals(layers):
        numbers.append(number)
        assert removal.order.equal(alone[number].order)
        torch.testing.assert_close(removal.cost, alone[number].cost, rtol=1e-10, atol=0)
    assert (sorted(numbers), together) == (list(range(6)), [[1, 2, 1], [2], [1], [1]])
    monkeypatch.setattr(brain_surgeon, "HOST_ROOM", 0)
    together.clear()
    assert len(list(removals(layers[:3]))) == len(together) == 3


def test_a_layer_says_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    one = layer(*problem(2, 30, 2, 3, F32, 0.01), 2)
    pair = brain_surgeon._State([one]).pair
    assert one.bytes == sum(t.nbytes for t in (pair.matrices, pair._factors)) == 2 * 60 * (2 * 60 + 257) * 4
    for name, value in (("memory_reserved", 70), ("memory_allocated", 30), ("mem_get_info", (100, 999))):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert brain_surgeon._room(torch.device("cuda", 0)) == 70
    assert brain_surgeon._room(torch.device("cpu")) == brain_surgeon.HOST_ROOM


class Waits(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types here
    """Counts what makes the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # torch's
        names = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "unique")
        self.count += func.__name__.split(".")[0] in names
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("width", [1, 2])
def test_no_step_waits_for_the_device(width: int) -> None:
    counts = []
    for size in (100, 400):
        hessian, weight = problem(2, size // width, width, 3, F64, 0.01)
        with Waits() as waits:
            remove_all(hessian, weight.mT @ weight, width)
        counts.append(waits.count)
    assert counts[0] == counts[1] > 0  # one matrix is inverted


def test_matrices_lose_rows_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy_updates, "MOVED_ELEMENTS", 250)  # two matrices at a time
    pair = lazy_updates.LazyPair(3, 10, 4, F64, torch.device("cpu"))
    rows = torch.randn(2, 3, 10, 10, dtype=F64)
    first, second = dense = rows + rows.mT
    pair.matrices.copy_(dense)
    change = pair.more(3)
    change.copy_(torch.randn(3, 3, 2, 10, dtype=F64))
    r, p = change.unbind(2)
    want = torch.stack([first - r.mT @ r, second - r.mT @ p - p.mT @ r])
    columns = torch.tensor([[0, 1, 2, 9], [1, 4, 5, 6], [5, 6, 7, 8]])
    torch.testing.assert_close(
        pair.rows(columns), torch.stack([want[:, c, columns[c]] for c in range(3)]), rtol=1e-12, atol=1e-12
    )
    storage = pair.matrices.data_ptr()
    pair.narrow(columns)
    pair.apply()
    less = torch.stack([want[:, c][:, columns[c]][:, :, columns[c]] for c in range(3)], 1)
    torch.testing.assert_close(pair.matrices, less, rtol=1e-12, atol=1e-12)
    assert (pair.matrices.data_ptr(), pair.waiting) == (storage, 0)
