"""Operators that choose positions by computed indices: the chosen axis cannot be cut, the others pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ecospa_fx.axes.call import UNIT, Call, Value
from ecospa_fx.axes.dims import Axis, DimKind
from ecospa_fx.axes.findings import Order, Sorting
from ecospa_fx.axes.products import picked_from
from ecospa_fx.axes.reasons import WHERE
from ecospa_fx.axes.registry import axis_rule
from ecospa_fx.axes.resize import Resize, resize_rule
from ecospa_fx.axes.shapes import broadcast_size
from ecospa_fx.ir.schema import is_operator, operator_name

_JOIN = "join the old and the new parts with torch.cat instead"


def _chosen(call: Call, value: Value, index: int) -> None:
    call.block(value.axes[index], f"{call.operator} chooses its positions by computed indices")


def _counted(call: Call, *operands: object) -> None:
    """Every position of these operands says where something goes or comes from: none may be missing."""
    for axis in (a for v in operands if isinstance(v, Value) for a in v.axes):
        call.block(axis, f"{call.operator} finds positions by it")


def _order(call: Call, value: Value, axis: int, index: Value) -> list[int] | None:
    """The fixed order in which positions of an axis that may be cut are read; None for any other index.

    Rows of a table of weights that is read again and again, as by relative positions, are no channels.
    """
    if len(index.axes) != 1 or not call.dims.cuttable(value.axes[axis]):
        return None
    numbers = call.numbers(index)
    return None if numbers is None else _positions(numbers.tolist(), value, axis)


def _positions(positions: list[int], value: Value, axis: int) -> list[int] | None:
    size = value.axes[axis].size
    if not positions or not all(-size <= position < size for position in positions):
        return None
    again = value.weights and len({position % size for position in positions}) < len(positions)
    return None if again else positions


def _order_of_all(call: Call, value: Value, axis: int, index: Value) -> list[int] | None:
    """The order of an index that is the same for each place of the other axes, all of which it covers."""
    others, node = [i for i in range(len(value.axes)) if i != axis], index.node
    if node is None or value.node is None or not call.dims.cuttable(value.axes[axis]) or not is_operator(call.node):
        return None
    sizes = [[str(size) for size in n.meta["val"].shape] for n in (value.node, node)]
    if len(index.axes) != len(value.axes) or any(sizes[0][i] != sizes[1][i] for i in others):
        return None
    if call.numbers(index) is None and is_operator(node) and operator_name(node.target) == "aten.expand":
        node = node.all_input_nodes[0]
    numbers = call.numbers(replace(index, node=node))
    if numbers is None or not numbers.numel():
        return None
    rows = numbers.expand(index.shape).movedim(axis, -1).flatten(0, -2)
    return _positions(rows[0].tolist(), value, axis) if bool((rows == rows[0]).all()) else None


@resize_rule("aten.index_select", "aten.index", "aten.gather", "aten.take_along_dim")
def resize_index(resize: Resize) -> None:
    """What is read in a fixed order is read in the order of what is left."""
    resize.pick()


@axis_rule("aten.embedding", linear=True)
def embedding(call: Call) -> Value:
    """Rows of a table; the columns pass."""
    weight, indices = call["weight"], call["indices"]
    _chosen(call, weight, 0)
    result = call.value([*indices.axes, weight.axes[1]], [*(False for _ in indices.axes), weight.zero[1]])
    _routes(call, result, indices, weight.axes[0])
    return replace(result, descent=picked_from(call, weight, weight.axes[1:]))


@axis_rule("aten.index_select", linear=True)
def index_select(call: Call) -> Value:
    """Chosen positions of one axis."""
    value, axis = call["self"], int(call["dim"]) % max(len(call["self"].axes), 1)
    if not value.axes:
        return call.stored()
    if (order := _order(call, value, axis, call["index"])) is not None:
        return call.picked(value, axis, order)
    _chosen(call, value, axis)
    _counted(call, call["index"])
    fresh = call.fresh()
    axes = [fresh[i] if i == axis else a for i, a in enumerate(value.axes)]
    result = call.value(axes, [z and i != axis for i, z in enumerate(value.zero)])
    return replace(result, descent=picked_from(call, value, [a for i, a in enumerate(value.axes) if i != axis]))


@axis_rule("aten.index", linear=True)
def index(call: Call) -> Value:
    """Advanced indexing: the indexed axes give way to the broadcast shape of the indices."""
    value, indices = call["self"], call["indices"]
    where = [i for i, entry in enumerate(indices) if entry is not None]
    chosen = [indices[i] for i in where]
    if any(call.is_mask(indices[i]) for i in where):
        return _masked(call, value, where)
    if len(where) == 1 and (order := _order(call, value, where[0], chosen[0])) is not None:
        return call.picked(value, where[0], order)
    for i in where:
        _chosen(call, value, i)
    middle = [call.pointwise(chosen, "lost", _broadcast(chosen))] if chosen else []
    rows = list(middle[0].axes) if middle else []
    together = where == list(range(where[0], where[-1] + 1)) if where else False
    first = where[0] if together else 0
    rest = [i for i in range(len(value.axes)) if i not in where]
    before, after = [i for i in rest if i < first], [i for i in rest if i >= first]
    axes = [*(value.axes[i] for i in before), *rows, *(value.axes[i] for i in after)]
    zero = [*(value.zero[i] for i in before), *(False for _ in rows), *(value.zero[i] for i in after)]
    result = call.value(axes, zero)
    if len(chosen) == 1:
        _routes(call, result, chosen[0], value.axes[where[0]], len(before))
    return replace(result, descent=picked_from(call, value, [value.axes[i] for i in rest]))


def _masked(call: Call, value: Value, where: Sequence[int]) -> Value:
    """Positions where a mask is true: a count that the data decides."""
    if len(where) > 1:
        return call.block_all(f"{call.operator} chooses its positions by masks", WHERE)[0]
    mask = call["indices"][where[0]]
    first, count = where[0], len(mask.axes)
    for i in range(first, first + count):
        _chosen(call, value, i)
    _counted(call, mask)
    fresh = call.fresh()[first]
    return call.value(
        [*value.axes[:first], fresh, *value.axes[first + count :]],
        [*value.zero[:first], False, *value.zero[first + count :]],
    )


def _broadcast(values: Sequence[Value]) -> list[int]:
    rank = max(len(v.axes) for v in values)
    shapes = [(1,) * (rank - len(v.axes)) + v.shape for v in values]
    return [broadcast_size(sizes) for sizes in zip(*shapes, strict=True)]


def _routes(call: Call, result: Value, indices: Value, source: Axis, axis: int = 0) -> None:
    """Where a single axis of indices picks positions of a parameter's axis, the rows belong to those positions."""
    if call.dims.cuttable(source) and len(indices.axes) == 1:
        call.routed(result.axes[axis], source, indices)


