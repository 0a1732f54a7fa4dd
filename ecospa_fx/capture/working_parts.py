"""Which parts of a model can be exported by themselves, where the whole cannot."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ecospa_fx.ir.pytrees import Arguments, NamedArguments, closed, copied, opened
from ecospa_fx.ir.tracing import quiet, random_state_restored
from ecospa_fx.module_modes import set_mode
from ecospa_fx.snapshot import untouched

log = logging.getLogger(__name__)

SECONDS = 20.0
"""Of this thread's own work, after which no further part is tried."""
MOST = 3
"""How many parts are named."""

Export = Callable[[nn.Module, Arguments, NamedArguments], object]
"""Exports a module for some arguments, or raises what torch does."""


def working_parts(
    model: nn.Module, args: Sequence[object], kwargs: Mapping[str, object], export: Export, seconds: float = SECONDS
) -> list[str]:
    """Paths of modules that can be exported on what the model gives them, the largest first.

    None is inside another one, and of layers that are alike, such as those of a list, the first is tried. None at all
    where the model does not run. The model stays as it is.
    """
    begin, working, tried = time.thread_time(), list[str](), set[tuple[str, type[nn.Module]]]()
    calls = _first_calls(model, args, kwargs)
    for path, module in _candidates(model):
        alike = re.sub(r"\d+", "*", path), type(module)
        if path not in calls or alike in tried or any(path.startswith(f"{other}.") for other in working):
            continue
        if len(working) == MOST or time.thread_time() - begin > seconds:
            break
        tried.add(alike)
        try:
            export(module, *calls[path])
        except Exception as error:  # whatever torch or the model's own code raises
            log.debug("part %s cannot be exported: %s", path, error)
        else:
            working.append(path)
    return working


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that hold others, by path, from the one with most parameters."""
    sizes = {path: sum(p.numel() for p in m.parameters()) for path, m in model.named_modules()}
    inner = [(path, m) for path, m in model.named_modules() if path and sizes[path] and any(m.children())]
    yield from sorted(inner, key=lambda entry: -sizes[entry[0]])


def _first_calls(
    model: nn.Module, args: Sequence[object], kwargs: Mapping[str, object]
) -> dict[str, tuple[Arguments, NamedArguments]]:
    """By path what a module gets in its first call, where the model runs."""
    calls: dict[str, tuple[Arguments, NamedArguments]] = {}
    with untouched(model), random_state_restored(), torch.no_grad(), quiet():
        set_mode(False, model)
        for path, module in _candidates(model):

            def noted(_: nn.Module, args: Arguments, kwargs: NamedArguments, path: str = path) -> None:
                if path not in calls:
                    calls[path] = _detached(args, kwargs)

            module.register_forward_pre_hook(noted, prepend=True, with_kwargs=True)
        own_args, own_kwargs = copied((tuple(args), dict(kwargs)))
        try:
            model(*own_args, **own_kwargs)
        except Exception as error:  # whatever the model's own code raises
            log.debug("no parts are tried, because the model does not run: %s", error)
            return {}
    return calls


def _detached(args: Arguments, kwargs: NamedArguments) -> tuple[Arguments, NamedArguments]:
    """Arguments in new objects, whose tensors have no history: only their shapes count."""
    parts = pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, opened((args, kwargs)))
    call: tuple[Arguments, NamedArguments] = closed(parts)[0]
    return call
