"""The verbs of the library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ecospa_fx.axes.flow import flow
from ecospa_fx.coupling.couplings import Couplings
from ecospa_fx.coupling.find import find_couplings
from ecospa_fx.graph.capture import capture
from ecospa_fx.graph.restore import restore
from ecospa_fx.plan import Plan


def detect(model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Couplings:
    """Find the couplings of a model.

    model: an nn.Module on any device, "meta" included, or a traced ``fx.GraphModule``; args, kwargs: example inputs.
    Returns every prunable dim with everything that must shrink with it, and every dim that cannot be removed, with the
    reason. The model stays untouched. Raises CaptureError where ``torch.export`` cannot trace it.

    Example:
        >>> import torch, ecospa_fx as eco
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 8))
        >>> [(c.kind, c.size) for c in eco.detect(mlp, (torch.randn(2, 8),)) if c.blocked is None]
        [('ffn', 32)]
    """
    program = capture(model, args, kwargs, dynamic=False)
    walked = flow(program.graph, program.parameters, program.shapes, program.sizes)
    return Couplings((entry.coupling for entry in find_couplings(walked, program.shapes)), model)


def shrink(model: nn.Module, plan: Plan, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> nn.Module:
    """A smaller module that equals `model` with every parameter multiplied by its mask.

    args, kwargs: example inputs; other batch sizes and lengths work where the model's own code allows them. Parameters
    that lose nothing are shared with `model`, which stays untouched; ``copy.deepcopy`` the result to train both.
    Raises PlanError where the plan was made for another model, CaptureError where it cannot be traced.

    Example:
        >>> import torch, ecospa_fx as eco
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 8))
        >>> x = torch.randn(2, 8)
        >>> small = eco.shrink(mlp, eco.plan(eco.detect(mlp, (x,)), ratio=0.5), (x,))
        >>> tuple(small.get_parameter("0.weight").shape)
        (16, 8)
    """
    from ecospa_fx.passes.shrink_couplings import shrink_program

    plan.check(model)
    program = capture(model, args, kwargs, dynamic=True)
    shrink_program(program, plan)
    return restore(program, model)
