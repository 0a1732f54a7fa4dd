"""The calls on which edits are proven: other sizes, other numbers, and results of any structure."""

from __future__ import annotations

import copy
import warnings
from collections import UserDict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils import _pytree as pytree

import ecospa_fx as eco
from ecospa_fx.capture.export import capture
from ecospa_fx.errors import PlanError
from ecospa_fx.inplace.calls import TrialCall, has_constant_tensor, has_varied_tensor, randomised_calls, resized_calls
from ecospa_fx.inplace.equivalence import EquivalenceCheck, all_close
from ecospa_fx.ir.pytrees import opened
from tests.support.inplace import half, largest, masked_twin, plan_of

WIDTH, HEADS = 8, 2


class Masked(nn.Module):
    """Attention and an FFN. A mask may be longer than the tokens: what is too much of it is cut off, as caches want."""

    def __init__(self, settings: Any = None) -> None:
        super().__init__()
        self.heads, self.table = HEADS, nn.Embedding(32, WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)

    def forward(self, ids: Tensor, mask: Tensor | None = None, types: Tensor | None = None) -> Tensor:
        x: Tensor = self.table(ids)
        if types is not None:
            x = x + self.table(types)
        if mask is not None and mask.dim() == 2:
            mask = mask[:, None, None, : ids.shape[1]]
        if mask is not None and mask.dtype is not x.dtype:
            mask = mask.bool()
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        x = x + self.out(scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))
        out: Tensor = x + self.down(self.up(x).relu())
        return out


def tokens(batch: int, length: int) -> Tensor:
    return torch.arange(batch * length).remainder(29).view(batch, length)


