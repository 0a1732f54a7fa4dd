"""Saves a shrunk model to a folder and loads it again.

A folder holds ``plan.json``, the weights, ``config.json`` of a Hugging Face model, and ``manifest.json``, which names
every other file with its size and digest and is written last. Loading builds the original architecture, shrinks it
with the plan and reads the weights into it: nothing in the folder is executed. Of a module that ``shrink_`` edited, the
manifest holds the integers that were written, too, so that it comes back as the user's own class.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ecospa_fx.errors import EcospaError, StorageError
from ecospa_fx.example_inputs import from_description
from ecospa_fx.huggingface import build, import_transformers
from ecospa_fx.inplace.serialise import apply_saved_edit
from ecospa_fx.origin import ATTRIBUTE, Origin, origin, remember
from ecospa_fx.plan import Plan
from ecospa_fx.progress import stage
from ecospa_fx.rewrite import smaller
from ecospa_fx.storage.folder import (
    digest,
    folder_path,
    is_dense,
    new_folder,
    read_manifest,
    read_weights,
    refuse_existing,
    write_weights,
)
from ecospa_fx.storage.manifest import CONFIG, MANIFEST, PLAN, FileEntry, Manifest, write_manifest
from ecospa_fx.strict_json import strict_json
from ecospa_fx.version import __version__
from ecospa_fx.wrappers import unwrapped

Arguments = tuple[Any, ...]
KeywordArguments = dict[str, Any]
DenseModel = tuple[nn.Module, Arguments, KeywordArguments]
"""A model with example inputs."""

# -- saving ------------------------------------------------------------------------------------------------------


def save(
    small: nn.Module,
    path: str | os.PathLike[str],
    *,
    origin: Origin | None = None,
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> None:
    """Write a shrunk model to a new folder, which is there completely or not at all.

    origin: where the model came from, for a module that does not say so itself. dtypes: types to write parameters and
    buffers in, by name; by default the ones they have. Raises StorageError for a path that exists, a module without
    an origin or of which only a part was made smaller, and what the file system refuses.

    >>> save(small, "smaller")  # doctest: +SKIP
    >>> small = load("smaller")  # doctest: +SKIP
    """
    target, small = folder_path(path), unwrapped(small)
    _check_types(dtypes)
    refuse_existing(target)
    source = origin or getattr(small, ATTRIBUTE, None)
    if not isinstance(source, Origin):
        raise StorageError(
            f"this {type(small).__name__} does not say what it was shrunk from: "
            "pass origin=ecospa_fx.origin.origin(model, plan, args, kwargs)"
        )
    if source.parts:
        raise StorageError(
            f"of this {type(small).__name__} only {', '.join(source.parts)} was made smaller, which is not saved as a "
            "folder yet: keep state_dict() and origin_of(small).plan.to_json(), and shrink the original with part= "
            "before it loads them"
        )
    tensors = _storable_tensors(_saved_tensors(small, source.buffers), dtypes or {})
    with stage("saving"), new_folder(target) as folder:
        (folder / PLAN).write_text(source.plan.to_json(), encoding="utf-8")
        if source.config is not None:
            (folder / CONFIG).write_text(source.config, encoding="utf-8")
        write_weights(folder, tensors)
        write_manifest(folder, _manifest(folder, source, tensors))


def _check_types(dtypes: object) -> None:
    """Raise StorageError for what is no mapping from names to types."""
    if dtypes is None:
        return
    if not isinstance(dtypes, Mapping) or not all(isinstance(dtype, torch.dtype) for dtype in dtypes.values()):
        raise StorageError(f"dtypes={dtypes!r:.60} are no types: give a torch.dtype by name of parameter or buffer")


def _saved_tensors(small: nn.Module, buffers: Sequence[str]) -> dict[str, Tensor]:
    """Parameters and buffers by first name; buffers that shrinking added follow from the plan and are left out."""
    tensors: dict[str, Tensor] = dict(small.named_parameters())
    tensors.update({name: buffer for name, buffer in small.named_buffers() if name in set(buffers)})
    return tensors


def _storable_tensors(tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """Tensors as files hold them, each in memory of its own. Raises StorageError for what no file holds."""
    for name, dtype in dtypes.items():
        if (
            name not in tensors
            or not isinstance(dtype, torch.dtype)
            or _number_kind(dtype) != _number_kind(tensors[name].dtype)
        ):
            raise StorageError(f"dtypes[{name!r}]={dtype!r:.40} fits no tensor of this model: leave it out")
    result: dict[str, Tensor] = {}
    addresses: set[int] = set()
    for name, tensor in tensors.items():
        storable = _storable(name, tensor, dtypes.get(name))
        shared = storable.numel() > 0 and storable.data_ptr() in addresses
        result[name] = storable.clone() if shared else storable
        addresses.add(result[name].data_ptr())
    return result


def _storable(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A copy only where the type, the device or the layout asks for one, or where the tensor is part of another."""
    if tensor.is_meta:
        raise StorageError("the model is on meta and has no values to save: load its weights first")
    if not is_dense(tensor):
        raise StorageError(
            f"{name!r} is a {type(tensor).__name__} that is not dense: turn it into a plain tensor first"
        )
    dense = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous().resolve_conj().resolve_neg()
    whole = dense.untyped_storage().nbytes() == dense.numel() * dense.element_size()
    return dense if whole else dense.clone()


