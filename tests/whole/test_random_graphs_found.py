"""What random graphs have found: the smallest model that showed each fault, as a literal test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ecospa_fx as eco
from ecospa_fx.capture.export import capture
from ecospa_fx.plan import Plan, Selection
from ecospa_fx.verify import masked_error
from tests.support.exported_once import exported_once

EXACT = 1e-9


class Small(nn.Module):
    """linear layers a, b, … of given sizes, a buffer s, and a function of the module and its input."""

    def __init__(
        self, forward: Callable[[Any, Tensor], Tensor], sizes: Sequence[tuple[int, int]], stored: Tensor | None = None
    ) -> None:
        super().__init__()
        self._forward = forward
        for name, (inside, outside) in zip("abcd", sizes, strict=False):
            setattr(self, name, nn.Linear(inside, outside))
        self.register_buffer("s", torch.randn(3) if stored is None else stored)
        self.p = nn.Parameter(torch.randn(1, 24))

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def built(
    forward: Callable[[Any, Tensor], Tensor], sizes: Sequence[tuple[int, int]], stored: Tensor | None = None
) -> nn.Module:
    torch.manual_seed(0)
    return Small(forward, sizes, stored).double().eval()


def offers(model: nn.Module, x: Tensor) -> dict[str, tuple[int, int]]:
    """Size and carriers of everything offered."""
    return {c.name: (c.size, c.carriers) for c in eco.detect(model, (x,)).offered}


def reasons(model: nn.Module, x: Tensor) -> str:
    return "; ".join(c.blocked.message for c in eco.detect(model, (x,)).blocked if c.blocked)


def check_exact(model: nn.Module, *shape: int) -> None:
    """Random plans, at the example's batch and another one."""
    x, other = (torch.randn(batch, *shape, dtype=torch.float64) for batch in (2, 5))
    couplings = eco.detect(model, (x,))
    assert couplings.offered
    with exported_once():
        for seed in range(4):
            plan = eco.plan(couplings, ratio=0.4, scores="random", seed=seed)
            small = eco.shrink(model, plan, (x,))
            for example in (x, other):
                assert masked_error(model, small, plan, (example,)) <= EXACT, str(plan)


# -- stored operands -----------------------------------------------------------------------------------------------


def test_an_operand_that_follows_in_one_dim_of_an_axis_is_not_reduced_again() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        result: Tensor = m.b(torch.maximum(m.a(x).reshape(-1, 24), m.p))
        return result

    model = built(forward, [(4, 8), (24, 5)])
    assert (8, 1) in offers(model, torch.randn(2, 3, 4).double()).values()
    check_exact(model, 3, 4)


@pytest.mark.slow
def test_an_operand_is_reduced_along_two_axes_of_one_call() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = x + m.a(x.flatten(1)).view(-1, 4, 6)
        result: Tensor = m.c(m.b(h).flatten(1))
        return result

    model = built(forward, [(24, 24), (6, 7), (28, 5)])
    assert {(4, 1), (6, 1), (7, 1)} <= set(offers(model, torch.randn(2, 4, 6).double()).values())
    check_exact(model, 4, 6)


@pytest.mark.slow
def test_a_size_that_the_batch_leaves_alone_is_known() -> None:
    """The length is a symbol with one possible value: pieces of it can be selected."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)
        h = x + (torch.cat([h, h], 1).mT @ m.b.weight)
        result: Tensor = m.c(F.relu(h).flatten(1)[:, :24])
        return result

    model = built(forward, [(8, 6), (8, 12), (24, 5)])
    check_exact(model, 6, 8)


@pytest.mark.slow
def test_an_operand_of_an_einsum_gains_no_axis() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.a(x).view(-1, 3, 2, 4).transpose(1, 2)
        h = torch.einsum("bhtd,td->bhtd", F.relu(h), m.s)
        result: Tensor = m.b(h.transpose(1, 2).flatten(2))
        return result

    model = built(forward, [(6, 8), (8, 5)], torch.randn(3, 4))
    assert (4, 1) in offers(model, torch.randn(2, 3, 6).double()).values()
    check_exact(model, 3, 6)


def test_a_stored_tensor_read_twice_by_one_call_is_not_reduced_for_one_reader() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = torch.einsum("btc,c,d->btcd", m.a(x), m.s, m.s)
        result: Tensor = m.b(h.mT)
        return result

    model = built(forward, [(4, 6), (6, 5)], torch.randn(6))
    x = torch.randn(2, 3, 4).double()
    assert "read here in another place too" in reasons(model, x)
    assert (6, 1) not in offers(model, x).values()


# -- what a dim meets ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_heads_that_meet_one_another_carry_no_choice() -> None:
    """Every head against every head: which dimensions a head keeps cannot differ."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.a(x).view(-1, 3, 2, 4)
        result: Tensor = m.b((F.softmax(h @ h.mT, -1) @ h).flatten(2))
        return result

    model = built(forward, [(6, 8), (8, 5)])
    assert list(offers(model, torch.randn(2, 3, 6).double()).values()) == [(4, 1)]
    check_exact(model, 3, 6)


