"""Numerical equivalence check of an edited model: random weights, several calls, outputs compared with a reference.

The edits are made in a copy. Weights that are zero, equal or symmetric would let a wrong edit pass, so noise is added
to them; the copy computes in float64 where its code does, and in evaluation mode, as dropout would differ by chance.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ecospa_fx.capture.export import capture
from ecospa_fx.errors import PlanError
from ecospa_fx.inplace.attributes import AttributeRead
from ecospa_fx.inplace.calls import (
    TrialCall,
    flag_flipped_calls,
    has_constant_tensor,
    has_varied_tensor,
    randomised_calls,
    resized_calls,
)
from ecospa_fx.inplace.edits import Edits
from ecospa_fx.ir.program import ExportedForm
from ecospa_fx.ir.pytrees import closed, copied, opened
from ecospa_fx.passes.shrink.shrink_couplings import shrink_program
from ecospa_fx.plan import Plan
from ecospa_fx.rewrite import smaller
from ecospa_fx.runtime.restore import restore
from ecospa_fx.verify import narrowed, unwritten, without_fast_path

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
ROUNDED_TOLERANCE = 1e-6
"""Of a copy in float64 whose code computes some of it in shorter types, as norms do: there the order of sums counts."""

MAX_FLOAT64_PARAMETERS = 300_000_000
"""Parameters up to which the copy computes in float64."""


Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of a call by position and by name."""