def masks(batch: int, length: int) -> dict[str, Tensor]:
    ones, causal = torch.ones(batch, length, dtype=torch.long), torch.ones(length, length).tril().bool()
    left = ones.clone()
    left[0, : length // 2] = 0
    return {
        "ones": ones,
        "left": left,
        "longer": torch.ones(batch, length + 3, dtype=torch.bool),
        "added": torch.zeros(batch, 1, length, length, dtype=torch.float64).masked_fill(~causal, -1e9),
    }


@pytest.mark.parametrize("name", ["ones", "left", "longer", "added"])
def test_masks(name: str) -> None:
    model, args = Masked().double().eval(), (tokens(2, 5), masks(2, 5)[name])
    plan = plan_of(eco.detect(model, args), ["ffn"], half)
    twin = masked_twin(model, plan)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        eco.shrink_(model, plan, args)
    assert (model.up.out_features, model.down.in_features) == (6, 6)
    for ids, mask in (args, (tokens(3, 4), masks(3, 4)[name])):
        assert largest(model(ids, mask), twin(ids, mask)) < 1e-12


@pytest.mark.parametrize(("batch", "length"), [(2, 5), (5, 5), (1, 5)])
def test_inputs_of_one_size_vary_together(batch: int, length: int) -> None:
    """Even where the batch is as large as the length by chance, and where either is one."""
    model = Masked().double().eval()
    args = tokens(batch, length), torch.ones(batch, length, dtype=torch.long)
    bench = EquivalenceCheck(model, args, {"types": tokens(batch, length)})
    shapes = {tuple(tuple(t.shape) for t in (*call.args, *call.kwargs.values())) for call in bench.calls}
    assert ((batch, length),) * 3 in shapes
    resized_calls = [shape for shape, *rest in shapes if all(shape == other for other in rest)]
    assert any(b != batch for b, _ in resized_calls) or batch == 1
    assert any(n != length for _, n in resized_calls) or length == 1


class Unlike(nn.Module):
    """Two inputs whose lengths have nothing to do with each other, in a list beside a number."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)

    def forward(self, parts: list[Tensor], power: float) -> tuple[Tensor, Tensor]:
        first, second = (self.down(self.up(part).relu() ** power) for part in parts)
        if second.shape[1] % 2 == 0:  # what both lengths become together is refused
            raise ValueError("an odd length is wanted")
        return first, second


def test_sizes_that_are_equal_by_chance_vary_apart() -> None:
    model = Unlike().double()
    bench = EquivalenceCheck(model, ([torch.randn(2, 5, WIDTH), torch.randn(2, 5, WIDTH)], 2.0), {})
    lengths = {tuple(part.shape[1] for part in call.args[0]) for call in bench.calls}
    assert (5, 5) in lengths
    assert any(a != 5 and b == 5 for a, b in lengths)
    batches = {tuple(part.shape[0] for part in call.args[0]) for call in bench.calls}
    assert any(a == b != 2 for a, b in batches)


@dataclass
class Cache:
    """Keys from before, and how many there are."""

    keys: Tensor
    length: int = 0


class Cached(nn.Module):
    """Reads a cache; its mask is as long as the cache and the tokens together."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)

    def forward(self, x: Tensor, mask: Tensor, cache: Cache) -> Tensor:
        keys = torch.cat([cache.keys, x], 1) * mask[..., None]
        out: Tensor = x + self.down(self.up(x).relu()) + keys.sum(1, keepdim=True)
        return out


def test_sizes_that_are_sums_of_others() -> None:
    """A cache of 4, 3 tokens and a mask of 7; what is in objects varies, too."""
    model = Cached().double()
    x, mask, cache = torch.randn(2, 3, WIDTH), torch.ones(2, 7), Cache(torch.randn(2, 4, WIDTH))
    example = TrialCall((x.double(), mask.double(), Cache(cache.keys.double())), {})
    program = capture(model, *(example.args, example.kwargs), dynamic=True)
    for call in resized_calls(program, example):
        assert isinstance(call.args[2], Cache)
    bench = EquivalenceCheck(model, (x, mask, cache), {})
    assert bench.calls[0].args[2].keys.dtype is torch.float64
    assert any(call.args[2].keys.shape[0] != 2 for call in bench.calls)


def test_what_holds_the_same_everywhere_is_varied() -> None:
    """Also beside what differs: a mask of padding must not hide that all tokens are the same."""
    ids, mask = torch.zeros(2, 5, dtype=torch.long), masks(2, 5)["left"]
    assert has_varied_tensor(TrialCall((ids, mask), {}))
    assert has_constant_tensor(TrialCall((ids, mask), {}))
    (call,) = randomised_calls(TrialCall((ids, mask), {}))
    assert call.args[1] is mask
    assert call.args[0].unique().tolist() == [0, 1]
    bench = EquivalenceCheck(Masked().double(), (ids, mask), {})
    assert any(len(call.args[0].unique()) > 1 for call in bench.calls)


# -- results -----------------------------------------------------------------------------------------------------


@dataclass
class Answer:
    """What a module returns: an ordinary dataclass."""

    y: Tensor
    inner: Any = None
    more: list[Any] = field(default_factory=list)


@dataclass(slots=True)
class Slotted:
    """One without a dictionary."""

    y: Tensor


class Named(NamedTuple):
    """A tuple with names."""

    y: Tensor
    number: int


class Mapping(UserDict[str, Any]):
    """A mapping that no tree library knows."""


class Listed(list[Any]):
    """A list that no tree library knows."""


def tensors_in(result: Any) -> list[Tensor]:
    """The tensors in containers and objects of any kind, in order."""
    return [leaf for leaf in pytree.tree_leaves(opened(result)) if isinstance(leaf, Tensor)]


def test_tensors_in_anything() -> None:
    a, b, c, d, e, f = (torch.full((1,), float(i)) for i in range(6))
    loop = Answer(a)
    loop.inner = loop
    result = [
        loop,
        Slotted(b),
        Named(c, 3),
        Mapping(x=d),
        {"more": Listed([e])},
        Answer(f, None, [Slotted(a)]),
        a,
        "a",
        None,
    ]
    assert [int(t) for t in tensors_in(result)] == [0, 1, 2, 3, 4, 5, 0, 0]


class Answers(nn.Module):
    """A plain FFN that returns what `how` says."""

    def __init__(self, how: Any) -> None:
        super().__init__()
        self.how, self.up, self.down = how, nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Any:
        return self.how(x + self.down(torch.relu(self.up(x))))


RESULTS = {
    "object": Answer,
    "nested": lambda y: Answer(y, Answer(y.sum()), [y.mean(), 3]),
    "named": lambda y: Named(y, 3),
    "tree": lambda y: {"y": [y, None], "loss": (y.sum(),)},
    "beside": lambda y: (y, Answer(y)),
}


@pytest.mark.parametrize("name", list(RESULTS))
def test_results_of_any_structure(name: str) -> None:
    model, x = Answers(RESULTS[name]).double(), torch.randn(3, 16, dtype=torch.float64)
    plan = plan_of(eco.detect(model, (x,)), ["ffn"], half)
    twin = masked_twin(model, plan)
    eco.shrink_(model, plan, (x,))
    assert model.up.weight.shape == (16, 16)
    got, want = tensors_in(model(x)), tensors_in(twin(x))
    assert len(got) == len(want) > 0
    assert all(largest(a, b) < 1e-12 for a, b in zip(got, want, strict=True))


def test_what_objects_hold_is_compared() -> None:
    """An edit that is wrong in an object alone is no edit."""
    model, x = Answers(lambda y: (y.new_ones(3), Answer(y))).double(), torch.randn(3, 16, dtype=torch.float64)
    bench = EquivalenceCheck(model, (x,), {})
    results = tuple((call, bench.run(call)) for call in bench.calls)
    assert bench.gives(results)
    with torch.no_grad():
        bench.model.get_parameter("down.bias")[3] += 1e-3
    assert not bench.gives(results)


# -- the proof itself --------------------------------------------------------------------------------------------


def test_nothing_compared_proves_nothing() -> None:
    ones = torch.ones(2, dtype=torch.float64)
    assert not all_close([], [], 1e-9)
    assert not all_close([torch.ones(3)], [torch.ones(2)], 1e-9, strict=False)
    assert not all_close([ones], [ones, ones], 1e-9)
    assert all_close([ones, torch.ones(3)], [ones, torch.ones(2)], 1e-9, strict=False)
    assert not all_close([ones, torch.ones(3)], [ones, torch.ones(2)], 1e-9)
    assert not all_close([ones * torch.nan], [ones], 1e-9)
    assert not all_close([ones.float()], [ones], 1e-9)


class Counting(nn.Module):
    """Returns no number that could be compared."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        positive: Tensor = self.down(self.up(x).relu()) > 0
        return positive


def test_a_model_of_flags_cannot_be_proven() -> None:
    model, x = Counting().double(), torch.randn(3, WIDTH, dtype=torch.float64)
    plan = plan_of(eco.detect(model, (x,)), ["ffn"], half)
    with pytest.raises(PlanError, match="cannot be written back"):
        eco.shrink_(model, plan, (x,))
    assert model.up.weight.shape == (12, WIDTH)


class Added(nn.Module):
    """Adds what an attribute says where the width is not the one it was written for: with weights of zero, nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up, self.down = 12, nn.Linear(WIDTH, 24), nn.Linear(12, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.up(x).split(self.first, -1)
        out: Tensor = x + self.down(a.relu() * b)
        return out


def test_weights_of_zero_are_shaken() -> None:
    """A split in the wrong places gives the same numbers where all weights are zero."""
    model, x = Added().double(), torch.randn(3, WIDTH, dtype=torch.float64)
    plan = plan_of(eco.detect(model, (x,)), ["ffn"], half)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    bench = EquivalenceCheck(model, (x,), {})
    assert all(p.std() > 0 for p in bench.model.parameters())
    assert not any(p.any() for p in model.parameters())
    eco.shrink_(model, plan, (x,))
    assert model.first == 6
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    twin = copy.deepcopy(model)
    assert torch.equal(model(x), twin(x))


def test_other_sizes_are_tried() -> None:
    """Batches and lengths, each alone and both, beside the example itself."""
    model, x = Answers(RESULTS["object"]).double(), torch.randn(3, 2, 16, dtype=torch.float64)
    shapes = [tuple(call.args[0].shape[:2]) for call in EquivalenceCheck(model, (x,), {}).calls]
    assert shapes[0] == (3, 2)
    assert {(b != 3, n != 2) for b, n in shapes} == {(False, False), (True, False), (False, True), (True, True)}
