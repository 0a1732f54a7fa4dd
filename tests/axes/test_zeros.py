"""Where removed elements are 0, dim by dim: through concatenations, repeated heads, and sums over merged axes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ecospa_fx as eco
from ecospa_fx.axes.dims import DimKind, Dims
from ecospa_fx.axes.findings import Value
from ecospa_fx.axes.zeros import Zeros, alive_anywhere, alive_on, flagged
from ecospa_fx.verify import masked_error


def test_flags_and_dims() -> None:
    dims = Dims()
    a, b = (dims.fresh(4, DimKind.PARAMETER) for _ in range(2))
    stored = dims.fresh(4, DimKind.STORED)
    ((left, *_),) = (dims.dims_of(a),)
    zero = flagged(dims, [a, b, stored, dims.concat([a, b])], [False, False, False, False], [left])
    assert tuple(zero) == (False, True, False, False)
    value = Value((a, b, stored, dims.concat([b, a])), zero)
    assert [alive_on(dims, value, i) for i in range(4)] == [{left}, set(), set(), {left}]
    plain = Value((b, a), (True, False))
    assert alive_anywhere(dims, plain) == {left}
    dims.split(a, (2, 2))  # whatever becomes of a dim, it is the same units
    assert alive_on(dims, value, 0) == set(dims.dims_of(a))
    assert isinstance(value.zero, Zeros)
    assert value.zero == (False, True, False, False)


class Pieces(nn.Module):
    """Attention whose bias is put together of one for queries, something stored for keys, and one for values."""

    def __init__(self, cosine: bool = False) -> None:
        super().__init__()
        self.qkv, self.out, self.cosine = nn.Linear(8, 24, bias=False), nn.Linear(8, 8), cosine
        self.q_bias, self.v_bias = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))
        self.k_bias: Tensor
        self.register_buffer("k_bias", torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.qkv.weight, torch.cat((self.q_bias, self.k_bias, self.v_bias)))
        q, k, v = y.view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        if self.cosine:
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        result: Tensor = self.out(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))
        return result


class Grouped(nn.Module):
    """Grouped queries, and a norm over all heads together."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 3 * n, bias=False) for n in (4, 2, 2))
        self.norm, self.out, self.fused = nn.RMSNorm(12), nn.Linear(12, 8), fused

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, 3)).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        else:
            k, v = (t[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for t in (k, v))
            y = (q @ k.mT).softmax(-1) @ v
        result: Tensor = self.out(self.norm(y.transpose(1, 2).flatten(2)))
        return result


@pytest.mark.parametrize(
    ("model", "offers", "refuses"),
    [
        (Pieces(), ["heads 2", "qk 4", "vo 4"], 0), (Pieces(cosine=True), ["heads 2", "vo 4"], 1),
        (Grouped(fused=True), ["heads 2", "qk 3", "vo 3"], 1), (Grouped(fused=False), ["heads 2", "qk 3", "vo 3"], 1),
    ],
    ids=["pieces", "cosines", "grouped", "repeated"],
)  # fmt: skip
def test_each_dim_for_itself(model: nn.Module, offers: list[str], refuses: int) -> None:
    """A query head alone leaves the mean of its values behind, a key of stored bias that bias; others leave 0."""
    args = (torch.randn(2, 5, 8).double(),)
    couplings = eco.detect(model.double(), args)
    assert sorted(f"{c.kind} {c.size}" for c in couplings.offered) == offers
    refused = [c.blocked.message for c in couplings.blocked if c.blocked and "are not zero there" in c.blocked.message]
    assert len(refused) == refuses
    for kinds in (["qk"], ["vo"], ["heads"]):
        if any(c.kind in kinds for c in couplings.offered):
            plan = eco.plan(couplings, ratio=0.4, scores="random", kinds=kinds)
            assert masked_error(model, eco.shrink(model, plan, args), plan, args) < 1e-12
