"""Which integers of a module follow from tensor shapes: of its own parameters, and of its inputs.

What a constructor says is in `ecospa_fx.inplace.constructor`. A module without tensors, such as a norm without weights,
is as wide as its inputs: an integer that in every call is the size of one axis of its inputs, in the dense model, is
the size of that axis afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ecospa_fx.inplace.attributes import IntegerAttribute, Place, integers_of
from ecospa_fx.inplace.buffers import BufferSlice, EditTarget
from ecospa_fx.inplace.constructor import ConstructorEvidence, TensorShapes, constructor_evidence, shapes_of
from ecospa_fx.inplace.equivalence import EquivalenceCheck
from ecospa_fx.inplace.groups import NarrowedAxes, narrowed_axes, role_of
from ecospa_fx.inplace.trial import IntegerEdits, edited
from ecospa_fx.plan import Plan

ROUNDS = 8
"""How often a model is run to see what reaches modules behind one that refused what reached it."""

InputAxis = tuple[int, int, int]
"""Number of the call, of the tensor in it, and of the axis."""

SizesByAxis = dict[InputAxis, int]
"""Sizes of the axes of a module's inputs."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """New integers by place."""

    from_constructors: dict[EditTarget, int]
    """As modules set them that are built with parameters of the new shapes."""
    from_inputs: dict[EditTarget, int]
    """As inputs of modules without tensors say."""
    set_by_constructors: set[Place]
    """Every integer that a constructor sets, whether it changes or not."""


def evidence(check: EquivalenceCheck, plan: Plan, values: IntegerEdits) -> Evidence:
    """What shapes say after a plan. values: what follows for certain, buffers among it."""
    following, covered = _from_constructors(check.model, narrowed_axes(plan, check.model), values)
    return Evidence(following, _from_inputs(check, plan, {**following, **values}), covered)


# -- parameters and buffers --------------------------------------------------------------------------------------


def _from_constructors(
    model: nn.Module, axes: NarrowedAxes, values: IntegerEdits
) -> tuple[dict[EditTarget, int], set[Place]]:
    """The integers that constructors change in modules that hold something narrower, and all that they set."""
    shapes = _shapes_after(model, axes, values)
    results: dict[str, ConstructorEvidence | None] = {}
    following: dict[EditTarget, int] = {}
    covered: set[Place] = set()
    for path, module in model.named_modules():
        old = shapes_of(module)
        wanted = {name: shapes.get(f"{path}.{name}" if path else name, shape) for name, shape in old.items()}
        if wanted == old:
            continue
        fixed = {(p.name, p.index): n for p, n in values.items() if isinstance(p, Place) and p.module == path}
        numbers = sorted((n, v) for n, v in vars(module).items() if isinstance(v, int | str))
        key = f"{type(module).__module__}.{type(module).__qualname__} {numbers} {fixed} {old} {wanted}"
        result = results.get(key) if key in results else constructor_evidence(module, wanted, fixed)
        results[key] = result
        if result is not None:
            covered |= {Place(path, (), *name) for name in result.attributes}
            following.update({Place(path, (), *name): value for name, value in result.changes.items()})
    return following, covered


def _shapes_after(model: nn.Module, axes: NarrowedAxes, values: IntegerEdits) -> TensorShapes:
    """The new shapes of the parameters and buffers that get narrower, by all their names."""
    sizes: dict[tuple[str, int], int] = {key: new for key, (_, new) in axes.items()}
    sizes.update(
        {
            (f"{target.module}.{target.name}" if target.module else target.name, target.axis): n
            for target, n in values.items()
            if isinstance(target, BufferSlice)
        }
    )
    result: TensorShapes = {}
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in tensors:
        result[name] = tuple(sizes.get((name, axis), size) for axis, size in enumerate(tensor.shape))
    return result


# -- inputs ------------------------------------------------------------------------------------------------------


