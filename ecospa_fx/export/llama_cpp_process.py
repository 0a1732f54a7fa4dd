"""Runs llama.cpp on a GGUF file, in a process of its own, which may end where a file is wrong: needs xllamacpp, NumPy.

    python llama_cpp_process.py FILE OUTPUT.npy    # {"tokens": [...], "texts": [...]} on the standard input

Decodes the tokens one by one with the cache, and writes their logits, float32 [tokens, vocabulary]; prints the tokens
of each text as JSON. Exit status 3 where the file cannot be loaded.
"""

from __future__ import annotations

import ctypes
import json
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy

LARGEST = 1024
"""Bytes that every structure of parameters fits into; they are passed on as the library fills them."""


class OpaqueParameters(ctypes.Structure):
    """OpaqueParameters of a model or a context, whose fields nobody here knows."""

    _fields_ = (("bytes", ctypes.c_uint8 * LARGEST),)


class Batch(ctypes.Structure):
    """Tokens to decode: ``llama_batch``."""

    _fields_ = (
        ("count", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("tokens", "embeddings", "positions", "counts", "sequences", "wanted")),
    )


def library() -> ctypes.CDLL:
    """The library in xllamacpp, with the types of the functions that are called."""
    spec = find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        raise SystemExit("xllamacpp is not installed")
    (path,) = (p for p in Path(spec.origin).parent.iterdir() if p.name.startswith("xllamacpp.") and p.suffix != ".py")
    lib = ctypes.CDLL(str(path))
    pointer, integer = ctypes.c_void_p, ctypes.c_int32
    for name, result, arguments in (
        ("llama_backend_init", None, ()),
        ("llama_model_default_params", OpaqueParameters, ()),
        ("llama_context_default_params", OpaqueParameters, ()),
        ("llama_model_load_from_file", pointer, (ctypes.c_char_p, OpaqueParameters)),
        ("llama_init_from_model", pointer, (pointer, OpaqueParameters)),
        ("llama_batch_get_one", Batch, (pointer, integer)),
        ("llama_decode", integer, (pointer, Batch)),
        ("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), (pointer, integer)),
        ("llama_model_get_vocab", pointer, (pointer,)),
        ("llama_vocab_n_tokens", integer, (pointer,)),
        (
            "llama_tokenize",
            integer,
            (pointer, ctypes.c_char_p, integer, pointer, integer, ctypes.c_bool, ctypes.c_bool),
        ),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


def logits(lib: ctypes.CDLL, model: int, tokens: list[int]) -> numpy.ndarray:
    """The logits after each token."""
    context = lib.llama_init_from_model(model, lib.llama_context_default_params())
    size, rows = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model)), []
    for token in tokens:
        entry = numpy.array([token], numpy.int32)
        if lib.llama_decode(context, lib.llama_batch_get_one(entry.ctypes.data, 1)):
            raise SystemExit(f"llama.cpp cannot decode token {token}")
        rows.append(numpy.ctypeslib.as_array(lib.llama_get_logits_ith(context, -1), (size,)).copy())
    return numpy.stack(rows) if rows else numpy.zeros((0, size), numpy.float32)


def tokenised(lib: ctypes.CDLL, model: int, text: str) -> list[int]:
    """The tokens of a text, without special ones around it."""
    raw = text.encode()
    buffer = numpy.zeros(len(raw) + 16, numpy.int32)
    vocabulary = lib.llama_model_get_vocab(model)
    count = lib.llama_tokenize(vocabulary, raw, len(raw), buffer.ctypes.data, len(buffer), False, False)
    return [int(token) for token in buffer[:count]]


def main() -> int:
    """Run the job on the standard input."""
    job = json.load(sys.stdin)
    lib = library()
    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(sys.argv[1].encode(), lib.llama_model_default_params())
    if not model:
        return 3
    numpy.save(sys.argv[2], logits(lib, model, job["tokens"]))
    sys.stdout.write(json.dumps([tokenised(lib, model, text) for text in job["texts"]]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
