"""The certificate beside every export: what was exported, from what, by which versions, how far the engine is off.

It stands as ``certificate.json`` in a folder, and as ``NAME.certificate.json`` beside a file.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ecospa_fx.errors import StorageError
from ecospa_fx.origin import ATTRIBUTE, Origin
from ecospa_fx.plan import Plan
from ecospa_fx.relative_error import relative_error
from ecospa_fx.rewrite import smaller
from ecospa_fx.storage.folder import check_files, digest
from ecospa_fx.storage.manifest import FileEntry
from ecospa_fx.strict_json import FieldError, from_plain, strict_json, to_plain
from ecospa_fx.verify import masked_error
from ecospa_fx.version import __version__

NAME, KIND, VERSION = "certificate.json", "ecospa-fx-certificate", 1
SAMPLES = 64
"""Numbers of the output that a certificate keeps, evenly spread."""

PACKAGES = ("torch", "transformers", "safetensors", "gguf", "xllamacpp", "onnx", "onnxruntime")

Call = Mapping[str, object]
"""Arguments by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exactness:
    """How far the exported module is from what its plan means."""

    against: Literal["masking", "graph"]
    """The masked dense model; where what stays was changed too, the smaller graph with the same weights."""
    error: float
    """The largest relative one, see `ecospa_fx.verify.masked_error`."""
    dtype: str
    """The type that both were computed in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRun:
    """What an engine made of the exported files, on inputs that can be run again."""

    engine: str
    """The package that ran, with its version."""
    inputs: object
    """Tensors by name, see `described`."""
    largest_error: float
    """Of any number in the output, against the module that was exported in the type that it has."""
    largest_output: float
    """Of any number in the output, by absolute value."""
    outputs: tuple[float, ...]
    """Some numbers of the engine's output, evenly spread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """What ``certificate.json`` holds, field by field."""

    format: str = KIND
    """What kind of file this is."""
    version: int = VERSION
    """Of the format."""
    export: str
    """The format of the export: transformers, gguf or onnx."""
    versions: Mapping[str, str]
    """Of the packages that took part, by name."""
    model_class: str = field(metadata={"key": "class"})
    """Qualified name of the class of the exported model."""
    weights: str
    """Digest of the exported model's parameters, see `weights_digest`."""
    dense_weights: str | None = None
    """Digest of the dense model's parameters; None where it was not given."""
    plan: object = None
    """What was removed, as JSON; None where the model does not say."""
    exactness: Exactness | None = None
    """None where the dense model was not given."""
    engine: EngineRun | None = None
    """None where the engine is not installed."""
    code: str | None = None
    """Digest of the modelling file, the only code in a folder; None where there is none."""
    files: Mapping[str, FileEntry]
    """Every other file of the export by name."""


