"""The bench on which an edit is proven: a copy of the model with weights that hide nothing, and several calls.

Weights that are zero, equal or symmetric would let a wrong edit pass, so the copy's are shaken; it computes in float64
where its code does, and in evaluation mode, as dropout would differ by chance.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ecospa_fx.errors import PlanError
from ecospa_fx.graph.capture import capture
from ecospa_fx.graph.objects import copied, opened
from ecospa_fx.graph.program import ExportedForm
from ecospa_fx.graph.restore import restore
from ecospa_fx.plan import Plan
from ecospa_fx.verify import masked, narrowed, without_fast_path

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
LARGEST = 300_000_000
"""Parameters up to which the copy computes in float64."""


@dataclass(frozen=True, slots=True)
class Call:
    """Arguments, and whether everything in the result must agree: where not, only what has the same shape."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    strict: bool = True


class Bench:
    """A copy of a model that edits are tried on.

    model: the copy; calls: the example, the example in other sizes, and with its flags the other way round, as far as
    the dense model takes them; tolerance: largest relative difference that counts as equal.
    """

    def __init__(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        if any(p.is_meta for p in model.parameters()):
            raise PlanError("the model is on meta, where no edit can be proven by numbers: load its weights first")
        self.model, self.dtype = _copied(model), torch.float64
        if sum(p.numel() for p in model.parameters()) > LARGEST or not self._runs(args, kwargs):
            self.model, self.dtype = _shaken(_copied(model).float()), torch.float32
        self.tolerance = TOLERANCE[self.dtype]
        example = Call(*self._typed(tuple(args), dict(kwargs)))
        with torch.no_grad():
            self.run(example)
        self.program = capture(self.model, example.args, example.kwargs, dynamic=True)
        more = [*others(self.program, example), *flipped(example)]
        self.calls = [example, *(call for call in more if self.attempt(call) is not None)]
        if not any(varied(call) for call in self.calls):
            self.calls += [found for call in self.calls if (found := self._varied(call)) is not None]
            self._check_varied()

    def _runs(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        self.model = _shaken(self.model.double())
        return self.attempt(Call(*self._typed(tuple(args), dict(kwargs)))) is not None

    def _typed(self, args: Any, kwargs: Any) -> Any:
        return pytree.tree_map(
            lambda t: t.to(self.dtype) if isinstance(t, Tensor) and t.is_floating_point() else t, (args, kwargs)
        )

    def _varied(self, call: Call) -> Call | None:
        """The call with other numbers in all its tensors or in one, None where the model takes no such call."""
        return next((found for found in shuffled(call) if self.attempt(found) is not None), None)

    def _check_varied(self) -> None:
        tensors = [t for call in self.calls for t in pytree.tree_leaves((call.args, call.kwargs)) if _told_apart(t)]
        if tensors and not any(varied(call) for call in self.calls):
            raise PlanError(
                "the tensors of the example hold the same number everywhere, which hides wrong edits of attention: "
                "pass inputs that differ, such as random tokens"
            )

    def run(self, call: Call) -> list[Tensor]:
        """The numbers in what the model returns, its buffers unchanged afterwards."""
        with unwritten(self.model):
            return numbers(self.model, call)

    def attempt(self, call: Call) -> list[Tensor] | None:
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
        if not plan.allow and not self.program.state:
            with masked(self.model, plan):
                return Reference(tuple((call, self.run(call)) for call in self.calls), {})
        return self.graph_reference(plan)

    def graph_reference(self, plan: Plan) -> Reference:
        """What the rewritten graph does with the calls that it takes, and the buffers that got narrower in it."""
        small = self._shrunk(plan)
        calls = [Call(*narrowed(small, call.args, call.kwargs)) for call in self.calls if call.strict]
        with unwritten(small):
            results = tuple((call, numbers(small, call)) for call in calls)
        dense = dict(self.model.named_buffers())
        cut = {n: t for n, t in small.named_buffers() if n in dense and t.shape != dense[n].shape}
        return Reference(results, cut)

    def _shrunk(self, plan: Plan) -> nn.Module:
        """The rewritten graph of the copy, from the capture that is there unless another one is needed."""
        from ecospa_fx.api import shrink  # which imports this module
        from ecospa_fx.passes.shrink_couplings import shrink_program

        example, program = self.calls[0], self.program.frozen()
        try:
            shrink_program(program, plan)
        except PlanError:
            return shrink(self.model, plan, example.args, example.kwargs)
        return restore(program, self.model, example.args, example.kwargs)

    def equals(self, reference: Reference) -> bool:
        """Whether the model, as it is now, does what the reference does."""
        for call, want in reference.results:
            got = self.attempt(call)
            if got is None or not equal(got, want, self.tolerance, strict=call.strict):
                return False
        return True


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """Calls with what they must return, and the buffers that have other shapes then, by name."""

    results: tuple[tuple[Call, list[Tensor]], ...]
    buffers: dict[str, Tensor]


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model).eval()
    except Exception as error:
        raise PlanError(f"{type(model).__name__} cannot be copied, so no edit of it can be tried: {error}") from error


def _shaken(model: nn.Module) -> nn.Module:
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


@contextmanager
def unwritten(model: nn.Module) -> Iterator[None]:
    """Buffers as they were afterwards, whatever the model writes into them."""
    places = [(module._buffers, name, value) for module in model.modules() for name, value in module._buffers.items()]
    saved = [None if value is None else value.clone() for _, _, value in places]
    try:
        yield
    finally:
        with torch.no_grad():
            for (held, name, value), values in zip(places, saved, strict=True):
                held[name] = value
                if value is not None and values is not None and not torch.equal(value, values):
                    value.copy_(values)


def numbers(model: nn.Module, call: Call) -> list[Tensor]:
    """The tensors of numbers that a model returns, those in objects such as caches left out."""
    args, kwargs = copied((call.args, call.kwargs))
    with torch.no_grad(), without_fast_path():
        result = model(*args, **kwargs)
    leaves = pytree.tree_leaves(result)
    return [t for t in leaves if isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex())]


