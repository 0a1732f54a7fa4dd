"""The verb `export`: a model as files that other people's engines read, each with a certificate."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ecospa_fx.errors import InputError, StorageError
from ecospa_fx.export import llama_cpp, onnx_file
from ecospa_fx.export.certificate import (
    NAME,
    Certificate,
    EngineRun,
    certificate_path,
    certified,
    engine_run,
    weights_digest,
    write_certificate,
)
from ecospa_fx.export.configurations import stock_class
from ecospa_fx.export.gguf_file import TYPES, as_stored, reader_for, write_gguf
from ecospa_fx.export.gguf_parts import computed, import_gguf, parts_of
from ecospa_fx.export.gguf_tokenizer import TEXTS, add_tokenizer, wanted_tokens
from ecospa_fx.export.tokenizers import copy_tokenizer, tokenizer_folder
from ecospa_fx.export.transformers_folder import TOLERANCE, calls_of, exact_twin, outputs_of, reread, write_checkpoint
from ecospa_fx.huggingface import example_inputs
from ecospa_fx.runtime.guards import leaves_untouched
from ecospa_fx.storage.folder import digest, folder_path, new_files, new_folder, refuse_existing
from ecospa_fx.wrappers import unwrapped

Format = Literal["transformers", "gguf", "onnx"]

LENGTH = 64
"""Tokens that llama.cpp decodes, one at a time."""

LLAMA_CPP_LIMIT = {"F32": 0.05, "F16": 0.05, "BF16": 0.05, "Q8_0": 0.25}
"""Largest error of llama.cpp over the largest number, by how weights are stored."""

SENSITIVITY = 4.0
"""How many times the error that rounding alone makes, in torch, may be llama.cpp's: badly pruned models multiply it."""