def certificate_path(target: Path) -> Path:
    """Where the certificate of an export stands: in its folder, or beside its file."""
    return target / NAME if target.is_dir() else target.with_name(f"{target.name}.{NAME}")


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over the names, types, shapes and bytes of a model's parameters, in the order of their names."""
    sha256 = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        tensor = parameter.detach().to("cpu").contiguous()
        sha256.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha256.update(tensor.view(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return sha256.hexdigest()


def certified(model: nn.Module, export: str, folder: Path, *, dense: nn.Module | None, call: Call) -> Certificate:
    """The certificate of the files in a folder, without what the engine makes of them.

    call: arguments by name, on which the model is compared with the dense one.
    """
    source = getattr(model, ATTRIBUTE, None)
    plan = source.plan if isinstance(source, Origin) else None
    return Certificate(
        export=export,
        versions={"ecospa_fx": __version__, **{name: v for name in PACKAGES if (v := _version(name))}},
        model_class=f"{type(model).__module__}.{type(model).__qualname__}",
        weights=weights_digest(model),
        dense_weights=None if dense is None else weights_digest(dense),
        plan=None if plan is None else json.loads(plan.to_json()),
        exactness=None if dense is None or plan is None else exactness_of(dense, model, plan, call),
        files={file.name: FileEntry(file.stat().st_size, digest(file)) for file in sorted(folder.iterdir())},
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


# -- exactness ---------------------------------------------------------------------------------------------------


def exactness_of(dense: nn.Module, model: nn.Module, plan: Plan, call: Call) -> Exactness:
    """How far a smaller module is from masking; from the graph, where more than removal made its weights.

    In float64 where both models run in it, otherwise in float32.
    """
    plan.check(dense)
    for dtype in (torch.float64, torch.float32):
        big, small = (copy.deepcopy(part).to(dtype).eval() for part in (dense, model))
        inputs = {n: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in call.items()}
        name = str(dtype).removeprefix("torch.")
        try:
            if _only_removed(big, small, plan):
                return Exactness(against="masking", error=masked_error(big, small, plan, (), inputs), dtype=name)
            return Exactness(against="graph", error=_graph_error(big, small, plan, inputs), dtype=name)
        except RuntimeError:  # code that does not run in float64
            if dtype is torch.float32:
                raise
    raise AssertionError


def _only_removed(dense: nn.Module, small: nn.Module, plan: Plan) -> bool:
    """Whether what a smaller model has is what the plan keeps of the dense one, number by number."""
    masks, kept = plan.masks(dense), dict(small.named_parameters())
    return all(
        torch.equal(parameter[masks[name]] if name in masks else parameter.flatten(), kept[name].flatten())
        for name, parameter in dense.named_parameters()
    )


def _graph_error(dense: nn.Module, small: nn.Module, plan: Plan, call: Call) -> float:
    graph, weights = smaller(dense, plan, (), dict(call)), dict(small.named_parameters())
    with torch.no_grad():
        for name, parameter in graph.named_parameters():
            parameter.copy_(weights[name])
        return float(relative_error(_leaves(small(**call)), _leaves(graph(**call))))


def _leaves(outputs: object) -> list[object]:
    leaves: list[object] = torch.utils._pytree.tree_leaves(outputs)
    return leaves


# -- what an engine did ------------------------------------------------------------------------------------------


def engine_run(package: str, call: Call, got: Tensor, want: Tensor) -> EngineRun:
    """The record of an engine's output for some inputs, against what the module gives. Both: tensors of one shape."""
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    return EngineRun(
        engine=f"{package} {_version(package)}",
        inputs=described(call),
        largest_error=float((got - want).abs().max()),
        largest_output=float(want.abs().max()),
        outputs=sampled(got),
    )


def sampled(output: Tensor) -> tuple[float, ...]:
    """Some numbers of an output, evenly spread: at most `SAMPLES`."""
    flat = output.detach().double().cpu().flatten()
    return tuple(flat[:: -(-flat.numel() // SAMPLES)].tolist())


def described(call: Call) -> object:
    """Arguments by name as JSON: whole numbers and flags as they are, floating tensors of noise by their shape."""
    return {name: _described(value) for name, value in call.items()}


def _described(value: object) -> object:
    if not isinstance(value, Tensor):
        return {"value": value}
    kind = {"dtype": str(value.dtype).removeprefix("torch.")}
    if value.is_floating_point() and torch.equal(value.cpu(), _noise(list(value.shape), value.dtype)):
        return {"noise": list(value.shape), **kind}
    return {"values": value.tolist(), **kind}


def _noise(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def restored(description: object) -> dict[str, Any]:
    """The arguments that `described` wrote. Raises StorageError for anything else."""
    try:
        entries = cast(Mapping[str, Mapping[str, Any]], description)
        return {name: _restored(entry) for name, entry in entries.items()}
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise StorageError(f"the certificate describes no inputs ({error}): export the model again") from error


def _restored(entry: Mapping[str, Any]) -> object:
    if "value" in entry:
        return entry["value"]
    dtype = getattr(torch, str(entry["dtype"]))
    return _noise(entry["noise"], dtype) if "noise" in entry else torch.tensor(entry["values"], dtype=dtype)


# -- files -------------------------------------------------------------------------------------------------------


def write_certificate(path: Path, certificate: Certificate) -> None:
    """Write a certificate, which is the last file of an export."""
    path.write_text(json.dumps(to_plain(certificate), indent=1, allow_nan=False), encoding="utf-8")


def read_certificate(target: Path) -> Certificate:
    """The certificate of an exported folder or file, whose files all have their digests. Raises StorageError."""
    path = certificate_path(target)
    if not path.is_file():
        raise StorageError(f"there is no {path}: name a folder or a file that ecospa_fx exported")
    try:
        entries = strict_json(path.read_text(encoding="utf-8"))
        if not isinstance(entries, dict) or (entries.get("format"), entries.get("version")) != (KIND, VERSION):
            raise ValueError(f"it is no {KIND} of version {VERSION}")
        certificate = from_plain(Certificate, entries)
        if not all(name == Path(name).name and name not in ("", "..") for name in certificate.files):
            raise ValueError("it names files elsewhere")
    except (ValueError, KeyError, TypeError, FieldError, OSError) as error:
        raise StorageError(f"{path} is damaged ({error}): export the model again") from error
    check_files(path.parent, certificate.files)
    return certificate
