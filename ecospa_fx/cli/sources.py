"""Loads a model with example inputs from a Hugging Face folder, a config.json alone, or a function that builds one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from ecospa_fx.errors import EcospaError, StorageError
from ecospa_fx.export.transformers_folder import reread
from ecospa_fx.huggingface import PretrainedConfig, build, example_inputs, import_transformers, model_class, quiet_bars
from ecospa_fx.storage.folder import read_manifest
from ecospa_fx.storage.manifest import MANIFEST
from ecospa_fx.storage.models import load_with_inputs


@dataclass(frozen=True, slots=True)
class Source:
    """A model with example inputs."""

    model: nn.Module
    """The model."""
    args: tuple[Any, ...] = ()
    """Example inputs by position."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Example inputs by name."""
    folder: Path | None = None
    """Where the model was read from; None for a function."""


def open_source(text: str, *, weights: bool) -> Source:
    """The model that `text` names, in eval mode unless a function set its mode.

    text: a Hugging Face folder, a ``config.json``, or ``package.module:function``, where the function returns
    (model, args, kwargs); without weights also a folder that `save` wrote. weights: whether the values are needed;
    without them a Hugging Face model is built on ``meta`` whatever its size. No code from a folder is executed.
    Raises StorageError for what is not there or is not a model, CaptureError where no example inputs are known for it.
    """
    path = Path(text)
    if path.exists():
        return _from_path(path, weights)
    module, colon, function = text.rpartition(":")
    if colon and module and function.isidentifier():
        return from_function(_function(module, function), text)
    raise StorageError(
        f"there is no {text!r}: name a Hugging Face folder, a config.json, or package.module:function "
        "for a function that returns (model, args, kwargs)"
    )


# -- functions ---------------------------------------------------------------------------------------------------


def _function(module: str, name: str) -> Callable[[], object]:
    """Import a function, from the current folder too."""
    sys.path.insert(0, str(Path.cwd()))
    try:
        function: object = getattr(import_module(module), name, None)
    except Exception as error:
        raise StorageError(f"module {module!r} cannot be imported: {one_line(error)}") from error
    finally:
        sys.path.remove(str(Path.cwd()))
    if not callable(function):
        raise StorageError(f"module {module!r} has no function {name!r}: name one that returns (model, args, kwargs)")
    return function


def from_function(function: Callable[[], object], name: str) -> Source:
    """What a function returned: (model, args, kwargs). Raises StorageError for anything else, or where it fails."""
    try:
        result = function()
    except Exception as error:
        raise StorageError(f"{name} failed: {one_line(error)}") from error
    if not isinstance(result, tuple | list) or len(result) != 3:
        raise StorageError(f"{name} returned {type(result).__name__}: it must return (model, args, kwargs)")
    model, args, kwargs = result
    if not (isinstance(model, nn.Module) and isinstance(args, tuple | list) and isinstance(kwargs, Mapping)):
        kinds = ", ".join(type(part).__name__ for part in result)
        raise StorageError(f"{name} returned ({kinds}): it must return an nn.Module, a tuple and a dict")
    return Source(model, tuple(args), dict(kwargs))


def one_line(error: Exception) -> str:
    """An error of somebody else's code on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


# -- Hugging Face ------------------------------------------------------------------------------------------------


def _from_path(path: Path, weights: bool) -> Source:
    folder = path if path.is_dir() else path.parent
    if (path / MANIFEST).is_file():
        if weights:
            raise StorageError(f"{path} was compressed already: compress the original model with a higher ratio")
        return Source(*load_with_inputs(path), folder)
    config_file = path / "config.json" if path.is_dir() else path
    if not config_file.is_file():
        raise StorageError(f"{path} has no config.json: name a Hugging Face folder or a config.json")
    if weights and not path.is_dir():
        raise StorageError(f"{path} describes a model without its weights: name the folder that holds them")
    config = _config(config_file)
    try:
        if weights:
            with nullcontext() if sys.stderr.isatty() else quiet_bars():
                model = model_class(config).from_pretrained(folder, config=config, dtype="auto", local_files_only=True)
        else:
            model = build(config, "meta")
    except EcospaError:
        raise
    except Exception as error:
        raise StorageError(f"{path} is not a model that transformers can read: {one_line(error)}") from error
    return Source(model.eval(), (), example_inputs(model), folder)


def _config(path: Path) -> PretrainedConfig:
    """The configuration in a file; its class is the one in transformers, never one from the folder."""
    transformers = import_transformers()
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise StorageError(f"{path} is not a readable config.json: {one_line(error)}") from error
    if not isinstance(entries, dict) or "model_type" not in entries:
        raise StorageError(f"{path} names no model_type: it is not the config.json of a transformers model")
    try:
        config: PretrainedConfig = transformers.AutoConfig.from_pretrained(
            path, trust_remote_code=False, local_files_only=True
        )
        return config
    except Exception as error:
        raise StorageError(f"{path} is not a configuration that transformers knows: {one_line(error)}") from error


def open_exportable(folder: Path) -> nn.Module:
    """The model in a folder that `save` or `export` wrote, or in any other folder of transformers.

    No code from it is executed. Raises StorageError for what is none, and for a graph, which other engines do not read.
    """
    if (folder / MANIFEST).is_file():
        if read_manifest(folder).integers is None:
            raise StorageError(
                f"{folder} holds a graph, which engines other than torch do not read: write the plan back into the "
                "model with ecospa_fx.shrink_, and save that"
            )
        return load_with_inputs(folder)[0]
    if not (folder / "config.json").is_file():
        raise StorageError(f"{folder} has no {MANIFEST} and no config.json: name a folder with a saved model")
    try:
        entries = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (kind,) = entries["architectures"]
        return reread(folder, kind, heterogeneous="per_layer_config" in entries)
    except EcospaError:
        raise
    except Exception as error:
        raise StorageError(f"{folder} is not a model that transformers can read: {one_line(error)}") from error
