"""Checks on the example that the traced graph computes what the model does: code may ask whether it is traced."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from ecospa_fx.errors import warn_caller
from ecospa_fx.ir.program import ExportedForm
from ecospa_fx.ir.pytrees import Tree, copied, opened
from ecospa_fx.module_modes import set_mode
from ecospa_fx.relative_error import relative_error
from ecospa_fx.runtime.interpreter import PartialInterpreter
from ecospa_fx.snapshot import untouched
from ecospa_fx.verify import without_fast_path

log = logging.getLogger(__name__)

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}
"""Relative errors that other kernels may make; in shorter types 0.5. What is meant is another function."""


def compared(
    programs: Iterable[ExportedForm], model: nn.Module, args: Sequence[object], kwargs: Mapping[str, object]
) -> Iterator[ExportedForm]:
    """The programs as they come; before the first one, a warning where it does not do what the model does.

    Both run once, on the example and in evaluation mode. Nothing is compared, and nothing said, of models without
    values (``meta``), of those that are random, and where either cannot be run. The model stays as it is.
    """
    for number, program in enumerate(programs):
        if number == 0 and has_values(model, args, kwargs):
            _compare(program, model, args, kwargs)
        yield program


def has_values(model: nn.Module, args: Sequence[object], kwargs: Mapping[str, object]) -> bool:
    """Whether a model and its arguments hold numbers."""
    tensors = [t for t in pytree.tree_leaves(opened((args, kwargs))) if isinstance(t, Tensor)]
    return not any(t.is_meta or isinstance(t, FakeTensor) for t in (*model.parameters(), *model.buffers(), *tensors))


def _compare(program: ExportedForm, model: nn.Module, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
    try:
        with evaluated(model) as devices:
            want = leaves_of(model, args, kwargs, devices)
            got = _leaves(lambda: _traced(program, model, args, kwargs), devices)
            error = relative_error(got, want)
            if not error > tolerance_of(want) or not any(t.isfinite().any() for t in _floats(want)):
                return
            again = leaves_of(model, args, kwargs, devices, seed=1)
            random = relative_error(again, want) > tolerance_of(want)
    except Exception as reason:  # whatever the model or an operator raises says that there is nothing to compare
        log.debug("what was traced is not compared with the model: %s", reason)
        return
    if random or model.training:  # in training mode the graph may hold statistics of the batch
        log.debug("what was traced differs from the model by %.1e in evaluation mode", error)
        return
    warn_caller(
        f"what was traced of {type(model).__name__} is not what it computes on the example (relative error "
        f"{error:.1e}), as where code asks whether it is being traced: the smaller model does what was traced, so "
        "compare it with ecospa_fx.verify.masked_error, or choose another implementation of that code"
    )


def leaves_of(
    model: nn.Module,
    args: Sequence[object],
    kwargs: Mapping[str, object],
    devices: Iterable[torch.device],
    seed: int = 0,
) -> list[Tree]:
    """The leaves of what a model returns for copies of the arguments, with random numbers from a seed."""
    own_args, own_kwargs = copied((tuple(args), dict(kwargs)))
    return _leaves(lambda: model(*own_args, **own_kwargs), devices, seed)


def _traced(program: ExportedForm, model: nn.Module, args: Sequence[object], kwargs: Mapping[str, object]) -> Tree:
    evaluator = PartialInterpreter(program, model, args, kwargs)
    values = {**evaluator.start(args, kwargs), **evaluator.weights()}
    evaluator.run(evaluator.order, values)
    return evaluator.returned(values, args, kwargs)


def _leaves(run: Callable[[], Tree], devices: Iterable[torch.device], seed: int = 0) -> list[Tree]:
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach devices that are not restored
    for device in devices:
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
    return pytree.tree_leaves(opened(run()))


def _floats(leaves: Sequence[object]) -> list[Tensor]:
    return [t for t in leaves if isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex())]


def tolerance_of(leaves: Sequence[object]) -> float:
    """The relative error that the types of some tensors allow."""
    dtype = min((t.dtype for t in _floats(leaves)), key=lambda d: d.itemsize, default=torch.float64)
    return TOLERANCE.get(dtype, 0.5)


@contextmanager
def evaluated(model: nn.Module) -> Iterator[list[torch.device]]:
    """Evaluation mode inside, without gradients, compilers, and kernels that only inference has; no trace of it after.

    Yields the model's CUDA devices, whose random numbers go on as if none had been drawn, too.
    """
    devices = list({t.device for t in (*model.parameters(), *model.buffers()) if t.device.type == "cuda"})
    with (
        untouched(model),
        torch.random.fork_rng(devices=devices),
        torch.no_grad(),
        without_fast_path(),
        torch.compiler.set_stance("force_eager"),
    ):
        set_mode(False, model)
        yield devices
