"""Shrinks the user's own module in place: parameters are cut and the integers of its code follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import nn

from ecospa_fx.coupling.types import BLOCK
from ecospa_fx.errors import PlanError
from ecospa_fx.inplace.buffers import EditTarget
from ecospa_fx.inplace.calls import TrialCall
from ecospa_fx.inplace.configuration import config_attributes, constructor_differences, search_configuration
from ecospa_fx.inplace.edits import Edits
from ecospa_fx.inplace.equivalence import (
    ROUNDED_TOLERANCE,
    EquivalenceCheck,
    all_close,
    changed_buffers,
    output_tensors,
)
from ecospa_fx.inplace.groups import Group, components, group_by_role
from ecospa_fx.inplace.integer_search import candidate_targets, is_equivalent, search_integers
from ecospa_fx.inplace.serialise import integers_to_json
from ecospa_fx.inplace.stale_configuration import warn_of_stale
from ecospa_fx.inplace.trial import apply_edit, edited
from ecospa_fx.inplace.unread_integers import infer_integers
from ecospa_fx.module_modes import modes_restored, set_mode
from ecospa_fx.origin import ATTRIBUTE, origin, remember
from ecospa_fx.parts import only_part, plan_inside
from ecospa_fx.plan import Plan, check_plan
from ecospa_fx.rewrite import smaller
from ecospa_fx.runtime.guards import leaves_untouched
from ecospa_fx.runtime.lift_parameters import check_call
from ecospa_fx.runtime.part import Call, Part
from ecospa_fx.snapshot import untouched
from ecospa_fx.verify import masked
from ecospa_fx.wrappers import unwrapped

Model = TypeVar("Model", bound=nn.Module)
USER_MODEL_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
"""Of the user's own module and weights; in shorter types 0.1: that the edit is right is proven on the copy."""


@leaves_untouched(calls=False)
def shrink_(
    model: Model,
    plan: Plan,
    args: Sequence[object] = (),
    kwargs: Mapping[str, object] | None = None,
    *,
    part: str | None = None,
) -> Model:
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
        part: path of the module inside the model that the plan is of, by default None, the whole. The trials are on the
            part alone, and the whole with it must give on the example what the masked whole gives.

    Returns:
        The same model.

    Raises:
        InputError, OptionError: ``part`` names no module, or several.
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
    inside = unwrapped(model, resizing=PlanError)
    if part is None:
        write_back(inside, plan, args, kwargs)
    else:
        plan.check(inside)
        example = tuple(args), dict(kwargs or {})
        _write_part(inside, plan, only_part(inside, part, *example, "shrink_() writes one part at a time"), example)
    return model


def _write_part(whole: nn.Module, plan: Plan, part: Part, example: Call) -> None:
    """Write a plan into a part of a model; both are as they were where anything fails."""
    call, inner = TrialCall(*example), plan_inside(plan, part)
    with modes_restored(whole), masked(whole, plan), untouched(whole):
        set_mode(False, whole)
        want = None if plan.allow else output_tensors(whole, call)

    def confirm(check: EquivalenceCheck) -> None:
        with modes_restored(whole):
            set_mode(False, whole)
            try:
                if want is not None:
                    _check_outputs(whole, call, want, "masking gives", check)
                else:
                    output_tensors(whole, call)
            except PlanError:
                raise
            except Exception as error:  # whatever the code around the part raises
                raise PlanError(
                    f"{type(whole).__name__} does not run with a narrower part {part.path!r}, so nothing is written "
                    f"back: {error}"
                ) from error

    write_back(part.module, inner, part.args, part.kwargs, confirm=confirm)
    vars(part.module).pop(ATTRIBUTE, None)
    again = vars(whole).pop(ATTRIBUTE, None) is not None
    if not again:
        remember(whole, origin(whole, plan, *example, parts=(part.path,)))


