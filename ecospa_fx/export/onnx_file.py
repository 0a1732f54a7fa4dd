"""Writes a model as an ONNX file through ``torch.onnx.export``, and runs it with ONNX Runtime."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ecospa_fx.errors import CaptureError, StorageError
from ecospa_fx.ir.tracing import quiet
from ecospa_fx.module_modes import modes_restored, set_mode
from ecospa_fx.snapshot import untouched

NEEDED = ("onnx", "onnxscript")

LARGEST = 1_500_000_000
"""Bytes of weights in one file; a larger model has them in a second one, as the format of the first has a limit."""


def data_path(path: Path) -> Path:
    """The second file, which weights are in where they are large."""
    return path.with_name(f"{path.name}.data")


def is_large(model: nn.Module) -> bool:
    """Whether a model's weights go into a second file."""
    return sum(p.numel() * p.element_size() for p in model.parameters()) > LARGEST


def write_onnx(path: Path, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Write a model, whose axes of inputs may then have other sizes wherever its code allows it.

    Raises StorageError where a package is missing, CaptureError where the model cannot be exported.
    """
    for name in NEEDED:
        if find_spec(name) is None:
            raise StorageError(f'{name} is not installed: pip install "ecospa-fx[onnx]"')
    shapes = pytree.tree_map(_dynamic, (tuple(args), dict(kwargs)))
    with untouched(model, traced=True), modes_restored(model), torch.no_grad(), warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        set_mode(False, model)
        try:
            torch.onnx.export(
                model,
                tuple(args),
                path,
                kwargs=dict(kwargs),
                dynamo=True,
                dynamic_shapes=_by_name(shapes),
                external_data=is_large(model),
                verbose=False,
            )
        except Exception as error:  # whatever the exporter of torch raises
            first = str(error).strip().partition("\n")[0]
            raise CaptureError(
                f"torch.onnx.export cannot export {type(model).__name__} ({type(error).__name__}: {first:.200}): use "
                "another format"
            ) from error


def _dynamic(leaf: object) -> dict[int, Any] | None:
    return dict.fromkeys(range(leaf.dim()), torch.export.Dim.AUTO) if isinstance(leaf, Tensor) else None


def _by_name(shapes: Any) -> Any:
    args, kwargs = shapes
    return kwargs if not args else args if not kwargs else (args, kwargs)


def is_installed() -> bool:
    """Whether ONNX Runtime can be run here."""
    return find_spec("onnxruntime") is not None


def run(path: Path, tensors: Sequence[Tensor]) -> Tensor:
    """The first output of a file for some inputs, in their order. Raises StorageError where it cannot be read."""
    runtime = import_module("onnxruntime")
    try:
        session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
        inputs = {entry.name: tensor.cpu().numpy() for entry, tensor in zip(session.get_inputs(), tensors, strict=True)}
        return torch.from_numpy(session.run(None, inputs)[0])
    except Exception as error:  # ONNX Runtime has no class for its errors
        raise StorageError(f"ONNX Runtime does not run {path.name}: {str(error).partition(chr(10))[0]:.200}") from error
