"""How a restored model is called: arguments are bound, checked and flattened as in the example, or refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import sympy
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ecospa_fx.errors import InputError
from ecospa_fx.ir.alias import written
from ecospa_fx.ir.program import ExportedForm
from ecospa_fx.ir.pytrees import (
    Arguments,
    NamedArguments,
    Tree,
    closed,
    containers,
    difference,
    objects,
    opened,
    put_together,
    skeletons,
    unchanged,
    update,
)
from ecospa_fx.ir.slices import TensorSlice, take


@dataclass(frozen=True, slots=True)
class Leaf:
    """What the graph requires of one input."""

    name: str
    """What messages call it."""
    sizes: tuple[int | str | None, ...] | None
    """Those of a tensor: a number where only that one works, a name where one symbol stands for it, None where anything
    goes."""
    constant: object = None
    """The only value that it may have, where it is no tensor."""
    cut: TensorSlice = ()
    """How the dense model's becomes this one's."""
    written: bool = False
    """Whether the graph writes into it."""

    def fit(self, value: object) -> object:
        """A tensor of the dense model as the graph takes it; anything else as it is."""
        if not self.cut or not isinstance(value, Tensor) or len(value.shape) != len(self.sizes or ()):
            return value
        return take(value, self.cut) if all(value.shape[step.axis] == step.size for step in self.cut) else value

    def check(self, value: object, symbols: dict[str, int]) -> None:
        """Refuse a value that the graph was not made for; symbols: what is known of the sizes so far."""
        if self.sizes is None:
            if isinstance(value, Tensor) or not _same(value, self.constant):
                actual = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
                raise InputError(f"argument {self.name} is {actual}, but the graph was made with {self.constant!r}")
            return
        shape = tuple(value.shape) if isinstance(value, Tensor) else None
        if shape is None or len(shape) != len(self.sizes):
            raise InputError(self._refusal(type(value).__name__ if shape is None else str(list(shape))))
        for axis, (size, want) in enumerate(zip(shape, self.sizes, strict=True)):
            if isinstance(want, str):
                if symbols.setdefault(want, size) != size:
                    raise InputError(
                        f"argument {self.name} has size {size} in axis {axis}, another argument {symbols[want]}"
                    )
            elif want is not None and size != want:
                raise InputError(self._refusal(str(list(shape))))

    def _refusal(self, actual: str) -> str:
        wanted = ", ".join(str(n) if isinstance(n, int) else "any" for n in self.sizes or ())
        if self.cut:
            return (
                f"the smaller model takes an input {self.name} of shape [{wanted}], not {actual}: what it keeps from "
                "call to call is narrower too, so cut yours with ecospa_fx.verify.narrowed(small, args, kwargs)"
            )
        return (
            f"the smaller model takes an input of shape [{wanted}], not {actual}: its graph fixes these sizes, as "
            "the original's code or torch.export does, and of images all but the batch: shrink it again with example "
            "inputs of the new shape"
        )


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def _same(value: object, constant: object) -> bool:
    return value is constant or (type(value) is type(constant) and repr(value) == repr(constant))


def leaf(node: fx.Node, example: object, cut: TensorSlice, changed: bool) -> Leaf:
    """What a placeholder requires; example: its value among the example arguments; cut, changed: see `Leaf`."""
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return Leaf(str(node.target), tuple(_size(s) for s in value.shape), cut=cut, written=changed)
    return Leaf(str(node.target), None, example)


def _size(size: int | torch.SymInt) -> int | str | None:
    if isinstance(size, int):
        return size
    expression = size.node.expr
    if expression.is_number:
        return int(expression)
    return str(expression) if isinstance(expression, sympy.Symbol) else None


class FlatSignature(Protocol):
    """How torch flattened the arguments and the result of a module."""

    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec


class CallAdapter:
    """Binds the arguments of a call as the original ``forward`` would, and flattens them for the graph.

    args, kwargs: the example's; signature: how torch flattened them; leaves: what the graph requires of each; cuts: how
    the dense model's outputs become the graph's, None for what is no tensor.
    """

    def __init__(
        self,
        model: nn.Module,
        args: Sequence[object],
        kwargs: Mapping[str, object],
        signature: FlatSignature,
        leaves: Sequence[Leaf],
        cuts: Sequence[TensorSlice | None],
    ) -> None:
        parameters = inspect.signature(model.forward).parameters.values()
        kinds = inspect.Parameter
        self.positional, self.keywords = len(args), tuple(kwargs)
        self.spec, self.result, self.leaves = signature.in_spec, signature.out_spec, tuple(leaves)
        self.cuts = tuple(cuts)
        self.names = tuple(p.name for p in parameters if p.kind in {kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD})
        self.plain = not any(p.kind is kinds.VAR_POSITIONAL for p in parameters)
        by_name = {**dict(zip(self.names, args, strict=False)), **kwargs}
        plain = {n: not objects(v) and not any(map(_is_tensor, pytree.tree_leaves(v))) for n, v in by_name.items()}
        self.constants = {n: v for n, v in by_name.items() if plain[n]}
        self.stateful = bool(objects((args, kwargs)))
        self._returns_objects = bool(skeletons(self.result))  # any that are no containers

    def __deepcopy__(self, memo: dict[int, object]) -> CallAdapter:
        """Nothing in it changes."""
        return self

    def call(self, run: Callable[..., Tree], args: Arguments, kwargs: NamedArguments) -> Tree:
        """What the original returns, by a graph of leaves; objects among the arguments change as they would there."""
        args, kwargs = self._in_order(args, kwargs)
        return self._returned(run(*self._flat(args, kwargs)), objects((args, kwargs)) if self.stateful else [])

    def flat(self, args: Arguments, kwargs: NamedArguments) -> list[object]:
        """The leaves of the arguments, of the dense or the smaller model, in the order of the graph's inputs."""
        return self._flat(*self._in_order(args, kwargs))

    def returned(self, leaves: Sequence[object], args: Arguments, kwargs: NamedArguments) -> Tree:
        """What the original returns for some arguments, from the graph's outputs."""
        return self._returned(leaves, objects(self._in_order(args, kwargs)) if self.stateful else [])

    def _in_order(self, args: Arguments, kwargs: NamedArguments) -> tuple[Arguments, NamedArguments]:
        if self.plain and (len(args) != self.positional or tuple(kwargs) != self.keywords):
            args, kwargs = self._arranged(args, kwargs)
        return self._cut(args, kwargs) if any(leaf.cut for leaf in self.leaves) else (args, kwargs)

    def _returned(self, leaves: Sequence[object], arguments: list[object]) -> Tree:
        """What the original returns, from the graph's outputs; arguments: the objects among them."""
        return self._finished(pytree.tree_unflatten(leaves, self.result), arguments)

    def _finished(self, result: Tree, arguments: list[object]) -> Tree:
        """The result with objects in place of their parts, after those among the arguments have changed."""
        if self.stateful:
            result, states = result
            for target, state in zip(arguments, states, strict=True):
                if state is not None:
                    update(target, state)
        return closed(result, arguments)[0] if self._returns_objects else result

    def _cut(self, args: Arguments, kwargs: NamedArguments) -> tuple[Arguments, NamedArguments]:
        """The arguments with what the dense model kept from call to call cut. An object keeps what is cut of it.

        A tensor of the caller's that the graph writes into stays as it is, and is refused later.
        """
        leaves, spec = pytree.tree_flatten(opened((args, kwargs)))
        if len(leaves) != len(self.leaves):
            return args, kwargs  # refused later, with the reason
        cut = [expected.fit(value) for expected, value in zip(self.leaves, leaves, strict=True)]
        targets, parts = objects((args, kwargs)), pytree.tree_unflatten(cut, spec)
        for target, state in zip(targets, containers(parts), strict=True):
            if not unchanged(opened(target), state):
                update(target, state)
        plain = [old if want.written else new for want, old, new in zip(self.leaves, leaves, cut, strict=True)]
        call: tuple[Arguments, NamedArguments] = closed(pytree.tree_unflatten(plain, spec), instead=targets)[0]
        return call

    def narrowed(self, args: Arguments, kwargs: NamedArguments) -> tuple[Arguments, NamedArguments]:
        """The arguments of the dense model, in new objects, as the smaller one takes them."""
        leaves, spec = pytree.tree_flatten(opened((args, kwargs)))
        cut = [expected.fit(value) for expected, value in zip(self.leaves, leaves, strict=True)]
        call: tuple[Arguments, NamedArguments] = closed(pytree.tree_unflatten(cut, spec))[0]
        return call

    def cuts_of_results(self) -> list[TensorSlice]:
        """How every leaf of (result, objects given) is narrowed. Numbers go the way of the tensors."""
        cuts = [*(leaf.cut for leaf in self.leaves), *self.cuts]
        marks = [None if cut is None else torch.tensor(i) for i, cut in enumerate(cuts)]
        arguments = closed(put_together(self.spec, marks[: len(self.leaves)]))[1]
        result = self._finished(put_together(self.result, marks[len(self.leaves) :]), arguments)
        leaves = pytree.tree_leaves(opened((result, arguments)))
        return [(cuts[int(mark)] or ()) if isinstance(mark, Tensor) else () for mark in leaves]

    def _flat(self, args: Arguments, kwargs: NamedArguments) -> list[object]:
        """The leaves of the arguments in the order of the graph's inputs."""
        leaves, spec = pytree.tree_flatten(opened((args, kwargs)) if self.stateful else (args, kwargs))
        if len(leaves) != len(self.leaves) or (not torch.compiler.is_compiling() and spec != self.spec):
            raise self._otherwise(spec)
        symbols: dict[str, int] = {}
        for value, expected in zip(leaves, self.leaves, strict=True):
            expected.check(value, symbols)
        return leaves

    def _otherwise(self, spec: pytree.TreeSpec) -> Exception:
        """Why arguments of another structure are refused."""
        for actual, expected in zip(skeletons(spec), skeletons(self.spec), strict=False):
            where = difference(actual, expected)
            if where is not None:
                return InputError(
                    f"an argument that is a {expected.class_name} differs from the example's: {where}; "
                    "shrink the model again with an example in this state"
                )
        return TypeError(f"the arguments are structured otherwise than the example's: {spec} instead of {self.spec}")

    def _arranged(self, args: Arguments, kwargs: NamedArguments) -> tuple[Arguments, NamedArguments]:
        if len(args) > len(self.names):
            parameters = any(isinstance(a, nn.Parameter) for a in pytree.tree_leaves(args))
            advice = ": leave Parameters out, the smaller model has its own" if parameters else ""
            raise TypeError(
                f"{len(args)} positional arguments were given where the model takes {len(self.names)}{advice}"
            )
        by_name = {**self.constants, **dict(zip(self.names, args, strict=False)), **kwargs}
        wanted = (*self.names[: self.positional], *self.keywords)
        missing, unknown = [n for n in wanted if n not in by_name], [n for n in by_name if n not in wanted]
        if missing or unknown:
            lists = (missing, "missing"), (unknown, "unknown")
            faults = [f"{', '.join(names)} {fault}" for names, fault in lists if names]
            raise TypeError(f"the graph takes the arguments {', '.join(wanted)}: {' and '.join(faults)}")
        return tuple(by_name[n] for n in wanted[: self.positional]), {n: by_name[n] for n in self.keywords}


def call_adapter(
    program: ExportedForm, model: nn.Module, args: Sequence[object], kwargs: Mapping[str, object]
) -> CallAdapter:
    """How a program, captured from a model with example arguments, is called."""
    signature = program.exported.module_call_graph[0].signature
    examples = pytree.tree_leaves(opened((tuple(args), dict(kwargs))))
    cuts, changed = [program.narrowed.get(node, ()) for node in program.inputs], written(program.graph)
    writes = [node in changed for node in program.inputs]
    leaves = [leaf(*entry) for entry in zip(program.inputs, examples, cuts, writes, strict=True)]
    (output,) = program.graph.find_nodes(op="output")
    returned = [program.narrowed.get(n, ()) if isinstance(n, fx.Node) else None for n in output.args[0]]
    return CallAdapter(model, args, kwargs, signature, leaves, returned)
