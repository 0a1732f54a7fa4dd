"""Which sizes become symbols, in which order that is tried, and how long."""

from __future__ import annotations

from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import ecospa_fx as eco
from ecospa_fx.capture import export as capturing
from ecospa_fx.capture.attempts import TimeLimit, TooSlow, attempts
from ecospa_fx.verify import masked_error


class Pixels(nn.Module):
    """Patches of an image, perhaps masked, perhaps beside tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.up, self.down, self.tokens = nn.Linear(8, 24), nn.Linear(24, 8), nn.Embedding(9, 8)

    def forward(self, image: Tensor, mask: Tensor | None = None, ids: Tensor | None = None) -> Tensor:
        if mask is not None:
            image = image * mask[:, None]
        x = self.patches(image).flatten(2).transpose(1, 2)
        if ids is not None:
            x = torch.cat([x, self.tokens(ids)], 1)
        y: Tensor = self.down(torch.relu(self.up(x)))
        return y


IMAGE, MASK, IDS = torch.randn(2, 3, 8, 12), torch.ones(2, 8, 12), torch.ones(2, 5, dtype=torch.long)


def symbols(*tensors: Tensor) -> list[list[tuple[int, ...]] | None]:
    """Per attempt the axes of each tensor that become symbols."""

    class Parts(nn.Module):
        def forward(self, *parts: Tensor) -> Tensor:
            return parts[0]

    shapes = [a.shapes for a in attempts(Parts(), tensors, {})]
    return [None if s is None else [tuple(axes) for axes in s["parts"]] for s in shapes]


def test_of_images_alone_only_the_batch_is_a_symbol() -> None:
    assert symbols(IMAGE) == [[(0,)], None]
    assert symbols(IMAGE, torch.ones(2, 1, 8, 12)) == [[(0,), (0,)], None]
    assert symbols(torch.ones(2, 4, 3, 8, 8)) == [[(0,)], None]


def test_a_mask_of_pixels_does_not_make_symbols_of_heights_and_widths() -> None:
    assert set(map(str, symbols(IMAGE, MASK))) == {str([(0,), (0,)]), "None"}
    assert symbols(IMAGE, MASK, IDS)[0] == [(0,), (0,), (0, 1)]
    assert symbols(torch.ones(2, 4, 3, 8, 12), MASK, IDS)[0] == [(0,), (0,), (0, 1)]


def test_what_a_model_keeps_of_a_sequence_stays_free() -> None:
    cache, hidden = torch.ones(2, 4, 7, 6), torch.ones(2, 5, 24)
    assert symbols(IDS, cache, cache)[0] == [(0, 1), (0, 1, 2, 3), (0, 1, 2, 3)]
    assert symbols(hidden, cache)[0] == [(0, 1, 2), (0, 1, 2, 3)]
    assert symbols(IDS, torch.ones(2, 1, 5, 5))[0] == [(0, 1), (0, 1, 2, 3)]


def test_a_batch_of_one_is_doubled_for_masked_images_too() -> None:
    found = attempts(Pixels(), (IMAGE[:1],), {"mask": MASK[:1], "ids": IDS[:1]})
    assert found[0].doubled
    assert found[0].args[0].shape[0] == 2
    assert found[0].shapes == {"image": {0: Dim.AUTO}, "mask": {0: Dim.AUTO}, "ids": {0: Dim.AUTO, 1: Dim.AUTO}}


@pytest.mark.parametrize("ids", [None, IDS])
def test_masked_images_of_other_batches_and_lengths_run(ids: Tensor | None) -> None:
    model = Pixels().double()
    args = (IMAGE.double(), MASK.double(), *([] if ids is None else [ids]))
    plan = eco.plan(eco.detect(model, args), 0.5, scores="random")
    small = eco.shrink(model, plan, args)
    other = (IMAGE[:1].expand(5, -1, -1, -1).double(), MASK[:1].expand(5, -1, -1).double())
    more = () if ids is None else (torch.ones(5, 9, dtype=torch.long),)
    assert masked_error(model, small, plan, (*other, *more)) < 1e-9


def test_a_trace_that_takes_too_long_is_ended_at_its_next_operator() -> None:
    x = torch.ones(3)
    with pytest.raises(TooSlow, match=r"seconds for 1 calls"), TimeLimit(-1.0, 0.0):
        x + 1
    assert torch._C._len_torch_function_stack() == 0
    with TimeLimit(60.0, 0.0):
        assert torch.equal(x + 1, x * 2)


class Slow(TimeLimit):
    """Gives up at the third call."""

    def __torch_function__(self, *given: Any, **named: Any) -> Any:
        if self._calls == 3:
            self._first = self._each = -1.0
        return super().__torch_function__(*given, **named)


def test_after_an_attempt_that_is_too_slow_the_next_one_is_taken_in_every_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = Pixels().double(), IMAGE.double()
    plan = eco.plan(eco.detect(model, (x,)), 0.5, scores="random")
    monkeypatch.setattr(capturing, "TimeLimit", Slow)
    smaller = [eco.shrink(model, plan, (x,))]
    thread = Thread(target=lambda: smaller.append(eco.shrink(model, plan, (x,))))
    thread.start()
    thread.join()
    assert len(smaller) == 2
    assert all(masked_error(model, small, plan, (x,)) < 1e-9 for small in smaller)
    with pytest.raises(Exception, match=r"batch|size|shape"):
        smaller[0](torch.cat([x, x]))
    assert torch._C._len_torch_function_stack() == 0
    assert torch._guards.TracingContext.try_get() is None
    assert not x.__dict__
    monkeypatch.undo()
    free = eco.shrink(model, plan, (x,))  # nothing of the attempts that were given up is left
    assert free(torch.cat([x, x])).shape[0] == 4
