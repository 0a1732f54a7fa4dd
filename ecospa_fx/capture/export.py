"""From a module to a graph: torch.export, in both modes, followed by the passes that make graphs alike."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from ecospa_fx.capture.attempts import Attempt, TimeLimit, attempts, bound_arguments, takes_one
from ecospa_fx.capture.export_view import export_view
from ecospa_fx.capture.failure import failed
from ecospa_fx.capture.functorch import write_out_transforms
from ecospa_fx.capture.gradient_modes import gradient_modes_recorded, warn_of_custom_functions
from ecospa_fx.errors import CaptureError
from ecospa_fx.ir.build import allow_other_strides, sync_users
from ecospa_fx.ir.modes import Aligned, ModesDiffer, align, draws, note_dropout
from ecospa_fx.ir.passes import run_passes
from ecospa_fx.ir.program import ExportedForm
from ecospa_fx.ir.pytrees import Arguments, NamedArguments, closed, opened
from ecospa_fx.ir.tracing import one_at_a_time, quiet, random_state_restored
from ecospa_fx.module_modes import set_mode
from ecospa_fx.passes.canonicalise import CANONICALISE
from ecospa_fx.progress import stage
from ecospa_fx.snapshot import untouched

log = logging.getLogger(__name__)


def capture(
    model: nn.Module,
    args: Sequence[object],
    kwargs: Mapping[str, object] | None,
    *,
    dynamic: bool,
    both_modes: bool = True,
    whole: nn.Module | None = None,
) -> ExportedForm:
    """Export a module, which stays untouched.

    dynamic: sizes of the inputs become symbols wherever the model allows it; otherwise the graph holds for the example
    sizes and the model's own mode only, which is enough to find couplings and takes half the time. both_modes: whether
    a graph with symbols also notes what the other mode does, which takes a second export. whole: the model that it is a
    part of, in whose names parameters go. Raises CaptureError with torch's reason and the line of the user's code.
    """
    return next(captures(model, args, kwargs, dynamic=dynamic, both_modes=both_modes, whole=whole))


def captures(
    model: nn.Module,
    args: Sequence[object],
    kwargs: Mapping[str, object] | None,
    *,
    dynamic: bool,
    both_modes: bool = True,
    whole: nn.Module | None = None,
) -> Iterator[ExportedForm]:
    """The exports of a module that torch can make, from most to fewest symbolic sizes. Raises CaptureError for none.

    whole: see `capture`.
    """
    parts: tuple[Arguments, NamedArguments] = opened((tuple(args), dict(kwargs or {})))
    _refuse_quantised(model)
    _refuse_sharded(model)
    bound_arguments(model, *parts)
    programs = _exports(model, *parts, dynamic=dynamic, both_modes=both_modes, whole=whole)
    while True:
        try:
            with stage("capture with symbolic sizes" if dynamic else "capture at the example's sizes"):
                program = next(programs)
        except StopIteration:
            return
        with one_at_a_time():
            form = ExportedForm(program, model, whole)
        yield form


def _exports(
    model: nn.Module,
    args: Arguments,
    kwargs: NamedArguments,
    *,
    dynamic: bool,
    both_modes: bool,
    whole: nn.Module | None,
) -> Iterator[ExportedProgram]:
    """What the attempts that succeed make, in their order. Raises CaptureError where none does: see `failed`."""
    view, failure, succeeded, functions = export_view(model, kwargs), None, False, dict[str, None]()
    for attempt in attempts(view, args, kwargs) if dynamic else [Attempt(args, kwargs, None)]:
        result = _attempted(model, view, attempt, functions if dynamic else None, both_modes=both_modes)
        if isinstance(result, ExportedProgram):
            if dynamic and not succeeded:
                warn_of_custom_functions(functions)
            succeeded = True
            yield result
        failure = result if isinstance(result, Exception) else failure
    if failure is not None and not succeeded:
        call: tuple[Arguments, NamedArguments] = closed((args, kwargs))[0]
        raise failed(model, failure, *call, _exported_alone, whole)


def _exported_alone(model: nn.Module, args: Arguments, kwargs: NamedArguments) -> ExportedProgram:
    """The export of a part at its own sizes, within the seconds that a trace may take."""
    parts: tuple[Arguments, NamedArguments] = opened((args, kwargs))
    with one_at_a_time(), TimeLimit(first=10.0):
        return _export(model, export_view(model, parts[1]), Attempt(*parts, None))


def _attempted(
    model: nn.Module, view: nn.Module, attempt: Attempt, functions: dict[str, None] | None, *, both_modes: bool
) -> ExportedProgram | Exception | None:
    """What an attempt makes, what torch raised instead, or None where it does not take the user's own batch.

    functions: takes the names of custom functions where sizes may be symbols; None where they are those of the example.
    """
    with one_at_a_time():
        try:
            program = _export(model, view, attempt, functions=functions)
        except Exception as error:
            log.debug("an attempt at exporting %s failed: %s", type(model).__name__, error)
            return error
        if attempt.doubled and not takes_one(program):
            return None
        if functions is not None and both_modes:
            program = _in_both_modes(model, view, program, attempt)
        elif functions is not None:
            allow_other_strides(program.graph)
        return _canonicalised(program)


def _refuse_sharded(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "device_mesh"):  # a DTensor, of which this process has a part
            raise CaptureError(
                f"parameter {name!r} is sharded over devices, and a plan takes whole rows: shrink the model first and "
                "shard the result"
            )


def _refuse_quantised(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if ".quantized" in type(module).__module__ and "torch.ao" in type(module).__module__:
            raise CaptureError(
                f"module {name!r} ({type(module).__qualname__}) holds quantised weights: "
                "compress the float model first and quantise the result"
            )


def _canonicalised(program: ExportedProgram) -> ExportedProgram:
    """The program, with its graph rewritten in place by the passes of `CANONICALISE`."""
    sync_users(program.graph)  # the exporter's own passes leave some behind
    _note_inputs(program)
    run_passes(program.graph_module, CANONICALISE)
    return program


def _note_inputs(program: ExportedProgram) -> None:
    """Write into ``node.meta`` what the passes ask of inputs: names of parameters, and values of constants.

    Constants are tensors that the model's code holds literally, such as ``torch.tensor([-2])``.
    """
    signature = program.graph_signature
    parameters, constants = signature.inputs_to_parameters, signature.inputs_to_lifted_tensor_constants
    for node in program.graph.find_nodes(op="placeholder"):
        if node.name in parameters:
            node.meta["parameter"] = parameters[node.name]
        value = program.constants[constants[node.name]] if node.name in constants else None
        if isinstance(value, Tensor) and not value.is_meta:
            node.meta["constant"] = value


def _export(
    model: nn.Module,
    view: nn.Module,
    attempt: Attempt,
    *,
    functions: dict[str, None] | None = None,
    training: bool | None = None,
) -> ExportedProgram:
    """functions: takes the names of custom functions that gradients would go through; training: the mode of all parts,
    by default the one that each is in."""
    args, kwargs, shapes, _ = attempt
    with (
        quiet(),
        random_state_restored(),
        untouched(model, view, traced=True),
        _marks_kept((args, kwargs)),
        gradient_modes_recorded(functions if functions is not None else {}),
        nullcontext() if shapes is None else TimeLimit(),
    ):
        if training is not None:
            view.training = training
            set_mode(training, model)
        return write_out_transforms(torch.export.export(view, args, kwargs, strict=False, dynamic_shapes=shapes))


def _in_both_modes(model: nn.Module, view: nn.Module, program: ExportedProgram, attempt: Attempt) -> ExportedProgram:
    """A program that notes what depends on the mode, from a second export in the other one.

    The second one is of the example's sizes, which takes a third of the time, unless it has to stand for the first or
    is not like it. Where that fails, or the modes differ in more than literals, the program holds for the mode of the
    model, but for dropouts that are in it.
    """
    if attempt.shapes is not None:
        fixed = _in_other_mode(model, view, attempt._replace(shapes=None))
        aligned = _aligned(model, program, fixed, numbers=True)
        if aligned is not None and (aligned.complete or model.training):
            aligned.note(training=model.training)
            allow_other_strides(program.graph)
            return program
        if aligned is None and fixed is not None and draws(fixed.graph) != draws(program.graph):
            note_dropout(program.graph)  # no export would make them alike: one draws what the other does not
            return program
    other = _in_other_mode(model, view, attempt)
    aligned = _aligned(model, program, other)
    if other is None or aligned is None:
        note_dropout(program.graph)
        return program
    usable = aligned.complete or model.training
    aligned.note(training=model.training or not usable)
    chosen = program if usable else other
    allow_other_strides(chosen.graph)
    return chosen


def _aligned(
    model: nn.Module, program: ExportedProgram, other: ExportedProgram | None, numbers: bool = False
) -> Aligned | None:
    """How the programs of the model's own and of the other mode correspond; None where they do not."""
    if other is None:
        return None
    training, evaluation = (program, other) if model.training else (other, program)
    try:
        return align(training.graph, evaluation.graph, numbers)
    except ModesDiffer as reason:
        log.debug("the modes of %s differ: %s", type(model).__name__, reason)
        return None


def _in_other_mode(model: nn.Module, view: nn.Module, attempt: Attempt) -> ExportedProgram | None:
    """The export of the model in the mode in which it is not; None where there is none."""
    try:
        return _export(model, view, attempt, training=not model.training)
    except Exception:
        return None


@contextmanager
def _marks_kept(inputs: object) -> Iterator[None]:
    """Attributes of the example's tensors: an export that fails leaves on them which axes it took for symbols."""
    tensors = [t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor)]
    before = [dict(t.__dict__) for t in tensors]
    try:
        yield
    finally:
        for tensor, attributes in zip(tensors, before, strict=True):
            tensor.__dict__.clear()
            tensor.__dict__.update(attributes)
