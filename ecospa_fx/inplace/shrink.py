"""A plan written back into the user's own module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from ecospa_fx.errors import PlanError
from ecospa_fx.inplace.buffers import Spot
from ecospa_fx.inplace.calls import TrialCall
from ecospa_fx.inplace.configuration import builders, configured, told_by
from ecospa_fx.inplace.edits import Edits
from ecospa_fx.inplace.equivalence import EquivalenceCheck, equal, numbers
from ecospa_fx.inplace.groups import Group, components, grouped
from ecospa_fx.inplace.integer_search import counted, solve
from ecospa_fx.inplace.serialise import told
from ecospa_fx.inplace.stale_configuration import warn_of_stale
from ecospa_fx.inplace.trial import apply, edited
from ecospa_fx.inplace.unread_integers import described
from ecospa_fx.origin import ATTRIBUTE, origin, remember
from ecospa_fx.plan import Plan, check_plan
from ecospa_fx.rewrite import smaller
from ecospa_fx.runtime.guards import leaves_untouched
from ecospa_fx.runtime.lift_parameters import check_call
from ecospa_fx.snapshot import untouched
from ecospa_fx.verify import masked
from ecospa_fx.wrappers import unwrapped

Model = TypeVar("Model", bound=nn.Module)
OWN_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
"""Of the user's own module and weights; in shorter types 0.1: that the edit is right is proven on the copy."""


