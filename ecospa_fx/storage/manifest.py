"""The manifest of a saved model: a JSON file that describes the model and names every other file with its digest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ecospa_fx.errors import StorageError
from ecospa_fx.strict_json import FieldError, from_plain, strict_json, to_plain

FORMAT = "ecospa-fx-model"
VERSION = 1
MANIFEST, PLAN, CONFIG = "manifest.json", "plan.json", "config.json"
SAFETENSORS, TORCH = "weights.safetensors", "weights.pt"
FILES = {PLAN, CONFIG, SAFETENSORS, TORCH}


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a saved model."""

    bytes: int
    """Its length."""
    sha256: str
    """Its digest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What ``manifest.json`` holds, field by field."""

    format: str = FORMAT
    """What kind of folder this is."""
    version: int = VERSION
    """Of the format."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of the packages that wrote the folder, by name."""
    model_class: str = field(metadata={"key": "class"})
    """Qualified name of the original model's class."""
    attention: str | None = None
    """The attention implementation of a transformers model."""
    training: bool
    """Whether the model was shrunk in training mode."""
    inputs: object = None
    """Example inputs without their values, see `ecospa_fx.example_inputs`; None: not saved."""
    integers: object = None
    """The integers that `shrink_` wrote into the module; None for a graph."""
    dtypes: Mapping[str, str] | None = None
    """The type of every saved tensor by name; None in folders of older versions."""
    files: Mapping[str, FileEntry]
    """Every other file of the folder by name."""


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, which is the last file of a folder."""
    (folder / MANIFEST).write_text(json.dumps(to_plain(manifest), indent=1), encoding="utf-8")


def parse_manifest(folder: Path) -> Manifest:
    """Read the manifest. Raises StorageError for anything that `write_manifest` did not write."""
    try:
        entries = strict_json((folder / MANIFEST).read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise StorageError(f"{folder / MANIFEST} is damaged ({error}): save the model again") from error
    if not isinstance(entries, dict) or entries.get("format") != FORMAT or not _names_files(entries.get("files")):
        raise StorageError(f"{folder / MANIFEST} does not describe a model saved by ecospa_fx")
    if type(entries.get("version")) is not int or entries["version"] != VERSION:
        raise StorageError(
            f"{folder} has format version {entries.get('version')!r:.40} and this library reads version {VERSION}: "
            "load it with the version of ecospa_fx that wrote it"
        )
    try:
        return from_plain(Manifest, entries)
    except (KeyError, FieldError) as error:
        key = error.key if isinstance(error, FieldError) else error.args[0]
        raise StorageError(f"{folder / MANIFEST} holds {entries.get(key)!r:.40} as {key!r}: save it again") from error


def _names_files(files: object) -> bool:
    """Whether a manifest names a plan and weights, and nothing but files of this format."""
    if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        return False
    return PLAN in files and len({SAFETENSORS, TORCH} & set(files)) == 1 and set(files) <= FILES
