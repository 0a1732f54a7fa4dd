"""Axes as text: sums of products in the order of their positions, or formulas where they do not lie in rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ecospa_fx.axes.axis import Axis, DimKind, Piece
from ecospa_fx.axes.dims import Dims
from ecospa_fx.axes.flow import analyse
from ecospa_fx.axes.notation import Notation
from ecospa_fx.capture.export import capture


def fresh(dims: Dims, *sizes: int, kind: DimKind = DimKind.PARAMETER) -> list[Axis]:
    return [dims.fresh(size, kind) for size in sizes]


def test_products_and_sums() -> None:
    dims = Dims()
    heads, width, rest = fresh(dims, 2, 4, 3)
    notation = Notation(dims.sizes, dims.origins)
    pair = dims.merge([heads, width])
    assert notation.axis(heads) == "a"
    assert notation.axis(pair) == "(a b)"
    assert notation.axis(dims.concat([pair, rest])) == "(a b + c)"
    assert notation.axis(dims.merge([dims.concat([heads, rest]), width])) == "(a b + c b)"
    assert notation.axis(dims.merge([heads, dims.concat([width, rest])])) == "(a (b + c))"
    assert notation.axis(dims.concat([width, width])) == "(b + b)"
    assert notation.axis(dims.concat([])) == "0"
    assert notation.axis(dims.merge([])) == "1"
    assert notation.legend() == "a=2 b=4 c=3"


def test_kinds_of_dims_have_letters_of_their_own() -> None:
    dims = Dims()
    (cut,), (kept,), (blank,) = (fresh(dims, 5, kind=kind) for kind in DimKind)
    assert Notation(dims.sizes, dims.origins).axes([cut, kept, blank], [True, True, False]) == "(a° A _5)"


def test_names_go_on_after_z() -> None:
    dims = Dims()
    notation = Notation(dims.sizes, dims.origins, fresh(dims, *[2] * 26))
    assert [notation.axis(axis) for axis in fresh(dims, 2, 2)] == ["a1", "b1"]


def test_what_lies_in_no_rows_is_a_formula() -> None:
    dims = Dims()
    (whole,) = fresh(dims, 7)
    dims.take(whole, 0, 7, 2)
    assert Notation(dims.sizes, dims.origins).axis(dims.resolve(whole)) == "{2·a | 2·b+1}"
    assert str(dims.resolve(whole)) == "{2·d1 | 2·d2+1}"
    assert (
        Notation(dims.sizes, dims.origins).axis(Axis(8, (Piece(0, ((dims.new(3, DimKind.PARAMETER), 2),)),))) == "{2·a}"
    )


def test_an_axis_prints_without_its_dims() -> None:
    dims = Dims()
    heads, width, rest = fresh(dims, 2, 4, 3)
    assert str(dims.concat([dims.merge([heads, width]), rest])) == "(d0 d1 + d2)"
    assert str(dims.merge([heads, dims.concat([width, rest])])) == "(d0 (d1 + d2))"


class Gated(nn.Module):
    """A gate and what it gates, in one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(4, 6, bias=False), nn.Linear(3, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(x).chunk(2, -1)
        result: Tensor = self.down(gate.sigmoid() * up)
        return result


def test_a_flow_prints() -> None:
    flow = analyse(capture(Gated(), (torch.randn(2, 4),), None, dynamic=False))
    assert flow.notation.axis(flow.parameters["both.weight"].axes[0]) == "(a + a)"
    assert str(flow).splitlines() == [
        "both.weight: ((a + a)° b°)",
        "down.weight: (c° a°)",
        "x: (A B)",
        "linear = aten.linear(x, both.weight) : (A (a + a)°)",
        *[line for line in str(flow).splitlines() if line.startswith("    b: blocked, ")],
        "chunk = aten.chunk(linear, 2, -1) : (A a°), (A a°)",
        "getitem = getitem(chunk, 0) : (A a°)",
        "getitem_1 = getitem(chunk, 1) : (A a°)",
        "sigmoid = aten.sigmoid(getitem) : (A a)",
        "    a: nonlinear",
        "    a: a function of each position",
        "mul = aten.mul(sigmoid, getitem_1) : (A a°)",
        "    a: multiplied activations",
        "linear_1 = aten.linear(mul, down.weight) : (A c°)",
        "    a: contracts parameter",
        "output",
        "    c: blocked, it is part of the model's output; do not return it, for instance with use_cache=False",
        "where a=3 b=4 c=5 A=2 B=4",
    ]