@leaves_untouched(calls=False)
def shrink_(model: Model, plan: Plan, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Model:
    """Make a model smaller in place: its parameters, and the integers and tables of its modules that must follow.

    Classes, methods, hooks, modes and Parameter objects stay, so that generation with caches, adapters, trainers and
    saving go on working. Gradients are cut along; an optimizer must be made anew. A model inside of ``torch.compile``
    is edited inside it.

    Which attributes follow is found by trying, and proven on a copy, in float64 where the model runs in it: the edited
    module equals the masked one and the rewritten graph, for the example, for other sizes and with its flags the other
    way round. Where all layers got equal widths and the model's configuration can say so, the configuration follows,
    and a model built from it with these weights is equal too. Where it cannot, a warning names its fields.

    Args:
        model: the ``nn.Module`` that the plan was made for; it is changed.
        plan: a `Plan` in which all carriers of a coupling keep the same number of units. The option
            expressible_in="module" of the verb `plan` makes one that can be written back.
        args: tuple of positional example inputs, by default ().
        kwargs: mapping of example inputs by name, by default none.

    Returns:
        The same model.

    Raises:
        PlanError: the plan was made for another model, or it cannot be proven that the edited module is right. The
            model is then exactly as it was.
        CaptureError: the model cannot be traced with these inputs.

    Examples:
        >>> import torch, ecospa_fx as eco
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 8))
        >>> x = torch.randn(2, 8)
        >>> eco.shrink_(mlp, eco.plan(eco.detect(mlp, (x,)), ratio=0.5, scores="magnitude"), (x,))[0]
        Linear(in_features=8, out_features=16, bias=True)

        Again, to a quarter of the first width:

        >>> plan = eco.plan(eco.detect(mlp, (x,)), scores="magnitude", widths={"ffn": 8})
        >>> eco.shrink_(mlp, plan, (x,))[2]
        Linear(in_features=8, out_features=8, bias=True)

        A model of transformers, with widths that its configuration can say:

        >>> plan = eco.plan(couplings, 0.3, scores, expressible_in="module", allocation="uniform")  # doctest: +SKIP
        >>> eco.shrink_(model, plan, (ids,)).save_pretrained(folder)  # doctest: +SKIP
    """
    check_call(model, args, kwargs, PlanError)
    check_plan(plan)
    kwargs, inside = dict(kwargs or {}), unwrapped(model, resizing=PlanError)
    plan.check(inside)
    bench = EquivalenceCheck(inside, args, kwargs)
    values = proven(bench, plan)
    known, again = replace(origin(inside, plan, args, kwargs), integers=told(values)), hasattr(inside, ATTRIBUTE)
    _write(inside, plan, values, TrialCall(tuple(args), kwargs), bench)
    warn_of_stale(inside, bench.model, plan, builders(bench.model))
    if again:
        delattr(inside, ATTRIBUTE)  # it is no longer what one plan makes of the original
        return model
    remember(inside, known)
    return model


def proven(bench: EquivalenceCheck, plan: Plan) -> dict[Spot, int]:
    """Every integer that follows a plan, proven together against masking and the rewritten graph."""
    if plan.ragged:
        name = next(s.name for s in plan if s.ragged)
        raise PlanError(
            f"coupling {name!r} is ragged, which no width of a module can say: use ecospa_fx.shrink, or plan with "
            "allocation='global'"
        )
    groups = grouped([s for s in plan if s.kept < s.size], bench.model)
    values = solved(bench, plan, groups)
    following = described(bench, plan, groups, values)
    values = {**following.unread, **values}
    more: dict[Spot, int] = {**following.other, **values}
    if more != values and _equals(bench, plan, more, bench.reference(plan)):
        values = more
    values = _with_configuration(bench, plan, groups, values) or values
    _check_against_graph(bench, plan, values)
    return values


def _check_against_graph(bench: EquivalenceCheck, plan: Plan, values: Mapping[Spot, int]) -> None:
    """Raise PlanError where the edited module and the rewritten graph differ in a call that the graph is right for."""
    reference = bench.graph_reference(plan)
    if _equals(bench, plan, values, reference):
        return
    if not _equals(bench, plan, values, bench.graph_reference(plan, bench.traced())):
        raise PlanError(
            "the module with narrower weights and the rewritten graph differ, so nothing is written back: use "
            "ecospa_fx.shrink"
        )


def solved(bench: EquivalenceCheck, plan: Plan, groups: Sequence[Group]) -> dict[Spot, int]:
    """The integers that must follow a plan, found part by part and proven together.

    What cuts the same parameters is one part; so is what the same integer counts, where one part alone finds none.
    """
    values: dict[Spot, int] = {}
    everything = components(groups)
    parts = list(everything)
    while parts:
        first = parts.pop(0)
        try:
            values.update(solve(bench, plan, first))
        except PlanError:
            sharing = sharers(bench, plan, first, everything)
            if len(sharing) == 1:
                raise
            values.update(solve(bench, plan, [group for component in sharing for group in component]))
            parts = [component for component in parts if all(component is not other for other in sharing)]
    if len(groups) < 2 or _equals(bench, plan, values, bench.reference(plan)):
        return values
    return solve(bench, plan, groups)


def sharers(bench: EquivalenceCheck, plan: Plan, first: list[Group], parts: Sequence[list[Group]]) -> list[list[Group]]:
    """The parts that count the same integers as the first one, which is among them."""
    places = counted(bench, plan, first)
    return [first, *(other for other in parts if other is not first and places & counted(bench, plan, other))]


def _equals(bench: EquivalenceCheck, plan: Plan, values: Mapping[Spot, int], reference: Any) -> bool:
    with edited(bench.model, plan, values, reference.buffers):
        return bench.equals(reference)


def _with_configuration(
    bench: EquivalenceCheck, plan: Plan, groups: Sequence[Group], values: dict[Spot, int]
) -> dict[Spot, int] | None:
    """The integers with those of a configuration that follows, and all that its constructor sets."""
    for name in builders(bench.model):
        told = configured(bench, plan, groups, name)
        if told is not None:
            everything = {**values, **told.values}
            with edited(bench.model, plan, everything, bench.reference(plan).buffers):
                return everything | told_by(told.model, bench.model)
    return None


# -- the user's own module ---------------------------------------------------------------------------------------


def _write(model: nn.Module, plan: Plan, values: Mapping[Spot, int], call: TrialCall, bench: EquivalenceCheck) -> None:
    """Edit the user's module and run it; whatever happens before it has run, it is as it was."""
    edits = Edits()
    with _evaluating(model):
        want = None
        if not plan.allow:
            with masked(model, plan), untouched(model):
                want = numbers(model, call)
        try:
            apply(model, plan, values, _buffers(model, plan, bench), edits)
            if want is not None:
                with untouched(model):
                    got = numbers(model, call)
                dtype = min((t.dtype for t in want), key=lambda d: d.itemsize, default=torch.float64)
                if not equal(got, want, OWN_TOLERANCE.get(dtype, 0.1)):
                    raise PlanError(
                        f"{type(model).__name__} with narrower weights does not give what masking gives, though a copy "
                        "of it does, so nothing is written back: use ecospa_fx.shrink"
                    )
        except BaseException:
            edits.undo()
            raise


def _buffers(model: nn.Module, plan: Plan, bench: EquivalenceCheck) -> dict[str, torch.Tensor]:
    """The buffers that got narrower, with what the user's own model has in them."""
    if not bench.program.state:
        return {}

    example = bench.calls[0]
    small, dense = smaller(model, plan, example.args, example.kwargs), dict(model.named_buffers())
    return {n: t for n, t in small.named_buffers() if n in dense and t.shape != dense[n].shape}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode inside, and in its own mode outside."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode
