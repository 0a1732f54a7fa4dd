"""Layers whose couplings are known element by element: feed-forward networks, Einstein pairs, attention."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from tests.support.fuzz.builder import Builder, Ref
from tests.support.fuzz.program import Element, Planted, Unit, evaluate

KEEPS_ZERO = ["F.relu({0})", "F.gelu({0})", "F.silu({0})", "torch.tanh({0})", "{0}.square()", "-{0}", "{0} / 2"]


def row(name: str, position: int, axis: int = 0) -> Element:
    """A position along one axis of a parameter."""
    return (name, axis, position, -1, -1)


def rows(module: str, bias: bool, positions: Iterable[int]) -> set[Element]:
    """Rows of a linear layer, with their biases."""
    found = {row(f"{module}.weight", p) for p in positions}
    return found | {row(f"{module}.bias", p) for _, _, p, _, _ in found} if bias else found


def linear(b: Builder, inside: int, outside: int, bias: bool) -> str:
    """A private linear layer."""
    name = b.attribute(f"nn.Linear({inside}, {outside}, bias={bias})")
    b.private.add(name)
    return name


def private(b: Builder, *shape: int) -> str:
    """A private parameter."""
    name = b.parameter(*shape).removeprefix("self.")
    b.private.add(name)
    return name


# -- feed-forward ------------------------------------------------------------------------------------------------


def feed_forward(b: Builder, x: Ref) -> Ref:
    """up → moves and functions → down over x [B, T, C], gated or not; units may arrive in another order."""
    inside, wide, bias = x.shape[-1].number, b.choose([4, 6, 8, 12]), b.chance(50)
    form = b.choose(["plain", "two", "halves", "interleaved"])
    up = linear(b, inside, wide * (2 if form in {"halves", "interleaved"} else 1), bias)
    second = linear(b, inside, wide, bias) if form == "two" else up
    h = b.add("linear", f"self.{up}({{0}})", x)
    gate = {"two": (f"self.{second}({{0}})", x), "halves": (f"{{0}}[..., :{wide}]", h),
            "interleaved": ("{0}[..., ::2]", h)}.get(form)  # fmt: skip
    if gate is not None:
        other = b.add("linear" if form == "two" else "slice", gate[0], gate[1])
        main = {"halves": f"{{0}}[..., {wide}:]", "interleaved": "{0}[..., 1::2]"}.get(form)
        h = b.add("binary", "F.silu({0}) * {1}", other, b.add("slice", main, h) if main else h)
    h, order, extra, coarse = _wander(b, h, wide)
    down = linear(b, wide, inside, b.chance(50))
    result = b.add("linear", f"self.{down}({{0}})", h)
    units = []
    for at, i in enumerate(order):
        unit = {row(f"{down}.weight", at, 1)} | extra[i]
        owners = {"plain": [(up, i)], "two": [(up, i), (second, i)], "halves": [(up, i), (up, wide + i)],
                  "interleaved": [(up, 2 * i), (up, 2 * i + 1)]}  # fmt: skip
        for owner, position in owners[form]:
            unit |= rows(owner, bias, [position])
        units.append(frozenset(unit))
    b.planted.append(Planted("ffn", frozenset(units), coarse))
    return result


def _wander(b: Builder, h: Ref, wide: int) -> tuple[Ref, list[int], list[set[Element]], bool]:
    """Moves that end where they began, one reordering, scales.

    Returns which unit is where, what units gained, and whether a rectangle of them was taken apart.
    """
    order = list(range(wide))
    extra: list[set[Element]] = [set() for _ in range(wide)]
    half = wide // 2
    reorderings = ["torch.cat([{0}[..., ::2], {0}[..., 1::2]], -1)",
                   f"torch.cat([{{0}}[..., {half}:], {{0}}[..., :{half}]], -1)",
                   f"torch.cat({{0}}.split([{half - 1}, {wide - half + 1}], -1)[::-1], -1)"]  # fmt: skip
    identities = ["{0}.transpose(1, 2).contiguous().transpose(1, 2)", "{0}.flatten(0, 1).unflatten(0, (B, -1))",
                  f"{{0}}.unflatten(-1, (2, {half})).flatten(-2)", "{0}.mT.mT", "{0}.unsqueeze(1).squeeze(1)",
                  "{0}.permute(2, 0, 1).movedim(0, -1)", f"torch.cat({{0}}.split({half}, -1), -1)",
                  "torch.stack({0}.unbind(1), 1)"]  # fmt: skip
    rectangle = cut = False
    for _ in range(b.integer(0, 4)):
        code = b.choose(identities)
        rectangle |= "unflatten(-1" in code
        cut |= "split" in code
        h = b.add("identity", code, h)
        if b.chance(60):
            h = b.add("unary", b.choose(KEEPS_ZERO), h)
        if b.chance(20):
            scale = private(b, wide)
            h = b.add("scale", f"{{0}} * self.{scale}", h)
            for at, i in enumerate(order):
                extra[i].add(row(scale, at))
    coarse = rectangle and cut  # in either order: pieces become rows of a rectangle, or its rows become pieces
    if b.chance(50):
        code = b.choose(reorderings[0 if not cut and not rectangle else 1 : 2 if rectangle or cut or half < 3 else 3])
        coarse |= rectangle or "::2" in code
        h = b.add("reorder", code, h)
        order = evaluate(code.format("v"), {"v": torch.tensor(order)}).tolist()
        order = [int(i) for i in order]
    return h, order, extra, coarse


def einsum_pair(b: Builder, x: Ref) -> Ref:
    """Two parameters around a rank, with or without heads; the layouts differ."""
    inside, rank, heads = x.shape[-1].number, b.choose([3, 4, 6]), b.choose([0, 2, 3])
    first, second = b.choose(["rc", "cr"]), b.choose(["ro", "or"])
    if heads:
        first, second = b.choose(["hrc", "hcr"]), b.choose(["hro", "hor"])
    extent = {"r": rank, "c": inside, "o": inside, "h": heads}
    one, two = (private(b, *(extent[c] for c in labels)) for labels in (first, second))
    middle = b.choose(["bhtr", "bthr", "htbr"]) if heads else b.choose(["btr", "brt", "rbt"])
    h = b.add("einsum", f"torch.einsum('btc,{first}->{middle}', {{0}}, self.{one})", x)
    if b.chance(60):
        h = b.add("unary", b.choose(KEEPS_ZERO), h)
    result = b.add("einsum", f"torch.einsum('{middle},{second}->bto', {{0}}, self.{two})", h)
    places = [(0, c) for c in range(heads)] or [(-1, -1)]
    units = {
        frozenset({(one, first.index("r"), i, *place), (two, second.index("r"), i, *place)})
        for place in places
        for i in range(rank)
    }
    b.planted.append(Planted("einsum", frozenset(units)))
    return result


# -- attention ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Heads:
    """Sizes of an attention layer: key heads, query heads per key head, and head dimension."""

    keys: int
    group: int
    width: int

    @property
    def queries(self) -> int:
        """Query heads."""
        return self.keys * self.group


Place = Callable[[str, int, int], tuple[str, int]]
"""From (q, k or v; head; head dimension) to the layer and its row."""


def attention(b: Builder, x: Ref) -> Ref:
    """Queries, keys and values out of one to three layers; rotary or not; fused or by hand; then an output layer."""
    begin = len(b.steps)
    heads = Heads(b.choose([1, 2, 2, 3]), b.choose([1, 1, 2]), b.choose([2, 4, 4, 6]))
    bias = b.chance(40)
    (q, k, v), place = _projections(b, x, heads, bias)
    pairs = "none"
    if b.chance(50):
        pairs = b.choose(["halves", "interleaved", "complex", "stacked"])
        q, k = _rotary(b, q, k, x.shape[1].number, heads, pairs)
    mixed = _mix(b, q, k, v, heads)
    width = heads.queries * heads.width
    merged = b.choose(["{0}.transpose(1, 2).reshape(B, {T}, {W})", "{0}.transpose(1, 2).flatten(2)",
                       "{0}.permute(0, 2, 1, 3).contiguous().view(B, -1, {W})",
                       "torch.cat({0}.unbind(1), -1)"])  # fmt: skip
    code = merged.replace("{T}", str(x.shape[1].number)).replace("{W}", str(width))
    out = linear(b, width, x.shape[-1].number, b.chance(50))
    result = b.add("linear", f"self.{out}({{0}})", b.add("merge_heads", code, mixed))
    apart = any("unbind(1)" in s.code or "torch.stack({0}.split" in s.code for s in b.steps[begin:])
    _plant_attention(b, heads, bias, place, pairs, out, apart)
    return result


def _plant_attention(b: Builder, n: Heads, bias: bool, place: Place, pairs: str, out: str, apart: bool) -> None:
    """QK units per rotary pair or dimension, VO units per dimension, whole key heads where they stay one axis."""
    half = n.width // 2
    atoms = [[d] for d in range(n.width)]
    if pairs != "none":
        atoms = [[i, i + half] if pairs == "halves" else [2 * i, 2 * i + 1] for i in range(half)]

    def taken(which: str, head: int, d: int) -> set[Element]:
        module, position = place(which, head, d)
        return rows(module, bias, [position])

    qk, vo, whole = set[Unit](), set[Unit](), set[Unit]()
    for key in range(n.keys):
        queries = [key * n.group + g for g in range(n.group)]
        owned = set[Element]()
        for atom in atoms:
            unit = {e for d in atom for h in queries for e in taken("q", h, d)}
            unit |= {e for d in atom for e in taken("k", key, d)}
            qk.add(frozenset(unit))
            owned |= unit
        for d in range(n.width):
            unit = taken("v", key, d) | {row(f"{out}.weight", h * n.width + d, 1) for h in queries}
            vo.add(frozenset(unit))
            owned |= unit
        whole.add(frozenset(owned))
    if len(atoms) > 1:
        b.planted.append(Planted("qk", frozenset(qk), apart))
    b.planted.append(Planted("vo", frozenset(vo), apart))
    if n.keys > 1 and not apart:
        b.planted.append(Planted("heads", frozenset(whole)))


def _projections(b: Builder, x: Ref, n: Heads, bias: bool) -> tuple[list[Ref], Place]:
    """Queries, keys and values as [B, heads, T, width], and where their rows are."""
    counts = {"q": n.queries, "k": n.keys, "v": n.keys}
    forms = ["separate", "split", "grouped"] + (["stacked", "per_head", "chunk", "kv_pair"] if n.group == 1 else [])
    form = b.choose(forms)
    if form in {"separate", "kv_pair"}:
        return _separate(b, x, n, bias, paired=form == "kv_pair")
    inside, total = x.shape[-1].number, (n.queries + 2 * n.keys) * n.width
    fused = linear(b, inside, total, bias)
    h = b.add("linear", f"self.{fused}({{0}})", x)
    w, sections = n.width, [c * n.width for c in counts.values()]
    if form in {"split", "chunk"}:
        code = f"{{0}}.split({sections}, -1)" if form == "split" else "{0}.chunk(3, -1)"
        parts = [b.add("split", f"{code}[{i}]", h) for i in range(3)]
        starts = dict(zip("qkv", (0, sections[0], sections[0] + sections[1]), strict=True))
        views = [_headed(b, p, c, w) for p, c in zip(parts, counts.values(), strict=True)]
        return views, lambda which, head, d: (fused, starts[which] + head * w + d)
    if form == "stacked":
        h = b.add("unflatten", f"{{0}}.view(B, -1, 3, {n.keys}, {w})", h)
        code = b.choose(["{0}.unbind(2)[%d].transpose(1, 2)", "{0}.permute(2, 0, 3, 1, 4)[%d]",
                         "{0}[:, :, %d].transpose(1, 2)"])  # fmt: skip
        views = [b.add("select", code % i, h) for i in range(3)]
        return views, lambda which, head, d: (fused, ("qkv".index(which) * n.keys + head) * w + d)
    if form == "per_head":
        code = b.choose([f"{{0}}.view(B, -1, {n.keys}, 3, {w})[..., %d, :].transpose(1, 2)",
                         f"{{0}}.view(B, -1, {n.keys}, {3 * w}).chunk(3, -1)[%d].transpose(1, 2)"])  # fmt: skip
        views = [b.add("select", code % i, h) for i in range(3)]
        return views, lambda which, head, d: (fused, (head * 3 + "qkv".index(which)) * w + d)
    return _grouped(b, h, n, fused)


def _grouped(b: Builder, h: Ref, n: Heads, fused: str) -> tuple[list[Ref], Place]:
    """Per key head its query heads, its key and its value."""
    h = b.add("unflatten", f"{{0}}.view(B, -1, {n.keys}, {n.group + 2}, {n.width})", h)
    q = b.add("slice", f"{{0}}[:, :, :, :-2].reshape(B, -1, {n.queries}, {n.width}).transpose(1, 2)", h)
    k = b.add("slice", "{0}[:, :, :, -2].transpose(1, 2)", h)
    v = b.add("slice", "{0}[:, :, :, -1].transpose(1, 2)", h)

    def place(which: str, head: int, d: int) -> tuple[str, int]:
        key, inner = (head // n.group, head % n.group) if which == "q" else (head, n.group + "kv".index(which))
        return fused, (key * (n.group + 2) + inner) * n.width + d

    return [q, k, v], place


def _separate(b: Builder, x: Ref, n: Heads, bias: bool, paired: bool) -> tuple[list[Ref], Place]:
    inside, w = x.shape[-1].number, n.width
    q = linear(b, inside, n.queries * w, bias)
    query = _headed(b, b.add("linear", f"self.{q}({{0}})", x), n.queries, w)
    if not paired:
        k, v = (linear(b, inside, n.keys * w, bias) for _ in range(2))
        others = [_headed(b, b.add("linear", f"self.{m}({{0}})", x), n.keys, w) for m in (k, v)]
        names = {"q": q, "k": k, "v": v}
        return [query, *others], lambda which, head, d: (names[which], head * w + d)
    kv = linear(b, inside, 2 * n.keys * w, bias)
    h = b.add("unflatten", f"self.{kv}({{0}}).view(B, -1, 2, {n.keys}, {w}).permute(2, 0, 3, 1, 4)", x)
    others = [b.add("select", f"{{0}}[{i}]", h) for i in range(2)]

    def place(which: str, head: int, d: int) -> tuple[str, int]:
        return (q, head * w + d) if which == "q" else (kv, ("kv".index(which) * n.keys + head) * w + d)

    return [query, *others], place


def _headed(b: Builder, v: Ref, heads: int, width: int) -> Ref:
    """[B, T, heads · width] as [B, heads, T, width]."""
    code = b.choose([f"{{0}}.view(B, -1, {heads}, {width}).transpose(1, 2)",
                     f"{{0}}.unflatten(-1, ({heads}, {width})).permute(0, 2, 1, 3)",
                     f"torch.stack({{0}}.split({width}, -1), 1)" if heads < 3 and b.chance(10) else
                     f"{{0}}.reshape(B, -1, {heads}, {width}).movedim(2, 1)"])  # fmt: skip
    return b.add("split_heads", code, v)


def _rotary(b: Builder, q: Ref, k: Ref, length: int, n: Heads, pairs: str) -> tuple[Ref, Ref]:
    """Rotary embedding in one of its spellings; the angles are stored, or computed from stored frequencies."""
    half = n.width // 2
    angles = f"torch.outer(torch.arange({length}.0), torch.rand({half}))"
    if pairs == "complex":
        held = b.attribute(f"buffer:torch.polar(torch.ones({length}, {half}), {angles}).to(torch.complex128)")
        number = "torch.view_as_complex({0}.reshape(*{0}.shape[:-1], -1, 2))"
        code = f"torch.view_as_real({number} * self.{held}).flatten(-2)"
        return b.add("rotary", code, q), b.add("rotary", code, k)
    repeated = "torch.cat([a, a], -1)" if pairs == "halves" else "a.repeat_interleave(2, -1)"
    held = b.attribute(f"buffer:(lambda a: {repeated})({angles})")
    pair = f"{{0}}.unflatten(-1, ({half}, 2))"
    turned = {
        "halves": f"torch.cat([-{{0}}[..., {half}:], {{0}}[..., :{half}]], -1)",
        "interleaved": "torch.stack([-{0}[..., 1::2], {0}[..., ::2]], -1).flatten(-2)",
        "stacked": f"torch.stack([-{pair}[..., 1], {pair}[..., 0]], -1).flatten(-2)",
    }[pairs]
    code = f"{{0}} * self.{held}.cos() + {turned} * self.{held}.sin()"
    return b.add("rotary", code, q), b.add("rotary", code, k)


def _mix(b: Builder, q: Ref, k: Ref, v: Ref, n: Heads) -> Ref:
    """softmax(q kᵀ) v with grouped heads, masks, in one call or several."""
    length = q.shape[2].number
    fused = b.chance(50)
    if fused and b.chance(50):
        extra = ", enable_gqa=True" if n.group > 1 else ""
    else:
        k, v = (_spread(b, t, n) for t in (k, v)) if n.group > 1 else (k, v)
        extra = ""
    mask = b.choose(["", "", "causal", "stored"])
    if fused:
        extra += {"causal": ", is_causal=True", "": ""}.get(mask, "")
        if mask == "stored":
            extra += f", attn_mask=self.{b.attribute(f'buffer:torch.randn({length}, {length})')}"
        return b.add("attention", f"F.scaled_dot_product_attention({{0}}, {{1}}, {{2}}{extra})", q, k, v)
    scores = b.add("matmul", b.choose([f"{{0}} @ {{1}}.mT / {n.width ** 0.5}", "{0} @ {1}.transpose(-2, -1) * 0.5",
                                       "torch.einsum('bhtd,bhsd->bhts', {0}, {1})"]), q, k)  # fmt: skip
    if mask == "causal":
        code = "{0}.masked_fill(torch.ones({1}, {1}).triu(1).bool(), float('-inf'))".replace("{1}", str(length))
        scores = _masked(b, scores, code)
    elif mask == "stored":
        scores = b.add("buffer", f"{{0}} + {b.buffer(length, length)}", scores)
    code = b.choose(["F.softmax({0}, -1) @ {1}", "torch.einsum('bhts,bhsd->bhtd', {0}.softmax(-1), {1})"])
    return b.add("attention", code, scores, v)


def _masked(b: Builder, scores: Ref, code: str) -> Ref:
    """Infinite scores are no value of their own: they are masked where they are used."""
    return b.add("masked", code.replace("float('-inf')", "-1e3"), scores)


def _spread(b: Builder, v: Ref, n: Heads) -> Ref:
    """Key heads repeated to the query heads."""
    code = b.choose([f"{{0}}.repeat_interleave({n.group}, 1)",
                     f"{{0}}[:, :, None].expand(-1, -1, {n.group}, -1, -1).reshape(B, {n.queries}, -1, {n.width})",
                     f"{{0}}.unsqueeze(2).repeat(1, 1, {n.group}, 1, 1).flatten(1, 2)"])  # fmt: skip
    return b.add("repeat", code, v)