def _number_kind(dtype: torch.dtype) -> str:
    """What kind of numbers a type holds: those of one kind can stand for one another."""
    return "float" if dtype.is_floating_point else "complex" if dtype.is_complex else str(dtype)


def _manifest(folder: Path, origin: Origin, tensors: Mapping[str, Tensor]) -> Manifest:
    versions = {"ecospa_fx": __version__, "torch": str(torch.__version__)}
    if origin.config is not None:
        versions["transformers"] = import_transformers().__version__
    files = sorted(folder.iterdir())
    return Manifest(
        versions=versions,
        model_class=origin.model_class,
        attention=origin.attention,
        training=origin.training,
        inputs=origin.inputs,
        integers=origin.integers,
        dtypes={name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()},
        files={file.name: FileEntry(file.stat().st_size, digest(file)) for file in files},
    )


# -- loading -----------------------------------------------------------------------------------------------------


def load(
    path: str | os.PathLike[str], model: Callable[[], object] | None = None, *, dtype: torch.dtype | None = None
) -> nn.Module:
    """The shrunk model that `save` wrote, on the CPU, in the mode that it was shrunk in.

    A graph comes back as a graph, and what `shrink_` edited as a module of its own class. model: builds the original
    architecture, or (model, args, kwargs); its values do not matter and it is not changed. Not needed for models of
    transformers, which are built from their configuration. dtype: floating type of parameters to load instead of the
    saved one. No code from the folder is executed.

    Raises StorageError for a folder that is incomplete, damaged or not of this kind, and where `model` builds another
    architecture; what `model` itself raises comes through.
    """
    return load_with_inputs(folder_path(path), model, dtype)[0]


def load_with_inputs(
    folder: Path, model: Callable[[], object] | None = None, dtype: torch.dtype | None = None
) -> DenseModel:
    """(model, args, kwargs): what `load` returns, with the example inputs that it was traced with."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise StorageError(f"dtype={dtype!r:.40} is no floating type: give one like torch.bfloat16")
    manifest = read_manifest(folder)
    plan = _read_plan(folder)
    tensors = read_weights(folder, manifest)
    if dtype is not None:
        weights = {name for name, _ in plan.shapes}
        tensors = {n: t.to(dtype) if n in weights and t.is_floating_point() else t for n, t in tensors.items()}
    dense = _dense(folder, manifest, model)
    with _fitting(folder):
        small = _shrunk(dense, plan, manifest, tensors)
    return small, *dense[1:]


@contextmanager
def _fitting(folder: Path) -> Iterator[None]:
    """Whatever goes wrong while a folder's content is put into a model is a StorageError."""
    try:
        yield
    except StorageError:
        raise
    except EcospaError as error:
        raise StorageError(f"{folder} does not fit this model: {error}") from error
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        raise StorageError(f"{folder} does not fit this model ({type(error).__name__}: {first:.200})") from error


