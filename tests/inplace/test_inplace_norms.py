"""Norms over fewer units in the user's own module: another epsilon and other weights, found by trying."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ecospa_fx as eco
from ecospa_fx.errors import PlanError, StorageError
from ecospa_fx.inplace.edits import Edits
from ecospa_fx.inplace.norms import NormEdit
from ecospa_fx.inplace.serialise import apply_saved_edit
from ecospa_fx.verify import masked

WIDTH = 12


class ByHand(nn.Module):
    """An RMSNorm whose attributes have names of their own, with its weight counted from `start`."""

    def __init__(self, width: int, start: float = 0.0) -> None:
        super().__init__()
        self.scale, self.tiny = nn.Parameter(torch.rand(width) + 0.5), 1e-3
        self.start = start

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.tiny) * (self.start + self.scale)


class Normed(nn.Module):
    """Two feed-forward layers with a norm inside each."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(6, WIDTH) for _ in range(2))
        self.norm = nn.ModuleList(norm(WIDTH) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(WIDTH, 6) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for up, norm, down in zip(self.up, self.norm, self.down, strict=True):
            x = x + down(norm(F.gelu(up(x))))
        return x


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "module": lambda n: nn.RMSNorm(n, eps=1e-3),
    "default epsilon": nn.RMSNorm,
    "by hand": ByHand,
    "from 1": lambda n: ByHand(n, 1.0),
}
X = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))


def made(norm: Callable[[int], nn.Module]) -> tuple[Normed, eco.Plan]:
    """A model with weights that differ, and a plan with other widths in each layer."""
    torch.manual_seed(0)
    model = Normed(norm).eval()
    for module in model.norm:
        for parameter in module.parameters():
            nn.init.uniform_(parameter, 0.5, 1.5)
    names = [c.name for c in eco.detect(model, (X,)).offered]
    return model, eco.plan(eco.detect(model, (X,)), scores="random", widths=dict(zip(names, (5, 8), strict=True)))


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_over_fewer_units_is_written_back(name: str, tmp_path: Path) -> None:
    model, plan = made(NORMS[name])
    dense = copy.deepcopy(model)
    with masked(dense, plan):
        want = dense(X)
    small = eco.shrink_(model, plan, (X,))
    assert small is model
    torch.testing.assert_close(small(X), want, rtol=1e-5, atol=1e-5)
    assert [tuple(p.shape) for n, p in small.named_parameters() if n.startswith("norm")] == [(5,), (8,)]
    eco.save(small, tmp_path / "model")
    loaded = eco.load(tmp_path / "model", model=lambda: dense)
    assert type(loaded) is Normed
    assert torch.equal(loaded(X), small(X))


def test_it_shrinks_twice() -> None:
    """The number of units that a norm divides by stays the first one."""
    model, plan = made(NORMS["module"])
    dense = copy.deepcopy(model)
    eco.shrink_(model, plan, (X,))
    couplings = eco.detect(model, (X,))
    second = eco.plan(couplings, scores="random", widths={c.name: 3 for c in couplings.offered})
    with masked(model, second):
        want = model(X)
    eco.shrink_(model, second, (X,))
    torch.testing.assert_close(model(X), want, rtol=1e-5, atol=1e-5)
    epsilons = [module.eps for module in model.norm]
    assert epsilons == pytest.approx([1e-3 * WIDTH / 3] * 2)
    assert [module.eps for module in dense.norm] == [1e-3] * 2


def test_what_a_module_cannot_carry_is_refused_and_nothing_changes() -> None:
    model, plan = made(nn.LayerNorm)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(PlanError, match=r"cannot be written back into the module: .*LayerNorm with eps"):
        eco.shrink_(model, plan, (X,))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.eps for module in model.norm] == [1e-5] * 2


def test_an_edit_is_undone() -> None:
    model, _ = made(NORMS["from 1"])
    norm, edits = model.norm[0], Edits()
    assert isinstance(norm, ByHand)
    before = norm.scale.data.clone()
    NormEdit("norm.0", "scale", "tiny", 12, 1.0).write(model, 3, edits)
    torch.testing.assert_close(norm.scale.data, 2 * (before + 1) - 1)
    assert norm.tiny == pytest.approx(4e-3)
    edits.undo()
    assert torch.equal(norm.scale.data, before)
    assert norm.tiny == 1e-3


@pytest.mark.parametrize(
    "entry",
    [
        ["norm.2", "scale", "tiny", 12, 0.0, 4], ["norm.0", "bias", "tiny", 12, 0.0, 4],
        ["norm.0", "scale", "start", 12, 0.0, 4], ["norm.0", "scale", "tiny", 12, 0.0, 13],
        ["norm.0", "scale", "tiny", 12, 0.0, 0], ["norm.0", "scale", "tiny", "12", 0.0, 4],
    ],
)  # fmt: skip
def test_a_saved_norm_that_is_not_there_is_refused(entry: list[object]) -> None:
    model, _ = made(NORMS["by hand"])
    nothing = eco.Plan((), tuple((n, tuple(p.shape)) for n, p in model.named_parameters()))
    with pytest.raises(StorageError, match=r"^the model has no norm at \['norm"):
        apply_saved_edit(model, nothing, [entry], {})
    apply_saved_edit(model, nothing, [["norm.0", "scale", "tiny", 12, 0.0, 12]], {})


class Grouped(nn.Module):
    """A convolution, a norm over groups of its channels, and another convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(4, 8)
        self.last = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(F.silu(self.norm(self.first(x))))
        return out


def test_the_number_of_groups_follows() -> None:
    torch.manual_seed(0)
    model, x = Grouped(), torch.randn(2, 3, 5, 5)
    plan = eco.plan(eco.detect(model, (x,)), ratio=0.5, scores="random")
    with masked(model, plan):
        want = model(x)
    eco.shrink_(model, plan, (x,))
    assert (model.norm.num_groups, model.norm.num_channels) == (2, 4)
    torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-5)
