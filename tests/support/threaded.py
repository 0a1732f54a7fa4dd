"""What the library computes of matrices, at sizes at which some builds of torch never end an LU decomposition."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

import ecospa_fx as eco
from ecospa_fx.capture.export import capture
from ecospa_fx.coupling.types import Coupling
from ecospa_fx.importance.brain_surgeon import gate_roots, order_scores, remove_all
from ecospa_fx.importance.linalg import damped, inverse, least_squares, power, regular_inverse
from ecospa_fx.importance.linear_views import sides_of
from ecospa_fx.passes.lossy.change_basis import ChangeBasis, balanced

SIZE = 192


class Product(nn.Module):
    """Two matrices in a row, one head each of two: a linear coupling."""

    def __init__(self) -> None:
        super().__init__()
        self.v, self.o = nn.Linear(8, 2 * SIZE), nn.Linear(2 * SIZE, 8)

    def forward(self, x: Tensor) -> Tensor:
        values = self.v(x).unflatten(-1, (2, SIZE)).transpose(1, 2)
        mixed = x.new_ones(2, x.shape[1], x.shape[1]).tril() @ values
        out: Tensor = self.o(mixed.transpose(1, 2).flatten(2))
        return out


def main() -> None:
    """Every computation once, on a batch of two."""
    torch.manual_seed(0)
    rows = torch.randn(2, 2 * SIZE, SIZE, dtype=torch.float64)
    matrix = damped(rows.mT @ rows, 0.01)
    for result in (inverse(matrix), regular_inverse(rows[:, :SIZE]), power(matrix, -0.5)):
        assert result.isfinite().all()
    least_squares(matrix[0], torch.randn(4, SIZE, dtype=torch.float64), 0.1, 1.0)
    keep = torch.arange(SIZE).expand(2, -1) % 2 > 0
    assert gate_roots(matrix, keep, 0.1).isfinite().all()
    wide = torch.zeros(2, 2 * SIZE, 2 * SIZE, dtype=torch.float64)
    wide[:, :SIZE, :SIZE] = wide[:, SIZE:, SIZE:] = matrix
    weight = torch.randn(2, 3, 2 * SIZE, dtype=torch.float64)
    assert order_scores(remove_all(wide, weight.mT @ weight, SIZE)).isfinite().all()
    turn(regular_inverse(rows[:, :SIZE]))


def turn(basis: Tensor) -> None:
    """A linear coupling in other bases, as training and compression turn it."""
    model, example = Product(), (torch.randn(2, 3, 8),)
    coupling: Coupling = next(c for c in eco.detect(model, example).offered if c.symmetry == "linear")
    program, sides = capture(model, example, {}, dynamic=False), sides_of(coupling)
    assert sides is not None
    change = balanced(ChangeBasis(*sides, basis.float()), program)
    replace(change, basis=change.basis.double()).run(program)
