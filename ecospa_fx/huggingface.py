"""Models of transformers, by their configuration; nothing is downloaded and no code beside the package is run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ecospa_fx.errors import StorageError


def import_transformers() -> ModuleType:
    """The package, which only Hugging Face models need. Raises StorageError where it is not installed."""
    try:
        return import_module("transformers")
    except ImportError as error:
        raise StorageError('transformers is not installed: pip install "ecospa-fx[hf]"') from error


def model_class(config: Any) -> Any:
    """The class that a configuration names in ``architectures``; otherwise the Auto class that knows it best."""
    transformers = import_transformers()
    for name in config.architectures or ():
        named = getattr(transformers, name, None)
        if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
            return named
    for auto in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModel"):
        mapping = getattr(transformers, auto)._model_mapping
        if type(config) in mapping:
            models = mapping[type(config)]
            return models[0] if isinstance(models, tuple | list) else models
    raise StorageError(f"transformers knows no model for a {type(config).__name__}: name a function that builds it")


def is_causal(model: nn.Module) -> bool:
    """False for a model of transformers that is not a causal language model; True for all others."""
    if not type(model).__module__.startswith("transformers.models."):
        return True
    import_transformers()
    names = import_module("transformers.models.auto.modeling_auto").MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return type(model).__name__ in names.values()


def build(config: object, device: str) -> Any:
    """The model of a configuration without values: on ``meta``, or on the CPU in memory that nobody has written yet.

    Buffers hold what the constructor computes, except on ``meta``.
    """
    if device == "meta":
        with torch.device("meta"):
            return model_class(config)(config)
    with _without_initialisation():
        model = model_class(config)(config)
    model.tie_weights()
    return model


@contextmanager
def _without_initialisation() -> Iterator[None]:
    """Weights that will be read anyway are not drawn first, where transformers offers that."""
    import_transformers()
    try:
        skipping = import_module("transformers.initialization").no_init_weights()
    except (ImportError, AttributeError):
        yield
        return
    with skipping:
        yield


# -- example inputs of a Hugging Face model ----------------------------------------------------------------------
