"""What couplings are called, how many parameters they hold, and which of them contain which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod

from ecospa_fx.coupling.types import Coupling, LocatedCoupling, Member


def named_couplings(located: Sequence[LocatedCoupling], shapes: Mapping[str, tuple[int, ...]]) -> list[LocatedCoupling]:
    """Couplings with their names, sizes and contents."""
    used: dict[str, int] = {}
    named = []
    for entry in located:
        coupling = entry.coupling
        name = f"{coupling.layer}.{coupling.kind}" if coupling.layer else coupling.kind
        used[name] = used.get(name, 0) + 1
        name = name if used[name] == 1 else f"{name}.{used[name]}"
        named.append(replace(entry, coupling=replace(coupling, name=name, parameters=_elements(coupling, shapes))))
    content = _content(named)
    return [
        replace(e, coupling=replace(e.coupling, contains=content[e.coupling.name])) if e.coupling.name in content else e
        for e in named
    ]


def common_module(parameters: Sequence[str]) -> str:
    """The innermost module that holds all parameters; without the parameter's own module where it is one module."""
    paths = [parameter.split(".")[:-1] for parameter in parameters]
    shared = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def _content(named: Sequence[LocatedCoupling]) -> dict[str, tuple[str, ...]]:
    """Per head coupling the finer couplings that its heads hold: those on the same axes of the same parameters."""
    finer: dict[tuple[str, int], list[str]] = {}
    for coupling in (entry.coupling for entry in named):
        if coupling.blocked is None and coupling.kind != "heads":
            for member in coupling.members:
                finer.setdefault((member.parameter, member.axis), []).append(coupling.name)
    content = {}
    for coupling in (entry.coupling for entry in named):
        if coupling.kind == "heads":
            inside = (name for m in coupling.members for name in finer.get((m.parameter, m.axis), ()))
            content[coupling.name] = tuple(dict.fromkeys(inside))
    return content


def _elements(coupling: Coupling, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Parameter elements that the whole coupling holds."""
    total = 0
    for parameter in dict.fromkeys(member.parameter for member in coupling.members):
        shape = shapes[parameter]
        members = [member for member in coupling.members if member.parameter == parameter]
        left = prod(shape)
        for axis in dict.fromkeys(member.axis for member in members):
            removed = sum(_span(member) for member in members if member.axis == axis)
            left = left // shape[axis] * (shape[axis] - removed)
        total += prod(shape) - left
    return total


def _span(member: Member) -> int:
    """Positions of its axis that a member holds."""
    width = sum(prod(size for size, _ in box.width) for box in member.boxes)
    on_axis = any(box.carriers for box in member.boxes)
    return member.units * width * (member.carriers if on_axis else 1)