@axis_rule("aten.gather", "aten.take_along_dim")
def gather(call: Call) -> Value:
    """Positions of one axis chosen for each place of the others; take_along_dim broadcasts."""
    value, broadcasts = call["self"], call.operator == "aten.take_along_dim"
    chosen = call.get("index") or call["indices"]
    if call.get("dim") is None:
        return call.block_all(f"{call.operator} chooses from all its elements", "name a dim to choose along")[0]
    axis = int(call["dim"]) % max(len(value.axes), 1)
    order = _order_of_all(call, value, axis, chosen)
    if order is not None:
        return call.picked(value, axis, order)
    axes: list[Axis] = []
    for i in range(len(value.axes)):
        if i == axis:
            _chosen(call, value, i)
            axes.append(chosen.axes[i])
        elif value.axes[i].size == chosen.axes[i].size:
            axes.append(call.align([(value, i), (chosen, i)]) if value.axes[i].size != 1 else UNIT)
        elif broadcasts:
            axes.append(value.axes[i] if chosen.axes[i].size == 1 else chosen.axes[i])
        else:
            for operand in (value, chosen):
                call.block(
                    operand.axes[i], f"{call.operator} reads a part of it", "slice it to the size of the index first"
                )
            axes.append(chosen.axes[i])
    target = [value.axes[i] if i == axis else a for i, a in enumerate(axes)]
    call.gathered([chosen], [chosen.axes[i] if i == axis else a for i, a in enumerate(axes)])
    call.gathered([value], target)
    alike = [i != axis and call.follows(value.axes[i], a) for i, a in enumerate(axes)]
    result = call.value(axes, [z and same for z, same in zip(value.zero, alike, strict=True)])
    return replace(result, descent=picked_from(call, value, [a for i, a in enumerate(value.axes) if i != axis]))


