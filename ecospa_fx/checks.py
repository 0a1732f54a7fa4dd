"""Checks of what users pass: each says in one sentence what is wrong, and what is taken in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from inspect import signature
from typing import Any

from ecospa_fx.errors import EcospaError, OptionError


def check_known(verb: str, options: Iterable[str], allowed: Iterable[str]) -> None:
    """Raise OptionError, a TypeError as for any function, for an option that a verb does not have."""
    every = sorted(allowed)
    for name in options:
        if name not in every:
            near = get_close_matches(name, every, 1, 0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(every)}"
            raise OptionError(f"{verb}() has no option {name!r}: {hint}")


def check_options(verb: str, options: Iterable[str], kind: Any, function: Callable[..., Any]) -> None:
    """`check_known` for a verb whose further options a typed dictionary lists, beside those in its signature."""
    explicit = (n for n, p in signature(function).parameters.items() if p.kind is not p.VAR_KEYWORD and n != "self")
    check_known(verb, options, {*kind.__optional_keys__, *explicit})


# -- values: each check says in one sentence which option is wrong, and what it takes ------------------------------


def check_flag(name: str, value: object, refused: type[EcospaError]) -> None:
    """Raise `refused` for what is neither True nor False."""
    if not isinstance(value, bool):
        raise refused(f"{name}={value!r:.60} is neither True nor False")


def check_whole(name: str, value: object, least: int, refused: type[EcospaError], what: str = "a count") -> None:
    """Raise `refused` for what is no whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise refused(f"{name}={value!r:.60} is not {what}: give a whole number of at least {least}")


def is_number(value: object) -> bool:
    """Whether a value is a number, which True and False are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_share(name: str, value: object, refused: type[EcospaError], what: str = "a share") -> None:
    """Raise `refused` for what is no number from 0 to below 1."""
    if not is_number(value) or not 0 <= value < 1:  # type: ignore[operator]  # a number, as has been checked
        raise refused(f"{name}={value!r:.60} is not {what}: give a number from 0 to below 1")


def check_function(name: str, value: object, refused: type[EcospaError], how: str) -> None:
    """Raise `refused` for what cannot be called. how: the arguments and the result of what is wanted."""
    if not callable(value):
        raise refused(f"{name}={value!r:.60} cannot be called: give a function {how}")


def check_data(batches: object, loss: object, refused: type[EcospaError], progress: object = False) -> None:
    """Raise `refused` for what cannot be a series of (args, kwargs), a loss that cannot be called, and no flag."""
    check_flag("progress", progress, refused)
    if loss is not None:
        check_function("loss", loss, refused, "(output, args, kwargs) -> scalar")
    if isinstance(batches, str | bytes | Mapping) or not isinstance(batches, Iterable) or hasattr(batches, "dtype"):
        raise refused(
            f"batches={batches!r:.60} is no series of batches: give pairs (args, kwargs), for example [((ids,), {{}})]"
        )
