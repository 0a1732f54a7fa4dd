"""One export for all plans of a test, which proves what becomes of a graph, not that torch makes the same again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from unittest import mock

from torch import nn
from torch.utils import _pytree as pytree

from ecospa_fx import rewrite
from ecospa_fx.capture.export import captures
from ecospa_fx.ir.program import ExportedForm


class _Exports:
    """The exports of one model for some arguments, made as far as they are asked for; every reader gets copies."""

    def __init__(self, model: nn.Module, args: Sequence[object], kwargs: Mapping[str, object] | None) -> None:
        self.inputs = model, args, kwargs  # kept, so that identities stay theirs
        self._made, self._more = list[ExportedForm](), captures(model, args, kwargs, dynamic=True)

    def __iter__(self) -> Iterator[ExportedForm]:
        number = 0
        while True:
            if number == len(self._made):
                form = next(self._more, None)
                if form is None:
                    return
                self._made.append(form)
            yield self._made[number].frozen()
            number += 1


@contextmanager
def exported_once() -> Iterator[None]:
    """Within, `eco.shrink` exports a model once for the same arguments. Nobody may change the model meanwhile."""
    exports: dict[tuple[object, ...], _Exports] = {}

    def shared(
        model: nn.Module,
        args: Sequence[object],
        kwargs: Mapping[str, object] | None,
        *,
        dynamic: bool,
        whole: nn.Module | None,
    ) -> Iterator[ExportedForm]:
        assert dynamic
        assert whole is None
        key = (id(model), model.training, *map(id, pytree.tree_leaves((args, kwargs))))
        if key not in exports:
            exports[key] = _Exports(model, args, kwargs)
        yield from exports[key]

    with mock.patch.object(rewrite, "captures", shared):
        yield
