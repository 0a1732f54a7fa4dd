"""Plans as JSON text: every field is checked for its type, so that no foreign object gets into a plan."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import cast, get_args

from ecospa_fx.coupling.types import Box, Member, Role
from ecospa_fx.errors import PlanError
from ecospa_fx.plan import FORMAT, VERSION, Plan, Selection


def write(plan: Plan) -> str:
    """The plan as JSON text."""
    return json.dumps(
        {
            "format": FORMAT,
            "version": VERSION,
            "shapes": {name: list(shape) for name, shape in plan.shapes},
            "selections": [_fields(s) for s in plan.selections],
        }
    )


def read(text: str | bytes) -> Plan:
    """The plan that `write` wrote. Raises PlanError for anything else."""
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
