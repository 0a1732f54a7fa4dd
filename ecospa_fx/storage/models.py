"""Saving a shrunk model to a folder and loading it again.

A folder holds ``plan.json``, the weights, ``config.json`` of a Hugging Face model, and ``manifest.json``, which names
every other file with its size and digest and is written last. Loading builds the original architecture, shrinks it
with the plan and reads the weights into it: nothing in the folder is executed. Of a module that ``shrink_`` edited, the
manifest holds the integers that were written, too, so that it comes back as the user's own class.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ecospa_fx.errors import EcospaError, StorageError
from ecospa_fx.example_inputs import blank
from ecospa_fx.huggingface import build, import_transformers
from ecospa_fx.inplace.serialise import apply_saved_edit
from ecospa_fx.origin import ATTRIBUTE, Origin, origin, remember
from ecospa_fx.plan import Plan
from ecospa_fx.rewrite import smaller
from ecospa_fx.storage.folder import (
    CONFIG,
    FORMAT,
    MANIFEST,
    PLAN,
    VERSION,
    digest,
    folder_path,
    is_dense,
    new_folder,
    read_manifest,
    read_weights,
    refuse_existing,
    write_weights,
)
from ecospa_fx.strict_json import strict_json
from ecospa_fx.version import __version__
from ecospa_fx.wrappers import unwrapped

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
    an origin, and what the file system refuses.

    >>> save(small, "smaller")  # doctest: +SKIP
    >>> small = load("smaller")  # doctest: +SKIP
    """
    target, small = folder_path(path), unwrapped(small)
    _check_types(dtypes)
    refuse_existing(target)
    found = origin or getattr(small, ATTRIBUTE, None)
    if not isinstance(found, Origin):
        raise StorageError(
            f"this {type(small).__name__} does not say what it was shrunk from: "
            "pass origin=ecospa_fx.origin.origin(model, plan, args, kwargs)"
        )
    tensors = _all_written(_own_tensors(small, found.buffers), dtypes or {})
    with new_folder(target) as folder:
        (folder / PLAN).write_text(found.plan.to_json(), encoding="utf-8")
        if found.config is not None:
            (folder / CONFIG).write_text(found.config, encoding="utf-8")
        write_weights(folder, tensors)
        (folder / MANIFEST).write_text(json.dumps(_manifest(folder, found, tensors), indent=1), encoding="utf-8")


def _check_types(dtypes: object) -> None:
    """Raise StorageError for what is no mapping from names to types."""
    if dtypes is None:
        return
    if not isinstance(dtypes, Mapping) or not all(isinstance(dtype, torch.dtype) for dtype in dtypes.values()):
        raise StorageError(f"dtypes={dtypes!r:.60} are no types: give a torch.dtype by name of parameter or buffer")


def _own_tensors(small: nn.Module, buffers: Sequence[str]) -> dict[str, Tensor]:
    """Parameters and buffers by first name; buffers that shrinking added follow from the plan and are left out."""
    known = set(buffers)
    found: dict[str, Tensor] = dict(small.named_parameters())
    found.update({name: buffer for name, buffer in small.named_buffers() if name in known})
    return found