class EquivalenceCheck:
    """A copy of a model that edits are tried on.

    model: the copy; calls: the example, the example in other sizes, and with its flags the other way round, as far as
    the dense model takes them; tolerance: largest relative difference that counts as equal. like: a check of a smaller
    model of the same code, which has made the other calls: then the example is the only one, in float32.
    """

    def __init__(
        self,
        model: nn.Module,
        args: Sequence[object],
        kwargs: Mapping[str, object],
        like: EquivalenceCheck | None = None,
    ) -> None:
        if any(p.is_meta for p in model.parameters()):
            raise PlanError("the model is on meta, where no edit can be proven by numbers: load its weights first")
        self.model, self.dtype = _copied(model), torch.float64
        if like is not None or sum(p.numel() for p in model.parameters()) > MAX_FLOAT64_PARAMETERS:
            self.model, self.dtype = _with_noise(self.model.float()), torch.float32
        elif not self._runs(args, kwargs):
            self.model, self.dtype = _with_noise(_copied(model).float()), torch.float32
        self.tolerance = TOLERANCE[self.dtype]
        self.read: set[AttributeRead] | None = None
        """Attributes that running the model reads, by identity of their owner and name; None: not known yet."""
        example = TrialCall(*self._typed(tuple(args), dict(kwargs)))
        with torch.no_grad(), FloatTypes() as computed:
            self.run(example)
        if computed.types - {torch.float64, torch.complex128}:
            self.tolerance = max(self.tolerance, ROUNDED_TOLERANCE)
        self.calls = [example]
        if like is None:
            more = [*resized_calls(self.program, example), *flag_flipped_calls(example)]
            self.calls += [call for call in more if self.attempt(call) is not None]
        self.keeps_state: bool = like.keeps_state if like is not None else bool(self.program.state)
        """Whether the model keeps what it computes from call to call in buffers, inputs or outputs."""
        if has_constant_tensor(example):
            same = self.calls if not has_varied_tensor(example) else [example]
            self.calls += [other for call in same if (other := self._varied(call)) is not None]
            self._check_varied()

    @cached_property
    def program(self) -> ExportedForm:
        """The graph of the copy, with symbols for sizes."""
        example = self.calls[0]
        return capture(self.model, example.args, example.kwargs, dynamic=True, both_modes=False)

    @cached_property
    def holds_orders(self) -> bool:
        """Whether some buffers may say in which order units are read, which a plan changes."""
        examples = (node.meta["val"] for node in self.program.stored)
        return any(t.dim() == 1 and not t.is_floating_point() and t.dtype is not torch.bool for t in examples)

    def _runs(self, args: Sequence[object], kwargs: Mapping[str, object]) -> bool:
        self.model = _with_noise(self.model.double())
        return self.attempt(TrialCall(*self._typed(tuple(args), dict(kwargs)))) is not None

    def _typed(self, args: tuple[object, ...], kwargs: dict[str, object]) -> Inputs:
        parts = pytree.tree_map(
            lambda t: t.to(self.dtype) if isinstance(t, Tensor) and t.is_floating_point() else t, opened((args, kwargs))
        )
        typed: Inputs = closed(parts)[0]
        return typed

    def _varied(self, call: TrialCall) -> TrialCall | None:
        """The call with other numbers in tensors that hold one everywhere, None where the model takes no such call."""
        return next((other for other in randomised_calls(call) if self.attempt(other) is not None), None)

    def _check_varied(self) -> None:
        if not any(has_varied_tensor(call) for call in self.calls):
            raise PlanError(
                "the tensors of the example hold the same number everywhere, which hides wrong edits of attention: "
                "pass inputs that differ, such as random tokens"
            )

    def run(self, call: TrialCall) -> list[Tensor]:
        """The floating tensors that the model returns, its buffers unchanged afterwards."""
        with unwritten(self.model):
            return output_tensors(self.model, call)

    def attempt(self, call: TrialCall) -> list[Tensor] | None:
        """What `run` returns, None where the model does not take the call."""
        try:
            return self.run(call)
        except Exception:  # whatever the model's code raises says that this call, or this edit, is none
            return None

    def reference(self, plan: Plan) -> Reference:
        """What a model shrunk by a plan must do: what the masked model does.

        Where masking is not what the plan means, or where the model keeps what it computes from call to call in
        buffers, inputs or outputs, what the rewritten graph does.
        """
        plan.check(self.model)
        if not plan.allow and not self.keeps_state:
            first, *others = self.calls
            buffers = changed_buffers(self.model, self._shrunk(plan)) if self.holds_orders else {}
            return Reference(self._masked(plan, [first]), buffers, lambda: self._masked(plan, others))
        return self.graph_reference(plan, self.traced())

    def _masked(self, plan: Plan, calls: Sequence[TrialCall]) -> Results:
        edits = Edits()
        try:
            edits.zeros(self.model, plan.factors() if calls else {})
            return tuple((call, self.run(call)) for call in calls)
        finally:
            edits.undo()

    def graph_reference(
        self, plan: Plan, calls: Sequence[TrialCall] | None = None, weights: Mapping[str, Tensor] | None = None
    ) -> Reference:
        """What the rewritten graph does with some calls, or all strict ones, and the buffers that got narrower in it.

        Calls that it does not take are left out, but for the example: what was traced may hold for fewer.
        weights: other numbers for its parameters.
        """
        small, results, edits = self._shrunk(plan), [], Edits()
        edits.weights(small, weights or {})
        with unwritten(small):
            for call in (c for c in (self.calls if calls is None else calls) if c.strict):
                narrow = TrialCall(*narrowed(small, call.args, call.kwargs))
                try:
                    results.append((narrow, output_tensors(small, narrow)))
                except Exception as error:  # whatever the graph's operators raise says that it takes no such call
                    if call is self.calls[0]:
                        raise PlanError(f"the rewritten graph does not take the example: {error}") from error
        edits.undo()  # it shares parameters with the copy
        return Reference(tuple(results), changed_buffers(self.model, small))  # all of them, as the graph is there now

    def traced(self) -> list[TrialCall]:
        """The example, and the strict calls for which the graph does what the model does."""
        example, *rest = self.calls
        graph = restore(self.program.frozen(), self.model, example.args, example.kwargs)
        strict, original = [call for call in rest if call.strict], self.model
        wanted = tuple((call, self.run(call)) for call in strict)
        try:
            self.model = graph
            wrong = list(self._differing(wanted))
        finally:
            self.model = original
        return [example, *(call for call in strict if all(call is not other for other in wrong))]

    def _shrunk(self, plan: Plan) -> nn.Module:
        """The rewritten graph of the copy, from the capture that is there unless another one is needed."""

        example, program = self.calls[0], self.program.frozen()
        try:
            shrink_program(program, plan)
        except PlanError:
            return smaller(self.model, plan, example.args, example.kwargs)
        return restore(program, self.model, example.args, example.kwargs)

    def gives(self, results: Results) -> bool:
        """Whether the model, as it is now, returns some results."""
        return next(self._differing(results), None) is None

    def _differing(self, results: Results) -> Iterator[TrialCall]:
        for call, want in results:
            got = self.attempt(call)
            if got is None or not all_close(got, want, self.tolerance, strict=call.strict):
                yield call


