"""Calls of a whole model around the graph of one of its parts: what comes before it, and what comes after it.

Data, losses and outputs are those of the whole, so that whatever measures or learns by running a program works on parts
as on models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from ecospa_fx.errors import InputError, ScoreError
from ecospa_fx.ir.pytrees import Arguments, NamedArguments, Tree, copied
from ecospa_fx.module_modes import modes_restored, set_mode
from ecospa_fx.runtime.part import Call, Part, as_data


class Calling(Protocol):
    """How a program is called: arguments to the leaves that it takes, and what it gives to a result."""

    stateful: bool

    def flat(self, args: Arguments, kwargs: NamedArguments) -> list[object]:
        """The leaves of the arguments, in the order of the graph's inputs."""

    def returned(self, leaves: Sequence[object], args: Arguments, kwargs: NamedArguments) -> Tree:
        """What is returned for some arguments, from the graph's outputs."""


class Stopped(BaseException):
    """Ends a call of the whole where its part has got its arguments; no code of the user's catches it."""


class PartCalling:
    """Calls of a whole model with a graph in the place of one part, which it calls once.

    graph: how the part's own graph is called. Raises ScoreError for a part that is called several times.
    """

    stateful = False

    def __init__(self, part: Part, graph: Calling) -> None:
        if len(part.calls) > 1:
            raise ScoreError(
                f"part {part.path!r} is called {len(part.calls)} times in one call of {type(part.whole).__name__}, and "
                "method='second-order' follows one: choose units by method='gate-fisher', or name the part around them"
            )
        self._part, self._graph = part, graph

    def flat(self, args: Arguments, kwargs: NamedArguments) -> list[object]:
        """The leaves of what the whole gives to its part. Raises InputError where it does not call it."""
        calls: list[Call] = []

        def stop(*args: object, **kwargs: object) -> Tree:
            calls.append(as_data(args, kwargs))
            raise Stopped

        try:
            with _instead(self._part, stop):
                self._part.whole(*args, **kwargs)
        except Stopped:
            return self._graph.flat(*calls[0])
        raise InputError(f"{type(self._part.whole).__name__} does not call part {self._part.path!r} on this batch")

    def returned(self, leaves: Sequence[object], args: Arguments, kwargs: NamedArguments) -> Tree:
        """What the whole returns where its part gives some leaves."""

        def give(*args: object, **kwargs: object) -> Tree:
            return self._graph.returned(leaves, args, kwargs)

        with _instead(self._part, give):
            args, kwargs = copied((args, kwargs))
            return self._part.whole(*args, **kwargs)


@contextmanager
def _instead(part: Part, forward: Callable[..., Tree]) -> Iterator[None]:
    """Something in place of what a part computes, in evaluation mode; parameters of the whole take no gradients."""
    attributes, flags = vars(part.module), {p: p.requires_grad for p in part.whole.parameters()}
    before = {"forward": attributes["forward"]} if "forward" in attributes else {}
    with modes_restored(part.whole):
        set_mode(False, part.whole)
        attributes["forward"] = forward
        for parameter in flags:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)
            attributes.pop("forward", None)
            attributes.update(before)
