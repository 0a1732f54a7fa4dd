"""The plan: which units of each coupling stay. Plain data, self-contained, saved as JSON.

A plan needs neither the graph nor the detection that it came from: each selection carries its members as boxes, and
the plan carries the dense shape of every parameter, so that it can be applied to any later copy of the same model
and refuses any other one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from math import prod
from typing import NoReturn, cast, get_args

import torch
from tabulate import tabulate
from torch import Tensor, nn

from ecospa_fx.budget import elements
from ecospa_fx.coupling.couplings import Box, Coupling, Member, Role, parameter_shapes
from ecospa_fx.errors import PlanError
from ecospa_fx.graph.wrappers import unwrapped

FORMAT = "ecospa-fx-plan"
VERSION = 1


@dataclass(frozen=True, slots=True)
class Selection:
    """What one coupling keeps.

    name, kind, layer, size, carriers, members: as in the coupling; inexact: why removing differs from masking, or "";
    resized: which input or output gets narrower, or "".
    keep: per carrier the kept units, ascending. Every carrier keeps the same number, at least one; in a ragged
    selection each its own, at least one in all.
    """

    name: str
    kind: str
    layer: str
    size: int
    carriers: int
    members: tuple[Member, ...]
    keep: tuple[tuple[int, ...], ...]
    inexact: str = ""
    resized: str = ""

    @classmethod
    def of(cls, coupling: Coupling, keep: Tensor) -> Selection:
        """What stays of a coupling. keep: BoolTensor [carriers, units], True where a unit stays."""
        c, units = coupling, tuple(tuple(row.nonzero().flatten().tolist()) for row in keep)
        told = [note.message if note else "" for note in (c.inexact, c.resized)]
        return cls(c.name, c.kind, c.layer, c.size, c.carriers, c.members, units, *told)

    def __post_init__(self) -> None:
        if self.carriers < 1 or len(self.keep) != self.carriers:
            self._refuse(f"lists kept units for {len(self.keep)} carriers and has {self.carriers}")
        if not any(self.keep):
            self._refuse("keeps no unit at all")
        if self.ragged and (self.inexact or any(m.carrier_axis is not None for m in self.members)):
            self._refuse("keeps different numbers of units in carriers that have to keep the same")
        for units in filter(None, self.keep):
            if units[0] < 0 or units[-1] >= self.size or any(b <= a for a, b in pairwise(units)):
                self._refuse(f"keeps units that are not ascending numbers below {self.size}")
        if not self.members or any((m.carriers, m.units) != (self.carriers, self.size) for m in self.members):
            self._refuse("has no members, or one of another size")

    def _refuse(self, problem: str) -> NoReturn:
        raise PlanError(f"the selection of coupling {self.name!r} {problem}: make the plan anew")

    @property
    def kept(self) -> int:
        """Units that stay, per carrier; the most of any where they differ."""
        return max(len(units) for units in self.keep)

    @property
    def ragged(self) -> bool:
        """Whether carriers keep different numbers of units."""
        return len({len(units) for units in self.keep}) > 1

    @property
    def removed(self) -> Tensor:
        """BoolTensor [carriers, units], True where a unit goes."""
        gone = torch.ones(self.carriers, self.size, dtype=torch.bool)
        for row, units in zip(gone, self.keep, strict=True):
            row[list(units)] = False
        return gone

    def even(self) -> Selection:
        """The same with the first units that go added, until every carrier keeps as many as the fullest."""
        if not self.ragged:
            return self
        rows = []
        for units in self.keep:
            others = sorted(set(range(self.size)).difference(units))
            rows.append(tuple(sorted((*units, *others[: self.kept - len(units)]))))
        return replace(self, keep=tuple(rows))


@dataclass(frozen=True, slots=True, repr=False)
class Plan:
    """What stays of every coupling that was decided on.

    shapes: (name, dense shape) of every parameter of the model, in the order of ``named_parameters()``. Selections
    may overlap (a head and its dimensions): an element stays where every one keeps it.
    """

    selections: tuple[Selection, ...]
    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    def __post_init__(self) -> None:
        shapes, names = dict(self.shapes), [s.name for s in self.selections]
        repeated = next((n for n in names if names.count(n) > 1), None) if len(set(names)) < len(names) else None
        if repeated is not None:
            raise PlanError(f"coupling {repeated!r} is selected twice: make the plan anew")
        for selection in self.selections:
            for member in selection.members:
                _check_member(member, shapes, selection.name)

    def __iter__(self) -> Iterator[Selection]:
        return iter(self.selections)

    def __len__(self) -> int:
        return len(self.selections)

    def __getitem__(self, name: str) -> Selection:
        for selection in self.selections:
            if selection.name == name:
                return selection
        raise KeyError(f"the plan has no selection of coupling {name!r}")

    # -- applying ----------------------------------------------------------------------------------------------

    def check(self, model: nn.Module) -> None:
        """Raise PlanError unless the model has the parameters that the plan was made for."""
        want, have = dict(self.shapes), parameter_shapes(unwrapped(model))
        for name in [*want, *have]:
            if want.get(name) != have.get(name):
                raise PlanError(
                    f"the plan was made for another model: parameter {name!r} is {_told(want.get(name))} in the plan "
                    f"and {_told(have.get(name))} in the model; detect and plan again on this one"
                )

    def factors(self) -> dict[str, elements.Factors]:
        """Kept positions per axis of every parameter that loses elements; see `ecospa_fx.budget.elements`."""
        return elements.keep_factors(dict(self.shapes), self._removals(self.selections))

    def masks(self, model: nn.Module) -> dict[str, Tensor]:
        """BoolTensor of the dense shape, True where an element stays, for every parameter that loses elements.

        Names are those in the module inside of compiling or parallel wrappers. Each is on the parameter's own device,
        or on the CPU for a model on ``meta``. Raises PlanError for another model.
        """
        self.check(model)
        parameters = dict(unwrapped(model).named_parameters())
        found = {}
        for name, factors in self.factors().items():
            weight = parameters[name]
            found[name] = elements.mask(weight.shape, factors, None if weight.is_meta else weight.device)
        return found

    @property
    def ragged(self) -> bool:
        """Whether carriers of some coupling keep different numbers of units."""
        return any(selection.ragged for selection in self)

    def even(self) -> Plan:
        """The plan with enough units added that all carriers of a coupling keep the same number."""
        return replace(self, selections=tuple(s.even() for s in self)) if self.ragged else self

    @property
    def allow(self) -> tuple[str, ...]:
        """What detection must allow for the plan's couplings to be offered."""
        noted = {"renormalise": any(s.inexact for s in self), "cache": any(s.resized for s in self)}
        return tuple(name for name, allowed in noted.items() if allowed)

    @property
    def removed_parameters(self) -> int:
        """Elements that go, each counted once."""
        return elements.removed_elements(dict(self.shapes), self._removals(self.selections))

    @property
    def coupled_parameters(self) -> int:
        """Elements that the selected couplings hold, each counted once."""
        whole = [(s.members, torch.ones(s.carriers, s.size, dtype=torch.bool)) for s in self.selections]
        return elements.removed_elements(dict(self.shapes), whole)

    @staticmethod
    def _removals(selections: Iterable[Selection]) -> Iterator[elements.Removal]:
        return ((s.members, s.removed) for s in selections)

    # -- printing ----------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        return f"Plan({len(self.selections)} couplings, {self._summary()})"

    def __str__(self) -> str:
        if not self.selections:
            return "An empty plan: no coupling was offered, so nothing is removed."
        shapes = dict(self.shapes)
        rows = [
            [
                s.layer,
                s.kind + (" (inexact)" if s.inexact else "") + (" (narrower cache)" if s.resized else ""),
                _width(s),
                f"{elements.removed_elements(shapes, self._removals([s])):,}",
            ]
            for s in self.selections
        ]
        rows.append(["total", "", "", f"{self.removed_parameters:,}"])
        head = ["layer", "kind", "units kept × carriers", "parameters removed"]
        table = tabulate(rows, headers=head, colalign=("left", "left", "right", "right"), disable_numparse=True)
        return f"{table}\n{self._summary()}"

    def _summary(self) -> str:
        gone, held, whole = self.removed_parameters, self.coupled_parameters, sum(prod(s) for _, s in self.shapes)
        return (
            f"removes {gone:,} of {whole:,} parameters ({gone / max(whole, 1):.1%}), "
            f"{gone / max(held, 1):.1%} of what its couplings hold"
        )

    # -- saving ------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """The plan as JSON text; `from_json` gives back an equal plan."""
        return json.dumps(
            {
                "format": FORMAT,
                "version": VERSION,
                "shapes": {name: list(shape) for name, shape in self.shapes},
                "selections": [_fields(s) for s in self.selections],
            }
        )

    @classmethod
    def from_json(cls, text: str | bytes) -> Plan:
        """Read what `to_json` wrote; anything else is refused with a PlanError, and nothing in it is executed."""
        try:
            return _plan(_header(json.loads(text)))
        except PlanError:
            raise
        except KeyError as error:
            raise PlanError(f"this is not a readable plan: field {error} is missing; save the plan again") from error
        except (TypeError, ValueError, RecursionError) as error:
            raise PlanError(f"this is not a readable plan: {error}; save the plan again") from error


