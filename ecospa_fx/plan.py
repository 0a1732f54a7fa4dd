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
from typing import NoReturn

import torch
from tabulate import tabulate
from torch import Tensor, nn

from ecospa_fx.coupling import unit_elements
from ecospa_fx.coupling.choice import near_names
from ecospa_fx.coupling.couplings import Couplings, check_couplings, parameter_shapes
from ecospa_fx.coupling.masks import check_mask, keep_mask
from ecospa_fx.coupling.members import check_member, shape_text
from ecospa_fx.coupling.types import BLOCK, Coupling, Member
from ecospa_fx.errors import PlanError
from ecospa_fx.notebook import html_paragraph, html_table
from ecospa_fx.strict_json import from_plain
from ecospa_fx.wrappers import unwrapped

FORMAT = "ecospa-fx-plan"
VERSION = 1

EMPTY = "An empty plan: nothing is removed."
HEAD = ("layer", "kind", "units kept × carriers", "parameters removed")
ALIGN = ("left", "left", "right", "right")


@dataclass(frozen=True, slots=True)
class Selection:
    """What one coupling keeps."""

    name: str
    """The coupling's name."""
    kind: str
    """The coupling's kind."""
    layer: str
    """The innermost module that holds the coupling."""
    size: int
    """Units per carrier in the dense model."""
    carriers: int
    """How many times the choice may differ."""
    members: tuple[Member, ...]
    """Where the units lie in parameters."""
    keep: tuple[tuple[int, ...], ...]
    """Per carrier the units that stay, ascending: the same number in each, at least one; in a ragged selection each
    its own, at least one in all."""
    inexact: str = ""
    """Why removing differs from masking, or ""."""
    resized: str = ""
    """Which input or output gets narrower, or ""."""

    @classmethod
    def of(cls, coupling: Coupling, keep: Tensor) -> Selection:
        """What stays of a coupling. keep: BoolTensor [carriers, units], True where a unit stays, else PlanError."""
        c, units = coupling, tuple(tuple(row.nonzero().flatten().tolist()) for row in check_mask(coupling, keep))
        notes = [note.message if note else "" for note in (c.inexact, c.resized)]
        return cls(c.name, c.kind, c.layer, c.size, c.carriers, c.members, units, *notes)

    def __post_init__(self) -> None:
        if not all(isinstance(units, tuple) and all(type(u) is int for u in units) for units in self.keep):
            self._refuse("lists what it keeps as something else than tuples of whole numbers")
        if self.carriers < 1 or len(self.keep) != self.carriers:
            self._refuse(f"lists kept units for {len(self.keep)} carriers and has {self.carriers}")
        if not any(self.keep) and self.kind != BLOCK:
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
    def mask(self) -> Tensor:
        """BoolTensor [carriers, units], True where a unit is kept."""
        mask = torch.zeros(self.carriers, self.size, dtype=torch.bool)
        for row, units in zip(mask, self.keep, strict=True):
            row[list(units)] = True
        return mask

    @property
    def removed(self) -> Tensor:
        """BoolTensor [carriers, units], True where a unit is removed."""
        return ~self.mask

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
    """What stays of every coupling that was decided on."""

    selections: tuple[Selection, ...]
    """One for each coupling. Where they overlap (a head and its dimensions), an element stays if every one keeps it."""
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    """(name, dense shape) of every parameter of the model, in the order of ``named_parameters()``."""

    def __post_init__(self) -> None:
        shapes, names = dict(self.shapes), [s.name for s in self.selections]
        repeated = next((n for n in names if names.count(n) > 1), None) if len(set(names)) < len(names) else None
        if repeated is not None:
            raise PlanError(f"coupling {repeated!r} is selected twice: make the plan anew")
        for selection in self.selections:
            for member in selection.members:
                check_member(member, shapes, selection.name)

    @classmethod
    def keeping(cls, couplings: Couplings, keep: Mapping[str, object]) -> Plan:
        """The plan that keeps what is said of the couplings that are named, and every other one whole.

        keep: by name of coupling the units, neurons or heads that stay: their numbers, [kept] for all carriers alike or
        [carriers, kept]; or a mask, True where a unit stays, [units] or [carriers, units]; tensors or lists. Carriers
        may keep different numbers where the coupling can be ragged. Raises PlanError for a coupling that is not there
        or is blocked, and for units that do not fit.

        Examples:
            >>> import torch, ecospa_fx as eco
            >>> mlp = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 8))
            >>> x = torch.randn(2, 8)
            >>> plan = eco.Plan.keeping(eco.detect(mlp, (x,)), {"ffn": [0, 3, 5, 9]})
            >>> tuple(eco.shrink(mlp, plan, (x,)).get_parameter("0.weight").shape)
            (4, 8)
        """
        check_couplings(couplings, PlanError)
        if not isinstance(keep, Mapping):
            raise PlanError(
                f"keep={keep!r:.60} is no mapping: give the units that stay by name, like {{'ffn': [0, 3]}}"
            )
        by_name, selections = {c.name: c for c in couplings}, []
        for name, units in keep.items():
            if name not in by_name:
                raise PlanError(
                    f"keep names {name!r:.80}, and no coupling is called that: {near_names(couplings, name)}"
                )
            blocked = by_name[name].blocked
            if blocked is not None:
                raise PlanError(f"coupling {name!r} cannot lose a unit: {blocked.message}")
            selections.append(Selection.of(by_name[name], keep_mask(by_name[name], units)))
        return cls(tuple(selections), tuple(couplings.shapes.items()))

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
        if not isinstance(model, nn.Module):
            raise PlanError(f"{type(model).__name__} is not an nn.Module: pass the model that the plan was made for")
        want, have = dict(self.shapes), parameter_shapes(unwrapped(model))
        for name in [*want, *have]:
            if want.get(name) != have.get(name):
                raise PlanError(
                    f"the plan was made for another model: parameter {name!r} is {shape_text(want.get(name))} in the "
                    f"plan and {shape_text(have.get(name))} in the model; detect and plan again on this one"
                )

    def factors(self) -> dict[str, unit_elements.Factors]:
        """Kept positions per axis of every parameter that loses elements; see `ecospa_fx.coupling.unit_elements`."""
        return unit_elements.keep_factors(dict(self.shapes), self._choices(self.selections))

    def masks(self, model: nn.Module) -> dict[str, Tensor]:
        """BoolTensor of the dense shape, True where an element stays, for every parameter that loses elements.

        Names are those in the module inside of compiling or parallel wrappers. Each is on the parameter's own device,
        or on the CPU for a model on ``meta``. Raises PlanError for another model.
        """
        self.check(model)
        parameters = dict(unwrapped(model).named_parameters())
        masks = {}
        for name, factors in self.factors().items():
            weight = parameters[name]
            masks[name] = unit_elements.mask(weight.shape, factors, None if weight.is_meta else weight.device)
        return masks

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
        return unit_elements.removed_elements(dict(self.shapes), self._choices(self.selections))

    @property
    def coupled_parameters(self) -> int:
        """Elements that the selected couplings hold, each counted once."""
        return unit_elements.coupled_elements(dict(self.shapes), (s.members for s in self.selections))

    @staticmethod
    def _choices(selections: Iterable[Selection]) -> Iterator[unit_elements.UnitChoice]:
        return ((s.members, s.mask) for s in selections)

    # -- printing ----------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        return f"Plan({len(self.selections)} couplings, {self._summary()})"

    def __str__(self) -> str:
        if not self.selections:
            return EMPTY
        table = tabulate(self._rows(), headers=HEAD, colalign=ALIGN, disable_numparse=True)
        return f"{table}\n{self._summary()}"

    def _repr_html_(self) -> str:
        if not self.selections:
            return html_paragraph(EMPTY)
        return html_table(self._rows(), HEAD, ALIGN, self._summary())

    def _rows(self) -> list[list[str]]:
        """The rows of the table, the total last."""
        shapes = dict(self.shapes)
        rows = [
            [
                s.layer,
                s.kind + (" (inexact)" if s.inexact else "") + (" (narrower cache)" if s.resized else ""),
                _width(s),
                f"{unit_elements.removed_elements(shapes, self._choices([s])):,}",
            ]
            for s in self.selections
        ]
        return [*rows, ["total", "", "", f"{self.removed_parameters:,}"]]

    def _summary(self) -> str:
        removed, coupled, whole = self.removed_parameters, self.coupled_parameters, sum(prod(s) for _, s in self.shapes)
        return (
            f"removes {removed:,} of {whole:,} parameters ({removed / max(whole, 1):.1%}), "
            f"{removed / max(coupled, 1):.1%} of what its couplings hold"
        )

    # -- saving ------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """The plan as JSON text; `from_json` gives back an equal plan."""
        shapes = {name: list(shape) for name, shape in self.shapes}
        selections = [_as_plain(s) for s in self.selections]
        return json.dumps({"format": FORMAT, "version": VERSION, "shapes": shapes, "selections": selections})

    @classmethod
    def from_json(cls, text: str | bytes) -> Plan:
        """Read what `to_json` wrote; anything else is refused with a PlanError, and nothing in it is executed."""
        try:
            data = json.loads(text)
            _check_header(data)
            shapes = from_plain(dict[str, tuple[int, ...]], data["shapes"])
            return cls(from_plain(tuple[Selection, ...], data["selections"]), tuple(shapes.items()))
        except KeyError as error:
            raise PlanError(f"this is not a readable plan: field {error} is missing; save the plan again") from error
        except (TypeError, ValueError, RecursionError) as error:
            raise PlanError(f"this is not a readable plan: {error}; save the plan again") from error


