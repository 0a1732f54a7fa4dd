"""Random steps that compute: elementwise functions, broadcasts, reductions, norms, products."""

from __future__ import annotations

from tests.support.fuzz.builder import Builder, Ref, Rejected, Size
from tests.support.fuzz.moves import Recipe
from tests.support.fuzz.source import shuffled

ZERO_STAYS = [
    "F.relu({0})", "F.gelu({0})", "F.silu({0})", "torch.tanh({0})", "torch.sin({0})", "{0}.abs()", "{0}.square()",
    "-{0}", "{0} * 0.5", "{0} / 3", "F.leaky_relu({0}, 0.2)", "torch.expm1({0} / 8)", "F.elu({0})", "{0}.clamp(-1, 1)",
    "F.hardswish({0})", "{0} ** 2", "F.softshrink({0}, 0.1)", "{0}.clone()", "F.dropout({0}, 0.5, False)", "{0}.erf()",
    "torch.where({0} > 0, {0}, 0.0)", "{0}.masked_fill({0} > 0.5, 0.0)", "{0}.atan()", "{0}.round(decimals=1)",
    "{0}.contiguous()", "{0} + {0}", "{0} - {0} * 2", "{0}.nan_to_num()", "{0}.type_as({0})",
    "{0}.clone().relu_()", "{0}.clone().mul_(0.5)",
]  # fmt: skip
ZERO_GOES = [
    "torch.sigmoid({0})", "torch.exp({0} / 8)", "torch.cos({0})", "{0} + 1", "F.softplus({0})", "1 - {0}",
    "{0}.clamp(min=0.5)", "torch.where({0} > 0, {0}, 1.0)", "{0}.masked_fill({0} < 0, -1.0)", "F.hardsigmoid({0})",
    "({0} > 0).to({0}.dtype)", "{0}.logical_not().to({0}.dtype)", "{0} - 0.25", "1 / (1 + {0}.abs())",
    "torch.rsqrt({0}.square() + 1)", "F.logsigmoid({0})", "{0}.abs().log1p() + 1", "({0}.square() + 1).log()",
]  # fmt: skip


def unary(b: Builder, v: Ref) -> Ref:
    """An elementwise function; most keep zeros."""
    return b.add("unary", b.choose(ZERO_STAYS if b.chance(75) else ZERO_GOES), v)


# What is added to the first argument of atan2 makes -0.0 to 0.0: their angles differ, and a sum of fewer terms may be
# either.
OPERATIONS = [
    "{0} + {1}", "{0} * {1}", "{0} - {1}", "{0} * F.silu({1})", "{0} * torch.sigmoid({1})", "torch.maximum({0}, {1})",
    "{0} / ({1}.square() + 1)", "torch.where({0} > {1}, {0}, {1})", "{0} + 0.5 * {1}", "torch.addcmul({0}, {0}, {1})",
    "torch.lerp({0}, {1}, 0.3)", "torch.atan2({0} + 0.0, {1})", "{0}.masked_fill({1} > 0, 0.0)",
    "torch.add({0}, {1}, alpha=2)",
]  # fmt: skip


def binary(b: Builder, v: Ref) -> Ref:
    """Two values that broadcast."""
    others = [w for w in b.pool[-16:] if w.number != v.number and _broadcasts(v, w)]
    other = b.choose(others)
    pair = [v, other] if b.chance(60) else [other, v]
    return b.add("binary", b.choose(OPERATIONS), *pair)


def _broadcasts(v: Ref, w: Ref) -> bool:
    pairs = zip(reversed(v.shape), reversed(w.shape), strict=False)
    return all(x == y or Size(1) in (x, y) for x, y in pairs)


def with_constant(b: Builder, v: Ref) -> Ref:
    """A parameter or a stored tensor, broadcast."""
    rank = b.integer(1, v.rank)
    shape = [1 if size.batch or b.chance(40) else size.number for size in v.shape[v.rank - rank :]]
    held = b.parameter(*shape) if b.chance(55) else b.buffer(*shape)
    kept = held.startswith("self.b")
    return b.add("buffer" if kept else "scale", b.choose(OPERATIONS).replace("{1}", held), v)