@axis_rule("aten.scatter", "aten.scatter_add", "aten.scatter_reduce")
def scatter(call: Call) -> Value:
    """Positions of one axis overwritten for each place of the others, which go together."""
    value, index, source = call["self"], call["index"], call.get("src")
    axis = int(call["dim"]) % max(len(value.axes), 1)
    parts = [v for v in (value, index, source) if isinstance(v, Value)]
    for v in parts:
        if v.axes:
            call.block(v.axes[axis], f"{call.operator} writes to computed positions")
    others = [i for i in range(len(value.axes)) if i != axis]
    partly = [i for i in others if any(v.axes[i].size != value.axes[i].size for v in parts)]
    if any(call.dims.cuttable(v.axes[i]) for v in parts for i in partly):
        return call.block_all(f"{call.operator} writes to a part of it", "slice it to the size of the index first")[0]
    sums = call.operator != "aten.scatter_reduce" or call.get("reduce") == "sum"
    filled = isinstance(source, Value) or (not isinstance(call.get("value"), Value) and call.get("value", 0) == 0)
    axes, flags = list(value.axes), [False] * len(value.axes)
    for i in (j for j in others if j not in partly and value.axes[j].size > 1):
        axes[i] = call.align([(v, i) for v in parts])
        numbers = [v for v in parts if v is not index]
        flags[i] = sums and filled and all(v.zero[i] and call.follows(v.axes[i], axes[i]) for v in numbers)
    for v in parts:
        whole = [v.axes[i] if i == axis else a for i, a in enumerate(axes)]
        call.gathered([v], whole, joins=v is value)
    return call.value(axes, flags)


@axis_rule("aten.index_put", "aten._unsafe_index_put")
def index_put(call: Call) -> Value:
    """Chosen positions overwritten: values lie against the axes that are left."""
    value, indices, new = call["self"], call["indices"], call["values"]
    where = [i for i, entry in enumerate(indices) if entry is not None]
    for i in where:
        _chosen(call, value, i)
    _counted(call, *indices)
    if any(call.is_mask(indices[i]) for i in where) and any(call.dims.cuttable(a) for a in new.axes):
        return call.block_all(f"{call.operator} writes where a mask says", WHERE)[0]
    together = where == list(range(where[0], where[-1] + 1)) if where else False
    rest = [i for i in range(len(value.axes)) if i not in where]
    axes, flags, target = list(value.axes), [False] * len(value.axes), list(new.axes)
    chosen = [indices[i] for i in where if isinstance(indices[i], Value)]
    masked = any(call.is_mask(v) for v in chosen)
    rows: list[int | None] = [None] * (1 if masked else len(_broadcast(chosen)) if chosen else 0)
    first = where[0] if together else 0
    layout = [*(i for i in rest if i < first), *rows, *(i for i in rest if i >= first)]
    for offset, place in enumerate(reversed(layout)):
        j = len(new.axes) - 1 - offset
        if j < 0 or new.axes[j].size == 1:
            continue
        if place is None:
            call.block(new.axes[j], f"{call.operator} sends it to computed positions")
        elif new.axes[j].size == value.axes[place].size:
            axes[place] = target[j] = call.align([(value, place), (new, j)])
            parts = ((value, place), (new, j))
            flags[place] = all(v.zero[k] and call.follows(v.axes[k], axes[place]) for v, k in parts)
    call.gathered([value], axes, joins=True)
    call.gathered([new], target)
    return call.value(axes, flags)


@axis_rule("aten.index_add", "aten.index_copy", "aten.index_fill")
def index_add(call: Call) -> Value:
    """Chosen positions of one axis changed by the rows of a source."""
    value, source = call["self"], call.get("source")
    axis = int(call["dim"]) % max(len(value.axes), 1)
    _chosen(call, value, axis)
    _counted(call, call["index"])
    kept = isinstance(source, Value) or (not isinstance(call.get("value"), Value) and call.get("value", 0) == 0)
    axes, flags = list(value.axes), [kept and z for z in value.zero]
    for i in range(len(axes)):
        if i != axis and isinstance(source, Value):
            axes[i] = call.align([(value, i), (source, i)]) if axes[i].size > 1 else axes[i]
            flags[i] = flags[i] and source.zero[i]
        elif i == axis and isinstance(source, Value):
            call.block(source.axes[i], f"{call.operator} sends it to computed positions")
    if isinstance(source, Value):
        call.gathered([value], axes, joins=True)
        call.gathered([source], [source.axes[i] if i == axis else a for i, a in enumerate(axes)])
    return call.value(axes, [f and i != axis for i, f in enumerate(flags)])


