"""The kind of a coupling, a label for people that `kinds=` and `limits=` reach, from what the walk noted about its dim.

The first line that holds decides. A *product* is a contraction of two activations, see `ecospa_fx.axes.products`; it is
a *mixture* where it sums over places (tokens, windows) rather than over something that the units belong to, as experts
are; it is *used as weights* where its result, whatever happens to it elementwise, mixes something else or is itself
such a mixture that a third activation reads.

=====  ================================================================================================================
residual
       A norm runs over it, and what reads it through weights is added to it again: the width of the stream.
qk     A product sums over it, and is used as weights: rows of query and key. Softmax or not, in either order (linear
       attention contracts keys with values first), also where the query is learnt and no input enters it.
heads  It is a batch of products, or stays from one side of a mixture, and some weight holds it together with a qk dim,
       or with what the mixture mixes: a head, a KV head, the query heads of one shared key.
vo     It stays from one side of a mixture whose other side depends on parameters: rows of value, columns of output.
       Means and pools by fixed weights are no mixtures. Nor is a head what holds no other units.
qk     A product sums over it that is used in some other way (the score of a pair is the result), no weight reads it,
       and neither side is a matrix made for the sample.
ffn    Something nonlinear happens to it, or it is multiplied with another activation: rows of up and gate, columns of
       down. Also where it is normalised on the way: sums over the units, or over their squares, make no qk.
pair   Two weights with nothing of all that in between, as in LoRA; scaling by a vector is nothing.
=====  ================================================================================================================
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ecospa_fx.axes.axis import Axis
from ecospa_fx.axes.findings import Action, Effect, Product
from ecospa_fx.axes.flow import AxisFlow
from ecospa_fx.coupling.residual import residual_dims
from ecospa_fx.coupling.types import RESIDUAL


@dataclass(slots=True)
class _Evidence:
    """What products say about dims."""

    scores: set[int] = field(default_factory=set)
    """Dims that a product which is used as weights sums over."""
    dots: set[int] = field(default_factory=set)
    """Dims that any other product sums over."""
    batches: set[int] = field(default_factory=set)
    """Dims that both sides share."""
    stays: set[int] = field(default_factory=set)
    """Dims of one side alone."""
    mixed: set[int] = field(default_factory=set)
    """Dims of one side of a mixture."""
    opposite: dict[int, set[int]] = field(default_factory=dict)
    """Per dim what the other sides hold."""


class Labels:
    """The kinds of the dims of one graph."""

    def __init__(self, flow: AxisFlow) -> None:
        self._residual = residual_dims(flow)
        self._together, self._outer = _together(flow)
        self._evidence = self._products(flow.record.products)
        self.fixed: dict[int, bool] = {}
        """Dims along which no other basis may be chosen, and whether a function is applied to them."""
        for basis in flow.record.fixed:
            self.fixed[basis.dim] = self.fixed.get(basis.dim, False) or basis.nonlinear

    def kind(self, dim: int, events: Iterable[Effect]) -> str:
        """The label of a dim that these events happen to; see the table above."""
        seen = self._evidence
        actions = {event.action for event in events}
        if dim in self._residual:
            return RESIDUAL
        if dim in seen.scores:
            return "qk"
        if self._is_head(dim):
            return "heads"
        if dim in seen.mixed or dim in seen.batches:
            return "vo"
        if dim in seen.dots and Action.CONTRACTS_PARAMETER not in actions and not self._together.get(dim):
            return "qk"
        nonlinear = self.fixed.get(dim, False) or Action.NONLINEAR in actions
        products = {Action.MULTIPLIED_ACTIVATIONS, Action.CONTRACTS_ACTIVATIONS}
        return "ffn" if nonlinear or actions & products else "pair"

    def _is_head(self, dim: int) -> bool:
        seen, others = self._evidence, self._together.get(dim, set())
        if dim not in seen.batches and dim not in seen.stays:
            return False
        if others & seen.scores:
            return True
        if dim in seen.batches:
            return bool(others & (seen.mixed - seen.batches))
        return bool(self._outer.get(dim, set()) & seen.opposite.get(dim, set()))

    def _products(self, products: Sequence[Product]) -> _Evidence:
        evidence = _Evidence()
        contracted = [_dims(p.contracted) for p in products]
        single = [[_dims(axes) for axes in p.single] for p in products]
        used: dict[int, set[int]] = {}
        for later, product in enumerate(products):
            for source in (s for sources in product.sources for s in sources):
                used.setdefault(source, set()).update(contracted[later])
        for number, product in enumerate(products):
            earlier = {s for sources in product.sources for s in sources}
            for dim in contracted[number]:
                related = self._together.get(dim, set())
                before = any(dim in side and not contracted[s] & related for s in earlier for side in single[s])
                after = number in used and not used[number] & related
                (evidence.scores if before or after else evidence.dots).add(dim)
            evidence.batches |= _dims(product.shared)
            self._mixture(evidence, product, single[number], contracted[number])
        return evidence

    def _mixture(self, evidence: _Evidence, product: Product, single: Sequence[set[int]], over: set[int]) -> None:
        for side, alone in enumerate(single):
            if not any(learnt for i, learnt in enumerate(product.learnt) if i != side):
                continue
            others = set[int]().union(*(s for i, s in enumerate(single) if i != side))
            evidence.stays |= alone
            for dim in alone:
                evidence.opposite.setdefault(dim, set()).update(others)
            evidence.mixed |= {dim for dim in alone if not over & self._together.get(dim, set())}


def _dims(axes: Iterable[Axis]) -> set[int]:
    return {dim for axis in axes for dim in axis.dims}


def _together(flow: AxisFlow) -> tuple[dict[int, set[int]], dict[int, set[int]]]:
    """Per dim those that index the elements of a weight with it on the same side, and of these the ones inside of it.

    Sides are what a weight produces and what it consumes. Parameters that only scale elementwise say nothing.
    """
    summed = set(flow.record.summed)
    together: dict[int, set[int]] = {}
    outer: dict[int, set[int]] = {}
    for name in flow.parameters.keys() & flow.record.bound:
        for order in _orders(flow.parameters[name].axes):
            for i, dim in enumerate(order):
                alike = [d for d in order if d != dim and ((name, d) in summed) == ((name, dim) in summed)]
                together.setdefault(dim, set()).update(alike)
                outer.setdefault(dim, set()).update(set(alike) & set(order[i + 1 :]))
    return together, outer


def _orders(axes: Sequence[Axis]) -> Iterable[list[int]]:
    """The dims of each piece of each axis, outer ones first, with those of all later axes behind them."""
    for i, axis in enumerate(axes):
        others = [d for later in axes[i + 1 :] for d in later.dims]
        for piece in axis.pieces:
            inside = [d for d, _ in piece.dims]
            yield inside
            for other in others:
                for dim in inside:
                    yield [dim, other]
