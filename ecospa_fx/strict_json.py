"""JSON as it is meant: finite numbers, each key once, no deeper than can be read; and dataclasses out of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, TypeVar, Union, cast, get_args, get_origin, get_type_hints

Kind = TypeVar("Kind")

_LISTS: dict[object, type] = {tuple: list}
"""What JSON holds of a kind that is none of its own."""
_NAMES: dict[object, str] = {int: "a whole number", str: "a text", bool: "a flag", float: "a number"}


def strict_json(text: str | bytes) -> Any:
    """What a JSON text holds. Raises ValueError for anything else, whatever is wrong with it.

    >>> strict_json('{"a": [1, 2.5, null]}')
    {'a': [1, 2.5, None]}
    """
    try:
        return json.loads(text, parse_constant=_constant, parse_float=_number, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text:.20} is out of range")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError("a key stands in it twice")
    return entries


# -- dataclasses -------------------------------------------------------------------------------------------------


class FieldError(ValueError):
    """A field of a dataclass cannot be read. key: of the outermost such field in JSON."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


def from_plain(kind: type[Kind], value: object) -> Kind:
    """A value of a type from what JSON holds of it: lists become tuples, objects become dataclasses or mappings.

    kind: int, float, bool, str, None, a literal, a union, a tuple, a mapping by names, a dataclass of these, or object
    for any value. A field is read from the key in its metadata, by default its name; fields that are missing have
    their defaults. Raises KeyError with the key of a field that has none, TypeError for a value of another type and
    ValueError for one that no literal is, each in words that say what stands where; within dataclasses FieldError.

    >>> from_plain(tuple[int, ...], [1, 2])
    (1, 2)
    """
    return cast(Kind, _read(kind, value))


def _read(kind: object, value: object) -> object:
    origin, inner = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return _dataclass(kind, value)
    if origin in (Union, UnionType):
        if value is None and NoneType in inner:
            return None
        kinds = [member for member in inner if member is not NoneType]
        return _read(next((m for m in kinds if type(value) in (m, _LISTS.get(get_origin(m)))), kinds[0]), value)
    if kind is object:
        return value
    if origin is Literal:
        if value not in inner:
            raise ValueError(f"{value!r:.40} stands where one of {', '.join(map(str, inner))} belongs")
        return value
    if origin is tuple:
        items = _of(list, value, "a list")
        kinds = [inner[0]] * len(items) if inner[-1] is Ellipsis else list(inner)
        if len(kinds) != len(items):
            raise ValueError(f"{value!r:.40} stands where a list of {len(kinds)} belongs")
        return tuple(_read(member, item) for member, item in zip(kinds, items, strict=True))
    if origin in (dict, Mapping):
        return {name: _read(inner[1], item) for name, item in _of(dict, value, "an object").items()}
    return _plain(kind, value)


def _dataclass(kind: Any, value: object) -> Any:
    entries, types = _of(dict, value, "an object"), get_type_hints(kind)
    arguments = {}
    for f in fields(kind):
        key = json_key(f)
        if key not in entries and (f.default is not MISSING or f.default_factory is not MISSING):
            continue
        try:
            arguments[f.name] = _read(types[f.name], entries[key])
        except (TypeError, ValueError) as error:
            raise FieldError(key, str(error)) from error
    return kind(**arguments)


def json_key(field: Field[Any]) -> str:
    """The key of a dataclass field in JSON."""
    return str(field.metadata.get("key", field.name))


def to_plain(value: object) -> object:
    """What `from_plain` reads back: dataclasses become objects, tuples lists; anything else stays as it is.

    >>> to_plain((1, {"a": (2,)}))
    [1, {'a': [2]}]
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {json_key(f): to_plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {name: to_plain(item) for name, item in value.items()}
    return [to_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _plain(kind: object, value: object) -> object:
    if type(value) is kind or (kind is float and type(value) is int):
        return value
    raise TypeError(f"{value!r:.40} stands where {_NAMES[kind]} belongs")


def _of(kind: Any, value: object, name: str) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{value!r:.40} stands where {name} belongs")
    return value
