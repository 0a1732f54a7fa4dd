"""Groups the selections of a plan by the code that computes them: the same coupling in every layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from math import prod
from typing import TypeVar

from torch import nn

from ecospa_fx.coupling.types import Coupling
from ecospa_fx.coupling.unit_elements import kept_sizes
from ecospa_fx.plan import Plan, Selection

Alike = TypeVar("Alike", Coupling, Selection)


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Selections of one role: of parameters of equal names in modules of equal classes, one per layer."""

    selections: tuple[Selection, ...]

    @property
    def parameters(self) -> frozenset[str]:
        """What it cuts."""
        return frozenset(m.parameter for s in self.selections for m in s.members)

    def beneath(self, modules: Iterable[str]) -> list[Selection]:
        """The selections with a member in or under one of some modules."""
        paths = tuple(modules)
        return [s for s in self.selections if any(is_under(m.parameter, path) for m in s.members for path in paths)]


NarrowedAxes = Mapping[tuple[str, int], tuple[int, int]]
"""Old and new size of parameter axes that get smaller, by name of the parameter and axis."""


def is_under(name: str, path: str) -> bool:
    """Whether a parameter or module is in or under a module."""
    return not path or name == path or name.startswith(f"{path}.")


def paths_to(name: str) -> list[str]:
    """A parameter or module, and all modules around it, from the root down."""
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(len(parts) + 1)]


def parameter_scope(path: str, model: nn.Module) -> str:
    """Where the parameters are that a module's integers may be about: in it, or beside it where it holds nothing."""
    module = model.get_submodule(path)
    contents = (*module._modules.values(), *module._parameters.values(), *module._buffers.values())
    empty = all(item is None for item in contents)
    return path.rpartition(".")[0] if empty else path


Role = tuple[type, tuple[str, ...], type | None]
"""What a module is in its layer: its class, the names from the layer to it, and the class of the module around it."""


def role_of(path: str, model: nn.Module) -> Role:
    """What a module is in its layer, the same in every layer."""
    outer, *_ = path.rpartition(".")
    names = takewhile(lambda name: not name.isdigit(), reversed(path.split(".")))
    return type(model.get_submodule(path)), tuple(names), type(model.get_submodule(outer)) if path else None


def group_by_role(selections: Sequence[Selection], model: nn.Module) -> list[Group]:
    """The selections by what the same code computes in other layers."""
    return [Group(tuple(alike)) for alike in alike_in_layers(selections, model)]


def alike_in_layers(items: Sequence[Alike], model: nn.Module) -> list[list[Alike]]:
    """Selections or couplings, those that the same code computes in other layers together."""
    by_role: dict[object, list[Alike]] = {}
    for item in items:
        places = []
        for member in item.members:
            path, _, name = member.parameter.rpartition(".")
            boxes = tuple((len(box.carriers), len(box.width)) for box in member.boxes)
            places.append((role_of(path, model), name, member.axis, boxes))
        by_role.setdefault((item.kind, tuple(places)), []).append(item)
    return list(by_role.values())


def components(groups: Sequence[Group]) -> list[list[Group]]:
    """Groups that cut parameters in common, together."""
    result: list[list[Group]] = []
    for group in groups:
        touching = [c for c in result if any(group.parameters & other.parameters for other in c)]
        result = [c for c in result if c not in touching] + [[*(g for c in touching for g in c), group]]
    return result


def subplan(plan: Plan, groups: Iterable[Group]) -> Plan:
    """The plan of some groups alone."""
    wanted = {s.name for g in groups for s in g.selections}
    return Plan(tuple(s for s in plan if s.name in wanted), plan.shapes)


def narrowed_axes(plan: Plan, model: nn.Module) -> NarrowedAxes:
    """Old and new size of every parameter axis that gets smaller, by all names of the parameter."""
    plan.check(model)
    first, shapes = {id(p): name for name, p in model.named_parameters()}, dict(plan.shapes)
    narrowed = {}
    kept = {name: kept_sizes(shapes[name], factors) for name, factors in plan.factors().items()}
    for alias, parameter in model.named_parameters(remove_duplicate=False):
        for axis, new in enumerate(kept.get(first[id(parameter)], ())):
            if new < parameter.shape[axis]:
                narrowed[alias, axis] = (int(parameter.shape[axis]), new)
    return narrowed


def scaled_count(value: int, selections: Sequence[Sequence[Selection]]) -> int | None:
    """An integer that counts units of some couplings, after they got narrower; None where it does not.

    selections: those of each coupling that the integer may count, one in every layer: they must agree.
    """
    shares = [{(s.size, s.kept) for s in members} for members in selections]
    if any(len(share) != 1 for share in shares):
        return None
    old, new = (prod(next(iter(share))[side] for share in shares) for side in (0, 1))
    return value // old * new if value % old == 0 else None
