"""Numbers of units that make widths at which a device's kernels are fast."""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd, lcm, prod
from typing import Literal, get_args

from torch import Tensor

from ecospa_fx.coupling.types import Coupling, Member

ROW_BYTES = {"cuda": 16}
"""Bytes of which rows should be a multiple, by type of device: NVIDIA's tensor cores are fast from 16 on, that is 8
numbers of half precision. Kernels of devices that are not here are about as fast for any width."""


Engine = Literal["gguf", "marlin", "tensor-cores"]
"""What widths can be rounded for: see `engine_multiple`."""

ENGINES: tuple[Engine, ...] = get_args(Engine)

GGUF_BLOCK, GGUF_LEAST, GGUF_SHARE = 256, 32, 0.1
"""Numbers in a block of llama.cpp's K-quants, in one of its simplest ones, and the share of a width up to which whole
blocks of the former are asked for."""

MARLIN_ROWS, MARLIN_COLUMNS = 64, 128
"""What Marlin's kernels for 4-bit weights ask of the outputs and of the inputs of a product."""


def multiple_of(rounding: int | Engine | None, coupling: Coupling, parameters: Mapping[str, Tensor]) -> int:
    """The units per carrier of which a multiple should stay. rounding: see the option round_to of `plan`."""
    if rounding is None:
        return preferred_multiple(coupling, parameters)
    return rounding if isinstance(rounding, int) else engine_multiple(rounding, coupling, parameters)


def engine_multiple(engine: Engine, coupling: Coupling, parameters: Mapping[str, Tensor]) -> int:
    """The least number of units per carrier of which every multiple makes all axes of matrices fit an engine.

    Along an axis, a unit may be wider than one number, and all carriers keep as many: a multiple of m units is wanted
    where the axis has w numbers for each unit and m w is a multiple of what the engine wants. "gguf": 256 numbers, or
    32 where 256 is more than a tenth of the axis. "marlin": 64 of outputs, 128 of inputs. "tensor-cores": 8 numbers per
    carrier, that is 16 bytes of half precision, on any device.

    >>> import torch, ecospa_fx
    >>> mlp = torch.nn.Sequential(torch.nn.Linear(8, 3072), torch.nn.GELU(), torch.nn.Linear(3072, 8))
    >>> ffn = ecospa_fx.detect(mlp, (torch.randn(2, 8),)).offered[0]
    >>> [engine_multiple(engine, ffn, dict(mlp.named_parameters())) for engine in ENGINES]
    [256, 128, 8]
    """
    steps, whole_axis = [1], engine != "tensor-cores"
    for member in coupling.members:
        shape = parameters[member.parameter].shape
        if len(shape) > 1:
            wanted = _wanted(engine, member, shape[member.axis])
            steps += [wanted // gcd(wanted, numbers) for numbers in _numbers_per_unit(coupling, member, whole_axis)]
    return lcm(*steps)


def _numbers_per_unit(coupling: Coupling, member: Member, whole_axis: bool) -> list[int]:
    """How many numbers each unit has in every part of an axis: of one carrier, or of all."""
    boxes = [
        prod(size for size, _ in box.width) * (prod(size for size, _ in box.carriers) if whole_axis else 1)
        for box in member.boxes
    ]
    if whole_axis:
        return [sum(boxes)]
    return [2] if coupling.symmetry == "rotary" else boxes  # a pair is in one head, wherever its elements stand there


def _wanted(engine: Engine, member: Member, size: int) -> int:
    if engine == "gguf":
        return GGUF_BLOCK if GGUF_SHARE * size >= GGUF_BLOCK else GGUF_LEAST
    if engine == "marlin":
        return MARLIN_ROWS if member.role == "producer" else MARLIN_COLUMNS
    return ROW_BYTES["cuda"] // 2


def preferred_multiple(coupling: Coupling, parameters: Mapping[str, Tensor], *, autocast: bool = False) -> int:
    """The units per carrier of which a multiple should stay: the least that make every axis a multiple of `ROW_BYTES`.

    A unit may be wider than one element: of half-precision numbers on CUDA, multiples of 8 neurons are preferred, of
    4 rotary pairs, and any number of whole heads of 64. Each carrier counts by itself, as each head is a matrix of its
    own. autocast: numbers count as of half precision, which products may make of them.

    >>> import torch, ecospa_fx
    >>> mlp = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 8))
    >>> ffn = ecospa_fx.detect(mlp, (torch.randn(2, 8),)).offered[0]
    >>> preferred_multiple(ffn, dict(mlp.named_parameters()))  # on a CPU
    1
    """
    steps, pairs = [1], coupling.symmetry == "rotary"  # whose two elements are in one head, wherever they stand there
    for member in coupling.members:
        parameter = parameters[member.parameter]
        bytes_each = min(parameter.element_size(), 2) if autocast else parameter.element_size()
        wanted = max(1, ROW_BYTES.get(parameter.device.type, 1) // bytes_each)
        widths = [2 if pairs else prod(size for size, _ in box.width) for box in member.boxes]
        steps += [wanted // gcd(wanted, width) for width in widths]
    return lcm(*steps)
