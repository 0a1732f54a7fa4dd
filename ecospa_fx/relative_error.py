"""How far two results are from each other, number by number, and what of them cannot be compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

LEAST = 1e-12
"""Below that, numbers count as if they were as large."""

GAP = 1e-3
"""Numbers that agree with each other to this share, and are larger than all others by its inverse, were filled in."""

SAMPLE = 1 << 20
"""Numbers, evenly spread, from which the median is taken."""


class RelativeError(float):
    """A relative error, which is a float, with `left_out`: sentences about what it does not cover."""

    left_out: tuple[str, ...]

    def __new__(cls, value: float, left_out: Sequence[str] = ()) -> RelativeError:
        """A float with remarks."""
        error = super().__new__(cls, value)
        error.left_out = tuple(left_out)
        return error

    def __reduce__(self) -> Any:
        """Pickled with its remarks."""
        return RelativeError, (float(self), self.left_out)


def relative_error(got: Sequence[object], want: Sequence[object]) -> RelativeError:
    """The largest relative error of any number in some leaves; leaves that are no tensors count for nothing.

    A number is compared to itself, or to the usual size of the numbers in its tensor where that is larger: the median
    of those that are not zero, or the cube root of the type's precision times the largest, where that is more. Neither
    counts what was filled in, such as the least number of a type at masked places: it is equal to itself to `GAP`, and
    larger than all else by the inverse of that. So a mask does not hide errors beside it. Infinities must be in the
    same places. Where `want` is NaN nothing is compared, and `left_out` says how much that is. Of whole numbers and
    flags it is the share that differs. Infinite where shapes differ, where `got` is not finite and `want` is, and where
    nothing can be compared.
    """
    errors, notes = [0.0], list[str]()
    tensors = [leaf for leaf in want if isinstance(leaf, Tensor)]
    proving = [t for t in tensors if _has_parts(t)] or tensors  # whole numbers prove nothing where there are others
    if len(got) != len(want):
        return RelativeError(float("inf"))
    if not any(bool(t.isfinite().any()) for t in proving):
        errors = [float("inf")]
    for number, (g, w) in enumerate(zip(got, want, strict=True)):
        if not isinstance(w, Tensor) or not isinstance(g, Tensor):
            # whole numbers may be tensors in one of them
            errors += [float("inf") for leaf in (g, w) if isinstance(leaf, Tensor) and _has_parts(leaf)]
            continue
        unknown = int(w.isnan().sum()) if _has_parts(w) else 0
        if unknown:
            notes.append(
                f"{unknown:,} of the {w.numel():,} numbers in output {number} are NaN in the dense model, so that "
                "nothing is said about them: choose an example or a type that gives numbers there"
            )
        errors.append(float("inf") if g.shape != w.shape else _largest(g, w) if _has_parts(w) else _share(g, w))
    return RelativeError(max(errors), notes)


def _has_parts(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _share(got: Tensor, want: Tensor) -> float:
    """The share of whole numbers or flags that differs."""
    return float((got != want).double().mean()) if want.numel() else 0.0


def _largest(got: Tensor, want: Tensor) -> float:
    """The largest error in one tensor. Picking the finite numbers by index would take eight bytes per axis of each."""
    got, want = got.detach(), want.detach()
    numbers, finite = ~want.isnan(), want.isfinite()
    infinite = numbers & ~finite
    if not finite.any() or not want.numel():
        return float("inf") if bool((infinite & (got != want)).any()) else 0.0
    if bool((infinite & (got != want)).any()) or bool((finite & ~got.isfinite()).any()):
        return float("inf")
    wide = want.dtype if want.dtype in (torch.float64, torch.complex128) else torch.float32
    wide = torch.complex64 if want.is_complex() and wide is torch.float32 else wide
    size = torch.where(finite, want, 0).to(wide).abs()
    scale = size.clamp(min=usual_size(size, torch.finfo(want.dtype).eps))
    # both are halved, because the difference of two numbers of the type may be none of it
    halves = torch.where(finite, got.to(wide) / 2 - want.to(wide) / 2, 0).abs()
    return float(2 * (halves / scale).max())


def usual_size(sizes: Tensor, precision: float) -> float:
    """How large the numbers of a tensor usually are. sizes: their absolute values, zero for what does not count."""
    ordinary, top = sizes, float(sizes.max())
    while top > 0:
        rest = torch.where(ordinary < top * (1 - GAP), ordinary, 0)
        below = float(rest.max())
        if not 0 < below < top * GAP:
            break
        ordinary, top = rest, below
    some = ordinary.flatten()[:: max(ordinary.numel() // SAMPLE, 1)]
    some = some[some > 0]
    median = float(some.median()) if some.numel() else top
    return max(median, top * float(precision ** (1 / 3)), LEAST)
