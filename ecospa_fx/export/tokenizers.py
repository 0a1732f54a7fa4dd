"""The tokenizer that goes along with an exported model: its files are copied as they are."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import nn

from ecospa_fx.errors import InputError

FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "chat_template.json",
    "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
"""What transformers reads tokenizers and processors of images and sounds from."""


@runtime_checkable
class SavesItself(Protocol):
    """A tokenizer or processor of transformers."""

    def save_pretrained(self, folder: Path) -> object: ...


def tokenizer_folder(tokenizer: object, model: nn.Module) -> Path | SavesItself | None:
    """Where the tokenizer is: what was given, or the folder that a model was read from, or None."""
    if tokenizer is None:
        name = getattr(getattr(model, "config", None), "_name_or_path", None)
        return Path(name) if name and has_tokenizer(Path(name)) else None
    if isinstance(tokenizer, SavesItself):
        return tokenizer
    if isinstance(tokenizer, str | os.PathLike):
        path = Path(tokenizer)
        if path.is_dir() and has_tokenizer(path):
            return path
        raise InputError(f"tokenizer={str(path)!r:.80} is no folder with one of {', '.join(FILES[:2])}, …")
    raise InputError(f"tokenizer={tokenizer!r:.60} is no tokenizer: give a folder that has one, or one of transformers")


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a file of a tokenizer or processor."""
    return any((folder / name).is_file() for name in FILES)


def copy_tokenizer(source: Path | SavesItself | None, folder: Path) -> None:
    """Write the files of a tokenizer into a folder."""
    if isinstance(source, Path):
        for name in FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
    elif source is not None:
        source.save_pretrained(folder)