def equal(got: Sequence[Tensor], want: Sequence[Tensor], tolerance: float, *, strict: bool = True) -> bool:
    """Whether the same numbers are in the same places, up to a share of the largest of each tensor."""
    if len(got) != len(want):
        return False
    pairs = [(g, w) for g, w in zip(got, want, strict=True) if strict or g.shape == w.shape]
    return bool(pairs) and all(_equal(g, w, tolerance) for g, w in pairs)


def _equal(got: Tensor, want: Tensor, tolerance: float) -> bool:
    if got.shape != want.shape or got.dtype != want.dtype:
        return False
    finite = want.isfinite()
    if not torch.equal(finite, got.isfinite()):
        return False
    scale = want[finite].abs().max().item() if finite.any() else 0.0
    return bool((got[finite] - want[finite]).abs().le(tolerance * max(scale, 1e-12)).all())


# -- other calls -------------------------------------------------------------------------------------------------


def others(program: ExportedForm, example: Call) -> list[Call]:
    """The example with other numbers for the sizes that a graph keeps open: each alone, and all of them."""
    leaves, spec = pytree.tree_flatten(opened((example.args, example.kwargs)))
    shapes = [_expressions(node, leaf) for node, leaf in zip(program.inputs, leaves, strict=True)]
    symbols = sorted({s for shape in shapes for size in shape for s in getattr(size, "free_symbols", ())}, key=str)
    sizes: dict[Any, int] = {}
    for shape, leaf in zip(shapes, leaves, strict=True):
        sizes.update({size: leaf.shape[axis] for axis, size in enumerate(shape) if size in symbols})
    changed = [[s] for s in symbols] + ([symbols] if len(symbols) > 1 else [])
    found = []
    for chosen in changed:
        new = {s: n + (1 + symbols.index(s)) * (s in chosen) for s, n in sizes.items()}
        made = [_resized(leaf, shape, new) for leaf, shape in zip(leaves, shapes, strict=True)]
        args, kwargs = pytree.tree_unflatten(made, spec)
        if not any(type(leaf).__name__ == "Opened" for leaf in pytree.tree_leaves((args, kwargs))):
            found.append(Call(args, kwargs))
    return found


def varied(call: Call) -> bool:
    """Whether any tensor of numbers in a call holds different ones: positions that are all equal tell no attention."""
    leaves = pytree.tree_leaves((call.args, call.kwargs))
    return any(_told_apart(t) and bool((t != t.flatten()[0]).any()) for t in leaves)


def _told_apart(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dtype is not torch.bool and leaf.numel() > 1


def shuffled(call: Call) -> Iterator[Call]:
    """A call with other numbers in all its tensors, then in one at a time.

    Whole numbers become 0 or 1, on the CPU alone: elsewhere an index that is out of range ends the process.
    """
    leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
    source = torch.Generator().manual_seed(0)
    new = {i: _other(t, source) for i, t in enumerate(leaves) if _told_apart(t)}
    found = {i: t for i, t in new.items() if t is not None}
    for chosen in (list(found), *([i] for i in found)):
        made = [found[i] if i in chosen else leaf for i, leaf in enumerate(leaves)]
        args, kwargs = pytree.tree_unflatten(made, spec)
        if chosen:
            yield Call(args, kwargs, call.strict)


def _other(tensor: Tensor, source: torch.Generator) -> Tensor | None:
    if tensor.is_floating_point():
        return tensor + torch.randn(tensor.shape, generator=source, dtype=torch.float32).to(tensor)
    if tensor.is_complex() or tensor.device.type != "cpu":
        return None
    return torch.randint(0, 2, tensor.shape, generator=source).to(tensor)


def _expressions(node: fx.Node, leaf: Any) -> list[Any]:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not isinstance(leaf, Tensor):
        return []
    return [size.node.expr if isinstance(size, torch.SymInt) else size for size in value.shape]


def _resized(leaf: Any, shape: Sequence[Any], sizes: Mapping[Any, int]) -> Any:
    for axis, size in enumerate(shape):
        if hasattr(size, "free_symbols") and size.free_symbols:
            wanted = int(size.subs(sizes))
            positions = torch.arange(wanted, device=leaf.device) % leaf.shape[axis]
            leaf = leaf.index_select(axis, positions)
    return leaf


def flipped(example: Call) -> list[Call]:
    """The example with each of its flags the other way round: use_cache, for one."""
    flags = [name for name, value in example.kwargs.items() if isinstance(value, bool)]
    return [Call(example.args, {**example.kwargs, name: not example.kwargs[name]}, strict=False) for name in flags]
