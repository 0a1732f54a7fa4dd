"""Checks an export against its certificate: the digest of every file, the weights, the engine on the same inputs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ecospa_fx.errors import StorageError
from ecospa_fx.export import llama_cpp, onnx_file
from ecospa_fx.export.certificate import (
    NAME,
    Certificate,
    EngineRun,
    read_certificate,
    restored,
    sampled,
    weights_digest,
)
from ecospa_fx.export.transformers_folder import code_file, outputs_of, reread
from ecospa_fx.storage.folder import digest, folder_path

TOLERANCE = 1e-3
"""Of an engine's output on another machine, or of another version of it, over the largest number in the output."""


Output = tuple[Tensor | None, tuple[str, ...]]
"""What an engine gives, None where it cannot run here, and what was not checked."""


@dataclass(frozen=True, slots=True)
class Checked:
    """What was checked again of an export."""

    certificate: Certificate
    """The certificate."""
    files: int
    """How many files have their digests."""
    error: float | None
    """How far the engine's output is now from what it was, over its largest number; None where it did not run."""
    notes: tuple[str, ...] = ()
    """What was not checked, and why."""


def check_export(path: str | os.PathLike[str]) -> Checked:
    """Check an exported folder or file against its certificate. Raises StorageError where anything differs."""
    target = folder_path(path)
    certificate = read_certificate(target)
    if target.is_dir():
        _refuse_strangers(target, certificate)
    if certificate.engine is None:
        return Checked(certificate, len(certificate.files), None, ("the engine was not run when this was exported",))
    run = RUNNERS.get(certificate.export)
    if run is None:
        raise StorageError(f"{target} is an export as {certificate.export!r:.40}, which this version does not know")
    output, notes = run(target, certificate, certificate.engine)
    if output is None:
        return Checked(certificate, len(certificate.files), None, notes)
    error = _distance(sampled(output), certificate.engine)
    if not error <= TOLERANCE:
        raise StorageError(
            f"{target} gives other numbers than when it was exported, by {error:.1e} of the largest one: export the "
            "model again, or check it with the versions that its certificate names"
        )
    return Checked(certificate, len(certificate.files), error, notes)


def _refuse_strangers(folder: Path, certificate: Certificate) -> None:
    """Raise StorageError where a folder holds code that its certificate does not name."""
    for file in sorted(folder.rglob("*")):
        if file.suffix in (".py", ".so", ".bin", ".pt", ".pkl") and file.name not in certificate.files:
            raise StorageError(f"{file} may hold code and was not exported: remove it, or do not load this folder")


def _distance(outputs: tuple[float, ...], engine: EngineRun) -> float:
    if len(outputs) != len(engine.outputs):
        return float("inf")
    pairs = zip(outputs, engine.outputs, strict=True)
    return max(abs(a - b) for a, b in pairs) / max(engine.largest_output, 1e-12)


def _run_transformers(
    folder: Path, certificate: Certificate, engine: EngineRun
) -> tuple[Tensor | None, tuple[str, ...]]:
    """The output of the model in a folder. The modelling file that runs is this library's, whatever the folder has."""
    notes: tuple[str, ...] = ()
    if certificate.code is not None and certificate.code != digest(code_file()):
        notes = ("the modelling file is that of another version of ecospa_fx, and was not run: this version's was",)
    try:
        (kind,) = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"]
        model = reread(folder, kind, heterogeneous=certificate.code is not None)
        output = outputs_of(model, restored(engine.inputs))[0]
    except StorageError:
        raise
    except Exception as error:  # transformers says in many ways that it cannot read a folder
        raise StorageError(f"{folder} cannot be loaded ({type(error).__name__}: {error})") from error
    if weights_digest(model) != certificate.weights:
        raise StorageError(f"{folder} has other weights than its {NAME} says: export the model again")
    return output, notes


def _run_llama_cpp(file: Path, certificate: Certificate, engine: EngineRun) -> Output:
    """The logits that llama.cpp gives, decoding one token at a time."""
    if not llama_cpp.is_installed():
        return None, ("llama.cpp was not run: pip install xllamacpp",)
    ids = restored(engine.inputs)["input_ids"]
    return llama_cpp.run(file, ids[0].tolist())[0], ()


def _run_onnx(file: Path, certificate: Certificate, engine: EngineRun) -> Output:
    """The first output of ONNX Runtime."""
    if not onnx_file.is_installed():
        return None, ("ONNX Runtime was not run: pip install onnxruntime",)
    inputs = [value for value in restored(engine.inputs).values() if isinstance(value, Tensor)]
    return onnx_file.run(file, inputs), ()


RUNNERS: dict[str, Callable[[Path, Certificate, EngineRun], Output]] = {
    "transformers": _run_transformers,
    "gguf": _run_llama_cpp,
    "onnx": _run_onnx,
}
"""How the engine of each format is run."""
