"""Training and evaluation mode of every module of a model, changed for a while and put back afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn


def set_mode(training: bool, *models: nn.Module) -> None:
    """Every module of some models in one mode, whatever their own ``train`` would do."""
    for model in models:
        for module in model.modules():
            module.training = training


@contextmanager
def modes_restored(*models: nn.Module) -> Iterator[None]:
    """Afterwards every module that is in some models now is in the mode that it is in now."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def copy_modes(sources: Mapping[str, nn.Module], target: nn.Module) -> None:
    """Give every module of `target` the mode of its namesake in `sources`, or of the nearest one above.

    sources: modules by path, the root under "". Paths such as "layer@1", of a module's second call where a graph was
    cut into modules, go by what is before "@".
    """
    for path, module in target.named_modules(remove_duplicate=False):
        namesake = path.partition("@")[0]
        while namesake not in sources:
            namesake = namesake.rpartition(".")[0]
        module.training = sources[namesake].training
