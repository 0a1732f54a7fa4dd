"""Products of activations: what the walk notes about dims where tensors that depend on parameters are contracted.

Labels of couplings (see `ecospa_fx.coupling.labels`) are derived from these facts. A product here is a contraction of
at least two *activations*. A weight is none, nor is a matrix of it that computed indices pick for each sample; what is
made of weights alone by contracting them (a learned query times its projection) is one. A tensor that is multiplied
with itself position by position, or summed, as normalisations do, is no product.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

from ecospa_fx.axes.dims import Axis, DimKind
from ecospa_fx.axes.findings import Action, Contraction, Descent, Product, Value

if TYPE_CHECKING:
    from ecospa_fx.axes.call import Call

Labels = Sequence[Sequence[Hashable]]


def descent_of(values: Sequence[Value]) -> Descent:
    """What a tensor descends from that is computed from others without contracting them with a weight."""
    pure = all(v.weights for v in values)
    return Descent(
        learnt=_learnt(values),
        picked=any(v.descent.picked for v in values),
        combined=pure and any(v.descent.combined for v in values),
        products=frozenset[int]().union(*(v.descent.products for v in values)),
    )


def picked_from(call: Call, source: Value, left: Sequence[Axis]) -> Descent:
    """What descends from `source` by computed indices: matrices of a parameter where two of its dims are `left`."""
    descent = descent_of([source])
    dims = {d for axis in left for d in call.dims.dims_of(axis) if call.dims.origins[d] is DimKind.PARAMETER}
    picked = descent.picked or (bool(source.weights) and len(dims) > 1)
    return Descent(descent.learnt, picked, products=descent.products)


def factors_of(call: Call, operands: Sequence[Value]) -> tuple[Value, ...]:
    """The factors of an elementwise product of activations, before they are aligned; none where it is a square."""
    if len(operands) != 2 or not all(map(_is_activation, operands)):
        return ()
    rank = max(len(v.axes) for v in operands)
    labels = [list(range(rank - len(v.axes), rank)) for v in operands]
    return () if _same(call, operands, labels) else tuple(operands)


def note_product(call: Call, operands: Sequence[Value], labels: Labels, out: Sequence[Hashable], same: bool) -> Descent:
    """Record the product of activations that a contraction holds, if any; what the result descends from.

    same: what `squares` said before the operands' axes were tied.
    """
    activations = [i for i, v in enumerate(operands) if _is_activation(v)]
    holders, contracted = _product(operands, labels, out, activations)
    if len(activations) < 2 or not contracted or same:
        return _contracted(operands, activations)
    axes = _axes(operands, labels)
    single = tuple(tuple(a for n, by in holders.items() if by == {i} for a in axes[n]) for i in activations)
    shared = tuple(a for n, by in holders.items() if by == set(activations) for a in axes[n])
    learnt = tuple(_learnt([operands[i]]) for i in activations)
    sources = tuple(operands[i].descent.products for i in activations)
    record = call.record.products
    record.append(Product(tuple(a for n in contracted for a in axes[n]), shared, single, learnt, sources))
    return Descent(learnt=_learnt(operands), products=frozenset([len(record) - 1]))


def _product(
    operands: Sequence[Value], labels: Labels, out: Sequence[Hashable], activations: Sequence[int]
) -> tuple[dict[Hashable, set[int]], list[Hashable]]:
    """(per label that stays, the activations that have it; the labels that several are contracted over).

    Where activations meet only through their weights, as in x · W_q · W_k · y, each is taken with its weight.
    """
    weights = [set(labels[j]) for j in range(len(operands)) if j not in activations]
    holders: dict[Hashable, set[int]] = {}
    for i in activations:
        for name, axis in zip(labels[i], operands[i].axes, strict=True):
            if axis.size > 1:
                holders.setdefault(name, set()).add(i)
    inside = {n for names in weights for n in names}
    direct = [n for n, by in holders.items() if n not in out and n not in inside and len(by) > 1]
    if direct:
        return {n: by for n, by in holders.items() if n not in direct}, direct
    fed = {n for n, by in holders.items() if n in inside and n not in out and len(by) == 1}
    joined = {n: set(by) for n, by in holders.items() if n not in fed}
    for names in weights:
        owners = {i for n in names & fed for i in holders[n]}
        for name in names - holders.keys() if len(owners) == 1 else ():
            joined.setdefault(name, set()).update(owners)
    through = [n for n, by in joined.items() if n not in out and n not in holders and len(by) > 1]
    return {n: by for n, by in joined.items() if n not in through}, through


def squares(call: Call, operands: Sequence[Value], labels: Labels) -> bool:
    """Whether activations are multiplied place by place with what has the same positions of the same weights."""
    activations = [i for i, v in enumerate(operands) if _is_activation(v)]
    return _same(call, [operands[i] for i in activations], [labels[i] for i in activations])


def events_of(call: Call, operands: Sequence[Value], labels: Labels, out: Sequence[Hashable]) -> None:
    """Note which dims are batches of a product of activations, stay from one of them alone, or are multiplied."""
    computed = [i for i, v in enumerate(operands) if not v.weights and not v.descent.picked]
    after = {*out, *(n for i in range(len(operands)) if i not in computed for n in labels[i])}
    by_label = _axes([operands[i] for i in computed], [labels[i] for i in computed])
    summed = any(name not in after and len(axes) > 1 for name, axes in by_label.items())
    for name, axes in by_label.items() if len(computed) > 1 else ():
        if name in after and len(axes) < len(computed):
            call.note(axes, Action.AVERAGED)
        elif name in after:
            call.note(axes, Action.BATCHED if summed else Action.MULTIPLIED_ACTIVATIONS)


def note_sum(call: Call, value: Value, over: Sequence[int], *, divided: bool = False) -> None:
    """Note a sum over some axes of a value: of an elementwise product of activations it is a contraction.

    divided: whether it is divided by the number of positions.
    """
    rank = len(value.axes)
    labels = [range(rank - len(v.axes), rank) for v in value.factors]
    for i in over:
        wide = sum(i in axes and v.axes[i - axes[0]].size > 1 for v, axes in zip(value.factors, labels, strict=True))
        call.note(value.axes[i], Action.CONTRACTS_ACTIVATIONS if wide > 1 else Action.CONTRACTS_ONES)
        if divided:
            call.averages(value, i, call.operator)
        else:
            call.needs_zero(value, i)
    if value.factors:
        out = [i for i in range(rank) if i not in over]
        events_of(call, value.factors, labels, out)
        call.descent = note_product(call, value.factors, labels, out, same=False)


def note_sides(call: Call, entries: Sequence[tuple[Value, int]], weights: int, apart: bool) -> None:
    """Which parameters are consumers here: weights that an activation meets, or what made the second operand.

    apart: whether the two sides were different dims before. What turns one side must turn the other back.
    """
    record = call.record
    makers = []
    for value, index in entries:
        dims, names = call.dims.dims_of(value.axes[index]), value.weights or value.makers * value.descent.picked
        record.summed += [(name, dim) for dim in dims for name in names]
        record.consumed += [(name, dim) for dim in dims for name in names if weights < len(entries)]
        makers.append(names or value.makers)
    for value, index in entries[1:] if not weights else ():
        dims = call.dims.dims_of(value.axes[index])
        record.consumed += [(w, d) for d in dims for w in value.makers if w not in entries[0][0].makers]
    dims = call.dims.dims_of(entries[0][0].axes[entries[0][1]]) if len(makers) == 2 else ()
    record.contractions += [Contraction(dim, makers[0], makers[1], apart) for dim in dims]


def _learnt(values: Sequence[Value]) -> bool:
    return any(v.descent.learnt or v.weights for v in values)


def _is_activation(value: Value) -> bool:
    return not value.descent.picked and (not value.weights or value.descent.combined)


def _contracted(operands: Sequence[Value], activations: Sequence[int]) -> Descent:
    """What the result of a contraction descends from that is no product of activations."""
    learnt = _learnt(operands)
    if all(v.weights for v in operands):
        return Descent(learnt=True, combined=True)
    weighed = any(v.weights or v.descent.picked for v in operands)
    return Descent(learnt=learnt) if weighed else descent_of([operands[i] for i in activations])


def _axes(operands: Sequence[Value], labels: Labels) -> dict[Hashable, list[Axis]]:
    """The axes of each label, broadcast ones left out."""
    result: dict[Hashable, list[Axis]] = {}
    for value, names in zip(operands, labels, strict=True):
        for name, axis in zip(names, value.axes, strict=True):
            result.setdefault(name, []).extend([axis] if axis.size > 1 else [])
    return result


def _same(call: Call, operands: Sequence[Value], labels: Labels) -> bool:
    """Whether all operands have the same axes, position by position: none has a wide axis of its own."""
    shapes = [
        {n: call.dims.resolve(a) for n, a in zip(names, v.axes, strict=True) if a.size > 1}
        for v, names in zip(operands, labels, strict=True)
    ]
    return bool(shapes) and all(shape == shapes[0] for shape in shapes[1:])