def write_back(
    inside: nn.Module,
    plan: Plan,
    args: Sequence[object] = (),
    kwargs: Mapping[str, object] | None = None,
    result: nn.Module | None = None,
    confirm: Callable[[EquivalenceCheck], None] | None = None,
) -> None:
    """Write a plan into a module, which is as it was where anything fails.

    confirm: raises PlanError where what is written does not do in the module's surroundings. result: a graph of what
    the plan leaves whose weights are to be the module's: that the module with them gives what the graph gives is
    checked, too, in the copy and in the module itself.
    """
    kwargs = dict(kwargs or {})
    plan.check(inside)
    check = EquivalenceCheck(inside, args, kwargs)
    values = verified_integers(check, plan)
    if result is not None:
        _check_weights(check, plan, values, dict(result.named_parameters()))
    source = replace(origin(inside, plan, args, kwargs), integers=integers_to_json(values))
    again = hasattr(inside, ATTRIBUTE)
    _write(inside, plan, values, TrialCall(tuple(args), kwargs), check, result, confirm)
    if again:
        delattr(inside, ATTRIBUTE)  # it is no longer what one plan makes of the original
    else:
        remember(inside, source)


def check_expressible(
    model: nn.Module, plan: Plan, args: Sequence[object] = (), kwargs: Mapping[str, object] | None = None
) -> None:
    """Raise PlanError where `write_back` would refuse a plan; the model itself is only read."""
    plan.check(model)
    verified_integers(EquivalenceCheck(model, args, dict(kwargs or {})), plan)


def verified_integers(check: EquivalenceCheck, plan: Plan) -> dict[EditTarget, int]:
    """Every integer that follows a plan, verified together against masking and the rewritten graph."""
    dropped = next((s.name for s in plan if s.kind == BLOCK and not s.kept), None)
    if dropped is not None:
        raise PlanError(
            f"coupling {dropped!r} is a whole block, which is not taken out of a module's own code: use "
            "ecospa_fx.shrink, or plan with widths alone"
        )
    if plan.ragged:
        name = next(s.name for s in plan if s.ragged)
        raise PlanError(
            f"coupling {name!r} is ragged, which no width of a module can say: use ecospa_fx.shrink, or plan with "
            "allocation='global'"
        )
    groups = group_by_role([s for s in plan if s.kept < s.size], check.model)
    values = search_by_component(check, plan, groups)
    following = infer_integers(check, plan, groups, values)
    values = {**following.unread, **values}
    more: dict[EditTarget, int] = {**following.unverified, **values}
    if more != values and is_equivalent(check, plan, more, check.reference(plan)):
        values = more
    values = _with_configuration(check, plan, groups, values) or values
    _check_against_graph(check, plan, values)
    return values


def _check_against_graph(check: EquivalenceCheck, plan: Plan, values: dict[EditTarget, int]) -> None:
    """Raise PlanError where the edited module and the rewritten graph differ in a call that the graph is right for."""
    reference = check.graph_reference(plan)
    if is_equivalent(check, plan, values, reference):
        return
    if not is_equivalent(check, plan, values, check.graph_reference(plan, check.traced())):
        raise PlanError(
            "the module with narrower weights and the rewritten graph differ, so nothing is written back: use "
            "ecospa_fx.shrink"
        )


def _check_weights(
    check: EquivalenceCheck, plan: Plan, values: Mapping[EditTarget, int], weights: Mapping[str, torch.Tensor]
) -> None:
    """Raise PlanError where the edited module and the rewritten graph differ with some weights."""
    reference, edits = check.graph_reference(plan, check.traced(), weights), Edits()
    with edited(check.model, plan, values, reference.buffers):
        try:
            edits.weights(check.model, weights)
            equal = check.gives(reference.first)
        finally:
            edits.undo()
    if not equal:
        raise PlanError(
            "the module with the compressed weights does not give what the compressed graph gives, so nothing is "
            "written back: use ecospa_fx.compress"
        )


