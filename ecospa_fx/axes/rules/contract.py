"""Matrix products: Einstein summations, each written down as the labels of its axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ecospa_fx.axes.call import Call, Value
from ecospa_fx.axes.products import note_sum
from ecospa_fx.axes.registry import axis_rule, refuse
from ecospa_fx.axes.shapes import broadcast_size


def _batch(count: int) -> list[str]:
    return [f"batch{i}" for i in range(count)]


def _plus(call: Call, product: Value, *terms: Value | None) -> Value:
    """The product with terms added, broadcast."""
    present = [t for t in terms if t is not None]
    return call.pointwise([product, *present], "all") if present else product


@axis_rule("aten.linear", linear=True)
def linear(call: Call) -> Value:
    """input [..., in] · weight [out, in] + bias [out]."""
    value, weight = call["input"], call["weight"]
    rows = _batch(len(value.axes) - 1)
    out = ["out"] if len(weight.axes) == 2 else []
    product = call.contraction([value, weight], [[*rows, "in"], [*out, "in"]], [*rows, *out])
    return _plus(call, product, call.get("bias"))


@axis_rule("aten.matmul", "aten.mm", "aten.bmm", "aten.mv", "aten.dot", "aten.vdot", linear=True)
def matmul(call: Call) -> Value:
    """[..., m, k] · [..., k, n], batch axes broadcast; vectors lose their axis."""
    a, b = call["self"], call.get("other") or call.get("mat2") or call.get("vec") or call["tensor"]
    return _product(call, a, b)


def _product(call: Call, a: Value, b: Value) -> Value:
    left = ["m", "k"][-len(a.axes) :] if len(a.axes) < 2 else ["m", "k"]
    right = ["k", "n"] if len(b.axes) > 1 else ["k"]
    count = max(len(a.axes) - 2, len(b.axes) - 2, 0)
    rows = _batch(count)
    batches = [rows[count - max(len(v.axes) - 2, 0) :] for v in (a, b)]
    out = [*rows, *(["m"] if len(a.axes) > 1 else []), *(["n"] if len(b.axes) > 1 else [])]
    return call.contraction([a, b], [[*batches[0], *left], [*batches[1], *right]], out)


@axis_rule("aten.addmm", "aten.baddbmm", "aten.addmv", "aten.addbmm", linear=True)
def addmm(call: Call) -> Value:
    """A product added to another tensor."""
    a = call.get("mat1") or call.get("batch1") or call["mat"]
    b = call.get("mat2") or call.get("batch2") or call["vec"]
    if call.operator.startswith("aten.addbmm"):
        product = call.contraction([a, b], [["batch", "m", "k"], ["batch", "k", "n"]], ["m", "n"])
    else:
        product = _product(call, a, b)
    return _plus(call, product, call["self"])


@axis_rule("aten.einsum", linear=True)
def einsum(call: Call) -> Value:
    """The equation says it all."""
    equation, operands = call["equation"].replace(" ", ""), call["tensors"]
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    ranks = [len(v.axes) - len(t.replace("...", "")) for v, t in zip(operands, terms, strict=True)]
    widest = max(ranks)
    labels = [_labels(t, n) for t, n in zip(terms, ranks, strict=True)]
    if any(len(set(names)) < len(names) for names in labels):
        return call.block_all("einsum takes a diagonal of it")[0]
    if not arrow:
        letters = sorted({x for x in left if x.isalpha() and left.count(x) == 1})
        right = ("..." if "..." in left else "") + "".join(letters)
    return call.contraction(operands, labels, _labels(right, widest))


def _labels(term: str, ellipsis: int) -> list[str]:
    before, dots, after = term.partition("...")
    middle = [f"ellipsis{i}" for i in range(-ellipsis, 0)] if dots else []
    return [*before, *middle, *after]


@axis_rule("aten.tensordot", linear=True)
def tensordot(call: Call) -> Value:
    """Given axes of two tensors are contracted."""
    a, b = call["self"], call["other"]
    over = [[int(d) % len(v.axes) for d in call[n]] for v, n in ((a, "dims_self"), (b, "dims_other"))]
    names = [[f"{side}{i}" for i in range(len(v.axes))] for side, v in (("a", a), ("b", b))]
    for i, (x, y) in enumerate(zip(*over, strict=True)):
        names[0][x] = names[1][y] = f"sum{i}"
    return call.contraction([a, b], names, [n for part in names for n in part if not n.startswith("sum")])


@axis_rule("aten.outer", "aten.ger", linear=True)
def outer(call: Call) -> Value:
    """A column times a row."""
    a, b = call.values
    return call.contraction([a, b], [["m"], ["n"]], ["m", "n"])


@axis_rule("aten.inner", linear=True)
def inner(call: Call) -> Value:
    """a [..., k] · b [..., k], the other axes side by side."""
    a, b = call["self"], call["other"]
    if not a.axes or not b.axes:
        return call.pointwise([a, b], "any")
    left, right = ([f"{side}{i}" for i in range(len(v.axes) - 1)] for side, v in (("a", a), ("b", b)))
    return call.contraction([a, b], [[*left, "k"], [*right, "k"]], [*left, *right])


@axis_rule("aten.linalg_vecdot", linear=True)
def vecdot(call: Call) -> Value:
    """Sum of products along one axis, broadcast."""
    a, b = call.values[:2]
    product = call.pointwise([a, b], "any", _wider(a, b))
    over = call.get("dim", -1) % len(product.axes)
    note_sum(call, product, [over])
    left = [i for i in range(len(product.axes)) if i != over]
    return call.value([product.axes[i] for i in left], [product.zero[i] for i in left])


def _wider(a: Value, b: Value) -> Sequence[int]:
    rank = max(len(a.axes), len(b.axes))
    padded = [(1,) * (rank - len(v.axes)) + v.shape for v in (a, b)]
    return [broadcast_size(sizes) for sizes in zip(*padded, strict=True)]


@axis_rule("aten.bilinear", linear=True)
def bilinear(call: Call) -> Value:
    """x1 · W · x2 + bias."""
    a, b, weight = call["input1"], call["input2"], call["weight"]
    rows = _batch(len(a.axes) - 1)
    labels = [[*rows, "i"], [*rows, "j"], ["out", "i", "j"]]
    return _plus(call, call.contraction([a, b, weight], labels, [*rows, "out"]), call.get("bias"))


@axis_rule("transformers.grouped_mm_fallback", "aten._grouped_mm", linear=True)
def grouped_mm(call: Call) -> Value:
    """Rows of input [rows, k] sorted by group, each times the matrix of its group in weight [groups, k, n].

    offs [groups] says where each group ends: the rows belong to the groups, which carry whatever a matrix carries.
    """
    value = call.get("input") or call["self"]
    weight = call.get("weight") or call["mat2"]
    if len(value.axes) != 2 or len(weight.axes) != 3 or not isinstance(call.get("offs"), Value):
        remedy = "call it with rows [rows, k], matrices [groups, k, n] and offsets"
        return call.block_all("its groups are given in a form that is not followed", remedy)[0]
    matrix = replace(weight, axes=weight.axes[1:], zero=weight.zero[1:], node=None)
    product = call.contraction([value, matrix], [["rows", "k"], ["k", "n"]], ["rows", "n"])
    for axis in (weight.axes[0], *call["offs"].axes):
        call.block(axis, "rows are sent to its positions by computed offsets")
    call.routed(product.axes[0], weight.axes[0], call["offs"])
    return _plus(call, product, call.get("bias"))


refuse(
    "its weights are quantised",
    "quantized_decomposed.dequantize_per_tensor",
    "quantized_decomposed.dequantize_per_channel",
    "aten._weight_int8pack_mm",
    "aten._weight_int4pack_mm",
    "aten._int_mm",
    "aten._scaled_mm",
    remedy="compress the model first and quantise the result",
)
refuse("its elements are mixed by a factorisation or a transform", "aten.linalg_qr", "aten.linalg_svd", "aten._fft_r2c",
       "aten._fft_c2c", "aten._fft_c2r", "aten.fft_rfft", "aten.fft_irfft", "aten.fft_fft", "aten.linalg_inv_ex",
       "aten.cdist", "aten.stft", "aten.istft", "aten.fft_fftn", "aten.fft_fft2")  # fmt: skip
refuse("its gates mix all units of a layer at every step, in weights that stack them", "aten.lstm", "aten.gru",
       "aten.rnn_tanh", "aten.rnn_relu", "aten.lstm_cell", "aten.gru_cell", "aten.rnn_tanh_cell",
       "aten.rnn_relu_cell")  # fmt: skip
refuse(
    "it divides every row by its norm, so that a removed row is 0 / 0 and a removed column changes what is left",
    "aten._weight_norm",
    "aten._weight_norm_interface",
    remedy="fold it into the weight first, with torch.nn.utils.parametrize.remove_parametrizations or "
    "remove_weight_norm",
)