def reduce_(b: Builder, v: Ref) -> Ref:
    """A statistic along an axis, alone or put back against what it was taken of."""
    axis = b.choose(v.plain(1))
    name = b.choose(["sum", "sum", "mean", "amax", "std", "prod", "norm", "logsumexp", "cumsum", "argmax"])
    keep = b.chance(60)
    if name == "cumsum":
        return b.add("cumsum", f"{{0}}.cumsum({axis})", v)
    if name == "argmax":
        return b.add("argmax", f"{{0}}.argmax({axis}, keepdim=True).to({{0}}.dtype) * {{0}}", v)
    if name == "std" and v.shape[axis].number < 2:
        raise Rejected("one")
    result = b.add(name, f"{{0}}.{name}(dim={axis}, keepdim={keep})", v)
    return b.add("binary", f"{{0}} {b.choose('+*-')} {{1}}", v, result) if keep and b.chance(50) else result


def softmax(b: Builder, v: Ref) -> Ref:
    """Along any axis."""
    axis = b.choose(v.plain())
    return b.add("softmax", b.choose([f"F.softmax({{0}}, {axis})", f"{{0}}.log_softmax({axis - v.rank})"]), v)


def norm(b: Builder, v: Ref) -> Ref:
    """Norms, library and hand-written."""
    last, channel = v.shape[-1], v.shape[min(1, v.rank - 1)]
    kinds = []
    if not last.batch and last.number > 1:
        n = last.number
        kinds += [("layer_norm", f"nn.LayerNorm({n})"), ("layer_norm", f"nn.LayerNorm({n}, elementwise_affine=False)"),
                  ("rms_norm", f"nn.RMSNorm({n})")]  # fmt: skip
        if b.chance(30):
            scale = b.parameter(n)
            code = f"{{0}} * torch.rsqrt({{0}}.square().mean(-1, keepdim=True) + 1e-6) * {scale}"
            return b.add("rms_by_hand", code, v)
        if b.chance(20):
            return b.add("normalize", "F.normalize({0}, dim=-1)", v)
    if v.rank >= 2 and not channel.batch and v.shape[0].batch:
        kinds += [("group_norm", f"nn.GroupNorm({b.choose([1, channel.number])}, {channel.number})")]
        if v.rank <= 3:
            kinds += [("batch_norm", f"nn.BatchNorm1d({channel.number})")]
    operator, code = b.choose(kinds)
    return b.add(operator, f"self.{b.attribute(code)}({{0}})", v)


# -- products ----------------------------------------------------------------------------------------------------


def linear(b: Builder, v: Ref) -> Ref:
    """A weight against the last axis, in one of its spellings; sometimes a weight that is used already."""
    size = v.shape[-1]
    if size.batch:
        raise Rejected("batch")
    n, out = size.number, b.choose([4, 6, 8, 12, 16])
    if b.chance(12):
        old = [m for m, code in b.attributes.items() if code.startswith(f"nn.Linear({n},") and m not in b.private]
        return b.add("shared", f"self.{b.choose(old)}({{0}})", v)
    kind = b.integer(0, 6)
    if kind <= 2:
        bias = "" if kind else ", bias=False"
        return b.add("linear", f"self.{b.attribute(f'nn.Linear({n}, {out}{bias})')}({{0}})", v)
    if kind == 3:
        return b.add("matmul", f"{{0}} @ {b.parameter(n, out)}", v)
    if kind == 4 and v.rank == 2:
        code = f"torch.addmm({b.parameter(out)}, {{0}}, {b.parameter(n, out)})"
        return b.add("addmm", code, v)
    if kind == 5:
        return b.add("matmul", f"torch.matmul({{0}}, {b.parameter(out, n)}.T) + {b.parameter(out)}", v)
    return b.add("tensordot", f"torch.tensordot({{0}}, {b.parameter(n, out)}, dims=1)", v)