@axis_rule("aten.slice_scatter", "aten.select_scatter")
def slice_scatter(call: Call) -> Value:
    """Part of an axis overwritten, or all of it; the other axes are the same dims."""
    value, new = call["self"], call["src"]
    axis = int(call.get("dim", 0)) % len(value.axes)
    if call.operator == "aten.select_scatter":
        zero = (*new.zero[:axis], True, *new.zero[axis:])
        new = replace(new, axes=(*new.axes[:axis], UNIT, *new.axes[axis:]), zero=zero)
    part = value.axes[axis].size != new.axes[axis].size
    if part and any(call.dims.cuttable(v.axes[axis]) for v in (value, new)):
        return _overwritten(call, value, new, axis)
    axes, flags = [], []
    for i, old in enumerate(value.axes):
        along = old.size > 1 and not (part and i == axis)
        axes.append(call.align([(value, i), (new, i)]) if along else call.dims.fresh(old.size, DimKind.STORED))
        flags.append(along and all(v.zero[i] and call.follows(v.axes[i], axes[i]) for v in (value, new)))
    if part:
        call.block(value.axes[axis], f"{call.operator} overwrites a part of it", _JOIN)
    call.gathered([value], axes, joins=True)
    target = [a for i, a in enumerate(axes) if i != axis] if call.operator == "aten.select_scatter" else axes
    call.gathered([call["src"]], target)
    return call.value(axes, flags)


def _overwritten(call: Call, value: Value, new: Value, axis: int) -> Value:
    """A run of positions of a cut axis overwritten by as many others, which are the same dims."""
    message = f"{call.operator} overwrites a part of it"
    if call.operator == "aten.select_scatter" or call.get("step", 1) != 1:
        return call.block_all(message, _JOIN)[0]
    start, _, _ = slice(call.get("start"), call.get("end")).indices(value.axes[axis].size)
    run = call.sliced(value, axis, start, start + new.axes[axis].size)
    axes = list(value.axes)
    for i in (j for j in range(len(axes)) if run.axes[j].size > 1):
        both = call.align([(run, i), (new, i)])
        if not (call.follows(run.axes[i], both) and call.follows(new.axes[i], both)):
            return call.block_all(message, _JOIN)[0]
    return call.value(axes, [a and b for a, b in zip(value.zero, new.zero, strict=True)])


@resize_rule("aten.slice_scatter")
def resize_slice_scatter(resize: Resize) -> None:
    """Ends move to the number of kept positions before them."""
    if resize.changed(0, resize.axis("dim")):
        resize.bounds("dim", "start", "end", "step")


@axis_rule("aten.embedding_bag")
def embedding_bag(call: Call) -> list[Value]:
    """Sums or means of rows of a table; the columns pass."""
    weight = call["weight"]
    _chosen(call, weight, 0)
    _counted(call, *(call.get(name) for name in ("indices", "offsets", "per_sample_weights")))
    if call.get("mode", 0) == 2:
        return call.block_all(f"{call.operator} takes maxima", "sum or average instead")
    first = call.value([call.fresh()[0], weight.axes[1]], [False, weight.zero[1]])
    return [first, *(call.stored(i) for i in range(1, len(call.outputs)))]


@axis_rule("aten.bincount", "aten.histc")
def counts(call: Call) -> Value:
    """How often each number occurs: of sorted numbers from 0 up, that says where the run of each begins and ends."""
    value = call["self"]
    (result,) = call.block_all(f"{call.operator} counts its elements")
    bins = int(call.get("bins", 100))
    whole = call.operator == "aten.bincount" or (call.get("min", 0), call.get("max", 0)) == (0, bins - 1)
    ordered = value.sorting is not None and value.sorting.order is Order.SORTED
    if whole and ordered and value.sorting is not None and call.get("weights") is None:
        return replace(result, sorting=Sorting(Order.COUNTS, value.sorting.node))
    return result


@axis_rule("aten.one_hot", "aten.bucketize", "aten.searchsorted", "aten.nonzero",
           "aten._unique2", "aten.unique_consecutive", "aten.masked_select", "aten.item",
           "aten._local_scalar_dense", "aten.equal", "aten.isin", "aten.multinomial",
           "aten.nonzero_numpy", "aten.masked_scatter", "aten.unique_dim", "aten.argwhere")  # fmt: skip
def computed(call: Call) -> Value | list[Value]:
    """Something counted or looked up: new, and its inputs cannot be cut."""
    results = call.block_all(f"{call.operator} computes positions from it")
    return results if len(results) > 1 else results[0] if results else []
