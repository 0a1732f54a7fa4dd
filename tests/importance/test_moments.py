"""Sums of products of rows: exact to float32's rounding of what varies, however large the mean is."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ecospa_fx.importance.curvature import Moments


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=4), st.integers(1, 12), st.sampled_from([0.0, 1.0, 1e2, 1e4]),
    st.integers(0, 10**6),
)  # fmt: skip
def test_covariance_does_not_drown_in_the_mean(counts: list[int], width: int, mean: float, seed: int) -> None:
    """Rows in pieces of any size, empty ones too, as an expert without tokens has them."""
    source = torch.Generator().manual_seed(seed)
    rows = torch.randn(sum(counts), width, generator=source) + mean
    moments = Moments(width, torch.device("cpu"))
    for piece in torch.split(rows, counts):
        moments.add(piece)
    exact = rows.double()
    deviations = exact - exact.sum(0) / max(len(exact), 1)
    assert moments.rows == len(rows)
    torch.testing.assert_close(moments.total, exact.sum(0), rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(moments.second, exact.T @ exact, rtol=1e-6, atol=1e-4)
    # What is left to round are deviations from each piece's own mean, and that mean in float32.
    torch.testing.assert_close(moments.covariance(), deviations.T @ deviations, rtol=1e-4, atol=1e-3)


def test_a_covariance_of_few_rows_has_no_negative_variance() -> None:
    rows = 1e3 + 1e-2 * torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    moments = Moments(64, torch.device("cpu"))
    moments.add(rows)
    found = torch.linalg.eigvalsh(moments.covariance())
    assert found.min() > -1e-5 * found.max()


def test_what_is_large_and_does_not_vary_does_not_overflow() -> None:
    """Its square has no place in float32."""
    moments = Moments(3, torch.device("cpu"))
    moments.add(torch.full((2, 3), 1e30))
    torch.testing.assert_close(moments.second, torch.full((3, 3), 2e60, dtype=torch.float64), rtol=1e-6, atol=0)
