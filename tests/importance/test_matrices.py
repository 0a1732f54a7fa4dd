"""Linear algebra of symmetric and regular matrices, also in a process that has set its threads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ecospa_fx.importance.brain_surgeon import gate_roots
from ecospa_fx.importance.linalg import inverse, regular_inverse

ROOT = Path(__file__).resolve().parents[2]


def positive(*shape: int) -> Tensor:
    rows = torch.randn(*shape[:-1], 2 * shape[-1], shape[-1], dtype=torch.float64)
    return rows.mT @ rows


@pytest.mark.parametrize("shape", [(3,), (2, 5), (2, 3, 4)])
def test_inverses_are_those_of_each_matrix(shape: tuple[int, ...]) -> None:
    matrix, any_regular = positive(*shape), torch.randn(*shape, shape[-1], dtype=torch.float64)
    eye = torch.eye(shape[-1]).double().expand(*shape, shape[-1])
    torch.testing.assert_close(inverse(matrix) @ matrix, eye)
    torch.testing.assert_close(regular_inverse(any_regular) @ any_regular, eye)


def test_what_rounding_left_below_zero_is_lifted() -> None:
    matrix = torch.stack([torch.eye(3), torch.diag(torch.tensor([1.0, 1.0, -1e-7]))]).double()
    found = inverse(matrix)
    assert found[0].equal(torch.eye(3).double())
    assert found[1].isfinite().all()
    assert torch.linalg.eigvalsh(found[1]).min() > 0


def test_gates_of_what_stays_are_bounded() -> None:
    """Two queries that always say the opposite: the one that stays would have to be turned off, or far up."""
    for sign, bound in ((1.0, 4.0), (-1.0, 0.25)):
        matrix = torch.tensor([[[1.0, 60.0 * sign], [60.0 * sign, 3601.0]]]).double()
        roots = gate_roots(matrix, torch.tensor([[True, False]]), 1e-9)
        assert float(roots[0, 0, 0].square()) == pytest.approx(bound)


THREADED = """
import torch
torch.set_num_threads(2)
import tests.support.threaded as threaded
threaded.main()
print("done")
"""


@pytest.mark.slow
def test_matrices_of_many_rows_end_where_threads_were_set() -> None:
    """In a process of its own: an LU decomposition of a batch of these would never end there."""
    done = subprocess.run(
        [sys.executable, "-c", THREADED], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout.split() == ["done"], done.stderr
