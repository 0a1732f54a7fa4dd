"""The folder of a saved model as files: written completely or not at all, and checked before anything in it is used."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from ecospa_fx.errors import StorageError

FORMAT = "ecospa-fx-model"
VERSION = 1
MANIFEST, PLAN, CONFIG = "manifest.json", "plan.json", "config.json"
SAFETENSORS, TORCH = "weights.safetensors", "weights.pt"
FILES = {PLAN, CONFIG, SAFETENSORS, TORCH}
CHUNK = 1 << 24


# -- writing -----------------------------------------------------------------------------------------------------


def refuse_existing(path: str | os.PathLike[str]) -> None:
    """Raise StorageError where a folder cannot be made: something is there, or its parent is not."""
    target = Path(path)
    if target.exists() or target.is_symlink():
        raise StorageError(f"{target} exists already: choose a new folder or remove it first")
    if not target.absolute().parent.is_dir():
        raise StorageError(f"{target.absolute().parent} is not a folder: make it first")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary sibling that becomes `target` at the end, or goes away."""
    partial = target.absolute().parent / f".{target.name}.partial-{uuid4().hex}"
    try:
        partial.mkdir()
    except OSError as error:
        raise StorageError(f"{target} cannot be written: {error}") from error
    try:
        yield partial
        refuse_existing(target)
        partial.rename(target)
    except OSError as error:
        raise StorageError(f"{target} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_weights(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Tensors by name, as safetensors where that is installed, else in torch's format."""
    try:
        from safetensors.torch import save_file
    except ImportError:
        torch.save(tensors, folder / TORCH)
    else:
        save_file(tensors, folder / SAFETENSORS)
        (folder / SAFETENSORS).chmod((folder / PLAN).stat().st_mode)  # it is written for the owner alone


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            found.update(chunk)
    return found.hexdigest()


# -- reading -----------------------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, after every file that it names was checked. Raises StorageError."""
    if not folder.is_dir():
        raise StorageError(f"there is no folder {folder}")
    if not (folder / MANIFEST).is_file():
        raise StorageError(f"{folder} has no {MANIFEST}: it was not saved by ecospa_fx, or not completely")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise StorageError(f"{folder / MANIFEST} is damaged ({error}): save the model again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or not _has_files(manifest.get("files")):
        raise StorageError(f"{folder / MANIFEST} does not describe a model saved by ecospa_fx")
    if manifest.get("version") != VERSION:
        raise StorageError(
            f"{folder} has format version {manifest.get('version')!r} and this library reads version {VERSION}: "
            "load it with the version of ecospa_fx that wrote it"
        )
    for name, entry in manifest["files"].items():
        _check_file(folder / name, entry)
    return manifest


def _has_files(files: object) -> bool:
    """Whether a manifest names a plan and weights, and nothing but files of this format."""
    if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        return False
    return PLAN in files and len({SAFETENSORS, TORCH} & set(files)) == 1 and set(files) <= FILES


def _check_file(path: Path, entry: Mapping[str, Any]) -> None:
    if not path.is_file():
        raise StorageError(f"{path} is missing: copy the whole folder or save the model again")
    if path.stat().st_size != entry.get("bytes"):
        raise StorageError(f"{path} is not as long as it was when saved: copy the folder again or save again")
    if digest(path) != entry.get("sha256"):
        raise StorageError(f"{path} was changed after it was saved: copy the folder again or save again")


def read_weights(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors by name; whatever else a file holds is refused."""
    found: Any
    try:
        if SAFETENSORS in manifest["files"]:
            from safetensors.torch import load_file

            found = load_file(folder / SAFETENSORS)
        else:
            found = torch.load(folder / TORCH, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise StorageError('the package safetensors is not installed: pip install "ecospa-fx[hf]"') from error
    except Exception as error:  # each format raises its own kinds
        raise StorageError(f"the weights in {folder} cannot be read: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise StorageError(f"the weights in {folder} are not tensors by name")
    return found