class FloatTypes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch annotates no modes
    """Notes the floating types of all that is computed inside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.types: set[torch.dtype] = set()
        """Those of the results of operators."""

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """What the operator returns."""
        result = func(*args, **(kwargs or {}))
        leaves = pytree.tree_leaves(result)
        self.types |= {t.dtype for t in leaves if isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex())}
        return result


Results = tuple[tuple[TrialCall, list[Tensor]], ...]
"""Calls with the tensors that they must return."""


@dataclass(frozen=True, eq=False)
class Reference:
    """What a model must compute after an edit."""

    first: Results
    """Of the example, which tells most edits that are wrong."""
    buffers: dict[str, Tensor]
    """The buffers that have other shapes, or other whole numbers, then, by name."""
    run_rest: Callable[[], Results] = tuple
    """Makes the results of the other calls."""

    @cached_property
    def rest(self) -> Results:
        """Of the other calls. They are made when first asked for, by the model as it was before the edit."""
        return self.run_rest()


def changed_buffers(dense: nn.Module, small: nn.Module) -> dict[str, Tensor]:
    """By name the buffers of a rewritten graph that have other shapes than a module's, or other whole numbers."""
    before = dict(dense.named_buffers())
    pairs = {name: (before[name], after) for name, after in small.named_buffers() if name in before}
    return {
        name: new
        for name, (old, new) in pairs.items()
        if old.shape != new.shape or not (old.is_floating_point() or torch.equal(old, new))
    }


def _copied(model: nn.Module) -> nn.Module:
    try:
        duplicate = copy.deepcopy(model).eval()
    except Exception as error:
        raise PlanError(f"{type(model).__name__} cannot be copied, so no edit of it can be tried: {error}") from error
    for module, other in zip(model.modules(), duplicate.modules(), strict=True):
        forward = vars(module).get("forward")
        if forward is not None and forward is vars(other).get("forward") and _refers_to_modules(forward):
            raise PlanError(
                f"{type(module).__name__}.forward was replaced by a function that calls the original in every copy, so "
                "no edit can be tried: take it away while shrinking, or put it there with functools.partial"
            )
    return duplicate


def _refers_to_modules(function: object) -> bool:
    contents = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    return any(isinstance(getattr(content, "__self__", content), nn.Module) for content in contents)


def _with_noise(model: nn.Module) -> nn.Module:
    """The model with noise on its weights, as large as they are, or as weights of their shape should be."""
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                usual = parameter.shape[-1] ** -0.5 if parameter.dim() else 1.0
                size = max(parameter.square().mean().sqrt().item(), usual)
                noise = torch.randn(parameter.shape, generator=source, dtype=torch.float32)
                parameter.add_((0.5 * size * noise).to(parameter))
    return model


def output_tensors(model: nn.Module, call: TrialCall) -> list[Tensor]:
    """The floating tensors in what a model returns, however it is structured, as the model's own code makes them."""
    args, kwargs = copied((call.args, call.kwargs))
    with torch.no_grad(), without_fast_path(), torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of edits that are only tried
        result = model(*args, **kwargs)
    leaves = pytree.tree_leaves(opened(result))
    return [t for t in leaves if isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex())]


def all_close(got: Sequence[Tensor], want: Sequence[Tensor], tolerance: float, *, strict: bool = True) -> bool:
    """Whether the same numbers are in the same places, up to a share of the largest of each tensor."""
    if len(got) != len(want):
        return False
    pairs = [(g, w) for g, w in zip(got, want, strict=True) if strict or g.shape == w.shape]
    return bool(pairs) and all(_close(g, w, tolerance) for g, w in pairs)


def _close(got: Tensor, want: Tensor, tolerance: float) -> bool:
    if got.shape != want.shape or got.dtype != want.dtype:
        return False
    finite = want.isfinite()
    if not torch.equal(finite, got.isfinite()):
        return False
    scale = want[finite].abs().max().item() if finite.any() else 0.0
    return bool((got[finite] - want[finite]).abs().le(tolerance * max(scale, 1e-12)).all())
