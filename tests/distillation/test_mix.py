"""Batches whose positions are exchanged."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ecospa_fx.distillation.token_mixing import TokenMixing


def ids(rows: int, positions: int, *more: int, seed: int) -> Tensor:
    return torch.randint(0, 50, (rows, positions, *more), generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 3),
    lengths=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    more=st.sampled_from([(), (4,)]),
    share=st.sampled_from([0.0, 0.3, 0.9]),
)
def test_every_position_is_read_from_one_of_the_batches(
    rows: int, lengths: list[int], more: tuple[int, ...], share: float
) -> None:
    batches: list[Any] = [((ids(rows, n, *more, seed=i),), {}) for i, n in enumerate(lengths)]
    kept = [batch[0][0].clone() for batch in batches]
    mix = TokenMixing(share)
    for number, (own, length) in enumerate(zip(kept, lengths, strict=True)):
        ((found,), _) = mix(batches, number)
        assert found.shape == own.shape
        assert found.amin() >= own.amin()
        assert found.amax() <= own.amax()
        for position in range(length):
            known = [other[:, position] for other in kept if other.shape[1] > position]
            vectors = [row for each in known for row in each]
            assert all(any(torch.equal(value, v) for v in vectors) for value in found[:, position])
    assert all(torch.equal(batch[0][0], before) for batch, before in zip(batches, kept, strict=True))


def test_the_share_is_what_was_asked_for_and_the_same_each_time() -> None:
    whole = torch.arange(4000)
    batches: list[Any] = [((torch.stack([whole, whole.flip(0)]),), {}), ((torch.stack([whole.flip(0), whole]),), {})]
    ((first,), _), ((again,), _) = TokenMixing(0.25)(batches, 0), TokenMixing(0.25)(batches, 0)
    changed = (first != batches[0][0][0]).double().mean()
    assert abs(changed - 0.25) < 0.03
    assert torch.equal(first, again)


def test_inputs_of_one_token_go_together() -> None:
    batches: list[Any] = [
        ((), {"ids": torch.full((1, 200), n), "boxes": torch.full((1, 200, 4), n), "span": torch.tensor([[0, 1]])})
        for n in range(2)
    ]
    for each in batches:  # so that both values are within the range of either
        each[1]["ids"][0, 0], each[1]["ids"][0, 1] = 0, 1
        each[1]["boxes"][0, 0], each[1]["boxes"][0, 1] = 0, 1
    _, found = TokenMixing(0.5)(batches, 0)
    assert 0 < found["ids"].sum() < 199
    assert torch.equal(found["ids"], found["boxes"][..., 0])
    assert torch.equal(found["boxes"], found["boxes"][..., :1].expand(-1, -1, 4))


def test_other_inputs_and_other_structures_are_left_alone() -> None:
    pixels, flags, sizes = torch.randn(2, 8), torch.rand(2, 8) > 0.5, torch.tensor([3, 5])
    batches: list[Any] = [((pixels, flags, sizes, 7), {}), ((pixels + 1, ~flags, sizes + 1, 8), {})]
    found, _ = TokenMixing(0.9)(batches, 0)
    assert all(one is other for one, other in zip(found, batches[0][0], strict=True))
    tokens = ids(1, 6, seed=0)
    assert TokenMixing(0.9)([((tokens,), {}), ((), {"ids": tokens})], 0)[0][0] is tokens
    assert TokenMixing(0.9)([((tokens,), {})], 0)[0][0] is tokens