ONNX_LIMIT = {torch.float64: 1e-3, torch.float32: 1e-3}
"""The same of ONNX Runtime, by the type of the output; in shorter types 0.05."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """What is asked for."""

    model: Any
    """The module, without wrappers around it."""
    target: Path
    """The folder or file to write."""
    args: tuple[Any, ...]
    """Example inputs by position."""
    kwargs: dict[str, Any]
    """Example inputs by name."""
    dtype: torch.dtype | str | None
    """The type of the weights in the files; None: the one that they have."""
    tokenizer: object
    """A folder or an object that saves itself; None: the folder that the model was read from."""
    dense: nn.Module | None
    """The model before it was made smaller."""


@leaves_untouched(calls=True)
def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    format: Format,
    dtype: torch.dtype | str | None = None,
    tokenizer: object = None,
    dense: nn.Module | None = None,
) -> Certificate:
    """Write a model, as a rule one that `shrink_` made smaller, as files that other engines load. It is not changed.

    ``format="transformers"`` makes a folder for ``from_pretrained``: configuration, weights, tokenizer and generation
    settings. Where all layers have the same widths, nothing in it is special. Where they differ, ``config.json`` has a
    `per_layer_config`, for transformers 5.14 or newer, and the folder one modelling file, the same for every
    architecture, that builds each layer from its own part: load it with ``trust_remote_code=True``. Which fields carry
    the widths is found by trying, and proven: a model that is built from them gives the same numbers.

    ``format="gguf"`` makes a file for llama.cpp and what is built on it, such as Ollama. `dtype` may then be "q8_0",
    too. Where layers differ in width, it is written for one of the readers that take a width per layer, if the model
    computes what they do. Where llama.cpp is installed (``pip install xllamacpp``), the file is run before it gets its
    name.

    ``format="onnx"`` makes a file through ``torch.onnx.export``, of modules of any class and of graphs; its inputs may
    have other sizes wherever the code allows it.

    Beside it stands a certificate with the digests of all files, the plan, and how far the engine is off, on inputs
    that it holds; ``ecospa-fx verify`` checks it again.

    Args:
        model: the ``nn.Module``.
        path: a new folder, or for one file its name.
        args: tuple of positional example inputs, for ONNX; by default those that a model of transformers takes.
        kwargs: mapping of example inputs by name, for ONNX.
        format: of the files.
        dtype: type of the weights in the files, by default the one that they have.
        tokenizer: a folder with a tokenizer, or one of transformers; by default the folder that the model was read
            from, if that is known and has one.
        dense: the model before it was made smaller. Its digest, and how far the smaller model is from masking, or from
            the graph where what stays was changed too, go into the certificate.

    Returns:
        The certificate.

    Raises:
        CaptureError: ``torch.onnx.export`` cannot export the model.
        StorageError: the path exists, the format cannot carry the model, or a package is missing. Nothing is left
            of what was written.

    Examples:
        >>> export(model, "smaller", format="transformers")  # doctest: +SKIP
        >>> AutoModelForCausalLM.from_pretrained("smaller", trust_remote_code=True)  # doctest: +SKIP
        >>> export(model, "smaller.gguf", format="gguf", dtype="q8_0")  # doctest: +SKIP
        >>> export(small, "smaller.onnx", (x,), format="onnx")  # doctest: +SKIP
    """
    writers: dict[str, Callable[[Export], Certificate]] = {"transformers": _transformers, "gguf": _gguf, "onnx": _onnx}
    if format not in writers:
        raise InputError(f"format={format!r:.40} is unknown: give {' or '.join(map(repr, get_args(Format)))}")
    target = folder_path(path)
    refuse_existing(target)
    inside = unwrapped(model)
    for name, parameter in inside.named_parameters():
        if parameter.is_meta:
            raise StorageError(f"parameter {name!r} is on meta and has no values: load the weights first")
    return writers[format](
        Export(
            model=inside,
            target=target,
            args=tuple(args),
            kwargs=dict(kwargs or {}),
            dtype=dtype,
            tokenizer=tokenizer,
            dense=None if dense is None else unwrapped(dense),
        )
    )


def _transformers(asked: Export) -> Certificate:
    model, dtype = asked.model, asked.dtype
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise InputError(f"dtype={dtype!r:.40} is no floating type: give one like torch.bfloat16")
    source = tokenizer_folder(asked.tokenizer, model)
    stock_class(model)
    call = example_inputs(model)
    twin: Any = exact_twin(model, calls_of(call))
    (want, *_) = outputs_of(model, call)
    if dtype is not None:
        twin.to(dtype)
    with new_folder(asked.target) as folder:
        code = write_checkpoint(twin, folder)
        copy_tokenizer(source, folder)
        certificate = certified(model, "transformers", folder, dense=asked.dense, call=call)
        read = reread(folder, type(twin).__name__, heterogeneous=code is not None).to(want.device)
        (got, *_) = outputs_of(read, call)
        run = engine_run("transformers", call, got, want)
        limit = TOLERANCE.get(want.dtype, 0.02) * run.largest_output
        if dtype is None and not run.largest_error <= limit:
            raise StorageError(
                f"the checkpoint, loaded again, is off by {run.largest_error:.1e}, so it was not kept: save the model "
                "with ecospa_fx.save"
            )
        certificate = replace(
            certificate,
            weights=weights_digest(read),
            engine=run,
            code=None if code is None else digest(code),
        )
        write_certificate(folder / NAME, certificate)
    return certificate


def _gguf(asked: Export) -> Certificate:
    model, beside = asked.model, certificate_path(asked.target)
    refuse_existing(beside)
    if not hasattr(model, "config"):
        raise StorageError(
            f"a {type(model).__name__} has no configuration, which GGUF files take settings from: export a causal "
            "language model of transformers"
        )
    stored = asked.dtype or next(model.parameters()).dtype
    if stored not in TYPES:
        raise InputError(f"dtype={stored!r:.40} is no type of GGUF files: give one of {', '.join(map(str, TYPES))}")
    kind = TYPES[stored]
    gguf, source, config = import_gguf(), tokenizer_folder(asked.tokenizer, model), model.config.get_text_config()
    ids = torch.randint(config.vocab_size, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    ids = ids[:, : config.max_position_embeddings]
    wide = model if next(model.parameters()).dtype in (torch.float32, torch.float64) else copy.deepcopy(model).float()
    (want, *_) = outputs_of(wide, {"input_ids": ids.to(model.device), "use_cache": False})
    want = want.cpu()
    parts = parts_of(wide, ids, want)
    reader = reader_for(parts)
    context = min(n for n in (config.max_position_embeddings, getattr(config, "sliding_window", None)) if n)
    with new_files([asked.target, beside]) as folder:
        file = folder / asked.target.name
        writer = gguf.GGUFWriter(None, reader.name)
        add_tokenizer(writer, source, want.shape[-1])
        write_gguf(file, writer, parts, reader, kind=kind, context=context)
        writer.close()
        certificate = certified(model, "gguf", folder, dense=asked.dense, call={"input_ids": ids, "use_cache": False})
        if llama_cpp.is_installed():
            rounded = computed(as_stored(parts, kind), ids, half_cache=True)
            limit = LLAMA_CPP_LIMIT[kind] * float(want.abs().max())
            limit = max(limit, SENSITIVITY * float((rounded - want).abs().max()))
            certificate = replace(certificate, engine=_checked_run(file, ids, want, limit, wanted_tokens(source)))
        write_certificate(folder / beside.name, certificate)
    return certificate


def _checked_run(file: Path, ids: Tensor, want: Tensor, limit: float, tokens: list[list[int]]) -> EngineRun:
    """What llama.cpp makes of a file. Raises StorageError where that is something else than the model."""
    got, split = llama_cpp.run(file, ids[0].tolist(), TEXTS if tokens else ())
    run = engine_run("xllamacpp", {"input_ids": ids}, got[None], want)
    if not run.largest_error <= limit or split != tokens:
        what = f"other numbers, by {run.largest_error:.1e}" if split == tokens else "other tokens"
        raise StorageError(f"llama.cpp gives {what} than the model, so the file was not kept: export to another format")
    return run


def _onnx(asked: Export) -> Certificate:
    model, beside, args, kwargs = asked.model, certificate_path(asked.target), asked.args, asked.kwargs
    if asked.dtype is not None:
        raise InputError(f"dtype={asked.dtype!r:.40} is not taken by ONNX: bring the model to that type before")
    if not args and not kwargs:
        if not hasattr(model, "main_input_name"):
            raise InputError(
                f"ONNX needs example inputs of a {type(model).__name__}: pass args and kwargs, as to the model itself"
            )
        kwargs = example_inputs(model)
    targets = [asked.target, beside, *([onnx_file.data_path(asked.target)] if onnx_file.is_large(model) else [])]
    for target in targets:
        refuse_existing(target)
    call = {**{f"args[{number}]": value for number, value in enumerate(args)}, **kwargs}
    (want, *_) = outputs_of(model, kwargs, args)
    with new_files(targets) as folder:
        file = folder / asked.target.name
        onnx_file.write_onnx(file, model, args, kwargs)
        certificate = certified(model, "onnx", folder, dense=None if args else asked.dense, call=call)
        if onnx_file.is_installed():
            got = onnx_file.run(file, [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, Tensor)])
            run = engine_run("onnxruntime", call, got, want)
            if not run.largest_error <= ONNX_LIMIT.get(want.dtype, 0.05) * run.largest_output:
                raise StorageError(
                    f"ONNX Runtime gives other numbers than the model, by {run.largest_error:.1e}, so the file was not "
                    "kept: export to another format"
                )
            certificate = replace(certificate, engine=run)
        write_certificate(folder / beside.name, certificate)
    return certificate
