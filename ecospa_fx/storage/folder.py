"""The folder of a saved model: written completely or not at all, and every file checked by its digest on reading."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

import torch
from torch import Tensor, nn

from ecospa_fx.errors import EcospaError, StorageError
from ecospa_fx.storage.manifest import MANIFEST, PLAN, SAFETENSORS, TORCH, FileEntry, Manifest, parse_manifest

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

CHUNK = 1 << 24
ABANDONED = 3600.0
"""Seconds after which a partial folder that nobody locks is left over, whoever made it."""


# -- writing -----------------------------------------------------------------------------------------------------


def folder_path(path: str | os.PathLike[str]) -> Path:
    """A path that the file system can look up. Raises StorageError for anything else."""
    try:
        text = os.fspath(path)
        if not isinstance(text, str):
            raise TypeError(f"it is {type(text).__name__}")
        with suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(text)
        return Path(text)
    except (TypeError, ValueError, OSError) as error:
        raise StorageError(f"{path!r:.80} is no path of a folder ({error}): give a text or a Path") from error


def refuse_existing(path: str | os.PathLike[str]) -> None:
    """Raise StorageError where a folder cannot be made: something is there, or its parent is not."""
    target = folder_path(path)
    if target.exists() or target.is_symlink():
        raise StorageError(f"{target} exists already: choose a new folder or remove it first")
    if not target.absolute().parent.is_dir():
        raise StorageError(f"{target.absolute().parent} is not a folder: make it first")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary sibling that becomes `target` at the end, or goes away.

    It is locked while this process writes into it; what processes left that were killed is cleared away first.
    """
    with _partial_folder(target) as partial:
        yield partial
        refuse_existing(target)
        partial.rename(target)


@contextmanager
def new_files(targets: Sequence[Path]) -> Iterator[Path]:
    """A temporary folder whose files become `targets`, siblings of each other, at the end; or it goes away."""
    with _partial_folder(targets[0]) as partial:
        yield partial
        for target in targets:
            refuse_existing(target)
        moved: list[Path] = []
        try:
            for target in targets:
                (partial / target.name).rename(target)
                moved.append(target)
        except BaseException:
            for target in moved:
                target.unlink(missing_ok=True)
            raise


@contextmanager
def _partial_folder(target: Path) -> Iterator[Path]:
    stem = f".{target.name[:100]}.partial-"
    partial, lock = target.absolute().parent / f"{stem}{os.getpid()}-{uuid4().hex}", None
    try:
        _clear(partial.parent, stem)
        partial.mkdir()
        lock = _locked(partial, wait=True)
        yield partial
    except EcospaError:
        raise
    except Exception as error:  # writers of weights raise their own kinds where the disk is full
        raise StorageError(f"{target} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _clear(parent: Path, stem: str) -> None:
    """Remove partial folders of the same target whose makers are gone."""
    for folder in parent.iterdir():
        if folder.name.startswith(stem) and folder.is_dir() and not folder.is_symlink() and _left(folder, stem):
            shutil.rmtree(folder, ignore_errors=True)


def _left(folder: Path, stem: str) -> bool:
    """Whether nobody writes into a partial folder any more: it is not locked, and its maker is dead, or it is old."""
    try:
        lock = _locked(folder)
        old = time.time() - folder.stat().st_mtime > ABANDONED
    except OSError:  # somebody holds it, or has just removed it
        return False
    if lock is not None:
        os.close(lock)
    maker = folder.name.removeprefix(stem).partition("-")[0]
    return old or (lock is not None and maker.isdecimal() and not _alive(int(maker)))


def _locked(folder: Path, wait: bool = False) -> int | None:
    """A descriptor that holds a folder's lock; None where there are no locks. Raises OSError where another has it."""
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        os.close(descriptor)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        return None  # a file system without locks
    return descriptor


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass
    return True


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
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            sha256.update(chunk)
    return sha256.hexdigest()


# -- reading -----------------------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> Manifest:
    """The manifest, after every file that it names was checked. Raises StorageError."""
    if not folder.is_dir():
        raise StorageError(f"there is no folder {folder}")
    if not (folder / MANIFEST).is_file():
        raise StorageError(f"{folder} has no {MANIFEST}: it was not saved by ecospa_fx, or not completely")
    manifest = parse_manifest(folder)
    check_files(folder, manifest.files)
    return manifest


def check_files(folder: Path, files: Mapping[str, FileEntry]) -> None:
    """Raise StorageError unless every file of a folder is there, as long as it was and with its digest."""
    for name, entry in files.items():
        _check_file(folder / name, entry)


def _check_file(path: Path, entry: FileEntry) -> None:
    try:
        if not path.is_file():
            raise StorageError(f"{path} is missing: copy the whole folder or save the model again")
        if path.stat().st_size != entry.bytes:
            raise StorageError(f"{path} is not as long as it was when saved: copy the folder again or save again")
        if digest(path) != entry.sha256:
            raise StorageError(f"{path} was changed after it was saved: copy the folder again or save again")
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error}") from error


ALIGNMENT = 64
"""Bytes: that of memory which torch allocates."""


def read_weights(folder: Path, manifest: Manifest) -> dict[str, Tensor]:
    """Dense tensors by name, of the types that the manifest names; whatever else a file holds is refused."""
    tensors: object
    try:
        if SAFETENSORS in manifest.files:
            from safetensors.torch import load_file

            tensors = load_file(folder / SAFETENSORS)
        else:
            tensors = torch.load(folder / TORCH, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise StorageError('the package safetensors is not installed: pip install "ecospa-fx[hf]"') from error
    except Exception as error:  # each format raises its own kinds
        damage = f"they are damaged or hold something else than tensors ({type(error).__name__})"
        raise StorageError(f"the weights in {folder} cannot be read: {damage}") from error
    if not isinstance(tensors, dict) or not all(type(n) is str and isinstance(t, Tensor) for n, t in tensors.items()):
        raise StorageError(f"the weights in {folder} are not tensors by name")
    dtypes = manifest.dtypes
    for name, tensor in tensors.items():
        if not is_dense(tensor) or tensor.device.type != "cpu":
            raise StorageError(f"{name!r} in {folder} is no dense tensor with values: save the model again")
        if dtypes is not None and dtypes.get(name) != str(tensor.dtype).removeprefix("torch."):
            raise StorageError(f"{name!r} in {folder} has another type than when it was saved: save the model again")
    return {name: aligned(tensor.detach()) for name, tensor in tensors.items()}


def aligned(tensor: Tensor) -> Tensor:
    """The tensor where torch would have put it: products with matrices that begin elsewhere round otherwise.

    Files pack tensors without gaps, and what is read from one may be a map of it.
    """
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor is a plain one, with a value in memory for each of its elements."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    return plain and not (tensor.is_quantized or tensor.is_nested)
