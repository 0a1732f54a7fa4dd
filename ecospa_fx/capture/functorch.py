"""Transforms of torch.func inside a model: what they do is written out as operators, or they are refused."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from ecospa_fx.errors import CaptureError
from ecospa_fx.ir.provenance import operator_of, source_of


def write_out_transforms(program: ExportedProgram) -> ExportedProgram:
    """The program itself where nothing is transformed, else one without transforms.

    The exporter leaves the nodes under ``torch.func.vmap`` with the shapes of single examples, which hold for no tensor
    outside it. Raises CaptureError where the transform cannot be written out, such as gradients.
    """
    inside = [node for node in program.graph.nodes if _wrapped(node.meta.get("val"))]
    if not inside:
        return program
    frozen = any(_wrapped(value) for value in program.constants.values())  # the trace went around its operators
    try:
        written: ExportedProgram | None = None if frozen else program.run_decompositions({})
    except (RuntimeError, NotImplementedError):
        written = None
    if written is None or _changes_in_place(written):
        node = _first_with_source(inside)
        raise CaptureError(
            f"node {node.name} ({operator_of(node)}) at {source_of(node) or 'an unknown line'} lies inside a transform "
            "of torch.func that torch.export cannot write out: compute it there with ordinary operators"
        )
    return written


def _wrapped(value: object) -> bool:
    tensors = (t for t in pytree.tree_leaves(value) if isinstance(t, Tensor))
    return any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in tensors)


def _changes_in_place(program: ExportedProgram) -> bool:
    """Whether the program returns what was written into buffers and inputs: here it is written in place."""
    signature = program.graph_signature
    return bool(signature.buffers_to_mutate or signature.user_inputs_to_mutate)


def _first_with_source(inside: list[fx.Node]) -> fx.Node:
    return next((node for node in inside if source_of(node)), inside[0])
