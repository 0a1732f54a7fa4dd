"""The verb `export`: a model as files that other people's engines read, each with a certificate."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from ecospa_fx.errors import InputError, StorageError
from ecospa_fx.export.certificate import (
    NAME,
    Certificate,
    certified,
    engine_run,
    weights_digest,
    write_certificate,
)
from ecospa_fx.export.configurations import stock_class
from ecospa_fx.export.tokenizers import copy_tokenizer, tokenizer_folder
from ecospa_fx.export.transformers_folder import TOLERANCE, calls_of, exact_twin, outputs_of, reread, write_checkpoint
from ecospa_fx.huggingface import example_inputs
from ecospa_fx.runtime.guards import leaves_untouched
from ecospa_fx.storage.folder import digest, folder_path, new_folder, refuse_existing
from ecospa_fx.wrappers import unwrapped

Format = Literal["transformers"]


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

    Beside it stands a certificate with the digests of all files, the plan, and how far the engine is off, on inputs
    that it holds; ``ecospa-fx verify`` checks it again.

    Args:
        model: the ``nn.Module``.
        path: a new folder.
        args: not used by this format.
        kwargs: not used by this format.
        format: of the files.
        dtype: type of the weights in the files, by default the one that they have.
        tokenizer: a folder with a tokenizer, or one of transformers; by default the folder that the model was read
            from, if that is known and has one.
        dense: the model before it was made smaller. Its digest, and how far the smaller model is from masking, or from
            the graph where what stays was changed too, go into the certificate.

    Returns:
        The certificate.

    Raises:
        StorageError: the path exists, no configuration describes the model, or a package is missing. Nothing is left
            of what was written.

    Examples:
        >>> export(model, "smaller", format="transformers")  # doctest: +SKIP
        >>> AutoModelForCausalLM.from_pretrained("smaller", trust_remote_code=True)  # doctest: +SKIP
    """
    writers: dict[str, Callable[[Export], Certificate]] = {"transformers": _transformers}
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
