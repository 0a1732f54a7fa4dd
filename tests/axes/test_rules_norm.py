"""Norms: exact where what is removed is 0, since the number of positions stays; otherwise they block, and rightly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.oracle import Case, check_exact, check_literal, check_rule, sandwich, tagged

NOT_ZERO, MIXES = "is taken over it although removed elements are not zero there", "normalises over it"


def turned(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The function with channels on axis 1, as [batch, channels, time]."""
    return lambda h: function(h.mT).mT


class Norm(nn.Module):
    """linear → normalisation over channels first → relu → linear, and a normalisation of the input itself."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.first, self.up, self.norm, self.down = norm(6), nn.Linear(6, 8), norm(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.norm(self.up(self.first(x.mT).mT).mT)
        result: Tensor = self.down(h.mT.relu())
        return result


def scaled(statistic: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The operand, 0 where the hidden units are, times a statistic of it."""
    return lambda h: h.relu() * statistic(h.relu())


VECTOR = [(8,)]
fused_rms_norm = torch.ops.aten._fused_rms_norm
CASES = [
    sandwich("aten.mean", lambda h: h.relu().mean(1), label="time"),
    sandwich("aten.mean", scaled(lambda h: h.mean(-1, keepdim=True)), label="channels"),
    sandwich("aten.mean", scaled(lambda h: h.exp().mean(-1, keepdim=True)), "", NOT_ZERO, label="not-0"),
    sandwich("aten.std", scaled(lambda h: h.std()), label="all"),
    sandwich("aten.std", scaled(lambda h: h.std((1, 2), correction=0, keepdim=True)), label="two-axes"),
    sandwich("aten.var", scaled(lambda h: h.var(-1, keepdim=True)), label="channels"),
    sandwich("aten.var", scaled(lambda h: (h + 1).var(-1, keepdim=True)), "", NOT_ZERO, label="not-0"),
    sandwich("aten.var", scaled(lambda h: h[..., None].var(-1, correction=0)), label="one-number"),
    sandwich("aten.var_mean", lambda h: h * torch.var_mean(h, -1, keepdim=True)[1], label="mean-alone"),
    sandwich("aten.std_mean", scaled(lambda h: torch.add(*torch.std_mean(h, -1, keepdim=True))), label="both"),
    sandwich("aten.linalg_vector_norm", scaled(lambda h: torch.linalg.vector_norm(h, dim=1, keepdim=True))),
    sandwich("aten.linalg_vector_norm", lambda h: F.normalize(h, dim=-1), label="normalize"),
    sandwich("aten.linalg_vector_norm", scaled(lambda h: h.norm(torch.inf, -1, True)), label="largest"),
    sandwich("aten.linalg_vector_norm", lambda h: F.normalize(h + 1, dim=-1), "", NOT_ZERO, label="not-0"),
    sandwich("aten.linalg_vector_norm", scaled(lambda h: h.norm(-1, -1, True)), "", "of order -1", label="negative"),
    sandwich("aten.cosine_similarity", lambda h: h * F.cosine_similarity(h.relu(), h.sin(), -1)[..., None]),
    sandwich(
        "aten.cosine_similarity", lambda h: h * F.cosine_similarity(h.relu(), h.cos(), -1)[..., None],
        "", "summed over although", label="not-0",
    ),
    sandwich(
        "aten.cosine_similarity", lambda h, w: h * F.cosine_similarity(w, h, -1)[..., None], shapes=VECTOR,
        label="weight",
    ),
    sandwich(
        "aten.cosine_similarity", lambda h: h * F.cosine_similarity(h, torch.ones(8).to(h), -1)[..., None],
        "", "summed over although", label="stored",
    ),
    sandwich("aten.layer_norm", lambda h, w, b: F.layer_norm(h.relu(), (8,), w, b), shapes=VECTOR * 2),
    sandwich("aten.layer_norm", lambda h, w: F.layer_norm(h.relu(), (8,), w), shapes=VECTOR, label="no-bias"),
    sandwich("aten.layer_norm", lambda h: F.layer_norm(h.relu().mT, (3,)).mT, label="time"),
    sandwich("aten.layer_norm", lambda h: F.layer_norm(h, (8,)), label="bare"),
    sandwich("aten.layer_norm", lambda h: F.layer_norm(h, (3, 8)), label="bare-two-axes"),
    sandwich("aten.layer_norm", lambda h: F.layer_norm(F.layer_norm(h, (8,)), (8,)), "", NOT_ZERO, label="bare-twice"),
    sandwich(
        "aten.layer_norm", lambda h, w, b: F.layer_norm(F.layer_norm(h, (8,), w, b), (8,), w), shapes=VECTOR * 2,
        label="twice",
    ),
    sandwich(
        "aten.layer_norm", lambda h, w, b: F.layer_norm(F.layer_norm(h, (8,), w, b + 1), (8,)), "", NOT_ZERO,
        VECTOR * 2, label="shifted-after",
    ),
    sandwich(
        "aten.layer_norm", lambda h, w, b: F.layer_norm(h + 1, (8,), w, b), "", NOT_ZERO, VECTOR * 2, label="not-0"
    ),
    sandwich("aten.native_layer_norm", lambda h: torch.native_layer_norm(h.relu(), (8,), None, None, 1e-5)[0]),
    sandwich("aten.rms_norm", lambda h, w: F.rms_norm(h.relu(), (8,), w), shapes=VECTOR),
    sandwich("aten.rms_norm", lambda h: F.rms_norm(F.rms_norm(h, (8,)), (3, 8), None, 0.1), label="bare-twice"),
    sandwich(
        "aten.rms_norm", lambda h, w: F.rms_norm(F.rms_norm(h, (8,), w), (8,), w) * w, shapes=VECTOR,
        label="weight-read-twice",
    ),
    sandwich("aten.rms_norm", lambda h: F.rms_norm(h + 1, (8,)), "", NOT_ZERO, label="not-0"),
    sandwich(
        "aten._fused_rms_norm",
        lambda h, w: fused_rms_norm(h, [8], w, 1e-3)[0] * fused_rms_norm(h, [8], None, 1e-3)[1],
        shapes=VECTOR,
    ),
    sandwich("aten.batch_norm", turned(lambda h: F.batch_norm(h.relu(), torch.arange(8).to(h), torch.ones(8).to(h)))),
    sandwich("aten.instance_norm", turned(lambda h: F.instance_norm(h.relu()))),
    Case("aten.batch_norm", lambda: Norm(nn.BatchNorm1d), "ffn 6, ffn 8", label="module"),
    Case("aten.group_norm", lambda: Norm(lambda n: nn.GroupNorm(2, n)), "ffn 2, ffn 2", MIXES),
    Case("aten.group_norm", lambda: Norm(lambda n: nn.GroupNorm(n, n)), "ffn 6, ffn 8", label="of-one"),
    Case("aten.group_norm", lambda: Norm(lambda n: nn.GroupNorm(1, n)), "", MIXES, label="one-group"),
]  # fmt: skip


