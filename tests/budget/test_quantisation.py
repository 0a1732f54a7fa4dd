"""Which quantisations a model's widths exclude."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import ecospa_fx as eco
from ecospa_fx.budget.quantisation import exclusion_lines, exclusions
from tests.support.hugging import couplings_of

K, SMALL, MARLIN, HALF, BYTES = (
    "K-quants of llama.cpp", "q8_0 and q4_0 of llama.cpp", "Marlin (4 bits, vLLM)", "tensor cores, 16 bits",
    "tensor cores, 8 bits",
)  # fmt: skip


def excluded(*widths: int) -> list[tuple[Any, ...]]:
    first, *others = widths
    layers: list[nn.Module] = [nn.Linear(first, others[0])]
    for width, after in zip(others, [*others[1:], first], strict=True):
        layers += [nn.ReLU(), nn.Linear(width, after)]
    couplings = eco.detect(nn.Sequential(*layers), (torch.randn(2, first),))
    return [(x.quantisation, x.multiple, x.side, x.width, x.parameter) for x in exclusions(couplings)]


@pytest.mark.parametrize(
    ("width", "names"),
    [
        (768, []), (256, []), (384, [K]), (160, [K, MARLIN, MARLIN]), (192, [K, MARLIN]), (96, [K, MARLIN, MARLIN]),
        (48, [K, SMALL, MARLIN, MARLIN]), (24, [K, SMALL, MARLIN, MARLIN, BYTES, BYTES]),
        (20, [K, SMALL, MARLIN, MARLIN, HALF, HALF, BYTES, BYTES]),
    ],
)  # fmt: skip
def test_what_a_width_excludes(width: int, names: list[str]) -> None:
    """Only the axis of the coupling counts: what else a matrix is wide, nothing makes narrower."""
    assert [name for name, *_ in excluded(7, width)] == names


def test_inputs_and_outputs_of_every_matrix_once() -> None:
    assert excluded(7, 64, 512) == [(K, 256, "inputs", 64, "2.weight"), (MARLIN, 128, "inputs", 64, "2.weight")]
    assert [name for *_, name in excluded(7, 96, 256) if name != "2.weight"] == ["0.weight"]


def test_keys_are_outputs() -> None:
    """Though they consume what queries make; the stream's width is one that may be removed, too."""
    outputs = {x.parameter.split(".")[-2] for x in exclusions(couplings_of("llama")) if x.side == "outputs"}
    inputs = {x.parameter.split(".")[-2] for x in exclusions(couplings_of("llama")) if x.side == "inputs"}
    assert outputs >= {"k_proj", "v_proj", "gate_proj", "up_proj"}  # queries have 64
    assert inputs >= {"o_proj", "down_proj"}
    wide = {x.width for x in exclusions(couplings_of("llama")) if "k_proj" in x.parameter and x.side == "inputs"}
    assert wide <= {48}  # the stream's, not that of the keys, 32


def test_lines_fold_matrices_of_one_width() -> None:
    couplings = eco.detect(nn.Sequential(nn.Linear(7, 96), nn.ReLU(), nn.Linear(96, 7)), (torch.randn(2, 7),))
    lines = exclusion_lines([*exclusions(couplings), *exclusions(couplings)])
    assert lines == [
        f"excludes {K}, multiples of 256 inputs: 96 (2.weight and 1 more)",
        f"excludes {MARLIN}, multiples of 128 inputs: 96 (2.weight and 1 more)",
        f"excludes {MARLIN}, multiples of 64 outputs: 96 (0.weight and 1 more)",
    ]
    assert exclusion_lines(exclusions(couplings))[0].endswith(" 96 (2.weight)")
