"""Writes a smaller model as a checkpoint of transformers: standard files, and a modelling file where layers differ.

The configuration is proven before anything is written: a model that is built from it, with the same weights, gives the
same numbers. What was written is read again before it gets its name.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ecospa_fx.errors import StorageError
from ecospa_fx.export.configurations import candidate_configurations, per_layer_module, stock_class
from ecospa_fx.export.layer_fields import differing_numbers
from ecospa_fx.huggingface import PretrainedConfig, import_transformers, quiet_bars, without_initialisation
from ecospa_fx.module_modes import modes_restored, set_mode
from ecospa_fx.relative_error import relative_error
from ecospa_fx.storage.folder import aligned

Call = dict[str, Any]
"""Arguments by name."""

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
"""Of the same operations on the same weights, which some devices do in another order; in shorter types 0.02."""


def outputs_of(model: nn.Module, call: Call, args: Sequence[Any] = ()) -> list[Tensor]:
    """The floating tensors that a model returns, in evaluation mode; its mode is as before afterwards."""
    with modes_restored(model), torch.no_grad():
        set_mode(False, model)
        leaves = pytree.tree_leaves(model(*args, **call))
    return [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def calls_of(example: Call) -> list[Call]:
    """The example, and where it is made of tokens one sequence of other length."""
    ids = example.get("input_ids")
    return [example] if ids is None or len(example) > 2 else [example, {**example, "input_ids": ids[:1, :5]}]


def exact_twin(model: nn.Module, calls: Sequence[Call]) -> nn.Module:
    """A model of a class of transformers, built from a configuration that describes `model`, on the same weights.

    It is proven to compute the same. Raises StorageError with the module and the attribute that no configuration gives.
    """
    reasons: list[str] = []
    want: list[list[Tensor]] = []
    for config in candidate_configurations(model):
        want = want or [outputs_of(model, call) for call in calls]
        try:
            twin = _built(model, config)
        except Exception as error:  # the constructor or the weights refuse, in whatever way
            reasons.append(f"{type(model.config).__name__} builds none like it ({type(error).__name__}: {error})")
            continue
        reason = _difference(model, twin) or _numbers(twin, calls, want)
        if reason is None:
            return twin
        reasons.append(reason)
    raise StorageError(
        f"no configuration describes this {type(model).__name__}: {reasons[0]}; save it with ecospa_fx.save"
    )


def _built(model: Any, config: PretrainedConfig) -> nn.Module:
    kind = stock_class(model)
    if getattr(config, "is_heterogeneous", False):
        kind = getattr(per_layer_module(), kind.__name__)
    with without_initialisation(), torch.random.fork_rng(devices=[]):
        twin = kind(config)
    twin.load_state_dict(model.state_dict(), assign=True)
    twin.tie_weights()
    if model.can_generate():
        twin.generation_config = copy.deepcopy(model.generation_config)
    twin.to(next(model.parameters()).device)
    return twin.eval()  # type: ignore[no-any-return]


def _difference(model: nn.Module, twin: nn.Module) -> str | None:
    """The first buffer or fraction of a model that its twin has otherwise; None where there is none.

    Whole numbers may be ones that nobody reads; if one of them is read, the numbers tell.
    """
    buffers = dict(twin.named_buffers())
    for name, buffer in model.named_buffers():
        theirs = buffers.get(name)
        if theirs is None or theirs.shape != buffer.shape or not torch.equal(theirs.to(buffer.dtype), buffer):
            return f"buffer {name} holds other values than those that the configuration computes"
    for (path, name), value in differing_numbers(model, twin).items():
        if isinstance(value, float):
            theirs = getattr(twin.get_submodule(path), name)
            return f"{path}.{name} is {value:g}, and {theirs:g} by its configuration"
    return None


def _numbers(twin: nn.Module, calls: Sequence[Call], want: Sequence[Sequence[Tensor]]) -> str | None:
    for call, tensors in zip(calls, want, strict=True):
        try:
            error = relative_error(outputs_of(twin, call), tensors)
        except Exception as failure:  # a shape that does not fit, in whatever way the model's code says so
            return f"built from it, the model fails with {type(failure).__name__}: {failure}"
        if not error <= TOLERANCE.get(tensors[0].dtype, 0.02):
            return f"built from it, the model gives other numbers, by {error:.1e}"
    return None


def code_file() -> Path:
    """The modelling file, as it stands in this library."""
    return Path(__file__).with_name("modeling_per_layer.py")


def write_checkpoint(twin: Any, folder: Path) -> Path | None:
    """Write an `exact_twin` into a folder: weights, configurations, and the modelling file where it needs that.

    Returns the modelling file that was written, None where there is none.
    """
    code = None
    if getattr(twin.config, "is_heterogeneous", False):
        source = code_file()
        twin.config.auto_map = auto_map(type(twin).__name__, twin.config, source.stem)
        code = shutil.copyfile(source, folder / source.name)
    with quiet_bars():
        twin.save_pretrained(folder)
    return code


def auto_map(name: str, config: PretrainedConfig, module: str) -> dict[str, str]:
    """Which class of the modelling file each of transformers' Auto classes builds of this configuration.

    name: the class of the model, which is what those Auto classes build that know it.
    """
    result: dict[str, str] = {}
    for title, kind in vars(import_module("transformers.models.auto.modeling_auto")).items():
        mapping = getattr(kind, "_model_mapping", None) if title.startswith("AutoModel") else None
        if mapping is None or type(config) not in mapping:
            continue
        models = mapping[type(config)]
        names = [model.__name__ for model in (models if isinstance(models, tuple | list) else (models,))]
        if name in names:
            result[title] = f"{module}.{name}"
        elif title == "AutoModel":
            result[title] = f"{module}.{names[0]}"
    return result


def reread(folder: Path, kind: str, *, heterogeneous: bool) -> nn.Module:
    """The model in a folder, read with the modelling file of this library, whose bytes are those of the folder's.

    Its weights are aligned as in a model that was built, so that the same operations round the same.
    """
    source: ModuleType | Any = per_layer_module() if heterogeneous else import_transformers()
    with quiet_bars():
        model: nn.Module = getattr(source, kind).from_pretrained(folder, dtype="auto", local_files_only=True)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = aligned(tensor.data)
    return model.eval()
