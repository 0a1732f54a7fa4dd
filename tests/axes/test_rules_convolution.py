"""Convolutions, pooling and resampling: channels are contracted, grouped or pass; places in space mix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.oracle import Case, Operation, check_exact, check_literal, check_rule, tagged


class Image(nn.Module):
    """1×1 convolution → operation → 1×1 convolution over images [batch, 3, 4, 4]."""

    def __init__(self, operation: Operation, shapes: list[tuple[int, ...]]) -> None:
        super().__init__()
        self.up, self.operation, self.count = nn.Conv2d(3, 8, 1), operation, len(shapes)
        for i, shape in enumerate(shapes):
            self.register_parameter(f"p{i}", nn.Parameter(torch.randn(shape)))
        with torch.no_grad():
            channels = self.middle(torch.randn(2, 3, 4, 4)).shape[1]
        self.down = nn.Conv2d(channels, 5, 1)

    def middle(self, x: Tensor) -> Tensor:
        result: Tensor = self.operation(self.up(x), *(getattr(self, f"p{i}") for i in range(self.count)))
        return result

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(self.middle(x))
        return result


def image(
    operator: str, operation: Operation, offers: str = "ffn 8", blocked: str = "", shapes: list[tuple[int,
        ...]] | None = None,
    *, label: str = "",
) -> Case:  # fmt: skip
    return Case(f"aten.{operator}", lambda: Image(operation, shapes or []), offers, blocked, (3, 4, 4), label)


CASES = [
    image("conv2d", lambda h, w, b: F.conv2d(h.relu(), w, b).relu(), "ffn 6, ffn 8", "", [(6, 8, 2, 2), (6,)]),
    image("conv2d", lambda h, w: F.conv2d(h.relu(), w, padding=1, groups=8), shapes=[(8, 1, 3, 3)], label="depthwise"),
    image("conv2d", lambda h, w: F.conv2d(h.relu(), w, groups=2).relu(), "ffn 2, ffn 3×2, ffn 4", "", [(6, 4, 1, 1)],
          label="groups"),
    image("conv1d", lambda h, w: F.conv1d(h.relu().flatten(2), w)[..., None], "ffn 8, pair 6", "", [(6, 8, 3)]),
    image("conv3d", lambda h, w: F.conv3d(h.relu()[:, :, None], w)[:, :, 0], "ffn 8, pair 6", "", [(6, 8, 1, 1, 1)]),
    image("conv_transpose2d", lambda h, w: F.conv_transpose2d(h.relu(), w, stride=2), "ffn 8, pair 6", "", [(8, 6, 2,
          2)]),
    image("conv_transpose2d", lambda h, w: F.conv_transpose2d(h.relu(), w, groups=2), "ffn 2, ffn 4×2, pair 3", "",
          [(8, 3, 2, 2)], label="groups"),
    image("max_pool2d", lambda h: F.max_pool2d(h, 2)),
    image("avg_pool2d", lambda h: F.avg_pool2d(h.relu(), 2), "ffn 8"),
    image("avg_pool3d", lambda h: F.avg_pool3d(h.relu().permute(2, 1, 0, 3), (1, 1, 2)).permute(2, 1, 0, 3), "",
          "mixes neighbours", label="channels-as-depth"),
    image("adaptive_avg_pool2d", lambda h: F.adaptive_avg_pool2d(h.relu(), 1), "ffn 8"),
    image("upsample_bilinear2d", lambda h: F.interpolate(h.relu(), scale_factor=2, mode="bilinear")),
    image("upsample_nearest2d", lambda h: F.interpolate(h.relu(), scale_factor=2)),
    image("grid_sampler", lambda h: F.grid_sample(h.relu(), h[:, :2].permute(0, 2, 3, 1).sigmoid(),
          align_corners=False),
          "ffn 6", "reads places from it"),
    image("im2col", lambda h: F.unfold(h.relu(), 2)[..., None]),
    image("col2im", lambda h: F.fold(h.relu().flatten(2)[..., :4], (3, 3), 2), "", "moves windows"),
    image("pixel_shuffle", lambda h: F.pixel_shuffle(h.relu(), 2), "ffn 2", "moves channels into places"),
    image("pixel_unshuffle", lambda h: F.pixel_unshuffle(h.relu(), 2)),
    image("channel_shuffle", lambda h: F.channel_shuffle(h.relu(), 2), "ffn 4", "exchanges its groups"),
]  # fmt: skip


def test_literal(case: Case) -> None:
    check_literal(case)


@pytest.mark.slow
def test_exact(case: Case) -> None:
    check_exact(case)


CONVOLUTIONS: list[tuple[Callable[..., Any], list[tuple[int, ...]]]] = [
    (F.conv2d, [(2, 4, 5, 5), (6, 4, 2, 2), (6,)]),
    (F.conv1d, [(4, 5), (6, 4, 2)]),
    (lambda x, w: F.conv1d(x, w, groups=2), [(2, 4, 5), (6, 2, 2)]),
    (lambda x, w: F.conv1d(x, w, groups=4), [(2, 4, 5), (4, 1, 2)]),
    (F.conv_transpose1d, [(2, 4, 5), (4, 6, 2), (6,)]),
    (lambda x, w: F.conv_transpose1d(x, w, groups=2), [(2, 4, 5), (4, 3, 2)]),
    (lambda x, w, b: F.conv1d(x, w, b), [(2, 4, 6), (6, 4, 1), (6,)]),
    (lambda x, w: F.conv2d(x, w, padding=(1, 0), groups=4), [(2, 4, 5, 6), (4, 1, 3, 1)]),
    (lambda x, w: F.conv2d(x, w, padding="same"), [(2, 4, 6, 5), (6, 4, 1, 3)]),
    (lambda x, w: F.conv_transpose2d(x, w, stride=(1, 2)), [(2, 4, 6, 5), (4, 6, 1, 3)]),
    (lambda x: F.max_pool1d(x, 2), [(4, 6)]),
    (lambda x: F.avg_pool1d(x, 2), [(2, 4, 6)]),
    (lambda x: F.max_pool2d(x, 2), [(4, 6, 6)]),
    (lambda x: F.avg_pool3d(x, 2), [(4, 6, 6, 6)]),
    (lambda x: F.max_pool2d(x, 2, return_indices=True), [(2, 4, 6, 6)]),
    (lambda x: F.interpolate(x, scale_factor=2, mode="linear"), [(2, 4, 6)]),
    (lambda x: F.grid_sample(x, x[:, :2].permute(0, 2, 3, 1), align_corners=False), [(2, 4, 3, 3)]),
    (lambda x: F.unfold(x, 2), [(2, 4, 3, 3)]),
    (lambda x: F.unfold(x, 2), [(4, 3, 3)]),
    (lambda x: F.fold(x, (3, 3), 2), [(2, 8, 4)]),
    (lambda x: F.pixel_shuffle(x, 2), [(2, 8, 3, 3)]),
    (lambda x: F.pixel_unshuffle(x, 2), [(2, 2, 4, 6)]),
    (lambda x: F.channel_shuffle(x, 2), [(2, 8, 3, 3)]),
]


@pytest.mark.parametrize(("function", "shapes"), CONVOLUTIONS)
def test_one_call(function: Callable[..., Any], shapes: list[tuple[int, ...]]) -> None:
    for seed in range(2):
        check_rule(function, [tagged(*shape).sin() for shape in shapes], seed=seed)
