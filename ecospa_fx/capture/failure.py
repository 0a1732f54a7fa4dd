"""Why a model could not be traced, in one sentence that names a line of the user's code and none of ours."""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import torch
from torch import nn

from ecospa_fx.capture.working_parts import Export, working_parts
from ecospa_fx.errors import CaptureError, TorchFailure
from ecospa_fx.ir.pytrees import copied
from ecospa_fx.ir.tracing import quiet
from ecospa_fx.snapshot import untouched

_OURS = str(Path(__file__).parent.parent) + "/"
_LIBRARY = sysconfig.get_paths()["stdlib"] + "/"
_TORCH = str(Path(torch.__file__).parent) + "/"


def failed(
    model: nn.Module,
    error: Exception,
    args: Sequence[object],
    kwargs: Mapping[str, object],
    export: Export,
    whole: nn.Module | None = None,
) -> CaptureError:
    """The error to raise for one of torch's, which is its cause in short.

    Where the model itself does not take the arguments, that is said, by what its own call raises. Where it does, the
    parts that `export` takes by themselves are named; whole: the model that it is a part of, where it is one.
    """
    if isinstance(error, CaptureError):
        return error
    raised = _raised_by_call(model, args, kwargs) if type(error).__module__ == "builtins" else None
    if raised is not None:
        said = "does not take these arguments", _where(model, raised), _reason(raised), "pass some that it takes"
    else:
        remedy = _remedy(model if whole is None else whole, model, working_parts(model, args, kwargs, export))
        said = "cannot be exported", _where(model, error), _reason(error), remedy
    refusal = CaptureError("{} {}{}: {}; {}".format(_name(model), *said))
    refusal.__cause__ = TorchFailure(raised or error)
    return refusal


def _remedy(whole: nn.Module, model: nn.Module, parts: Sequence[str]) -> str:
    """What to do, with the parts of a model that can be exported named by their paths in the whole."""
    if not parts:
        return "torch.export must trace it"
    prefix = next(f"{path}." if path else "" for path, module in whole.named_modules() if module is model)
    names = " or ".join(f"part={prefix + path!r}" for path in parts)
    return f"torch.export must trace it, as it does {'its parts' if len(parts) > 1 else 'its part'}: pass {names}"


def _raised_by_call(model: nn.Module, args: Sequence[object], kwargs: Mapping[str, object]) -> Exception | None:
    """What the model itself raises for these arguments; nothing remains of the call."""
    try:
        args, kwargs = copied((tuple(args), dict(kwargs)))
        with quiet(), untouched(model):
            model(*args, **kwargs)
    except Exception as error:  # whatever the model's own code says
        return error
    return None


def _name(model: nn.Module) -> str:
    return type(model).__name__


def _reason(error: Exception) -> str:
    """The first line of what torch says."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__).rstrip(".")


def _where(model: nn.Module, error: Exception) -> str:
    """The innermost line of the user's code, or the module of torch's and the line that called us."""
    lines = _outside(traceback.extract_tb(error.__traceback__))
    if lines:
        return f" at {_in_words(lines[-1])}"
    callers = _outside(traceback.extract_stack())
    called = f" at {_in_words(callers[-1])}" if callers else ""
    path = _module(model, error.__traceback__)
    return f", in module {path!r} ({_name(model.get_submodule(path))}),{called}" if path else called


def _in_words(frame: traceback.FrameSummary) -> str:
    return f"{frame.filename}:{frame.lineno}: {frame.line}".rstrip(": ")


def _outside(frames: Iterable[traceback.FrameSummary]) -> list[traceback.FrameSummary]:
    return [frame for frame in frames if not _inner(frame.filename)]


def _inner(file: str) -> bool:
    """Whether a file is torch's, ours, Python's own or none at all."""
    return file.startswith((_OURS, _TORCH, "<")) or (file.startswith(_LIBRARY) and "-packages/" not in file)


def _module(model: nn.Module, frames: TracebackType | None) -> str:
    """The path of the innermost part of the model whose code was running."""
    names, innermost = {id(part): path for path, part in model.named_modules()}, ""
    while frames is not None:
        innermost = names.get(id(frames.tb_frame.f_locals.get("self"))) or innermost
        frames = frames.tb_next
    return innermost