def _fields(selection: Selection) -> dict[str, object]:
    """A selection as JSON has it; the lists of kept units, which are long, are not copied."""
    names = ("name", "kind", "layer", "size", "carriers", "keep")
    told = {n: getattr(selection, n) for n in ("inexact", "resized") if getattr(selection, n)}
    return {**{n: getattr(selection, n) for n in names}, "members": [asdict(m) for m in selection.members], **told}


def _width(selection: Selection) -> str:
    least = min(len(units) for units in selection.keep)
    kept = f"{least:,}–{selection.kept:,}" if selection.ragged else f"{selection.kept:,}"
    width = f"{kept}/{selection.size:,}"
    return width if selection.carriers == 1 else f"{width} × {selection.carriers}"


def _told(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else f"of shape {shape}"


# -- checking what a file claims ---------------------------------------------------------------------------------


def _check_member(member: Member, shapes: Mapping[str, tuple[int, ...]], coupling: str) -> None:
    """Raise PlanError where a member points outside its parameter."""
    shape = shapes.get(member.parameter)
    axes = [member.axis, *(() if member.carrier_axis is None else (member.carrier_axis,))]
    if shape is None or len(set(axes)) < len(axes) or not all(0 <= a < len(shape) for a in axes):
        raise PlanError(
            f"coupling {coupling!r} names axes {axes} of parameter {member.parameter!r}, "
            f"which is {_told(shape)}: make the plan anew"
        )
    slices = None if member.carrier_axis is None else shape[member.carrier_axis]
    if not all(_fits(box, member, shape[member.axis]) for box in member.boxes) or slices not in (None, member.carriers):
        raise PlanError(
            f"coupling {coupling!r} has positions outside parameter {member.parameter!r} "
            f"of shape {shape}: make the plan anew"
        )


def _fits(box: Box, member: Member, size: int) -> bool:
    """Whether all positions of a box lie within `size` and are few enough to be distinct."""
    pairs = [*box.carriers, (member.units, box.unit), *box.width]
    if any(n < 1 for n, _ in pairs) or prod(n for n, _ in pairs) > size:
        return False
    if box.carriers and prod(n for n, _ in box.carriers) != member.carriers:
        return False
    reach = [(n - 1) * stride for n, stride in pairs]
    return box.offset + sum(min(r, 0) for r in reach) >= 0 and box.offset + sum(max(r, 0) for r in reach) < size


# -- reading: every field is checked for its type, so that no foreign object gets into a plan ----------------------


def _header(data: object) -> dict[str, object]:
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise PlanError(f"this is not a plan: its format is not {FORMAT!r}; pass what Plan.to_json returned")
    if data.get("version") != VERSION:
        raise PlanError(
            f"the plan has format version {data.get('version')!r} and this library reads version {VERSION}: "
            "read it with the version of ecospa_fx that wrote it"
        )
    return cast("dict[str, object]", data)


def _plan(data: dict[str, object]) -> Plan:
    shapes = tuple((name, _numbers(shape)) for name, shape in _object(data["shapes"]).items())
    return Plan(tuple(_selection(_object(s)) for s in _list(data["selections"])), shapes)


def _selection(data: dict[str, object]) -> Selection:
    return Selection(
        name=_text(data["name"]),
        kind=_text(data["kind"]),
        layer=_text(data["layer"]),
        size=_number(data["size"]),
        carriers=_number(data["carriers"]),
        members=tuple(_member(_object(m)) for m in _list(data["members"])),
        keep=tuple(_numbers(units) for units in _list(data["keep"])),
        inexact=_text(data.get("inexact", "")),
        resized=_text(data.get("resized", "")),
    )


def _member(data: dict[str, object]) -> Member:
    role = _text(data["role"])
    if role not in get_args(Role):
        raise ValueError(f"role {role!r} is unknown")
    return Member(
        parameter=_text(data["parameter"]),
        axis=_number(data["axis"]),
        role=cast(Role, role),
        carrier_axis=None if data["carrier_axis"] is None else _number(data["carrier_axis"]),
        boxes=tuple(_box(_object(box)) for box in _list(data["boxes"])),
        carriers=_number(data["carriers"]),
        units=_number(data["units"]),
    )


def _box(data: dict[str, object]) -> Box:
    return Box(_number(data["offset"]), _pairs(data["carriers"]), _number(data["unit"]), _pairs(data["width"]))


def _pairs(value: object) -> tuple[tuple[int, int], ...]:
    pairs = [_numbers(pair) for pair in _list(value)]
    return tuple((size, stride) for size, stride in pairs)


def _numbers(value: object) -> tuple[int, ...]:
    return tuple(_number(item) for item in _list(value))


def _number(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{value!r:.40} stands where a whole number belongs")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.40} stands where a text belongs")
    return value


def _list(value: object) -> list[object]:
    if not isinstance(value, list):
        raise TypeError(f"{value!r:.40} stands where a list belongs")
    return value


def _object(value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise TypeError(f"{value!r:.40} stands where an object belongs")
    return value
