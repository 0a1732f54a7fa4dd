"""Dataclasses come out of JSON as they went in, and whatever stands there instead is refused with its key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from ecospa_fx.strict_json import FieldError, from_plain, to_plain


@dataclass(frozen=True)
class Entry:
    size: int
    kind: str = field(default="file", metadata={"key": "class"})


@dataclass(frozen=True)
class Folder:
    entries: Mapping[str, Entry]
    path: tuple[str | int, ...] = ()
    note: object = None
    limit: float | None = None


FOLDERS = [
    Folder({}),
    Folder({"a": Entry(3), "b": Entry(4, "link")}, ("x", 1, "y"), {"any": [1, None]}, 0.5),
]


@pytest.mark.parametrize("folder", FOLDERS)
def test_what_is_written_is_read_again(folder: Folder) -> None:
    assert from_plain(Folder, to_plain(folder)) == folder


def test_keys_of_fields_are_those_of_the_metadata() -> None:
    assert to_plain(Entry(3)) == {"size": 3, "class": "file"}
    assert from_plain(Entry, {"size": 3, "class": "link", "kind": "ignored"}) == Entry(3, "link")


@pytest.mark.parametrize(
    ("value", "key"),
    [
        ({"entries": {"a": {"size": "3"}}}, "entries"),
        ({"entries": {}, "path": [1.5]}, "path"),
        ({"entries": {}, "limit": "none"}, "limit"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_outermost_key(value: object, key: str) -> None:
    with pytest.raises(FieldError, match="stands where") as caught:
        from_plain(Folder, value)
    assert caught.value.key == key


def test_a_field_that_is_missing_is_named() -> None:
    with pytest.raises(KeyError, match="entries"):
        from_plain(Folder, {})


@pytest.mark.parametrize("value", ["text", 3, [1], {"a": 1}, None])
def test_an_object_may_be_anything(value: Any) -> None:
    assert from_plain(cast(Any, object), value) == value
