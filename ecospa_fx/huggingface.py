"""Models of transformers, by their configuration; nothing is downloaded and no code beside the package is run."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ecospa_fx.errors import CaptureError, StorageError

BATCH, LENGTH, FRAMES = 2, 16, 4000
"""Sizes of example inputs: sequences, tokens of each, samples of raw audio."""


PretrainedConfig = Any
"""A configuration of transformers, whose attributes depend on the architecture."""


class PretrainedModel(Protocol):
    """What example inputs need of a model of transformers."""

    config: PretrainedConfig
    main_input_name: object
    forward: Callable[..., object]

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...


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
    with without_initialisation():
        model = model_class(config)(config)
    model.tie_weights()
    return model


@contextmanager
def without_initialisation() -> Iterator[None]:
    """Weights that will be read anyway are not drawn first, where transformers offers that."""
    import_transformers()
    try:
        skipping = import_module("transformers.initialization").no_init_weights()
    except (ImportError, AttributeError):
        yield
        return
    with skipping:
        yield


@contextmanager
def quiet_bars() -> Iterator[None]:
    """Without the bars of transformers: for what takes a moment, and for files, where they are all on a line."""
    import_transformers()
    logging = import_module("transformers.utils.logging")
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


# -- example inputs of a Hugging Face model ----------------------------------------------------------------------


def example_inputs(model: PretrainedModel) -> dict[str, object]:
    """Keyword arguments that a transformers model accepts, on its device, from its configuration alone.

    Raises CaptureError where its main input is of a kind not known here.
    """
    accepted = inspect.signature(model.forward).parameters
    name = model.main_input_name
    maker = _MAKERS.get(name) if isinstance(name, str) else None
    if maker is None:
        raise CaptureError(
            f"no example is known for input {name!r} of {type(model).__name__}: "
            "name a function that returns (model, args, kwargs)"
        )
    inputs: dict[str, object] = {str(name): maker(model)}
    if "decoder_input_ids" in accepted and getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = _ids(model)
    if name == "input_ids" and hasattr(model.config, "vision_config") and not _generates(model):
        inputs["pixel_values"] = _pixels(model)
    if name == "pixel_values" and "input_ids" in accepted and hasattr(model.config, "text_config"):
        inputs["input_ids"] = _ids(model)
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    return inputs


def _generates(model: PretrainedModel) -> bool:
    return bool(getattr(model, "can_generate", bool)())


def _ids(model: PretrainedModel) -> Tensor:
    """Token ids [2, 16], all different where the vocabulary allows it, none of the first ones, which are special."""
    size = int(getattr(model.config.get_text_config(), "vocab_size", None) or 2)
    first = min(4, size - 1)
    ids = torch.arange(BATCH * LENGTH).remainder(size - first).add(first)
    return ids.view(BATCH, LENGTH).to(model.device)


def _pixels(model: PretrainedModel) -> Tensor:
    config = getattr(model.config, "vision_config", model.config)
    size = getattr(config, "image_size", 224)
    height, width = size if isinstance(size, tuple | list) else (size, size)
    shape = [BATCH, getattr(config, "num_channels", 3), height, width]
    frames = getattr(config, "num_frames", None)
    return _floats(model, shape if frames is None else [BATCH, frames, *shape[1:]])


def _features(model: PretrainedModel) -> Tensor:
    """Log-mel features: [2, bins, frames] where a convolution reads them (Whisper), else [2, frames, bins]."""
    config: PretrainedConfig = getattr(model.config, "audio_config", model.config)
    if hasattr(config, "max_source_positions") and hasattr(config, "num_mel_bins"):
        return _floats(model, [BATCH, config.num_mel_bins, 2 * config.max_source_positions])
    names = ("feature_projection_input_dim", "input_feat_per_channel", "num_mel_bins", "feature_size")
    bins = next((getattr(config, name) for name in names if hasattr(config, name)), 80)
    return _floats(model, [BATCH, 8 * LENGTH, bins])


def _samples(model: PretrainedModel) -> Tensor:
    """A raw waveform [2, samples], or a spectrogram [2, frames, bins] for models of patches."""
    config = model.config
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):
        return _floats(model, [BATCH, config.max_length, config.num_mel_bins])
    return _floats(model, [BATCH, FRAMES])


def _embeddings(model: PretrainedModel) -> Tensor:
    return _floats(model, [BATCH, LENGTH, model.config.get_text_config().hidden_size])


def _floats(model: PretrainedModel, shape: list[int]) -> Tensor:
    """Reproducible noise of the model's own type."""
    if model.device.type == "meta":
        return torch.empty(shape, dtype=model.dtype, device="meta")
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(model.device, model.dtype)


_MAKERS: dict[str, Callable[[PretrainedModel], Tensor]] = {
    "input_ids": _ids,
    "pixel_values": _pixels,
    "pixel_values_videos": _pixels,
    "input_features": _features,
    "input_values": _samples,
    "inputs_embeds": _embeddings,
}