def _from_inputs(check: EquivalenceCheck, plan: Plan, values: IntegerEdits) -> dict[EditTarget, int]:
    """New integers of modules without tensors. A module that refuses its inputs hides those of the modules behind."""
    integers = _integers_without_tensors(check.model)
    following: dict[EditTarget, int] = {}
    if not integers:
        return following
    dense, buffers = _input_sizes(check, list(integers)), check.reference(plan).buffers
    for _ in range(ROUNDS):
        with edited(check.model, plan, {**values, **following}, buffers):
            narrow = _input_sizes(check, list(integers))
        new = dict(following)
        for module, attributes in integers.items():
            for attribute in attributes:
                size = _new_size(attribute.value, dense.get(module, {}), narrow.get(module, {}))
                new.update({attribute.place: size} if size not in (None, attribute.value) else {})
        new.update(_for_equal_roles(check.model, integers, new))
        if new == following:
            break
        following = new
    return following


def _integers_without_tensors(model: nn.Module) -> dict[nn.Module, list[IntegerAttribute]]:
    """The integers of modules that hold no tensor and no other module."""
    result: dict[nn.Module, list[IntegerAttribute]] = {}
    for path, module in model.named_modules():
        if not module._modules and not shapes_of(module):
            attributes = [attribute for attribute in integers_of(module, path, (), set()) if not attribute.place.steps]
            result.update({module: attributes} if attributes else {})
    return result


def _for_equal_roles(
    model: nn.Module, integers: Mapping[nn.Module, Sequence[IntegerAttribute]], new: Mapping[EditTarget, int]
) -> dict[EditTarget, int]:
    """The same new sizes for modules of the same role and size in other layers, which may not have been called."""
    roles = {
        attribute.place: (role_of(attribute.place.module, model), attribute.place.name, attribute.place.index, size)
        for attributes in integers.values()
        for attribute in attributes
        for size in (attribute.value,)
    }
    size_by_role = {roles[place]: new[place] for place in roles if place in new}
    return {place: size_by_role[role] for place, role in roles.items() if role in size_by_role}


def _new_size(value: int, before: SizesByAxis, after: SizesByAxis) -> int | None:
    """What an integer becomes that is as large as an axis in all calls; None where no axis, or several, say so."""
    axes: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for (call, tensor, axis), size in before.items():
        axes.setdefault((tensor, axis), []).append((size, after.get((call, tensor, axis), size)))
    candidates = {
        tuple(sorted({new for _, new in pairs})) for pairs in axes.values() if {old for old, _ in pairs} == {value}
    }
    sizes = candidates.pop() if len(candidates) == 1 else ()
    return sizes[0] if len(sizes) == 1 else None


def _input_sizes(check: EquivalenceCheck, modules: Sequence[nn.Module]) -> dict[nn.Module, SizesByAxis]:
    """Sizes of the inputs of some modules in the strict calls of the check."""
    sizes: dict[nn.Module, SizesByAxis] = {}
    with _recording_input_sizes(modules, sizes) as begin:
        for number, call in enumerate(c for c in check.calls if c.strict):
            begin(number)
            check.attempt(call)
    return sizes


@contextmanager
def _recording_input_sizes(
    modules: Sequence[nn.Module], sizes_by_module: dict[nn.Module, SizesByAxis]
) -> Iterator[Callable[[int], None]]:
    """Record the input sizes of modules in every call; what is yielded sets the number of the call."""
    number = 0

    def begin(call: int) -> None:
        nonlocal number
        number = call

    def record(module: nn.Module, args: object, kwargs: object) -> None:
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        sizes: SizesByAxis = {
            (number, i, axis): size for i, t in enumerate(tensors) for axis, size in enumerate(t.shape)
        }
        sizes_by_module.setdefault(module, {}).update(sizes)

    handles = [module.register_forward_pre_hook(record, with_kwargs=True) for module in modules]
    try:
        yield begin
    finally:
        for handle in handles:
            handle.remove()