def _all_written(tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """Tensors as files hold them, each in memory of its own. Raises StorageError for what no file holds."""
    for name, dtype in dtypes.items():
        if name not in tensors or not isinstance(dtype, torch.dtype) or _sort(dtype) != _sort(tensors[name].dtype):
            raise StorageError(f"dtypes[{name!r}]={dtype!r:.40} fits no tensor of this model: leave it out")
    result: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        written = _written(name, tensor, dtypes.get(name))
        shared = written.numel() > 0 and written.data_ptr() in taken
        result[name] = written.clone() if shared else written
        taken.add(result[name].data_ptr())
    return result


def _written(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A copy only where the type, the device or the layout asks for one, or where the tensor is part of another."""
    if tensor.is_meta:
        raise StorageError("the model is on meta and has no values to save: load its weights first")
    if not is_dense(tensor):
        raise StorageError(
            f"{name!r} is a {type(tensor).__name__} that is not dense: turn it into a plain tensor first"
        )
    found = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous().resolve_conj().resolve_neg()
    whole = found.untyped_storage().nbytes() == found.numel() * found.element_size()
    return found if whole else found.clone()


def _sort(dtype: torch.dtype) -> str:
    """What kind of numbers a type holds: those of one kind can stand for one another."""
    return "float" if dtype.is_floating_point else "complex" if dtype.is_complex else str(dtype)


def _manifest(folder: Path, origin: Origin, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    versions = {"ecospa_fx": __version__, "torch": str(torch.__version__)}
    if origin.config is not None:
        versions["transformers"] = import_transformers().__version__
    files = sorted(folder.iterdir())
    return {
        "format": FORMAT,
        "version": VERSION,
        "versions": versions,
        "class": origin.model_class,
        "attention": origin.attention,
        "training": origin.training,
        "inputs": origin.inputs,
        "integers": origin.integers,
        "dtypes": {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()},
        "files": {f.name: {"bytes": f.stat().st_size, "sha256": digest(f)} for f in files},
    }


# -- loading -----------------------------------------------------------------------------------------------------


def load(
    path: str | os.PathLike[str], model: Callable[[], Any] | None = None, *, dtype: torch.dtype | None = None
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
    folder: Path, model: Callable[[], Any] | None = None, dtype: torch.dtype | None = None
) -> tuple[nn.Module, Any, Any]:
    """(model, args, kwargs): what `load` returns, with the example inputs that it was traced with."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise StorageError(f"dtype={dtype!r:.40} is no floating type: give one like torch.bfloat16")
    manifest = read_manifest(folder)
    plan = _read_plan(folder)
    tensors = read_weights(folder, manifest)
    if dtype is not None:
        weights = {name for name, _ in plan.shapes}
        tensors = {n: t.to(dtype) if n in weights and t.is_floating_point() else t for n, t in tensors.items()}
    dense, args, kwargs = _dense(folder, manifest, model)
    with _fitting(folder):
        small = _filled(dense, plan, args, kwargs, manifest, tensors)
    return small, args, kwargs


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


def _filled(
    dense: nn.Module, plan: Plan, args: Any, kwargs: Any, manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> nn.Module:
    """The dense model shrunk by a plan, or edited as the manifest says, with the saved tensors in it."""

    plan.check(dense)
    if manifest.get("dtypes") is None:
        _refuse_mixtures(dense, tensors)
    dense = _typed(dense, tensors)
    known = replace(origin(dense, plan, args, kwargs), integers=manifest.get("integers"))
    if known.integers is None:
        small = smaller(dense, plan, args, kwargs)
    else:
        small = apply_saved_edit(dense, plan, known.integers, tensors)
    _fill(small, tensors, known.buffers)
    return remember(small, known)


def _read_plan(folder: Path) -> Plan:
    try:
        text = (folder / PLAN).read_bytes()
        strict_json(text)
        return Plan.from_json(text)
    except Exception as error:  # whatever a plan's numbers may lead to
        raise StorageError(f"{folder / PLAN}: {error}") from error


# -- the original architecture -----------------------------------------------------------------------------------


def _dense(folder: Path, manifest: Mapping[str, Any], model: Callable[[], Any] | None) -> tuple[nn.Module, Any, Any]:
    """The original architecture with example inputs, in the mode that it had."""
    made: Any
    if isinstance(model, nn.Module):
        raise StorageError(
            f"model= is a {type(model).__name__} that is built already: pass a function that builds it anew, such as "
            "its class or lambda: Model(…)"
        )
    if model is not None:
        if not callable(model):
            raise StorageError(f"model={model!r:.60} cannot be called: pass a function that returns the original model")
        made = model()
    elif CONFIG in manifest["files"]:
        made = _from_config(folder, manifest)
    else:
        raise StorageError(
            f"{folder} holds a {manifest.get('class')}, which only your code can build: "
            "pass model=, a function that returns the original model"
        )
    args, kwargs = _example(folder, manifest)
    if isinstance(made, tuple | list) and len(made) == 3:
        made, args, kwargs = made
    made = unwrapped(made)
    if not isinstance(made, nn.Module):
        raise StorageError(f"model() returned {type(made).__name__}: it must return an nn.Module")
    if args is None:
        raise StorageError(f"{folder} holds no example inputs: let model() return (model, args, kwargs)")
    if made.training is not bool(manifest.get("training")):
        made = copy.deepcopy(made).train(bool(manifest.get("training")))
    return made, args, kwargs


def _example(folder: Path, manifest: Mapping[str, Any]) -> tuple[Any, Any]:
    """(args, kwargs) of zeros, or (None, None) where none were saved."""
    if manifest.get("inputs") is None:
        return None, None
    try:
        args, kwargs = blank(manifest["inputs"])
        return tuple(args), dict(kwargs)
    except (TypeError, ValueError) as error:
        raise StorageError(f"{folder / MANIFEST} describes no example inputs: save the model again") from error


def _from_config(folder: Path, manifest: Mapping[str, Any]) -> Any:
    """A model of transformers by the class that the manifest names, from its configuration."""
    transformers = import_transformers()
    name = str(manifest.get("class")).rpartition(".")[2]
    kind: Any = getattr(transformers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise StorageError(f"transformers {transformers.__version__} has no model class {name!r}: install another one")
    attention = manifest.get("attention")
    if attention is not None and not (isinstance(attention, str) and attention.isidentifier()):
        raise StorageError(f"{folder / MANIFEST} names an attention implementation {attention!r} outside transformers")
    try:
        described = strict_json((folder / CONFIG).read_text(encoding="utf-8"))
        config: Any = kind.config_class.from_dict(_plain(described))  # type: ignore[attr-defined]
        config.architectures = [name]
        config._attn_implementation = attention
        return build(config, "cpu").train(bool(manifest.get("training")))
    except EcospaError:
        raise
    except Exception as error:
        raise StorageError(f"{folder / CONFIG} does not describe a {name}: {error}") from error


def _plain(described: Any) -> Any:
    """A configuration without the entries that point to code outside of transformers."""
    if not isinstance(described, dict):
        return described
    unwanted = ("auto_map", "_attn_implementation", "attn_implementation", "quantization_config")
    return {key: _plain(value) for key, value in described.items() if not key.startswith(unwanted)}


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
    own: dict[str, Tensor] = {**dict(dense.named_parameters()), **dict(dense.named_buffers())}
    memo: dict[int, Any] = {}
    for name in own.keys() & tensors.keys():
        if _sort(own[name].dtype) != _sort(tensors[name].dtype):
            raise StorageError(f"{name!r} is saved as {tensors[name].dtype} and is {own[name].dtype} in the model")
    for name, old in own.items():
        if name in tensors and (old.dtype != tensors[name].dtype or old.device.type != "cpu"):
            empty = torch.empty(old.shape, dtype=tensors[name].dtype)
            memo[id(old)] = nn.Parameter(empty, old.requires_grad) if isinstance(old, nn.Parameter) else empty
    return copy.deepcopy(dense, memo) if memo else dense


def _fill(small: nn.Module, tensors: Mapping[str, Tensor], buffers: Sequence[str]) -> None:
    """Put the saved tensors in place of those of equal name, everywhere. Raises StorageError unless all fit."""
    own = _own_tensors(small, buffers)
    odd = sorted(own.keys() ^ tensors.keys())
    if odd:
        where = "the saved weights" if odd[0] in tensors else "the model"
        raise StorageError(f"{odd[0]!r} is in {where} only: the architecture is not the one that was saved")
    new: dict[int, Tensor] = {}
    for name, old in own.items():
        if old.shape != tensors[name].shape:
            raise StorageError(
                f"{name!r} has shape {tuple(tensors[name].shape)} in the saved weights and {tuple(old.shape)} "
                "in the model: the architecture or the plan is not the one that was saved"
            )
        saved = tensors[name].contiguous()
        new[id(old)] = nn.Parameter(saved, old.requires_grad) if isinstance(old, nn.Parameter) else saved
    for module in small.modules():
        for place in (module._parameters, module._buffers):
            for key, value in list(place.items()):
                if id(value) in new:
                    place[key] = new[id(value)]  # type: ignore[assignment]  # of the kind that was there