def search_by_component(check: EquivalenceCheck, plan: Plan, groups: Sequence[Group]) -> dict[EditTarget, int]:
    """The integers that must follow a plan, searched per component and verified together.

    Groups that cut the same parameters are one component; so are groups that the same integer counts, where no edit
    fits one of them alone.
    """
    values: dict[EditTarget, int] = {}
    everything = components(groups)
    parts = list(everything)
    while parts:
        first = parts.pop(0)
        try:
            values.update(search_integers(check, plan, first))
        except PlanError:
            sharing = components_sharing_integers(check, plan, first, everything)
            if len(sharing) == 1:
                raise
            values.update(search_integers(check, plan, [group for component in sharing for group in component]))
            parts = [component for component in parts if all(component is not other for other in sharing)]
    if len(groups) < 2 or is_equivalent(check, plan, values, check.reference(plan)):
        return values
    return search_integers(check, plan, groups)


def components_sharing_integers(
    check: EquivalenceCheck, plan: Plan, first: list[Group], parts: Sequence[list[Group]]
) -> list[list[Group]]:
    """The components that the same integers count as the first one, which is among them."""
    places = candidate_targets(check, plan, first)
    return [first, *(other for other in parts if other is not first and places & candidate_targets(check, plan, other))]


def _with_configuration(
    check: EquivalenceCheck, plan: Plan, groups: Sequence[Group], values: dict[EditTarget, int]
) -> dict[EditTarget, int] | None:
    """The integers with those of a configuration that follows, and all that its constructor sets."""
    for name in config_attributes(check.model):
        integers_to_json = search_configuration(check, plan, groups, name)
        if integers_to_json is not None:
            everything = {**values, **integers_to_json.values}
            with edited(check.model, plan, everything, check.reference(plan).buffers):
                return everything | constructor_differences(integers_to_json.model, check.model)
    return None


# -- the user's own module ---------------------------------------------------------------------------------------


def _write(
    model: nn.Module,
    plan: Plan,
    values: Mapping[EditTarget, int],
    call: TrialCall,
    check: EquivalenceCheck,
    result: nn.Module | None,
    confirm: Callable[[EquivalenceCheck], None] | None = None,
) -> None:
    """Edit the user's module and run it; whatever happens before all is done, it is as it was."""
    edits = Edits()
    with modes_restored(model):
        set_mode(False, model)
        want = None
        if not plan.allow:
            with masked(model, plan), untouched(model):
                want = output_tensors(model, call)
        try:
            apply_edit(model, plan, values, _buffers(model, plan, check), edits)
            if want is not None:
                _check_outputs(model, call, want, "masking gives", check)
            if result is not None:
                edits.weights(model, dict(result.named_parameters()))
                if not plan.allow:
                    with modes_restored(result), untouched(result):
                        set_mode(False, result)
                        want = output_tensors(result, call)
                    _check_outputs(model, call, want, "the compressed graph gives", check)
            if confirm is not None:
                confirm(check)
            warn_of_stale(model, check.model, plan, config_attributes(check.model))
        except BaseException:
            edits.undo()
            raise


def _check_outputs(
    model: nn.Module, call: TrialCall, want: Sequence[torch.Tensor], gives: str, check: EquivalenceCheck
) -> None:
    with untouched(model):
        got = output_tensors(model, call)
    dtype = min((t.dtype for t in want), key=lambda d: d.itemsize, default=torch.float64)
    rounded = min(check.tolerance, ROUNDED_TOLERANCE)  # code of a float64 model may compute in shorter types
    if not all_close(got, want, max(USER_MODEL_TOLERANCE.get(dtype, 0.1), rounded)):
        raise PlanError(
            f"{type(model).__name__} with narrower weights does not give what {gives}, though a copy of it does, so "
            "nothing is written back: use ecospa_fx.shrink"
        )


def _buffers(model: nn.Module, plan: Plan, check: EquivalenceCheck) -> dict[str, torch.Tensor]:
    """The buffers that got narrower or hold another order, with what the user's own model has in them."""
    if not check.program.state and not check.holds_orders:
        return {}
    example = check.calls[0]
    return changed_buffers(model, smaller(model, plan, example.args, example.kwargs))
