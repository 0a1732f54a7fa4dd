"""The generator: inputs, blocks of random steps and known layers in between, branches that join again, outputs."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from tests.support.fuzz import layers, mathematics, moves
from tests.support.fuzz.builder import Builder, Ref, Rejected, Size
from tests.support.fuzz.program import Program
from tests.support.fuzz.source import Drawn, Seeded, Source, choose, weighted

RECIPES = [*moves.MOVES, *mathematics.MATHEMATICS]


def generate(source: Source) -> Program:
    """A random program, valid by construction. Weights that steps are tried with are the same whenever it is made."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _generated(Builder(source), source)


def _generated(b: Builder, source: Source) -> Program:
    stream = _inputs(b)
    blocks = b.integer(1, 3)
    planted = b.integer(0, blocks) if b.chance(75) else -1
    for number in range(blocks):
        layer = choose(source, [layers.feed_forward, layers.einsum_pair, layers.attention, layers.attention])
        if number == planted:
            stream = _join(b, stream, _hidden(b, stream, layer))
        else:
            stream = _join(b, stream, _soup(b, stream))
    if planted == blocks:
        stream = _join(b, stream, _hidden(b, stream, choose(source, [layers.feed_forward, layers.attention])))
    outputs = [stream]
    if b.chance(20):
        outputs.append(choose(source, [r for r in b.pool[-6:] if r.number >= len(b.inputs)] or [stream]))
    form = "tensor" if len(set(outputs)) == 1 else choose(source, ["tuple", "dict"])
    return b.finish(tuple(dict.fromkeys(outputs)), form, source.integer(0, 10_000))


def seeded(seed: int) -> Program:
    """The program of a seed."""
    return generate(Seeded(seed))


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Random programs, as a hypothesis strategy."""
    return generate(Drawn(draw))


# -- parts ---------------------------------------------------------------------------------------------------------


def _inputs(b: Builder) -> Ref:
    """One stream [B, T, C]: given, embedded, normalised, or joined from two."""
    length, width = b.choose([2, 3, 4, 4, 6]), b.choose([4, 4, 6, 8])
    kind = b.integer(0, 9)
    if kind == 0:
        b.input(f"torch.randint(0, 7, (B, {length}))")
        stream = b.add("embedding", f"self.{b.attribute(f'nn.Embedding(7, {width})')}({{0}})", b.pool[-1])
    else:
        stream = b.input(f"torch.randn(B, {length}, {width}, dtype=torch.float64)")
    if kind in {1, 2}:
        other = b.input(f"torch.randn(B, {length}, {width}, dtype=torch.float64)")
        stream = b.add("binary", b.choose(["{0} + {1}", "{0} * {1}"]), stream, other)
    if kind == 3:
        b.input(f"torch.randn(B, {width}, dtype=torch.float64)")
    if b.chance(30):
        stream = b.add("layer_norm", f"self.{b.attribute(f'nn.LayerNorm({width})')}({{0}})", stream)
    b.pool = [r for r in b.pool if r == stream or not b.inputs[0].startswith("torch.randint")]
    return stream


def _hidden(b: Builder, x: Ref, layer: moves.Recipe) -> Ref:
    """A layer whose inner values no other step reads."""
    pool, planted, private = list(b.pool), list(b.planted), set(b.private)
    b.hidden = True
    made = b.attempt(lambda: layer(b, x))
    b.hidden, b.pool = False, pool
    if made is None:
        b.planted, b.private = planted, private
        return x
    b.pool.append(made)
    return made


def _soup(b: Builder, stream: Ref) -> Ref:
    """Some linear layers, then random steps on what they made, then a way back to the stream's shape."""
    pool = list(b.pool)
    b.pool = [made for _ in range(b.integer(1, 3)) if (made := b.attempt(lambda: mathematics.linear(b, stream)))]
    for _ in range(b.integer(2, 9)):
        if not b.pool:
            break
        recent = b.pool[-1 - b.integer(0, min(2, len(b.pool) - 1))]
        recipe = weighted(b.source, RECIPES)
        b.attempt(lambda recipe=recipe, recent=recent: recipe(b, recent))  # type: ignore[misc]
    candidates = [b.pool[-1 - b.integer(0, min(1, len(b.pool) - 1))], *reversed(b.pool)] if b.pool else []
    inner, b.pool = b.pool, pool
    for candidate in candidates[:4]:
        closed = b.attempt(lambda candidate=candidate: _closed(b, candidate, stream))  # type: ignore[misc]
        if closed is not None:
            b.pool = [*pool, *(inner[-2:] if b.chance(15) else []), closed]
            return closed
    return stream


def _closed(b: Builder, v: Ref, stream: Ref) -> Ref:
    """A value brought back to [B, T, C]."""
    batch, length, width = stream.shape
    if v.shape[:2] == (batch, length) and v.rank >= 3 and b.chance(85):
        inner = v if v.rank == 3 else b.add("flatten", "{0}.flatten(2)", v)
        if inner.shape == stream.shape and b.chance(15):
            return inner
        kind = b.integer(0, 3)
        n = inner.shape[-1].number
        if kind == 0:
            code = f"torch.einsum('btn,on->bto', {{0}}, {b.parameter(width.number, n)})"
            return b.add("einsum", code, inner)
        if kind == 1:
            return b.add("matmul", f"{{0}} @ {b.parameter(n, width.number)}", inner)
        return b.add("linear", f"self.{b.attribute(f'nn.Linear({n}, {width.number})')}({{0}})", inner)
    where = [i for i, size in enumerate(v.shape) if size.batch]
    if len(where) != 1:
        raise Rejected("batch")
    places = [i for i, size in enumerate(v.shape) if size == length]
    if v.shape[where[0]] == batch and places and v.rank >= 3 and v.shape[:2] != (batch, length) and b.chance(80):
        order = [where[0], places[0], *(i for i in range(v.rank) if i not in {where[0], places[0]})]
        return _closed(b, b.add("permute", f"{{0}}.permute({', '.join(map(str, order))})", v), stream)
    flat = v if where[0] == 0 else b.add("permute", f"{{0}}.movedim({where[0]}, 0)", v)
    flat = b.add("reshape", "{0}.reshape(B, -1)", flat)
    n, out = flat.shape[-1].number, length.number * width.number
    down = b.add("linear", f"self.{b.attribute(f'nn.Linear({n}, {out})')}({{0}})", flat)
    result = b.add("reshape", f"{{0}}.view(B, {length.number}, {width.number})", down)
    b.check_unmixed(result)
    return result


def _join(b: Builder, stream: Ref, made: Ref) -> Ref:
    """The stream and what a block made of it."""
    if made.number == stream.number or made.shape != stream.shape:
        return made
    width = stream.shape[-1].number
    kind = b.integer(0, 9)
    if kind <= 4:
        return b.add("binary", "{0} + {1}", stream, made)
    if kind == 5:
        return b.add("layer_norm", f"self.{b.attribute(f'nn.LayerNorm({width})')}({{0}} + {{1}})", stream, made)
    if kind == 6 and stream.shape[-1] == Size(width) and width < 12:
        return b.add("cat", "torch.cat([{0}, {1}], -1)", stream, made)
    if kind == 7:
        return b.add("binary", "{0} + {1} * torch.sigmoid({0})", stream, made)
    return made
