"""Random steps that move elements: shapes, orders, parts, copies, places."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

from tests.support.fuzz.builder import Builder, Ref, Rejected, Size, sizes
from tests.support.fuzz.source import shuffled

Recipe = Callable[[Builder, Ref], Ref]


def divisors(number: int) -> list[int]:
    """Proper divisors."""
    return [d for d in range(2, number) if number % d == 0]


# -- shapes ------------------------------------------------------------------------------------------------------


def unflatten(b: Builder, v: Ref) -> Ref:
    """One axis becomes two."""
    axis = b.choose([i for i in v.plain(4) if divisors(v.shape[i].number)])
    outer = b.choose(divisors(v.shape[axis].number))
    parts = (Size(outer), Size(v.shape[axis].number // outer))
    shape = (*v.shape[:axis], *parts, *v.shape[axis + 1 :])
    code = b.choose([f"{{0}}.reshape({sizes(shape)})", f"{{0}}.unflatten({axis}, ({sizes(parts)}))",
                     f"{{0}}.view({sizes(shape)})", f"{{0}}.unflatten({axis - v.rank}, ({outer}, -1))"])  # fmt: skip
    return b.add("unflatten", code, v)


def merge(b: Builder, v: Ref) -> Ref:
    """Two neighbouring axes become one."""
    axis = b.integer(0, v.rank - 2)
    shape = (*v.shape[:axis], v.shape[axis].times(v.shape[axis + 1]), *v.shape[axis + 2 :])
    code = b.choose([f"{{0}}.flatten({axis}, {axis + 1})", f"{{0}}.reshape({sizes(shape)})"])
    return b.add("flatten", code, v)


def regroup(b: Builder, v: Ref) -> Ref:
    """A reshape whose axes need not line up with the old ones."""
    if not v.shape[0] == Size(1, True) or any(size.batch for size in v.shape[1:]):
        raise Rejected("samples would be mixed")
    left, shape = prod(size.number for size in v.shape[1:]), [Size(1, True)]
    for _ in range(b.integer(1, 3)):
        part = b.choose([d for d in (1, 2, 3, 4, 6, 8, 12) if left % d == 0])
        shape.append(Size(part))
        left //= part
    shape.insert(b.integer(1, len(shape)), Size(left))
    return b.add("reshape", f"{{0}}.reshape({sizes(tuple(shape))})", v)


def permute(b: Builder, v: Ref) -> Ref:
    """Axes in another order."""
    if v.rank < 2:
        raise Rejected("rank")
    i, j = shuffled(b.source, range(v.rank))[:2]
    order = ", ".join(map(str, shuffled(b.source, range(v.rank))))
    code = b.choose([f"{{0}}.transpose({i}, {j})", f"{{0}}.permute({order})", f"{{0}}.movedim({i}, {j - v.rank})",
                     "{0}.mT", f"{{0}}.swapaxes({i}, {j}).contiguous()"])  # fmt: skip
    return b.add("permute", code, v)


def unsqueeze(b: Builder, v: Ref) -> Ref:
    """An axis of size 1 comes or goes."""
    ones = [i for i, size in enumerate(v.shape) if size == Size(1)]
    if ones and b.chance(60):
        return b.add("squeeze", f"{{0}}.squeeze({b.choose(ones)})", v)
    return b.add("unsqueeze", f"{{0}}.unsqueeze({b.integer(-v.rank - 1, v.rank)})", v)


# -- parts -------------------------------------------------------------------------------------------------------


def _index(axis: int, entry: str) -> str:
    return f"[{':, ' * axis}{entry}]"


def slice_(b: Builder, v: Ref) -> Ref:
    """Some positions: with a step, with negative bounds, beyond the end."""
    axis = b.choose(v.plain())
    size = v.shape[axis].number
    start, stop, step = b.integer(0, size - 1), b.integer(1, size + 1), b.choose([1, 1, 1, 2, 2, 3])
    first = b.choose([str(start), str(start - size), "" if start == 0 else str(start)])
    last = b.choose([str(stop), str(stop - size) if stop < size else ""])
    return b.add("slice", f"{{0}}{_index(axis, f'{first}:{last}:{step}' if step > 1 else f'{first}:{last}')}", v)


def narrow(b: Builder, v: Ref) -> Ref:
    """A run of positions, or one."""
    axis = b.choose(v.plain())
    size = v.shape[axis].number
    start = b.integer(0, size - 1)
    code = b.choose([f"{{0}}.narrow({axis}, {start}, {b.integer(1, size - start)})",
                     f"{{0}}.select({axis}, {start - size if b.chance(40) else start})",
                     f"{{0}}{_index(axis, str(start - size))}", f"{{0}}{_index(axis, f'[{start}]')}"])  # fmt: skip
    return b.add("narrow", code, v)


def split(b: Builder, v: Ref) -> Ref:
    """Parts, some or all of them put together again in some order."""
    axis = b.choose(v.plain())
    size = v.shape[axis].number
    first = b.integer(1, size - 1)
    even = b.choose([*divisors(size), size])
    code, count = b.choose([
        (f"{{0}}.split([{first}, {size - first}], {axis})", 2),
        (f"{{0}}.split({size // even}, {axis - v.rank})", even),
        (f"{{0}}.chunk({even}, {axis})", even),
        (f"torch.tensor_split({{0}}, {even}, {axis})", even),
    ])  # fmt: skip
    parts = [b.add("split", f"{code}[{i}]", v) for i in range(min(count, 4))]
    return _together(b, parts, axis)


def unbind(b: Builder, v: Ref) -> Ref:
    """Single positions, some or all of them put together again."""
    axis = b.choose([i for i in v.plain() if v.shape[i].number <= 4])
    parts = [b.add("unbind", f"{{0}}.unbind({axis})[{i}]", v) for i in range(v.shape[axis].number)]
    chosen = shuffled(b.source, parts)[: b.integer(1, len(parts))]
    return b.add("stack", f"torch.stack([{_slots(chosen)}], {b.integer(-v.rank, v.rank - 1)})", *chosen)


def _slots(refs: list[Ref]) -> str:
    return ", ".join(f"{{{i}}}" for i in range(len(refs)))


def _together(b: Builder, parts: list[Ref], axis: int) -> Ref:
    kind = b.integer(0, 5)
    if kind == 0:
        return parts[-1]
    if kind == 1 and len({p.shape for p in parts}) == 1:
        return b.add("binary", " * ".join(f"{{{i}}}" for i in range(len(parts))), *parts)
    if kind == 2:
        return b.add("binary", "{0} * F.silu({1})", parts[0], parts[-1])
    if kind == 3:
        signed = [b.add("neg", "-{0}", p) if i % 2 else p for i, p in enumerate(parts)]
        parts = signed
    order = shuffled(b.source, parts) if b.chance(60) else parts
    return b.add("cat", f"torch.cat([{_slots(order)}], {axis})", *order)


def cat(b: Builder, v: Ref) -> Ref:
    """With another value, along the axis in which they differ or along any."""
    others = [w for w in b.pool[-12:] if w.rank == v.rank and _differing(v, w) <= 1]
    other: Ref = b.choose(others)
    differ = [i for i, (x, y) in enumerate(zip(v.shape, other.shape, strict=True)) if x != y]
    axis = differ[0] if differ else b.choose(v.plain(1))
    pair = [v, other] if b.chance(50) else [other, v]
    return b.add("cat", f"torch.cat([{{0}}, {{1}}], {axis})", *pair)


def _differing(v: Ref, w: Ref) -> int:
    return sum(x != y for x, y in zip(v.shape, w.shape, strict=True))


def stack(b: Builder, v: Ref) -> Ref:
    """With another value of the same shape, along a new axis."""
    other = b.choose([w for w in b.pool[-12:] if w.shape == v.shape])
    stacked = b.add("stack", f"torch.stack([{{0}}, {{1}}], {b.integer(-v.rank - 1, v.rank)})", v, other)
    return merge(b, stacked) if b.chance(50) else stacked


# -- copies and places -------------------------------------------------------------------------------------------


def expand(b: Builder, v: Ref) -> Ref:
    """A new axis of equal positions."""
    axis, count = b.integer(0, v.rank), b.choose([2, 3, 4])
    shape = (*v.shape[:axis], Size(count), *v.shape[axis:])
    code = f"{{0}}.unsqueeze({axis}).expand({sizes(shape)})"
    expanded = b.add("expand", code, v)
    return merge(b, expanded) if b.chance(50) else expanded


def repeat(b: Builder, v: Ref) -> Ref:
    """Copies outside or inside an axis."""
    axis, count = b.choose(v.plain(1)), b.choose([2, 2, 3])
    counts = ", ".join(str(count if i == axis else 1) for i in range(v.rank))
    code = b.choose([f"{{0}}.repeat({counts})", f"{{0}}.tile({counts})", f"{{0}}.repeat_interleave({count}, {axis})",
                     f"{{0}}.repeat_interleave({count}, {axis - v.rank})"])  # fmt: skip
    return b.add("repeat", code, v)


def place(b: Builder, v: Ref) -> Ref:
    """Positions rolled, reversed, padded, masked, or windows over them."""
    axis = b.choose(v.plain())
    size, last = v.shape[axis].number, v.rank - 1
    amount = b.integer(1, size - 1)
    pads = ", ".join(["0, 0"] * (last - axis) + [f"{b.integer(0, 2)}, {b.integer(0, 2)}"])
    operator, code = b.choose([
        ("roll", f"torch.roll({{0}}, {amount}, {axis})"), ("roll", f"torch.roll({{0}}, {-amount}, {axis})"),
        ("flip", f"{{0}}.flip({axis})"), ("pad", f"F.pad({{0}}, ({pads}))"),
        ("pad", f"F.pad({{0}}, ({pads}), value=0.5)"),
        ("tril", "{0}.tril()"), ("unfold", f"{{0}}.unfold({axis}, {amount}, {b.integer(1, 2)})"),
    ])  # fmt: skip
    return b.add(operator, code, v)


def gather(b: Builder, v: Ref) -> Ref:
    """Positions chosen by indices that the model holds, or that it computes."""
    axis = b.choose(v.plain())
    size = v.shape[axis].number
    numbers = [b.integer(0, size - 1) for _ in range(b.integer(1, size))]
    if b.chance(30):
        numbers = shuffled(b.source, range(size))
    index = f"self.{b.attribute(f'buffer:torch.tensor({numbers})')}"
    view = ", ".join(str(-1 if i == axis else 1) for i in range(v.rank))
    whole = ", ".join(str(-1) if i == axis else size.text for i, size in enumerate(v.shape))
    operator, code = b.choose([
        ("index_select", f"{{0}}.index_select({axis}, {index})"), ("index", f"{{0}}{_index(axis, index)}"),
        ("take_along_dim", f"torch.take_along_dim({{0}}, {index}.view({view}), {axis})"),
        ("gather", f"{{0}}.gather({axis}, {index}.view({view}).expand({whole}))"),
        ("index", f"{{0}}{_index(axis, str(numbers))}"),
        ("sort", f"{{0}}.sort({axis}).values"), ("topk", f"{{0}}.topk({len(numbers)}, {axis}).values"),
        ("take_along_dim", f"torch.take_along_dim({{0}}, {{0}}.argsort({axis}), {axis})"),
    ])  # fmt: skip
    return b.add(operator, code, v)


MOVES: list[tuple[int, Recipe]] = [
    (6, unflatten), (5, merge), (2, regroup), (6, permute), (2, unsqueeze), (5, slice_), (2, narrow), (5, split),
    (2, unbind), (4, cat), (2, stack), (2, expand), (2, repeat), (1, place), (1, gather),
]  # fmt: skip
