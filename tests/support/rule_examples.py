"""One or two small calls of every operator that has a rule; ``tests/axes/golden/rules`` shows what it says of them.

Operands: ``x`` an activation, of which masking makes removed positions 0; ``y`` one that is not 0 there; ``w`` a
parameter; ``s`` something stored; ``c`` a constant, all positions alike; ``i`` stored positions; ``m`` a stored mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

HALF = [2, 3]


@dataclass(frozen=True, slots=True)
class Operand:
    """A tensor of an example."""

    kind: str
    """One of the letters above."""
    shape: tuple[int, ...]
    tensor: Tensor

    def __repr__(self) -> str:
        return self.kind


@dataclass(frozen=True, slots=True)
class Example:
    """One call of one operator."""

    operator: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shapes: tuple[tuple[int, ...], ...] | None = None
    """Of the outputs, for what cannot be called here."""


def _floats(*shape: int) -> Tensor:
    return torch.arange(1.0, 1.0 + torch.Size(shape).numel()).reshape(shape) / 100


def x(*shape: int) -> Operand:
    return Operand("x", shape, _floats(*shape))


def y(*shape: int) -> Operand:
    return Operand("y", shape, _floats(*shape))


def w(*shape: int) -> Operand:
    return Operand("w", shape, _floats(*shape))


def s(*shape: int) -> Operand:
    return Operand("s", shape, _floats(*shape))


def c(*shape: int) -> Operand:
    return Operand("c", shape, torch.ones(shape))


def i(*shape: int, below: int = 4) -> Operand:
    return Operand("i", shape, torch.arange(torch.Size(shape).numel()).reshape(shape) % below)


def m(*shape: int) -> Operand:
    return Operand("m", shape, torch.arange(torch.Size(shape).numel()).reshape(shape) % 2 == 0)


def of(operand: Operand, dtype: torch.dtype) -> Operand:
    """The same with other numbers."""
    return Operand(operand.kind, operand.shape, operand.tensor.to(dtype))


def each(names: str, *args: Any, shapes: tuple[tuple[int, ...], ...] | None = None, **kwargs: Any) -> Iterator[Example]:
    """One example for each of some operators, of aten where no namespace is given."""
    for name in names.split():
        yield Example(name if "." in name else f"aten.{name}", args, kwargs, shapes)


def pointwise() -> Iterator[Example]:
    yield from _of_one_tensor(x(3, 4))
    yield from _of_several_tensors(x(3, 4), x(4))


def _of_one_tensor(a: Operand) -> Iterator[Example]:
    yield from each("clone contiguous detach alias lift_fresh lift_fresh_copy lift detach_copy _to_copy", a)
    yield from each("to", a, torch.float64)
    yield from each("type_as", a, s(5))
    yield from each("neg positive conj resolve_conj resolve_neg conj_physical real", a)
    yield from each("_conj imag", of(a, torch.complex64))
    yield from each("dropout alpha_dropout feature_dropout", a, 0.5, False)
    yield from each("requires_grad_", a, False)
    yield from each("relu relu6 gelu silu tanh abs sin sinh asin asinh tan atan arctan erf sqrt square sign sgn "
                    "leaky_relu elu celu selu hardswish mish softshrink hardshrink floor ceil round trunc fix frac "
                    "log1p expm1 atanh arctanh erfinv nan_to_num rrelu deg2rad rad2deg angle isnan isinf",
                    a)  # fmt: skip
    yield from each("sigmoid exp exp2 cos cosh acos softplus log_sigmoid hardsigmoid logical_not isfinite erfc sinc "
                    "special_expit", a)  # fmt: skip
    yield from each("bitwise_not", of(a, torch.int64))
    yield from each("threshold", a, 0.0, 2.0)
    yield from each("log log2 log10 rsqrt reciprocal logit digamma lgamma", a)
    yield from each("log", y(3, 4))
    yield from each("native_dropout", a, 0.5, False)
    yield from each("glu", x(3, 8), -1)


def _of_several_tensors(a: Operand, b: Operand) -> Iterator[Example]:
    yield from each("add sub rsub subtract", a, b)
    yield from each("add", a, s(3, 4))
    yield from each("add", a, 1.0)
    yield from each("mul multiply logical_and", a, b)
    yield from each("mul", a, w(4))
    yield from each("mul", a, s(4))
    yield from each("mul", a, c(4))
    yield from each("__and__ bitwise_and __or__ bitwise_or __xor__ bitwise_xor", of(a, torch.bool), of(b, torch.bool))
    yield from each("div divide true_divide floor_divide fmod remainder", a, y(4))
    yield from each("div", a, b)
    yield from each("div", a, 2.0, rounding_mode="floor")
    yield from each("pow float_power", a, 2.0)
    yield from each("pow", a, -1.0)
    yield from each("pow", y(3, 4), b)
    yield from each("where", m(3, 4), a, b)
    yield from each("where", m(3, 4), a, 1.0)
    yield from each("where", m(4))
    yield from each("maximum minimum fmax fmin logical_or", a, b)
    yield from each("eq ne lt le gt ge isclose logical_xor atan2 hypot copysign complex polar xlogy", a, b)
    yield from each("clamp clip hardtanh", a, -1.0, 1.0)
    yield from each("clamp", a, 0.5)
    yield from each("clamp", a, b)
    yield from each("clamp_min clamp_max", a, 0.0)
    yield from each("masked_fill", a, m(3, 4), 0.0)
    yield from each("masked_fill", a, m(3, 4), 1.0)
    yield from each("addcmul addcdiv", a, b, y(3, 1))
    yield from each("lerp", a, a, 0.5)
    yield from each("copy", a, x(4))
    yield from each("prelu", x(2, 3, 4), w(3))
    yield from each("prelu", x(2, 3, 4), w(1))
    yield from each("_prelu_kernel", x(2, 3, 4), w(1, 3, 1))


def view() -> Iterator[Example]:
    yield from each("view reshape _unsafe_view _reshape_copy view_copy", x(3, 8), [3, 2, 4])
    yield from each("view", x(2, 3, 4), [6, 4])
    yield from each("view", x(6, 4), [4, 6])
    yield from each("_reshape_alias", x(3, 8), [3, 2, 4], [8, 4, 1])
    yield from each("flatten", x(3, 2, 4), 1)
    yield from each("unflatten", x(3, 8), 1, [2, 4])
    yield from each("squeeze", x(3, 1, 4), 1)
    yield from each("unsqueeze", x(3, 4), 1)
    yield from each("ravel", x(3, 4))
    yield from each("atleast_1d atleast_2d", x(4))
    yield from each("view_as reshape_as", x(3, 8), x(3, 2, 4))
    yield from each("view_as", x(3, 8), s(24))
    yield from each("view_as_real view_as_real_copy", of(x(3, 4), torch.complex64))
    yield from each("view_as_complex view_as_complex_copy", x(3, 4, 2))
    yield from each("transpose swapaxes swapdims", x(2, 3, 4), 0, 2)
    yield from each("numpy_T", x(2, 3, 4))
    yield from each("t adjoint matrix_H", x(3, 4))
    yield from each("mT mH", x(2, 3, 4))
    yield from each("permute permute_copy", x(2, 3, 4), [2, 0, 1])
    yield from each("movedim moveaxis", x(2, 3, 4), [2], [0])


def move() -> Iterator[Example]:
    a = x(3, 8)
    yield from each("slice slice_copy", a, 1, 2, 6)
    yield from each("slice", a, 1, 0, 8, 2)
    yield from each("narrow narrow_copy", a, 1, 2, 4)
    yield from each("select select_copy", a, 1, -1)
    yield from each("unbind", x(2, 4))
    yield from each("split unsafe_split split_copy", a, 5, 1)
    yield from each("chunk unsafe_chunk", a, 2, 1)
    yield from each("split_with_sizes split_with_sizes_copy", a, [2, 6], 1)
    yield from each("tensor_split", a, [3], 1)
    yield from each("hsplit", a, 2)
    yield from each("cat concat concatenate", [x(3, 4), x(3, 2)], 1)
    yield from each("cat", [x(3, 4), s(3, 1)], 1)
    yield from each("cat", [x(3, 4), s(1, 4)], 0)
    yield from each("stack", [x(3, 4), x(3, 4)], 1)
    yield from each("expand broadcast_to expand_copy", x(3, 1), [2, 3, 4])
    yield from each("expand_as", x(3, 1), x(3, 4))
    yield from each("broadcast_tensors", [x(3, 1), x(3, 4)])
    yield from each("meshgrid", [x(3), x(4)], indexing="ij")
    yield from each("repeat tile", x(3, 4), [1, 2])
    yield from each("repeat_interleave", x(3, 4), 2, 1)
    yield from each("repeat_interleave", x(3, 4), i(4), 1)
    yield from each("roll", a, [3], [1])
    yield from each("roll", a, [1])
    yield from each("flip", a, [1])
    yield from each("fliplr flipud rot90", a)
    yield from each("pad constant_pad_nd", a, [1, 2])
    yield from each("constant_pad_nd", a, [1, 2], 1.0)
    yield from each("reflection_pad1d replication_pad1d", x(2, 3, 8), [1, 2])
    yield from each("reflection_pad2d replication_pad2d", x(2, 3, 4, 4), [1, 1, 0, 0])
    yield from each("tril triu", a)
    yield from each("diff", a)
    yield from each("unfold", a, 1, 2, 2)


def contract() -> Iterator[Example]:
    yield from each("linear", x(2, 3, 4), w(5, 4), w(5))
    yield from each("linear", s(2, 3, 4), w(5, 4))
    yield from each("linear", y(3, 4), w(5, 4))
    yield from each("matmul", x(2, 3, 4), x(2, 4, 5))
    yield from each("matmul", x(2, 3, 4), w(4, 5))
    yield from each("mm", x(3, 4), w(4, 5))
    yield from each("bmm", x(2, 3, 4), x(2, 4, 5))
    yield from each("mv", w(3, 4), x(4))
    yield from each("dot vdot", x(4), x(4))
    yield from each("addmm", w(5), x(3, 4), w(4, 5))
    yield from each("addbmm", x(3, 5), x(2, 3, 4), x(2, 4, 5))
    yield from each("baddbmm", x(2, 3, 5), x(2, 3, 4), x(2, 4, 5))
    yield from each("addmv", x(3), w(3, 4), x(4))
    yield from each("einsum", "bi,oi->bo", [x(3, 4), w(5, 4)])
    yield from each("einsum", "bthd,bshd->bhts", [x(2, 3, 4, 5), x(2, 6, 4, 5)])
    yield from each("tensordot", x(2, 3, 4), w(4, 3, 5), [1, 2], [1, 0])
    yield from each("outer ger", x(3), x(4))
    yield from each("inner", x(3, 4), x(5, 4))
    yield from each("linalg_vecdot", x(3, 4), x(3, 4))
    yield from each("bilinear", x(2, 3), x(2, 4), w(5, 3, 4), w(5))
    yield from each("_grouped_mm transformers.grouped_mm_fallback", x(6, 8), w(2, 8, 16), i(2), shapes=((6, 16),))


def attention() -> Iterator[Example]:
    q, k, v = x(2, 4, 3, 8), x(2, 4, 5, 8), x(2, 4, 5, 6)
    yield from each("scaled_dot_product_attention", q, k, v)
    yield from each("scaled_dot_product_attention", q, k, v, m(3, 5))
    yield from each("scaled_dot_product_attention", q, x(2, 2, 5, 8), x(2, 2, 5, 6), enable_gqa=True)
    yield from each("scaled_dot_product_attention", q, x(2, 4, 3, 8), x(2, 4, 3, 6), is_causal=True)
    yield Example("flex_attention", (q, k, v), {}, ((2, 4, 3, 6), (2, 4, 3)))


def reduce() -> Iterator[Example]:
    a = x(3, 4)
    yield from each("sum nansum", a, [1])
    yield from each("sum", y(3, 4), [1])
    yield from each("amax amin logsumexp", a, dim=[1])
    yield from each("argmax argmin prod any all", a, 1)
    yield from each("nanmean count_nonzero", a, [1])
    yield from each("max min mode median", a, 1)
    yield from each("max", a, x(3, 4))
    yield from each("kthvalue", a, 1, 1)
    yield from each("aminmax", a, dim=1)
    yield from each("softmax log_softmax special_softmax cumsum cumprod logcumsumexp cummax cummin _safe_softmax", a, 1)
    yield from each("_softmax _log_softmax", a, 1, False)
    yield from each("renorm", a, 2.0, 1, 1.0)
    yield from each("renorm", y(3, 4), 2.0, 1, 1.0)
    yield from each("sort argsort", a, 1)
    yield from each("topk", a, 2, 1)
    yield from each("msort", a)


def norm() -> Iterator[Example]:
    a, images, given = x(3, 4), x(2, 3, 5), (w(3), w(3), s(3), s(3))
    for operand in (a, y(3, 4)):
        yield from each("mean std var linalg_vector_norm", operand, dim=[1])
        yield from each("layer_norm", operand, [4], w(4), w(4))
        yield from each("rms_norm", operand, [4], w(4))
    yield from each("var_mean std_mean", a, [1])
    yield from each("var", a, [1], correction=4)
    yield from each("norm", a, 2.0, [1])
    yield from each("norm", a, -1.0, [1])
    yield from each("linalg_norm", a, 2, [1])
    yield from each("frobenius_norm", a, [1])
    yield from each("cosine_similarity", a, x(3, 4))
    yield from each("cosine_similarity", a, y(3, 4))
    yield from each("layer_norm", a, [4])
    yield from each("rms_norm", a, [4])
    yield from each("native_layer_norm", a, [4], w(4), w(4), 1e-5)
    yield from each("_fused_rms_norm", a, [4], w(4), 1e-5)
    yield from each("batch_norm", images, *given, False, 0.1, 1e-5, False)
    yield from each("cudnn_batch_norm", images, *given, False, 0.1, 1e-5, shapes=((2, 3, 5), (3,), (3,), (0,)))
    yield from each("native_batch_norm _native_batch_norm_legit", images, *given, False, 0.1, 1e-5)
    yield from each("_native_batch_norm_legit_functional", images, *given, False, 0.1, 1e-5)
    yield from each("_native_batch_norm_legit_no_training _batch_norm_no_update", images, *given, 0.1, 1e-5)
    yield from each("_batch_norm_with_update", images, *given, 0.1, 1e-5)
    yield from each("instance_norm", images, w(3), w(3), None, None, True, 0.1, 1e-5, False)
    yield from each("group_norm", x(2, 4, 5), 2, w(4), w(4))
    yield from each("native_group_norm", x(2, 4, 5), w(4), w(4), 2, 4, 5, 2, 1e-5)


def index() -> Iterator[Example]:
    a, rows = x(4, 6), i(3)
    yield from each("embedding", w(4, 6), i(2, 3))
    yield from each("embedding_bag", w(4, 6), i(6), i(2))
    yield from each("index_select", a, 0, rows)
    yield from each("index", a, [rows])
    yield from each("index", a, [None, m(6)])
    yield from each("gather", a, 1, i(4, 3))
    yield from each("take_along_dim", a, i(1, 3), 1)
    yield from each("scatter scatter_add", a, 1, i(4, 3), x(4, 3))
    yield from each("scatter_reduce", a, 1, i(4, 3), x(4, 3), "sum")
    yield from each("index_put _unsafe_index_put", a, [rows], x(3, 6))
    yield from each("index_add index_copy", a, 0, rows, x(3, 6))
    yield from each("index_fill", a, 0, rows, 0.0)
    yield from each("slice_scatter", a, x(4, 3), 1, 1, 4)
    yield from each("select_scatter", a, x(4), 1, 2)
    yield from each("bincount", of(x(4), torch.int64))
    yield from each("histc", a, 4)
    yield from each("bucketize", a, s(3))
    yield from each("searchsorted", s(5), a)
    yield from each("isin", a, s(3))
    yield from each("one_hot", of(a, torch.int64), 4)
    yield from each("nonzero argwhere nonzero_numpy _unique2 unique_consecutive", a)
    yield from each("unique_dim", a, 0)
    yield from each("masked_select", a, m(6))
    yield from each("masked_scatter", a, m(6), x(24))
    yield from each("item _local_scalar_dense", s(1))
    yield from each("equal", a, x(4, 6))
    yield from each("multinomial", a, 2)


def create() -> Iterator[Example]:
    a, like = x(3, 4), s(3)
    yield from each("zeros empty ones rand randn", [3, 4])
    yield from each("new_zeros new_empty new_ones", like, [3, 4])
    yield from each("empty_permuted", [3, 4], [0, 1])
    yield from each("empty_strided", [3, 4], [4, 1])
    yield from each("full", [3, 4], 2.0)
    yield from each("new_full", like, [3, 4], 2.0)
    yield from each("zeros_like ones_like empty_like", a)
    yield from each("full_like fill", a, 2.0)
    yield from each("arange eye hann_window randperm", 4)
    yield from each("linspace", 0.0, 1.0, 4)
    yield from each("randint", 5, [3, 4])
    yield from each("scalar_tensor tensor", 2.0, shapes=((),))
    yield from each("tril_indices triu_indices", 3, 4)
    yield from each("rand_like randn_like bernoulli normal", a)
    yield from each("randint_like", a, 5)


def convolution() -> Iterator[Example]:
    line, plane = x(2, 4, 9), x(2, 4, 6, 6)
    yield from each("conv1d", line, w(6, 4, 3), w(6))
    yield from each("conv1d", line, w(4, 1, 3), w(4), [1], [0], [1], 4)
    yield from each("conv1d", line, w(6, 2, 1), None, [1], [0], [1], 2)
    yield from each("conv2d", plane, w(6, 4, 3, 3), w(6))
    yield from each("conv3d", x(2, 4, 3, 3, 3), w(6, 4, 2, 2, 2))
    yield from each("conv_transpose1d", line, w(4, 6, 3))
    yield from each("conv_transpose2d", plane, w(4, 6, 3, 3))
    yield from each("conv_transpose3d", x(2, 4, 3, 3, 3), w(4, 6, 2, 2, 2))
    yield from each("convolution", line, w(6, 4, 3), None, [1], [0], [1], False, [0], 1)
    yield from each("_convolution", line, w(6, 4, 3), None, [1], [0], [1], False, [0], 1, False, False, True, True)
    yield from each("max_pool1d avg_pool1d", line, [3])
    yield from each("max_pool2d avg_pool2d max_pool2d_with_indices", plane, HALF)
    yield from each("max_pool3d avg_pool3d", x(2, 4, 3, 4, 4), [3, 2, 2])
    yield from each("adaptive_avg_pool1d", line, [3])
    yield from each("adaptive_avg_pool2d adaptive_max_pool2d _adaptive_avg_pool2d", plane, HALF)
    yield from each("adaptive_avg_pool3d", x(2, 4, 3, 4, 4), [3, 2, 2])
    yield from each("upsample_nearest1d", line, [3])
    yield from each("upsample_linear1d", line, [3], False)
    yield from each("upsample_nearest2d _upsample_nearest_exact2d", plane, HALF)
    yield from each("upsample_bilinear2d upsample_bicubic2d", plane, HALF, False)
    yield from each("_upsample_bilinear2d_aa _upsample_bicubic2d_aa", plane, HALF, False)
    yield from each("upsample_nearest3d", x(2, 4, 3, 4, 4), [3, 2, 2])
    yield from each("upsample_trilinear3d", x(2, 4, 3, 4, 4), [3, 2, 2], False)
    yield from each("grid_sampler grid_sampler_2d", plane, s(2, 3, 3, 2), 0, 0, False)
    yield from each("grid_sampler_3d", x(2, 4, 3, 4, 4), s(2, 2, 2, 2, 3), 0, 0, False)
    yield from each("im2col", plane, HALF, [1, 1], [0, 0], [1, 1])
    yield from each("col2im", x(2, 8, 9), [4, 4], [2, 2], [1, 1], [0, 0], [1, 1])
    yield from each("pixel_shuffle", x(2, 8, 3, 5), 2)
    yield from each("pixel_unshuffle", x(2, 3, 4, 6), 2)
    yield from each("channel_shuffle", x(2, 6, 5), 2)


def effects() -> Iterator[Example]:
    a = x(3, 4)
    yield from each("_assert_tensor_metadata", a, [3, 4], shapes=())
    yield from each("_assert_async", s(1), shapes=())
    yield from each("_functional_assert_async", s(1), "message", s(1), shapes=())
    yield from each("_assert_scalar", 1, "message", shapes=())
    yield from each("sym_constrain_range sym_constrain_range_for_size", 3, shapes=())
    yield from each("sym_size sym_stride", a, 0, shapes=())
    yield from each("sym_numel sym_storage_offset", a, shapes=())


FAMILIES = {
    family.__name__: family
    for family in (pointwise, view, move, contract, attention, reduce, norm, index, create, convolution, effects)
}