def einsum_weight(b: Builder, v: Ref) -> Ref:
    """Some axes against a parameter: contracted, kept, or both."""
    letters = "abcdef"[: v.rank]
    plain = v.plain(1)
    touched = shuffled(b.source, plain)[: b.integer(1, min(3, len(plain)))] if plain else []
    if not touched:
        raise Rejected("no axis")
    gone = touched[: b.integer(1, len(touched))]
    new = [("x", b.choose([2, 4, 6, 8])), ("y", b.choose([2, 3]))][: b.integer(0, 2)]
    weight = [(letters[i], v.shape[i].number) for i in touched] + new
    weight = shuffled(b.source, weight)
    out = [c for i, c in enumerate(letters) if i not in gone] + [c for c, _ in new]
    if b.chance(30):
        out = shuffled(b.source, out)
    held = b.parameter(*(n for _, n in weight))
    equation = f"{letters},{''.join(c for c, _ in weight)}->{''.join(out)}"
    return b.add("einsum", f"torch.einsum('{equation}', {{0}}, {held})", v)


def product(b: Builder, v: Ref) -> Ref:
    """Two activations multiplied, with or without what attention does in between."""
    if v.rank < 2:
        raise Rejected("rank")
    other = b.choose([w for w in b.pool[-12:] if w.rank == v.rank and w.shape[:-2] == v.shape[:-2]])
    if other.shape[-1] == v.shape[-1]:
        scores = b.add("matmul", b.choose(["{0} @ {1}.mT", "{0} @ {1}.transpose(-1, -2)"]), v, other)
    elif other.shape[-2] == v.shape[-1]:
        scores = b.add("matmul", "{0} @ {1}", v, other)
    elif other.shape[-2] == v.shape[-2]:
        scores = b.add("matmul", "{0}.mT @ {1}", v, other)
    else:
        raise Rejected("sizes")
    return b.add("softmax", "F.softmax({0} / 2, -1) @ {1}", scores, other) if b.chance(30) else scores


def einsum_pair(b: Builder, v: Ref) -> Ref:
    """Two activations of equal rank in an Einstein summation: equal sizes may share a letter."""
    if v.rank < 2:
        raise Rejected("rank")
    other = b.choose([w for w in b.pool[-12:] if 2 <= w.rank <= 4])
    left, right = list("abcdef"[: v.rank]), list("uvwxyz"[: other.rank])
    for j, size in enumerate(other.shape):
        same = [i for i, s in enumerate(v.shape) if s == size and left[i] not in right]
        if same and (size.batch or b.chance(60)):
            right[j] = left[b.choose(same)]
    letters = list(dict.fromkeys([*left, *right]))
    named = [*zip(left, v.shape, strict=True), *zip(right, other.shape, strict=True)]
    batch = {letter for letter, size in named if size.batch}
    out = [c for c in letters if c in batch or b.chance(60)]
    return b.add("einsum", f"torch.einsum('{''.join(left)},{''.join(right)}->{''.join(out)}', {{0}}, {{1}})", v, other)


def convolution(b: Builder, v: Ref) -> Ref:
    """Over [batch, channels, places]: depthwise, pointwise or grouped."""
    if v.rank != 3 or not v.shape[0].batch or v.shape[1].batch or v.shape[2].batch:
        raise Rejected("no image")
    n = v.shape[1].number
    code = b.choose([f"nn.Conv1d({n}, {n}, 3, padding=1, groups={n})", f"nn.Conv1d({n}, 8, 1)",
                     f"nn.Conv1d({n}, {2 * n}, 1, groups={n})", f"nn.Conv1d({n}, 6, 3, padding=1)"])  # fmt: skip
    return b.add("convolution", f"self.{b.attribute(code)}({{0}})", v)


MATHEMATICS: list[tuple[int, Recipe]] = [
    (12, unary), (8, binary), (4, with_constant), (2, reduce_), (1, softmax), (1, norm), (3, linear),
    (3, einsum_weight), (3, product), (2, einsum_pair), (1, convolution),
]  # fmt: skip
