"""Products of activations by matrices in bfloat16, on CPUs that multiply it faster than float32.

PyTorch's "medium" precision asks for that, but on a CPU it reaches AMX alone: the bfloat16 instructions of AVX-512 are
used for tensors of that type only. So factors are rounded here, and with them results, while sums are float32.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from copy import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.functional import linear

from ecospa_fx.ir.linears import LinearUse, linear_uses
from ecospa_fx.runtime.interpreter import NodeValues, PartialInterpreter

FEW_ROWS = 64
"""Up to so many rows, rounding the matrix takes what the quicker product saves."""


def in_bfloat16(evaluator: PartialInterpreter, parameters: Collection[str]) -> PartialInterpreter:
    """The same evaluator, in which products by these float32 matrices are rounded, if that is quicker.

    Returns it unchanged where nothing is to be gained, or where the caller has chosen a precision per device.
    """
    if not (_multiplies_bfloat16() and may_choose_precision()):
        return evaluator
    program, rounding = evaluator.program, copy(evaluator)
    by_name = {name: node for node, name in program.parameters.items()}
    rounding.instead = {
        site.node: _product(site, by_name)
        for site in linear_uses(program)
        if site.parameter in parameters
        and _is_slow(program.tensor(site.parameter))
        # Behind a transposition the matrix itself may not be kept for so long.
        and by_name[site.parameter] in site.node.all_input_nodes
    }
    return rounding


@cache
def _multiplies_bfloat16() -> bool:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]  # torch has no types here
        return False
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def may_choose_precision() -> bool:
    """Whether the caller has not chosen one per device for products of float32 matrices."""
    try:
        torch.get_float32_matmul_precision()
    except RuntimeError:  # the newer settings, one per device, are in use
        return False
    return True


@contextmanager
def medium_precision() -> Iterator[None]:
    """Products in the precision that PyTorch calls "medium" inside, and every setting as it was outside.

    Nothing changes where the caller has chosen a precision per device.
    """
    if not may_choose_precision():
        yield
        return
    precision, settings = torch.get_float32_matmul_precision(), _own_settings()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        for place in (place for place in settings if place[1] == "matmul"):
            _set_setting(*place, settings[place])


_PLACES = ("generic", "all"), ("mkldnn", "all"), ("cuda", "all"), ("mkldnn", "matmul"), ("cuda", "matmul")
"""Where PyTorch keeps precisions, the general ones first: what is set nowhere shows what is set above it."""
_setting: Callable[[str, str], str] | None = getattr(torch._C, "_get_fp32_precision_getter", None)
_set_setting: Any = getattr(torch._C, "_set_fp32_precision_setter", None)


def _own_settings() -> dict[tuple[str, str], str]:
    """What was set in each place itself, "none" for nothing; no places in versions of PyTorch that have none."""
    if _setting is None or _set_setting is None:
        return {}
    settings = {}
    try:
        for place in _PLACES:
            settings[place] = _setting(*place)
            if place[1] == "all" and settings[place] != "none":
                _set_setting(*place, "none")  # so that the next ones show their own
    finally:
        for place, value in settings.items():
            if place[1] == "all" and value != "none":
                _set_setting(*place, value)
    return settings


def _is_slow(matrix: Tensor) -> bool:
    return matrix.device.type == "cpu" and matrix.dtype == torch.float32


def _product(site: LinearUse, by_name: dict[str, fx.Node]) -> Callable[[NodeValues], Tensor]:
    matrix, bias = by_name[site.parameter], by_name[site.bias] if site.bias is not None else None

    def compute(values: NodeValues) -> Tensor:
        x, weight = values[site.input], site.matrix(values[matrix])
        added = values[bias] if bias is not None else None
        if x.shape[:-1].numel() <= FEW_ROWS:
            return linear(x, weight, added)
        rounded: Tensor = _Rounded.apply(x, weight, added)  # type: ignore[no-untyped-call]
        return rounded

    return compute


class _Rounded(torch.autograd.Function):
    """x [..., n], W [m, n], b [m] or None: x Wᵀ + b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).bfloat16()
        wanted = ctx.needs_input_grad
        # The matrix is there anyway, its rounded twin would have to be kept.
        ctx.save_for_backward(rows if wanted[1] else None, matrix if wanted[0] else None)
        ctx.shape = x.shape
        # No view, for what comes after it may overwrite it.
        result = (rows @ matrix.bfloat16().T).view(*x.shape[:-1], len(matrix)).to(x.dtype)
        if bias is not None:
            result += bias
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        rows, matrix = ctx.saved_tensors
        exact = gradients[0].reshape(-1, gradients[0].shape[-1])
        gradient = exact.bfloat16()
        wanted = ctx.needs_input_grad
        return (
            (gradient @ matrix.bfloat16()).to(exact.dtype).view(ctx.shape) if wanted[0] else None,
            (gradient.T @ rows).to(exact.dtype) if wanted[1] else None,
            exact.sum(0) if wanted[2] else None,
        )