def _as_plain(selection: Selection) -> dict[str, object]:
    """A selection as JSON has it; the lists of kept units, which are long, are not copied."""
    names = ("name", "kind", "layer", "size", "carriers", "keep")
    notes = {n: getattr(selection, n) for n in ("inexact", "resized") if getattr(selection, n)}
    return {**{n: getattr(selection, n) for n in names}, "members": [asdict(m) for m in selection.members], **notes}


def _check_header(data: object) -> None:
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise PlanError(f"this is not a plan: its format is not {FORMAT!r}; pass what Plan.to_json returned")
    if data.get("version") != VERSION:
        raise PlanError(
            f"the plan has format version {data.get('version')!r} and this library reads version {VERSION}: "
            "read it with the version of ecospa_fx that wrote it"
        )


def check_plan(plan: object) -> None:
    """Raise PlanError for what is no plan."""
    if not isinstance(plan, Plan):
        raise PlanError(f"plan={plan!r:.60} is none: pass what ecospa_fx.plan, Plan.keeping or Plan.from_json returned")


def _width(selection: Selection) -> str:
    least = min(len(units) for units in selection.keep)
    kept = f"{least:,}–{selection.kept:,}" if selection.ragged else f"{selection.kept:,}"
    width = f"{kept}/{selection.size:,}"
    return width if selection.carriers == 1 else f"{width} × {selection.carriers}"
