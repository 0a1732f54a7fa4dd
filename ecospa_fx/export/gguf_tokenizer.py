"""The tokenizer of a GGUF file: byte-level BPE, whose way of splitting text is found by trying."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ecospa_fx.errors import StorageError, warn_caller
from ecospa_fx.export import llama_cpp
from ecospa_fx.export.gguf_parts import import_gguf
from ecospa_fx.export.tokenizers import SavesItself, copy_tokenizer

SPLITS = (
    "gpt-2", "smollm", "llama-bpe", "qwen2", "default", "starcoder", "falcon", "gpt-4o", "tekken", "deepseek-llm",
    "deepseek-coder", "olmo", "dbrx", "command-r", "mpt", "jina-v2-code", "chameleon", "exaone", "qwen35",
)  # fmt: skip
"""llama.cpp's names for how text is split before pairs are merged: the first that gives the same tokens is taken."""

TEXTS = (
    "Hello World! It's 12:45, isn't it? I'LL say we'd 1234567 things at 3.14%.\n\n\nNext   line\t\ttabs  ",
    "def f(x):\n    return {'a': x[0] ** 2}  # no\r\n\r\n    <b>HTML</b> &amp; C:\\path_to//file.txt !!!??? ...",
    "Größe, naïve café, Ελληνικά, Привет мир, 你好世界，こんにちは, مرحبا ١٢٣, हिन्दी, 🚀 e\u0301 ½ ² №5 \u00a0\u3000x",
)
"""Text in which the ways of splitting differ."""

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Kinds of tokens, as GGUF numbers them."""

Tokenizer = Path | SavesItself | None


def add_tokenizer(writer: Any, source: Tokenizer, size: int) -> None:
    """Add a tokenizer to a file. size: rows of the embedding, which may be more than there are tokens.

    Without one a warning says so. Raises StorageError for one that is not written, or that llama.cpp splits otherwise.
    """
    if source is None:
        writer.add_tokenizer_model("none")
        warn_caller(
            "there is no tokenizer beside the model, so that the file takes token numbers only: pass tokenizer=, a "
            "folder that has one"
        )
        return
    with _folder_of(source) as folder:
        entries = _entries(folder)
        _add(writer, folder, entries, size, _split(folder, entries))


def wanted_tokens(source: Tokenizer) -> list[list[int]]:
    """What the tokenizer itself makes of `TEXTS`; nothing without a tokenizer."""
    if source is None:
        return []
    with _folder_of(source) as folder:
        tokenizer = import_module("tokenizers").Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [list(tokenizer.encode(text, add_special_tokens=False).ids) for text in TEXTS]


@contextmanager
def _folder_of(source: Path | SavesItself) -> Iterator[Path]:
    if isinstance(source, Path):
        yield source
        return
    with TemporaryDirectory() as folder:
        copy_tokenizer(source, Path(folder))
        yield Path(folder)


def _entries(folder: Path) -> Mapping[str, Any]:
    """What ``tokenizer.json`` holds, if it is byte-level BPE. Raises StorageError otherwise."""
    path = folder / "tokenizer.json"
    try:
        entries: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        kind, levels = entries["model"]["type"], json.dumps([entries["pre_tokenizer"], entries["decoder"]])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{path} is no tokenizer that can be read ({error}): pass tokenizer=, a folder") from error
    if kind != "BPE" or '"ByteLevel"' not in levels:
        raise StorageError(
            f"{path} is a tokenizer of kind {kind} that is not written into GGUF files, only byte-level BPE is: export "
            "with format='transformers'"
        )
    return entries


def _tokens(entries: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """The text and the kind of every token by its number."""
    texts, kinds = [f"[PAD{number}]" for number in range(size)], [UNUSED] * size
    added = [(t["content"], t["id"], CONTROL if t["special"] else USER_DEFINED) for t in entries["added_tokens"]]
    for text, number, kind in [*((t, i, NORMAL) for t, i in entries["model"]["vocab"].items()), *added]:
        if number >= size:
            raise StorageError(f"the tokenizer has token {number} and the model {size:,}: pass the model's own one")
        texts[number], kinds[number] = text, kind
    return texts, kinds


def _add(writer: Any, folder: Path, entries: Mapping[str, Any], size: int, split: str) -> None:
    texts, kinds = _tokens(entries, size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    import_gguf().SpecialVocab(folder, load_merges=True, n_vocab=size).add_to_gguf(writer, quiet=True)


def _split(folder: Path, entries: Mapping[str, Any]) -> str:
    """The name of the way of splitting with which llama.cpp gives the tokens that the tokenizer itself gives."""
    if not llama_cpp.is_installed():
        raise StorageError(
            "how the tokenizer splits text is found by trying it in llama.cpp, and xllamacpp is not installed: "
            "pip install xllamacpp"
        )
    want = wanted_tokens(folder)
    size = 1 + max([*entries["model"]["vocab"].values(), *(token["id"] for token in entries["added_tokens"])])
    with TemporaryDirectory() as temporary:
        for split in SPLITS:
            path = Path(temporary) / f"{split}.gguf"
            _write_trial(path, folder, entries, size, split)
            try:
                tokens = llama_cpp.run(path, texts=TEXTS)[1]
            except StorageError:  # this llama.cpp does not know the name
                continue
            finally:
                path.unlink()
            if tokens == want:
                return split
    raise StorageError(
        f"llama.cpp splits text in no way as {folder / 'tokenizer.json'} does: export with format='transformers'"
    )


def _write_trial(path: Path, folder: Path, entries: Mapping[str, Any], size: int, split: str) -> None:
    """The smallest model with a tokenizer, to tokenise with."""
    writer, width = import_gguf().GGUFWriter(None, "llama"), 32
    _add(writer, folder, entries, size, split)
    for add in (writer.add_block_count, writer.add_head_count, writer.add_head_count_kv):
        add(1)
    for add in (writer.add_embedding_length, writer.add_feed_forward_length, writer.add_context_length):
        add(width)
    writer.add_layer_norm_rms_eps(1e-5)
    square = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes = {"token_embd": (size, width), "output_norm": (width,), "blk.0.attn_norm": (width,)}
    shapes |= {"blk.0.ffn_norm": (width,), **{f"blk.0.{name}": (width, width) for name in square}}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", torch.zeros(shape).numpy())
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
