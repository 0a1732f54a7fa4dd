"""Rules of several operands: every axis is the corresponding one of the others, or is blocked on both sides.

Each row is an operator with all of its tensors. They are parameters together, and one of them alone while the others
are stored. Half of whatever is free is cut at random, and each node of the cut run is compared with the cut of the
dense one: a rule that passes one operand's axis and forgets the other's fails by a shape or by a number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ecospa_fx.axes import registry
from tests.support.oracle import Case, check_exact, check_rule, prepared, tagged

aten = torch.ops.aten
Row = tuple[str, Callable[..., Any], tuple[tuple[int, ...], ...]]

PAIRS = """
    mul multiply logical_and bitwise_and fmax fmin logical_or bitwise_or maximum minimum atan2 bitwise_xor
    copysign eq ge gt hypot isclose le logical_xor lt ne xlogy add rsub sub subtract div divide floor_divide fmod
    remainder true_divide pow float_power max min __and__ __or__ __xor__ polar complex
"""
WHOLE = {"bitwise_and", "bitwise_or", "bitwise_xor", "__and__", "__or__", "__xor__"}


def _at(index: Tensor, size: int) -> Tensor:
    """Positions below a size."""
    return index.long() % size


def _pair(name: str) -> Row:
    operator = getattr(aten, name)

    def call(a: Tensor, b: Tensor) -> Any:
        return operator(a.long(), b.long()) if name in WHOLE else operator(a, b)

    return name, call, ((4, 6), (6,))


ROWS: list[Row] = [
    *(_pair(name) for name in PAIRS.split()),
    ("where", lambda a, b, c: aten.where(a > 5, b, c), ((4, 6), (6,), (4, 1))),
    ("masked_fill", lambda a, b: aten.masked_fill(a, b > 3, 0.0), ((4, 6), (6,))),
    ("masked_fill", lambda a, b, c: aten.masked_fill(a, b > 3, c.sum()), ((4, 6), (4, 1), (3,))),
    ("addcmul", aten.addcmul, ((4, 6), (6,), (4, 1))),
    ("addcdiv", lambda a, b, c: aten.addcdiv(a, b, c + 1), ((4, 6), (6,), (4, 1))),
    ("lerp", aten.lerp, ((4, 6), (4, 6), (4, 6))),
    ("clamp", aten.clamp, ((4, 6), (6,), (4, 1))),
    ("clip", aten.clip, ((4, 6), (6,), (4, 1))),
    ("clamp_min", aten.clamp_min, ((4, 6), (6,))),
    ("clamp_max", aten.clamp_max, ((4, 6), (6,))),
    ("cosine_similarity", lambda a, b: aten.cosine_similarity(a, b, -1), ((4, 6), (4, 6))),
    ("cosine_similarity", lambda a, b: aten.cosine_similarity(a, b, -1), ((4, 6), (6,))),
    ("copy", aten.copy, ((4, 6), (6,))),
    ("prelu", aten.prelu, ((2, 4, 6), (4,))),
    ("prelu", aten.prelu, ((2, 4, 6), (1,))),
    ("_prelu_kernel", aten._prelu_kernel, ((2, 4, 6), (1, 4, 1))),
    ("type_as", aten.type_as, ((4, 6), (5,))),
    ("to", aten.to.other, ((4, 6), (5,))),
    ("linear", aten.linear, ((3, 6), (4, 6), (4,))),
    ("matmul", aten.matmul, ((2, 3, 6), (6, 4))),
    ("matmul", aten.matmul, ((5, 1, 3, 6), (2, 6, 4))),
    ("mm", aten.mm, ((3, 6), (6, 4))),
    ("bmm", aten.bmm, ((2, 3, 6), (2, 6, 4))),
    ("mv", aten.mv, ((3, 6), (6,))),
    ("dot", aten.dot, ((6,), (6,))),
    ("vdot", aten.vdot, ((6,), (6,))),
    ("addmm", aten.addmm, ((4,), (3, 6), (6, 4))),
    ("baddbmm", aten.baddbmm, ((2, 1, 4), (2, 3, 6), (2, 6, 4))),
    ("addmv", aten.addmv, ((3,), (3, 6), (6,))),
    ("addbmm", aten.addbmm, ((3, 4), (2, 3, 6), (2, 6, 4))),
    ("einsum", lambda a, b, c: torch.einsum("bi,oi,bo->o", a, b, c), ((2, 6), (4, 6), (2, 4))),
    ("tensordot", lambda a, b: aten.tensordot(a, b, [1, 2], [1, 0]), ((3, 4, 6), (6, 4, 5))),
    ("outer", aten.outer, ((4,), (6,))),
    ("ger", aten.ger, ((4,), (6,))),
    ("inner", aten.inner, ((3, 6), (4, 6))),
    ("linalg_vecdot", aten.linalg_vecdot, ((3, 6), (6,))),
    ("bilinear", aten.bilinear, ((2, 3), (2, 4), (5, 3, 4), (5,))),
    ("scaled_dot_product_attention", lambda q, k, v, m: aten.scaled_dot_product_attention(q, k, v, m),
     ((2, 4, 3, 8), (2, 4, 5, 8), (2, 4, 5, 6), (4, 3, 5))),
    ("conv1d", lambda a, w, b: aten.conv1d(a, w, b), ((2, 4, 9), (6, 4, 3), (6,))),
    ("conv2d", lambda a, w, b: aten.conv2d(a, w, b, [1, 1], [0, 0], [1, 1], 2), ((2, 4, 5, 5), (6, 2, 1, 1), (6,))),
    ("conv3d", lambda a, w, b: aten.conv3d(a, w, b), ((2, 4, 3, 3, 3), (6, 4, 2, 2, 2), (6,))),
    ("conv_transpose1d", lambda a, w, b: aten.conv_transpose1d(a, w, b), ((2, 4, 9), (4, 6, 3), (6,))),
    ("conv_transpose2d", lambda a, w, b: aten.conv_transpose2d(a, w, b), ((2, 4, 5, 5), (4, 6, 3, 3), (6,))),
    ("conv_transpose3d", lambda a, w, b: aten.conv_transpose3d(a, w, b), ((2, 4, 3, 3, 3), (4, 6, 2, 2, 2), (6,))),
    ("convolution", lambda a, w, b: aten.convolution(a, w, b, [1], [0], [1], False, [0], 1),
     ((2, 4, 9), (6, 4, 3), (6,))),
    ("_convolution", lambda a, w, b: aten._convolution(a, w, b, [1], [0], [1], False, [0], 1, False, False, True, True),
     ((2, 4, 9), (6, 4, 3), (6,))),
    ("layer_norm", lambda a, w, b: aten.layer_norm(a, [6], w, b), ((4, 6), (6,), (6,))),
    ("native_layer_norm", lambda a, w, b: aten.native_layer_norm(a, [6], w, b, 1e-5), ((4, 6), (6,), (6,))),
    ("rms_norm", lambda a, w: aten.rms_norm(a, [6], w), ((4, 6), (6,))),
    ("group_norm", lambda a, w, b: aten.group_norm(a, 2, w, b), ((3, 4, 6), (4,), (4,))),
    ("native_group_norm", lambda a, w, b: aten.native_group_norm(a, w, b, 3, 4, 6, 2, 1e-5), ((3, 4, 6), (4,), (4,))),
    ("batch_norm", lambda a, w, b, m, v: aten.batch_norm(a, w, b, m, v, False, 0.1, 1e-5, False),
     ((2, 4, 6), (4,), (4,), (4,), (4,))),
    ("instance_norm", lambda a, w, b: aten.instance_norm(a, w, b, None, None, True, 0.1, 1e-5, False),
     ((2, 4, 6), (4,), (4,))),
    ("_native_batch_norm_legit_no_training",
     lambda a, w, b, m, v: aten._native_batch_norm_legit_no_training(a, w, b, m, v, 0.1, 1e-5),
     ((2, 4, 6), (4,), (4,), (4,), (4,))),
    ("grid_sampler", lambda a, g: aten.grid_sampler(a, g.cos(), 0, 0, False), ((4, 6, 5, 5), (4, 3, 3, 2))),
    ("grid_sampler_2d", lambda a, g: aten.grid_sampler_2d(a, g.cos(), 0, 0, True), ((4, 6, 5, 5), (4, 3, 3, 2))),
    ("grid_sampler_3d", lambda a, g: aten.grid_sampler_3d(a, g.cos(), 0, 0, True), ((4, 6, 3, 3, 3), (4, 2, 2, 2, 3))),
    ("cat", lambda a, b: aten.cat([a, b], 1), ((4, 6), (4, 3))),
    ("cat", lambda a, b: aten.cat([a, b.flatten()[:0], a.new_zeros(0)], 1), ((4, 6), (3,))),
    ("concat", lambda a, b: aten.concat([a, b], 0), ((4, 6), (3, 6))),
    ("concatenate", lambda a, b: aten.concatenate([a, b], 0), ((4, 6), (3, 6))),
    ("stack", lambda a, b: aten.stack([a, b], 1), ((4, 6), (4, 6))),
    ("expand_as", aten.expand_as, ((4, 1), (4, 6))),
    ("view_as", aten.view_as, ((4, 6), (24,))),
    ("reshape_as", aten.reshape_as, ((4, 6), (2, 2, 6))),
    ("broadcast_tensors", lambda a, b: aten.broadcast_tensors([a, b]), ((4, 1), (4, 6))),
    ("meshgrid", lambda a, b: aten.meshgrid([a, b], indexing="ij"), ((4,), (6,))),
    ("diff", lambda a, b: aten.diff(a, 1, -1, b), ((4, 6), (4, 2))),
    ("select_scatter", lambda a, b: aten.select_scatter(a, b, 1, 2), ((4, 6), (4,))),
    ("slice_scatter", lambda a, b: aten.slice_scatter(a, b, 1, 0, 6), ((4, 6), (4, 6))),
    ("slice_scatter", lambda a, b: aten.slice_scatter(a, b, 1, 1, 4), ((4, 6), (4, 3))),
    ("embedding", lambda w, i: aten.embedding(w, _at(i, 4)), ((4, 6), (5, 3))),
    ("embedding_bag", lambda w, i, s: F.embedding_bag(_at(i, 4), w, torch.tensor([0, 2]), mode="sum",
                                                      per_sample_weights=s), ((4, 6), (5,), (5,))),
    ("embedding_bag", lambda w, i: F.embedding_bag(_at(i, 4), w, mode="sum"), ((4, 6), (5, 3))),
    ("index_select", lambda a, i: aten.index_select(a, 0, _at(i, 4)), ((4, 6), (5,))),
    ("index", lambda a, i: a[_at(i, 4)], ((4, 6), (5, 2))),
    ("index", lambda a, i, j: a[_at(i, 4), :, _at(j, 3)], ((4, 6, 3), (5, 1), (2,))),
    ("index", lambda a, m: a.mT[m > 0.5], ((6, 4), (4,))),
    ("gather", lambda a, i: aten.gather(a, 1, _at(i, 6)), ((4, 6), (4, 3))),
    ("gather", lambda a, i: aten.gather(a, 1, _at(i, 6)), ((4, 6), (2, 3))),
    ("take_along_dim", lambda a, i: aten.take_along_dim(a, _at(i, 6), 1), ((1, 6), (4, 3))),
    ("take_along_dim", lambda a, i: aten.take_along_dim(a, _at(i, 6), 1), ((4, 6), (1, 3))),
    ("scatter", lambda a, i, s: aten.scatter(a, 1, _at(i, 6), s), ((4, 6), (4, 3), (4, 3))),
    ("scatter", lambda a, i: aten.scatter(a, 1, _at(i, 6), 0.0), ((4, 6), (2, 3))),
    ("scatter_add", lambda a, i, s: aten.scatter_add(a, 1, _at(i, 6), s), ((4, 6), (2, 3), (4, 3))),
    ("scatter_reduce", lambda a, i, s: aten.scatter_reduce(a, 1, _at(i, 6), s, "amax"), ((4, 6), (4, 3), (4, 3))),
    ("index_put", lambda a, i, v: aten.index_put(a, [_at(i, 4)], v), ((4, 6), (3,), (3, 6))),
    ("index_put", lambda a, i, v: aten.index_put(a, [_at(i, 4)], v), ((4, 6), (3,), (6,))),
    ("index_put", lambda a, i, v: aten.index_put(a, [None, _at(i, 6)], v), ((4, 6), (3,), (1,))),
    ("index_put", lambda a, m, v: aten.index_put(a, [m > 0.5], v[0, :1]), ((4, 6), (4,), (3, 6))),
    ("_unsafe_index_put", lambda a, i, v: aten._unsafe_index_put(a, [_at(i, 4)], v, True), ((4, 6), (3,), (3, 6))),
    ("index_add", lambda a, i, s: aten.index_add(a, 0, _at(i, 4), s), ((4, 6), (3,), (3, 6))),
    ("index_copy", lambda a, i, s: aten.index_copy(a, 1, _at(i, 6), s), ((4, 6), (3,), (4, 3))),
    ("index_fill", lambda a, i: aten.index_fill(a, 1, _at(i, 6), 0.0), ((4, 6), (3,))),
    ("bincount", lambda a, w: aten.bincount(a.long(), w, 7), ((6,), (6,))),
    ("bucketize", lambda a, b: aten.bucketize(a, b), ((4, 6), (5,))),
    ("searchsorted", lambda a, b: aten.searchsorted(a, b), ((5,), (4, 6))),
    ("isin", lambda a, b: aten.isin(a, b), ((4, 6), (3,))),
    ("masked_select", lambda a, m: aten.masked_select(a, m > 5), ((4, 6), (6,))),
    ("masked_scatter", lambda a, m, s: aten.masked_scatter(a, m > 5, s), ((4, 6), (6,), (24,))),
    ("repeat_interleave", lambda a, n: aten.repeat_interleave(a, n.long() % 2, 1), ((4, 6), (6,))),
    ("fill", lambda a, v: aten.fill(a, v.sum()), ((4, 6), (3,))),
]  # fmt: skip

ELSEWHERE = {
    "grouped_mm": "its operands are rows sorted by their group; tested in test_rules_contract",
    "nothing": "assertions, from which nothing comes out",
    "noise": "everything that reaches them is blocked; what they draw cannot be compared",
    "narrow": "its place is a single number", "positions": "their ends are single numbers",
    "split": "its places are a list of numbers", "orders": "its other operands are options",
    "reshape": "lists of tensors are handled one by one by its own operators",
}  # fmt: skip
"""Rules whose operators take several tensors that need not correspond."""

SAME = {"cudnn_batch_norm", "native_batch_norm", "_batch_norm_no_update", "_batch_norm_with_update", "equal",
        "_native_batch_norm_legit", "_native_batch_norm_legit_functional", "_fused_rms_norm"}  # fmt: skip
"""Operators that share the rule, and the order of its arguments, with one that has a row, or return no tensor."""


def _tensors(argument: Any) -> int:
    kind = str(argument.type)
    return 0 if "Tensor" not in kind or argument.is_out else 2 if "List" in kind else 1


def _takes_several(name: str) -> bool:
    packet = getattr(aten, name)
    schemas = [getattr(packet, overload)._schema for overload in packet.overloads()]
    return any(sum(map(_tensors, schema.arguments)) > 1 for schema in schemas)


def test_every_operator_of_several_tensors_has_a_row() -> None:
    names = [o.removeprefix("aten.") for o in registry.operators() if o.startswith("aten.")]
    rules = {name: registry.find(f"aten.{name}") for name in names}
    missing = {n for n, rule in rules.items() if rule is not None and rule.__name__ not in ELSEWHERE}
    missing = {name for name in missing if _takes_several(name)} - {name for name, _, _ in ROWS} - SAME
    assert missing == set()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("alone", [None, 0, 1, 2, 3, 4])
def test_axes_of_operands_go_together(alone: int | None, seed: int) -> None:
    """alone: the operand that is a parameter while the others are stored, None for all of them."""
    parameters: list[Tensor] = []
    buffers: list[Tensor] = []
    takes: list[tuple[Callable[..., Any], list[tuple[bool, int]]]] = []
    for _, call, shapes in ROWS:
        if alone is not None and alone >= len(shapes):
            continue
        own = []
        for i, shape in enumerate(shapes):
            kind = parameters if alone in (None, i) else buffers
            own.append((kind is buffers, len(kind)))
            kind.append(tagged(*shape))
        takes.append((call, own))

    def everything(*tensors: Tensor) -> list[Any]:
        given = (tensors[: len(parameters)], tensors[len(parameters) :])
        return [call(*(given[stored][at] for stored, at in own)) for call, own in takes]

    assert check_rule(everything, parameters, buffers, seed=seed) > len(takes) / 4


class Deformable(nn.Module):
    """Attention to sampled places; heads are folded into the batch of values and of places."""

    def __init__(self, stored: bool) -> None:
        super().__init__()
        self.value, self.out, self.stored = nn.Linear(16, 16), nn.Linear(16, 16), stored
        self.offsets, self.weights = nn.Linear(16, 2 * 4 * 2), nn.Linear(16, 4 * 2)
        self.places = nn.Buffer(torch.randn(4, 9, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        v = self.value(x).view(b, n, 4, d // 4).permute(0, 2, 3, 1).reshape(b * 4, d // 4, 3, 3)
        grid = self.offsets(x).view(b, n, 4, 2, 2).transpose(1, 2)
        grid = (self.places.expand(b, -1, -1, -1, -1) if self.stored else grid).reshape(b * 4, n, 2, 2)
        w = self.weights(x).view(b, n, 4, 2).softmax(-1).transpose(1, 2).reshape(b * 4, 1, n, 2)
        y = F.grid_sample(v, grid, align_corners=False) * w
        result: Tensor = self.out(y.sum(-1).view(b, d, n).transpose(1, 2))
        return result


@pytest.mark.slow
@pytest.mark.parametrize("stored", [False, True])
def test_heads_in_the_batch_of_what_is_sampled(stored: bool) -> None:
    case = Case("aten.grid_sampler", lambda: Deformable(stored), "", inputs=(9, 16))
    assert sorted((c.size, c.carriers) for c in prepared(case)[2].offered) == [(4, 1), (4, 4)]
    check_exact(case, seeds=(0, 1))
