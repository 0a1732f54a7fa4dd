"""Masks are recognised by what they hide, for every size; what no flag can say stays."""

from __future__ import annotations

import pytest
import torch

from ecospa_fx.passes import CausalAttention, RemoveInert
from tests.support.attention import CAUSAL, HIDES_NOTHING, OTHERS, Masked, attention_arguments, calls, inputs, traced

SIZES = ((2, 6), (3, 11), (2, 2))


@pytest.mark.parametrize("name", CAUSAL)
def test_golden_causal(name: str) -> None:
    graph = traced(Masked(CAUSAL[name]), inputs())
    result = CausalAttention().run(graph)
    assert (result.changes, result.reasons) == (1, ())
    assert attention_arguments(graph) == {"attn_mask": None, "is_causal": True}
    RemoveInert().run(graph)
    assert calls(graph) == ["scaled_dot_product_attention", "transpose", "flatten"]


@pytest.mark.parametrize("name", HIDES_NOTHING)
def test_golden_a_mask_that_hides_nothing(name: str) -> None:
    graph = traced(Masked(HIDES_NOTHING[name]), inputs())
    assert CausalAttention().run(graph).changes == 1
    assert attention_arguments(graph) == {"attn_mask": None}


@pytest.mark.parametrize("name", OTHERS)
def test_twin_other_masks_stay(name: str) -> None:
    mask, reason = OTHERS[name]
    graph = traced(Masked(mask), inputs())
    before = str(graph.graph)
    result = CausalAttention().run(graph)
    assert (result.changes, str(graph.graph)) == (0, before)
    assert reason in result.reasons[0]


def test_twin_a_mask_that_is_an_input_stays() -> None:
    class Given(Masked):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=v[..., 0].unsqueeze(-2) > -9)

    graph = traced(Given(None), inputs())
    result = CausalAttention().run(graph)
    assert result.changes == 0
    assert "come from node" in result.reasons[0]


def test_twin_a_window_wider_than_a_fixed_length_is_causal() -> None:
    mask, _ = OTHERS["window"]
    short, long = (traced(Masked(mask), inputs(length=n), axes=(0,)) for n in (3, 4))
    assert [CausalAttention().run(g).changes for g in (short, long)] == [1, 0]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CAUSAL, *HIDES_NOTHING])
def test_equal_at_every_size(name: str) -> None:
    graph = traced(Masked({**CAUSAL, **HIDES_NOTHING}[name]), inputs())
    wants = [graph(*inputs(*size)) for size in SIZES]
    CausalAttention().run(graph)
    graph.recompile()
    for size, want in zip(SIZES, wants, strict=True):
        assert torch.allclose(graph(*inputs(*size)), want, rtol=1e-12, atol=1e-12)


def test_again_changes_nothing() -> None:
    graph = traced(Masked(CAUSAL["tril"]), inputs())
    CausalAttention().run(graph)
    before = str(graph.graph)
    assert CausalAttention().run(graph).modified is False
    assert str(graph.graph) == before
