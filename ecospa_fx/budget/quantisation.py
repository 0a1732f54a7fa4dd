"""Which quantisations the widths of a model exclude, by what their kernels and blocks ask of a matrix's axes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from ecospa_fx.budget.alignment import GGUF_BLOCK, GGUF_LEAST, MARLIN_COLUMNS, MARLIN_ROWS, ROW_BYTES
from ecospa_fx.coupling.couplings import Couplings

Side = Literal["inputs", "outputs"]
"""An axis of a matrix, by what a product makes of it."""


@dataclass(frozen=True, slots=True)
class Quantisation:
    """A way to store or to multiply matrices."""

    name: str
    """As its engine calls it."""
    multiples: tuple[tuple[Side, int], ...]
    """Of what number each axis has to be a multiple."""


QUANTISATIONS = (
    Quantisation("K-quants of llama.cpp", (("inputs", GGUF_BLOCK),)),
    Quantisation("q8_0 and q4_0 of llama.cpp", (("inputs", GGUF_LEAST),)),
    Quantisation("Marlin (4 bits, vLLM)", (("inputs", MARLIN_COLUMNS), ("outputs", MARLIN_ROWS))),
    Quantisation("tensor cores, 16 bits", (("inputs", ROW_BYTES["cuda"] // 2), ("outputs", ROW_BYTES["cuda"] // 2))),
    Quantisation("tensor cores, 8 bits", (("inputs", ROW_BYTES["cuda"]), ("outputs", ROW_BYTES["cuda"]))),
)
"""Those that ask for something, the blocks of GGUF files first. llama.cpp falls back to larger types matrix by matrix,
vLLM refuses, and kernels of tensor cores fill up or are not taken."""


@dataclass(frozen=True, slots=True)
class Exclusion:
    """An axis of a matrix that a quantisation does not take."""

    quantisation: str
    """Its name."""
    multiple: int
    """What the axis is no multiple of."""
    side: Side
    """Which axis of the matrix."""
    width: int
    """How long it is."""
    parameter: str
    """Name of the matrix."""


def exclusions(couplings: Couplings) -> list[Exclusion]:
    """What the matrices of the offered couplings exclude as wide as they are now, each axis once.

    >>> import torch, ecospa_fx
    >>> mlp = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.GELU(), torch.nn.Linear(96, 64))
    >>> for x in exclusions(ecospa_fx.detect(mlp, (torch.randn(2, 64),))):
    ...     print(x.quantisation, x.multiple, x.side, x.width, x.parameter)
    K-quants of llama.cpp 256 inputs 96 2.weight
    Marlin (4 bits, vLLM) 128 inputs 96 2.weight
    Marlin (4 bits, vLLM) 64 outputs 96 0.weight
    """
    axes: dict[tuple[str, Side], int] = {}
    for c in couplings.offered:
        for m in c.members:
            # Keys meet queries in a product of activations: both are outputs of their matrices.
            side: Side = "inputs" if m.role == "consumer" and c.kind != "qk" else "outputs"
            shape = couplings.shapes[m.parameter]
            if len(shape) > 1:
                axes[m.parameter, side] = shape[m.axis]
    return [
        Exclusion(quantisation.name, multiple, side, width, parameter)
        for quantisation in QUANTISATIONS
        for side, multiple in quantisation.multiples
        for (parameter, which), width in axes.items()
        if which == side and width % multiple
    ]


def exclusion_lines(some: Iterable[Exclusion]) -> list[str]:
    """For people: a line for each quantisation, axis and multiple, with an example of every width."""
    lines: dict[tuple[str, int, Side], dict[int, list[str]]] = {}
    for x in some:
        lines.setdefault((x.quantisation, x.multiple, x.side), {}).setdefault(x.width, []).append(x.parameter)
    return [
        f"excludes {name}, multiples of {multiple} {side}: " + ", ".join(map(_example, widths, widths.values()))
        for (name, multiple, side), widths in lines.items()
    ]


def _example(width: int, names: list[str]) -> str:
    more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
    return f"{width:,} ({names[0]}{more})"
