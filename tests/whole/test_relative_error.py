"""What `masked_error` tells, and what it says that it does not cover."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ecospa_fx as eco
from ecospa_fx.relative_error import RelativeError, relative_error, usual_size
from ecospa_fx.verify import masked_error

INF = float("inf")


def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    source = torch.Generator().manual_seed(0)
    return (scale * torch.randn(*shape, generator=source, dtype=torch.float64)).to(dtype)


FILLS = [torch.finfo(torch.float64).min, torch.finfo(torch.float32).min, -1e9, -1e4, 1e30, -INF, INF]


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("share", [1, 15])
def test_what_is_filled_in_hides_nothing(fill: float, share: int) -> None:
    """Whether one of sixteen places is masked, or all but one."""
    want, wrong = normal(16, 40), normal(16, 40)
    want[:share] = wrong[:share] = fill
    assert relative_error([want.clone()], [want]) == 0.0
    assert relative_error([want * (1 - 1e-13)], [want]) < 1e-12
    wrong[-1] += 1
    assert 0.1 < relative_error([wrong], [want]) < 100
    wrong[-1] += 1e-7 - 1
    assert 1e-8 < relative_error([wrong], [want]) < 1e-5


def test_fills_that_scores_were_added_to() -> None:
    want, wrong = normal(4, 4, 8), normal(4, 4, 8)
    for one in (want, wrong):
        one[:, 2:] += -1e9
        one[:, 1] += torch.finfo(torch.float64).min
    wrong[:, 0] += 1
    assert relative_error([wrong], [want]) > 0.1
    wrong = want.clone()
    wrong[:, 2:] *= 2  # what was filled in differs, too
    assert relative_error([wrong], [want]) == pytest.approx(1)
    wrong[:, 2:] = -want[:, 2:]
    wrong[:, 1] *= -1
    assert relative_error([wrong], [want]) == pytest.approx(2)


def test_infinities_and_what_is_not_a_number() -> None:
    want = normal(3, 4)
    want[0, 0], want[0, 1] = -INF, INF
    for place, value in (((0, 0), INF), ((0, 0), 1.0), ((0, 1), torch.nan), ((1, 1), torch.nan), ((2, 2), INF)):
        got = want.clone()
        got[place] = value
        assert relative_error([got], [want]) == INF
    dense = want.clone()
    dense[2] = torch.nan
    for value in (torch.nan, 3.0, INF):
        got = want.clone()
        got[2] = value
        error = relative_error([got], [dense])
        assert error == 0.0
        assert error.left_out == (
            "4 of the 12 numbers in output 0 are NaN in the dense model, so that nothing is said about them: "
            "choose an example or a type that gives numbers there",
        )
    got[1, 0] += 1
    assert relative_error([got], [dense]) > 0.1
    assert relative_error([dense], [torch.full((3, 4), torch.nan)]) == INF
    assert relative_error([want[:1, :1]], [want[:1, :1]]) == INF  # nothing is compared but an infinity


def test_each_output_by_its_own_scale() -> None:
    loss, logits = torch.tensor(1e6, dtype=torch.float64), normal(3, 8, scale=1e-3)
    assert relative_error([loss, logits + 1e-3], [loss, logits]) > 0.1
    assert relative_error([loss + 1, logits], [loss, logits]) == pytest.approx(1e-6)
    both = torch.cat([normal(4, 8), normal(4, 8, scale=1e-6)])
    other = both.clone()
    other[4:] *= 1.5
    assert relative_error([other], [both]) > 1e-7


def test_rounding_is_no_error() -> None:
    """Numbers that only rounding makes, beside usual ones, are not compared to themselves."""
    for dtype, most in ((torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 0.2)):
        precision = torch.finfo(dtype).eps
        want = normal(64, 8, dtype=dtype)
        want[1:] *= precision  # nearly all of it
        got = want + precision * normal(64, 8, dtype=dtype).flip(0)
        assert 0 < relative_error([got], [want]) < most


def test_whole_numbers_flags_and_zeros() -> None:
    want = normal(3, 4)
    numbers, flags, zeros = torch.arange(8), torch.tensor([True, False]), torch.zeros(2, 3)
    same = [want, numbers, flags, zeros, 3, None]
    assert relative_error([torch.clone(t) if isinstance(t, Tensor) else t for t in same], same) == 0.0
    assert relative_error([want, numbers.flip(0).clamp(max=3), flags, zeros, 3, None], same) == 0.875
    assert relative_error([want, numbers, ~flags, zeros, 3, None], same) == 1.0
    assert relative_error([want, numbers, flags, zeros + 1e-20, 3, None], same) < 1e-6
    assert relative_error([want, numbers, flags, zeros + 1, 3, None], same) > 1e6
    assert relative_error([zeros], [zeros]) == 0.0
    assert relative_error([want, numbers], [want]) == relative_error([want[:2]], [want]) == INF
    assert relative_error([3], [3]) == relative_error([], []) == INF  # nothing was compared
    assert relative_error([want], [3]) == relative_error([3], [want]) == INF
    assert relative_error([torch.zeros(0), want], [torch.zeros(0), want]) == 0.0


def test_complex_numbers() -> None:
    want = torch.complex(normal(3, 4), normal(3, 4).flip(0))
    assert relative_error([want + 1e-14j], [want]) < 1e-12
    assert relative_error([want + 1j], [want]) > 0.1
    want[0] = torch.tensor(complex(-INF, 0))
    assert relative_error([want.clone()], [want]) == 0.0


def test_a_float_with_remarks() -> None:
    error = RelativeError(0.25, ["one"])
    assert isinstance(error, float)
    assert (error + 1, error < 0.3, f"{error:.1e}", error.left_out) == (1.25, True, "2.5e-01", ("one",))
    assert copy.deepcopy(error).left_out == pickle.loads(pickle.dumps(error)).left_out == ("one",)


def test_large_tensors_are_sampled() -> None:
    sizes = torch.ones(3 << 20)
    sizes[:5] = 1e12
    assert usual_size(sizes, 1e-16) == 1


# -- models ------------------------------------------------------------------------------------------------------


class Filled(nn.Module):
    """Fills masked places of its output, by `how`."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.up, self.down = how, nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor, mask: Tensor) -> Any:
        y = x + self.down(self.up(x).relu())
        seen = mask[..., None].to(y)
        if self.how == "least":
            return {"states": y.masked_fill(seen == 0, torch.finfo(y.dtype).min), "best": y.argmax(-1)}
        if self.how == "added":
            return y.square().mean() * 1e-8, y + (1 - seen) * -1e9
        return y + (1 - seen) * -INF, y.abs() > 1e3  # 0 · -inf where nothing is masked


@pytest.mark.parametrize("how", ["least", "added", "nothing"])
def test_models_with_masks(how: str) -> None:
    model = Filled(how).double()
    args = normal(2, 4, 8), torch.tensor([[1, 1, 0, 0], [1, 0, 1, 1]])
    plan = eco.plan(eco.detect(model, args), ratio=0.5, scores="magnitude")
    small = copy.deepcopy(eco.shrink(model, plan, args))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        error = masked_error(model, small, plan, args)
    if how == "nothing":
        assert error == INF
        assert [str(one.message) for one in told] == list(error.left_out)
        assert "40 of the 64 numbers in output 0 are NaN in the dense model" in error.left_out[0]
        return
    assert error < 1e-12
    assert not told
    with torch.no_grad():
        small.get_parameter("down.bias").add_(1.0)
    assert masked_error(model, small, plan, args) > 0.1