def test_a_carrier_with_a_choice_of_its_own_carries_no_other() -> None:
    """Axis y may differ along x and x along b, but not both: the places along x would be others for every b."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = torch.einsum("abcd,ydxb->abcxy", m.a(x).unflatten(-1, (4, 3)), m.w)
        result: Tensor = m.b(h.flatten(1))
        return result

    model = built(forward, [(6, 12), (288, 5)])
    model.w = nn.Parameter(torch.randn(3, 3, 4, 6, dtype=torch.float64))
    check_exact(model, 6, 6)


def test_a_dim_that_lies_twice_in_an_axis_carries_no_choice() -> None:
    """Copies between two occurrences of one dim: which copies stay can differ along neither."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)
        h = torch.einsum("abc,avw->acw", h.repeat_interleave(3, -1), h)
        result: Tensor = m.b(h.flatten(1))
        return result

    model = built(forward, [(4, 6), (108, 5)])
    x = torch.randn(2, 3, 4).double()
    assert list(offers(model, x).values()) == [(3, 1)]
    assert "merged with itself into one axis" in reasons(model, x)
    check_exact(model, 3, 4)


def gated(up: Tensor, form: str) -> Tensor:
    """Gate and value interleaved, or one after the other."""
    half = up.shape[-1] // 2
    gate, value = (up[..., ::2], up[..., 1::2]) if form == "interleaved" else (up[..., :half], up[..., half:])
    return F.silu(gate) * value


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "wide", "middle"),
    [
        ("interleaved", 6, lambda h: -h.unsqueeze(1).squeeze(1)),
        ("halves", 6, torch.tanh),
        ("halves", 12, torch.relu),
    ],
)
def test_pieces_that_become_rows_lose_the_same_units(form: str, wide: int, middle: Callable[[Tensor], Tensor]) -> None:
    """Units of two halves are tied where the halves become the rows of a rectangle; each goes with its neighbour."""
    half = wide // 2

    def forward(m: Any, x: Tensor) -> Tensor:
        h = middle(torch.cat(gated(m.a(x), form).chunk(2, -1), -1))
        h = F.relu(torch.unflatten(h, -1, (2, half)).flatten(-2))
        result: Tensor = m.b(h * m.s)
        return result

    model = built(forward, [(4, 2 * wide), (wide, 4)], torch.randn(wide))
    x = torch.randn(2, 3, 4).double()
    (coupling,) = eco.detect(model, (x,)).offered
    down = next(m for m in coupling.members if m.parameter == "b.weight")
    assert [set(unit) for unit in down.indices[0].tolist()] == [{i, i + half} for i in range(half)]
    check_exact(model, 3, 4)


def test_a_dim_merged_with_itself_is_refused() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)
        result: Tensor = m.b((h[..., None] * h[..., None, :]).flatten(2))
        return result

    model = built(forward, [(6, 4), (16, 5)])
    x = torch.randn(2, 3, 6).double()
    assert "merged with itself into one axis" in reasons(model, x)
    assert offers(model, x) == {}


def test_stored_rows_beside_cut_rows_are_refused() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        result: Tensor = m.b(F.pad(m.a(x), (2, 2)).view(-1, 3, 2, 4).flatten(2))
        return result

    model = built(forward, [(6, 4), (8, 5)])
    x = torch.randn(2, 3, 6).double()
    assert "some are stored and others are not" in reasons(model, x)
    assert offers(model, x) == {}