def _shrunk(model: DenseModel, plan: Plan, manifest: Manifest, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The dense model shrunk by a plan, or edited as the manifest says, with the saved tensors in it."""
    dense, args, kwargs = model
    plan.check(dense)
    if manifest.dtypes is None:
        _refuse_mixtures(dense, tensors)
    dense = _typed(dense, tensors)
    source = replace(origin(dense, plan, args, kwargs), integers=manifest.integers)
    if source.integers is None:
        small = smaller(dense, plan, args, kwargs)
    else:
        small = apply_saved_edit(dense, plan, source.integers, tensors)
    _load_tensors(small, tensors, source.buffers)
    return remember(small, source)


def _read_plan(folder: Path) -> Plan:
    try:
        text = (folder / PLAN).read_bytes()
        strict_json(text)
        return Plan.from_json(text)
    except Exception as error:  # whatever a plan's numbers may lead to
        raise StorageError(f"{folder / PLAN}: {error}") from error


# -- the original architecture -----------------------------------------------------------------------------------


def _dense(folder: Path, manifest: Manifest, model: Callable[[], object] | None) -> DenseModel:
    """The original architecture with example inputs, in the mode that it had."""
    if isinstance(model, nn.Module):
        raise StorageError(
            f"model= is a {type(model).__name__} that is built already: pass a function that builds it anew, such as "
            "its class or lambda: Model(…)"
        )
    if model is not None:
        if not callable(model):
            raise StorageError(f"model={model!r:.60} cannot be called: pass a function that returns the original model")
        result = model()
    elif CONFIG in manifest.files:
        result = _from_config(folder, manifest)
    else:
        raise StorageError(
            f"{folder} holds a {manifest.model_class}, which only your code can build: "
            "pass model=, a function that returns the original model"
        )
    example = _example(folder, manifest)
    if isinstance(result, tuple | list) and len(result) == 3:
        result, example = result[0], (result[1], result[2])
    dense = unwrapped(cast(nn.Module, result))
    if not isinstance(dense, nn.Module):
        raise StorageError(f"model() returned {type(dense).__name__}: it must return an nn.Module")
    if example is None or example[0] is None:
        raise StorageError(f"{folder} holds no example inputs: let model() return (model, args, kwargs)")
    if dense.training is not manifest.training:
        dense = copy.deepcopy(dense).train(manifest.training)
    return dense, *example


def _example(folder: Path, manifest: Manifest) -> tuple[Arguments, KeywordArguments] | None:
    """(args, kwargs) of zeros, or None where none were saved."""
    if manifest.inputs is None:
        return None
    try:
        args, kwargs = from_description(manifest.inputs)
        return tuple(args), dict(kwargs)
    except (TypeError, ValueError) as error:
        raise StorageError(f"{folder / MANIFEST} describes no example inputs: save the model again") from error


def _from_config(folder: Path, manifest: Manifest) -> nn.Module:
    """A model of transformers by the class that the manifest names, from its configuration."""
    transformers = import_transformers()
    name = manifest.model_class.rpartition(".")[2]
    kind: object = getattr(transformers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise StorageError(f"transformers {transformers.__version__} has no model class {name!r}: install another one")
    attention = manifest.attention
    if attention is not None and not attention.isidentifier():
        raise StorageError(f"{folder / MANIFEST} names an attention implementation {attention!r} outside transformers")
    try:
        entries = strict_json((folder / CONFIG).read_text(encoding="utf-8"))
        config = kind.config_class.from_dict(_without_code(entries))  # type: ignore[attr-defined]
        config.architectures = [name]
        config._attn_implementation = attention
        model: nn.Module = build(config, "cpu")
        return model.train(manifest.training)
    except EcospaError:
        raise
    except Exception as error:
        raise StorageError(f"{folder / CONFIG} does not describe a {name}: {error}") from error


def _without_code(entries: object) -> object:
    """A configuration without the entries that point to code outside of transformers."""
    if not isinstance(entries, dict):
        return entries
    unwanted = ("auto_map", "_attn_implementation", "attn_implementation", "quantization_config")
    return {key: _without_code(value) for key, value in entries.items() if not key.startswith(unwanted)}


def _refuse_mixtures(dense: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Raise StorageError where parameters of one type are saved in several, in folders that do not say so."""
    saved: dict[torch.dtype, torch.dtype] = {}
    for name, parameter in dense.named_parameters():
        if name in tensors and saved.setdefault(parameter.dtype, tensors[name].dtype) != tensors[name].dtype:
            raise StorageError(f"{name!r} is saved as {tensors[name].dtype} and others like it are not")


def _typed(dense: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The model in the types of the saved tensors, on the CPU; a copy where that changes anything.

    A graph holds its types as literals, so they must be right before it is traced. Raises StorageError where a saved
    tensor holds another kind of numbers than the model's.
    """
    present: dict[str, Tensor] = {**dict(dense.named_parameters()), **dict(dense.named_buffers())}
    memo: dict[int, object] = {}
    for name in present.keys() & tensors.keys():
        if _number_kind(present[name].dtype) != _number_kind(tensors[name].dtype):
            raise StorageError(f"{name!r} is saved as {tensors[name].dtype} and is {present[name].dtype} in the model")
    for name, old in present.items():
        if name in tensors and (old.dtype != tensors[name].dtype or old.device.type != "cpu"):
            empty = torch.empty(old.shape, dtype=tensors[name].dtype)
            memo[id(old)] = nn.Parameter(empty, old.requires_grad) if isinstance(old, nn.Parameter) else empty
    return copy.deepcopy(dense, memo) if memo else dense


def _load_tensors(small: nn.Module, tensors: Mapping[str, Tensor], buffers: Sequence[str]) -> None:
    """Put the saved tensors in place of those of equal name, everywhere. Raises StorageError unless all fit."""
    present = _saved_tensors(small, buffers)
    odd = sorted(present.keys() ^ tensors.keys())
    if odd:
        where = "the saved weights" if odd[0] in tensors else "the model"
        raise StorageError(f"{odd[0]!r} is in {where} only: the architecture is not the one that was saved")
    new: dict[int, Tensor] = {}
    for name, old in present.items():
        if old.shape != tensors[name].shape:
            raise StorageError(
                f"{name!r} has shape {tuple(tensors[name].shape)} in the saved weights and {tuple(old.shape)} "
                "in the model: the architecture or the plan is not the one that was saved"
            )
        saved = tensors[name].contiguous()
        new[id(old)] = nn.Parameter(saved, old.requires_grad) if isinstance(old, nn.Parameter) else saved
    for module in small.modules():
        for entries in (module._parameters, module._buffers):
            for key, value in list(entries.items()):
                if id(value) in new:
                    entries[key] = new[id(value)]  # type: ignore[assignment]  # of the kind that was there
