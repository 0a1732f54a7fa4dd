"""Verbs on parts of a model: each is captured by itself, in the names of the whole, and put back into a copy of it.

What is promised of a whole model is promised here too: the model with smaller parts gives what the model with masked
parameters gives. It is checked on the example, because what surrounds a part is the user's own code.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from torch import nn

from ecospa_fx.capture.export import capture
from ecospa_fx.coupling.couplings import Couplings
from ecospa_fx.coupling.detection import detected
from ecospa_fx.coupling.types import Coupling, Refusal
from ecospa_fx.errors import CaptureError, OptionError, PlanError
from ecospa_fx.ir.passes import Pass
from ecospa_fx.origin import origin, remember
from ecospa_fx.plan import Plan, Selection, check_plan
from ecospa_fx.relative_error import relative_error
from ecospa_fx.rewrite import shrunk
from ecospa_fx.runtime.part import Part, checked_paths, parts_of
from ecospa_fx.runtime.put_back import put_back
from ecospa_fx.runtime.restore import restore
from ecospa_fx.trace_check import evaluated, has_values, leaves_of, tolerance_of
from ecospa_fx.verify import masked

OUTSIDE = (
    "the rest of the model reads parameter {name!r} outside of part {path!r}, where it would not be narrower: name a "
    "part that holds every reader, or leave this coupling whole"
)


def detected_in_parts(
    whole: nn.Module,
    part: str | Iterable[str],
    allow: str | Iterable[str],
    args: Sequence[object],
    kwargs: Mapping[str, object],
) -> Couplings:
    """What `detect` returns for parts of a model: the couplings of each, one after the other."""
    of_parts = []
    for each in parts_of(whole, part, args, kwargs):
        program = capture(each.module, each.args, each.kwargs, dynamic=False, whole=whole)
        couplings = detected(program, whole, allow, (args, kwargs))
        of_parts.append(Couplings((_of_part(c, each) for c in couplings), whole, couplings.analysis, couplings.example))
    if len(of_parts) == 1:
        return of_parts[0]
    return Couplings(_apart(of_parts), whole, None, (args, kwargs))


def only_part(
    whole: nn.Module,
    part: str | Iterable[str] | None,
    args: Sequence[object],
    kwargs: Mapping[str, object],
    limit: str,
) -> Part:
    """The part of a path, or the model itself. Raises OptionError for several paths, of which `limit` says why not."""
    if part is None:
        return Part(whole, "", ((tuple(args), dict(kwargs)),))
    paths = checked_paths(whole, part)
    if len(paths) > 1:
        raise OptionError(f"{limit}, and part= names {len(paths)}: name one, and call it again for the next")
    return parts_of(whole, paths, args, kwargs)[0]


def _of_part(coupling: Coupling, part: Part) -> Coupling:
    """The coupling, refused where the rest of the model reads one of its parameters."""
    name = _read_outside(coupling, part)
    if name is None or coupling.blocked is not None:
        return coupling
    message = OUTSIDE.format(name=name, path=part.path)
    return replace(coupling, blocked=Refusal(message, "", "", remedy=message.partition(": ")[2]))


def _read_outside(entry: Coupling | Selection, part: Part) -> str | None:
    return next((m.parameter for m in entry.members if m.parameter in part.outside), None)


def _apart(of_parts: Sequence[Couplings]) -> Iterable[Coupling]:
    """All couplings, with a number in names that parameters of several parts would give twice."""
    used: dict[str, int] = {}
    for coupling in (coupling for couplings in of_parts for coupling in couplings):
        count = used[coupling.name] = used.get(coupling.name, 0) + 1
        yield coupling if count == 1 else replace(coupling, name=f"{coupling.name}.part{count}")


def smaller_in_parts(
    whole: nn.Module,
    plan: Plan,
    part: str | Iterable[str],
    args: Sequence[object],
    kwargs: Mapping[str, object],
    passes: Sequence[Pass] | None = None,
) -> nn.Module:
    """What `shrink` returns for parts of a model: a copy of the whole with smaller parts in it."""
    check_plan(plan)
    plan.check(whole)
    parts = parts_of(whole, part, args, kwargs)
    smaller = []
    for each, share in zip(parts, divided(plan, parts), strict=True):
        program = shrunk(each.module, share, each.args, each.kwargs, passes, compare=True, whole=whole)
        smaller.append((each, restore(program, each.module, each.args, each.kwargs)))
    result = put_back(smaller)
    check_put_back(whole, result, plan, args, kwargs)
    return remember(result, origin(whole, plan, args, kwargs, parts=tuple(each.path for each in parts)))


def divided(plan: Plan, parts: Sequence[Part]) -> list[Plan]:
    """What a plan keeps of each part. Raises PlanError for what is of none of them, or read outside of its part."""
    selections: dict[str, list[Selection]] = {each.path: [] for each in parts}
    names = {each.path: each.names for each in parts}
    for selection in plan:
        holding = [p for p in parts if all(m.parameter in names[p.path] for m in selection.members)]
        if not holding:
            paths = ", ".join(repr(each.path) for each in parts)
            raise PlanError(f"coupling {selection.name!r} of the plan is not of part {paths}: name its part in part=")
        name = _read_outside(selection, holding[0])
        if name is not None and selection.removed.any():
            message = OUTSIDE.format(name=name, path=holding[0].path)
            raise PlanError(f"coupling {selection.name!r} cannot lose a unit: {message}")
        selections[holding[0].path].append(selection)
    return [replace(plan, selections=tuple(selections[each.path])) for each in parts]


def plan_inside(plan: Plan, part: Part) -> Plan:
    """What a plan keeps of a part, in the names that its parameters have there. Raises PlanError: see `divided`."""
    (share,) = divided(plan, [part])
    whole = {id(p): name for name, p in part.whole.named_parameters()}
    names = {whole[id(p)]: name for name, p in part.module.named_parameters()}
    prefix = f"{part.path}."
    selections = [
        replace(
            selection,
            name=selection.name.removeprefix(prefix),
            layer=f"{selection.layer}.".removeprefix(prefix).removesuffix("."),
            members=tuple(replace(m, parameter=names[m.parameter]) for m in selection.members),
        )
        for selection in share
    ]
    shapes = ((name, tuple(p.shape)) for name, p in part.module.named_parameters())
    return Plan(tuple(selections), tuple(shapes))


def check_put_back(
    whole: nn.Module,
    small: nn.Module,
    plan: Plan,
    args: Sequence[object],
    kwargs: Mapping[str, object],
    *,
    exact: bool = True,
) -> None:
    """Raise PlanError where a model with smaller parts does not give, on the example, what the masked model gives.

    Nothing is compared where there are no values, and no numbers where they are random or the plan is inexact. Raises
    CaptureError where the rest of the model cannot work with the smaller parts. exact: False where other weights make
    up for what is removed, so that numbers differ.
    """
    if not has_values(whole, args, kwargs):
        return
    kind = type(whole).__name__
    with evaluated(whole) as devices, evaluated(small), masked(whole, plan):
        want = leaves_of(whole, args, kwargs, devices)
        try:
            got = leaves_of(small, args, kwargs, devices)
        except Exception as error:  # whatever the model's own code raises
            first = next(iter(str(error).splitlines()), type(error).__name__)
            raise CaptureError(
                f"{kind} does not run with a graph in place of its part: {first.rstrip('.')}; name another part, such "
                "as one inside it or around it"
            ) from error
        difference, limit = relative_error(got, want), tolerance_of(want)
        differs = difference > limit and exact and not plan.allow
        random = differs and relative_error(leaves_of(whole, args, kwargs, devices, seed=1), want) > limit
    if len(got) != len(want) or (differs and not random):
        raise PlanError(
            f"{kind} with the smaller part does not give on the example what masking gives (relative error "
            f"{difference:.1e}), as where it reads what is inside the part by hooks or attributes: leave out of the "
            "call what it would read, such as hidden states, or name a part around the reader"
        )