# -- the graph with symbolic sizes ---------------------------------------------------------------------------------


def grouped(m: Any, x: Tensor, length: int) -> Tensor:
    """Per key head two query heads, a key and a value in one projection."""
    h = m.a(x).view(x.shape[0], length, 2, 4, 4)
    q = h[:, :, :, :-2].reshape(x.shape[0], length, 4, 4).transpose(1, 2)
    k, v = (h[:, :, :, i].repeat_interleave(2, 2).transpose(1, 2) for i in (-2, -1))
    q = q.reshape(*q.shape[:-1], 2, 2).flatten(-2)  # reads sizes of a view
    result: Tensor = m.b((torch.softmax(q @ k.mT, -1) @ v).transpose(1, 2).reshape(x.shape[0], -1, 16))
    return result


@pytest.mark.slow
@pytest.mark.parametrize("length", [3, -1])
def test_selections_are_the_same_couplings_with_symbolic_sizes(length: int) -> None:
    """Slices that take everything, and sizes read off a view, do not come between a view and a selection."""
    model = built(lambda m, x: grouped(m, x, length), [(6, 32), (16, 5)])
    assert {(4, 2), (2, 1)} <= set(offers(model, torch.randn(2, 3, 6).double()).values())
    check_exact(model, 3, 6)


def test_a_symbol_equals_no_width_by_accident() -> None:
    """A batch of 2 is not the 2 halves of a width, as the walk over the symbolic graph sees them."""
    model = built(lambda m, x: m.b(F.relu(m.a(x))), [(6, 4), (4, 5)])
    program = capture(model, (torch.randn(2, 4, 6).double(),), None, dynamic=True)
    shape = next(n for n in program.graph.nodes if n.op == "placeholder" and n.name == "x").meta["val"].shape
    sizes = [program.sizes(size) for size in shape]
    assert sizes == [11, 13, 6]


def test_a_symbol_counts_as_a_number_that_the_graph_allows() -> None:
    model = built(lambda m, x: m.b(m.a(x).unflatten(1, (-1, 4)).relu()), [(6, 4), (4, 5)])
    program = capture(model, (torch.randn(2, 8, 6).double(),), None, dynamic=True)
    shape = next(n for n in program.graph.nodes if n.op == "placeholder" and n.name == "x").meta["val"].shape
    assert program.sizes(shape[1]) % 4 == 0


@pytest.mark.slow
def test_complex_numbers_are_viewed_at_any_width() -> None:
    """An odd number of columns beside them leaves strides that are no multiple of 2."""

    def forward(m: Any, x: Tensor) -> Tensor:
        q, v = m.a(x).split(8, -1)
        q = torch.view_as_real(torch.view_as_complex(q.unflatten(-1, (4, 2))) * 1j).flatten(-2)
        result: Tensor = m.b(q) + m.c(F.relu(v))
        return result

    model = built(forward, [(6, 16), (8, 5), (8, 5)])
    check_exact(model, 3, 6)


def test_an_input_reduced_along_another_axis_keeps_its_symbolic_sizes() -> None:
    """Each head keeps a dimension of its own, of an input whose batch and width are symbols."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = torch.unflatten(x, 1, (2, 2)).masked_fill(m.p.view(1, 2, 2, 1) > 0, 0.0)
        result: Tensor = h.permute(0, 3, 1, 2).flatten(2) @ m.a.weight
        return result

    model = built(forward, [(5, 4)])
    model.p = nn.Parameter(torch.randn(4, dtype=torch.float64))
    x, other = (torch.randn(*shape, dtype=torch.float64) for shape in ((2, 4, 6), (5, 4, 3)))
    couplings = eco.detect(model, (x,))
    (chosen,) = (c for c in couplings.offered if (c.size, c.carriers) == (2, 2))
    keep = ((0,), (1,))
    plan = Plan((Selection(chosen.name, chosen.kind, chosen.layer, 2, 2, chosen.members, keep),),
                tuple(couplings.shapes.items()))  # fmt: skip
    small = eco.shrink(model, plan, (x,))
    for example in (x, other):
        assert masked_error(model, small, plan, (example,)) <= EXACT
