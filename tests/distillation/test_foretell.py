"""Inputs that a model foretells itself, and those that it does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ecospa_fx.distillation.teacher_samples import TeacherSamples
from ecospa_fx.distillation.token_mixing import TokenMixing, augmented

CLASSES = 40


def counting(rows: int, positions: int) -> Tensor:
    """Ids [rows, positions] each of which is the one before it plus one."""
    return (torch.arange(positions) + 7 * torch.arange(rows)[:, None]) % CLASSES


def one_more(ids: Tensor) -> Tensor:
    """Logits [rows, positions, classes] of who knows that."""
    return 50.0 * torch.nn.functional.one_hot((ids + 1) % CLASSES, CLASSES).float()


def heard(ids: Tensor, output: Tensor, *more: Tensor, times: int = 4) -> TeacherSamples:
    found = TeacherSamples(torch.Generator().manual_seed(0))
    for number in range(times):
        found.observe(number, ((ids, *more), {}), [output])
    return found


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 3), positions=st.integers(4, 30))
def test_a_sequence_that_goes_on_is_foretold_at_the_place_after(rows: int, positions: int) -> None:
    ids = counting(rows, positions)
    found = heard(ids, one_more(ids), times=20).inputs(3)
    assert list(found) == [0]
    assert torch.equal(found[0], ids)  # all of it can be known


def test_draws_have_the_frequencies_that_the_output_says() -> None:
    logits = torch.tensor([0.7, 0.2, 0.1]).log().expand(1, 4001, 3)
    said = TeacherSamples(torch.Generator().manual_seed(0))._draw(logits)
    shares = torch.bincount(said[0], minlength=3) / said.numel()
    assert torch.allclose(shares, torch.tensor([0.7, 0.2, 0.1]), atol=0.03)


@pytest.mark.parametrize(
    ("inputs", "output"),
    [
        (counting(2, 30), torch.randn(2, 30, CLASSES)),  # knows nothing
        (counting(2, 30), one_more(counting(2, 30) - 1)),  # says the value at its own place, as an encoder does
        (torch.ones(2, 30, dtype=torch.long), one_more(torch.zeros(2, 30, dtype=torch.long))),  # always the same
        (counting(2, 30).float(), one_more(counting(2, 30))),  # not a number that names something
        (counting(2, 30), one_more(counting(2, 30))[:, :-1]),  # other positions
        (counting(2, 1), one_more(counting(2, 1))),  # no next one
        (counting(2, 30), one_more(counting(2, 30))[:, 0]),  # no positions
    ],
)
def test_what_is_not_foretold_is_left_alone(inputs: Tensor, output: Tensor) -> None:
    assert not heard(inputs, output).inputs(0)


def test_places_of_a_sequence_beside_its_tokens_are_not_taken_for_foretold() -> None:
    ids = torch.randint(0, CLASSES, (1, 300), generator=torch.Generator().manual_seed(0))
    logits = one_more(torch.cat([ids[:, 1:], ids[:, :1]], 1) - 1)
    found = heard(ids, logits, torch.arange(300)[None], torch.ones_like(ids)).inputs(1)
    assert list(found) == [0]


def test_the_mix_takes_what_was_foretold_once_it_was_heard_and_another_batch_before() -> None:
    ids = torch.randint(1, CLASSES - 1, (1, 400), generator=torch.Generator().manual_seed(0))
    ids[0, :2] = torch.tensor([0, CLASSES - 1])  # so that all values are within the range
    batches: list[Any] = [((ids,), {}), ((torch.full_like(ids, 5),), {})]
    mix = TokenMixing(0.2, 0.25)
    ((first,), _) = mix(batches, 0)
    assert set(first[first != ids].tolist()) == {5}
    told = (ids + 1) % CLASSES
    mix.observe(0, batches[0], [one_more(torch.cat([ids[:, 1:], ids[:, :1]], 1) - 1)])  # right everywhere
    assert torch.equal(mix(batches, 0)[0][0], ids)
    mix.observe(0, batches[0], [one_more(ids)])  # judged by all that was heard, and wrong by one here
    ((varied,), _) = mix(batches, 0)
    changed = varied != ids
    assert 0.15 < changed.double().mean() < 0.35
    assert torch.equal(varied[:, 1:][changed[:, 1:]], told[:, :-1][changed[:, 1:]])


def test_few_positions_are_filled_up_with_variations() -> None:
    ids = torch.arange(500).reshape(1, 500)
    few: list[Any] = [((ids.roll(n, 1),), {}) for n in range(5)]
    found = augmented(few, 0.2)
    assert len(found) == 20
    assert found[:5] == few
    changed = [(new[0][0] != few[i % 5][0][0]).double().mean() for i, new in enumerate(found[5:])]
    assert all(0.1 < float(share) < 0.3 for share in changed)
    enough: list[Any] = [((ids.expand(44, 500),), {})] * 4  # 88,000 positions
    assert augmented(enough, 0.2) == enough
    assert len(augmented(enough[:2], 0.2)) == 3
    assert augmented(few, 0.0) == few
    assert augmented(few[:1], 0.2) == few[:1]
    pixels: list[Any] = [((torch.randn(1, 8),), {})] * 3
    assert augmented(pixels, 0.2) == pixels