def test_literal(case: Case) -> None:
    check_literal(case)


@pytest.mark.slow
def test_exact(case: Case) -> None:
    check_exact(case)


FIXED: list[Callable[[Tensor], Any]] = [
    lambda a: a.norm(dim=1), lambda a: torch.linalg.vector_norm(a, 3, 0), lambda a: torch.linalg.norm(a[:, :, 0]),
    lambda a: torch.linalg.vector_norm(a, 0, 1), lambda a: torch.linalg.vector_norm(a, -1, 1),
    lambda a: F.batch_norm(a, None, None, training=True), lambda a: F.instance_norm(a),
    lambda a: torch.native_batch_norm(a, None, None, None, None, True, 0.1, 1e-5),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("function", FIXED)
def test_what_needs_no_number_of_positions(function: Callable[[Tensor], Any]) -> None:
    for seed in range(2):
        check_rule(function, [tagged(6, 4, 5).sin()], seed=seed)


AXES = st.sampled_from([(0,), (1,), (2,), (-1,), (0, 1), (2, 0), (0, 1, 2)])
STATISTICS = st.sampled_from(["mean", "var", "std", "var_mean", "std_mean"])


@settings(max_examples=20, deadline=None)
@given(
    st.tuples(st.integers(2, 6), st.integers(1, 4), st.integers(2, 5)), AXES, STATISTICS,
    st.sampled_from([0, 1, 2, 0.5]), st.booleans(), st.integers(0, 3),
)  # fmt: skip
def test_statistics(
    shape: tuple[int, ...], axes: tuple[int, ...], name: str, correction: float, keepdim: bool, seed: int
) -> None:
    options = {} if name == "mean" else {"correction": correction}

    def statistic(a: Tensor) -> Any:
        return getattr(torch, name)(a, axes, keepdim=keepdim, **options)

    enough = torch.Size(shape[axis] for axis in axes).numel() > options.get("correction", 0)
    cut = check_rule(statistic, [tagged(*shape).sin() + 100], seed=seed)
    assert cut >= sum(n > 1 for n in shape) - (0 if enough else len(axes))


@settings(max_examples=15, deadline=None)
@given(
    st.tuples(st.integers(1, 3), st.integers(2, 5), st.integers(2, 6)), st.integers(1, 2), st.booleans(), st.booleans(),
    st.sampled_from([None, 1e-5, 0.3]), st.booleans(), st.integers(0, 3),
)  # fmt: skip
def test_norms_over_the_last_axes(
    shape: tuple[int, ...], count: int, weight: bool, bias: bool, eps: float | None, centred: bool, seed: int
) -> None:
    sizes = shape[-count:]
    learnt = [tagged(*sizes).cos() for there in (weight, bias and centred) if there]

    def norm(a: Tensor, *rest: Tensor) -> Tensor:
        operands = iter(rest)
        scale = next(operands) if weight else None
        if not centred:
            return F.rms_norm(a, sizes, scale, eps)
        return F.layer_norm(a, sizes, scale, next(operands, None), eps or 1e-5)

    cut = check_rule(norm, [tagged(*shape).sin() + 3, *learnt], seed=seed)
    assert cut == sum(n > 1 for n in shape)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.booleans(), st.integers(0, 3))
def test_groups(groups: int, inside: int, native: bool, seed: int) -> None:
    shape = (3, groups * inside, 2)

    def norm(a: Tensor, w: Tensor, b: Tensor) -> Any:
        if native:
            return torch.native_group_norm(a, w, b, 3, groups * inside, 2, groups, 1e-5)
        return F.group_norm(a, groups, w, b)

    cut = check_rule(norm, [tagged(*shape).sin(), tagged(shape[1]), tagged(shape[1]).cos()], seed=seed)
    assert cut == 1 + (groups > 1)


def test_statistics_of_parameters_are_gathered() -> None:
    def normalised(a: Tensor, w: Tensor, b: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        return F.batch_norm(a, mean, variance, w, b)

    assert check_rule(normalised, [tagged(3, 6), tagged(6), tagged(6)], [tagged(6), tagged(6)]) == 1
