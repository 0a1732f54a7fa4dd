"""Parameters that a graph takes as inputs, as graphs of torch.compile backends do, as parameters of a module."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from ecospa_fx.errors import CaptureError, EcospaError
from ecospa_fx.ir.pytrees import Arguments, NamedArguments, Tree
from ecospa_fx.wrappers import unwrapped


def lift_parameters(
    model: nn.Module, args: Sequence[object], kwargs: Mapping[str, object] | None
) -> tuple[nn.Module, Arguments, NamedArguments]:
    """(model, args, kwargs) where no argument is a Parameter: a module that holds them, and the other arguments.

    The module has everything that `model` has; what were arguments are parameters by their names, those in containers
    by the way to them. Sizes that are symbols of another tracer become numbers. Without a Parameter among the
    arguments the model is returned as it is, without compiling or parallel wrappers around it. Raises CaptureError for
    what is no module or tuple of arguments, and for an argument that holds Parameters beside other tensors.
    """
    check_call(model, args, kwargs)
    model = unwrapped(model)
    args, kwargs = _numbered(tuple(args), dict(kwargs or {}))
    arguments: dict[int | str, object] = {**dict(enumerate(args)), **kwargs}  # type: ignore[dict-item]
    lifted = {place: value for place, value in arguments.items() if _holds_parameters(value)}
    if not lifted:
        return model, args, kwargs
    holder = LiftedParameters(model, lifted)
    rest = [value for i, value in enumerate(args) if i not in lifted]
    return holder, tuple(rest), {name: value for name, value in kwargs.items() if name not in lifted}


def check_model(model: object, refused: type[EcospaError] = CaptureError) -> None:
    """Raise `refused` for what is no module, with what to pass in its place."""
    if isinstance(model, ExportedProgram):
        raise refused("an ExportedProgram is called and cut as a module: pass program.module()")
    if not isinstance(model, nn.Module):
        raise refused(f"{type(model).__name__} is not an nn.Module: pass the model itself")


def check_call(model: object, args: object, kwargs: object, refused: type[EcospaError] = CaptureError) -> None:
    """Raise `refused` for what is no module, and for what are no arguments of one."""
    check_model(model, refused)
    if not isinstance(args, tuple | list):
        raise refused(f"args must be a tuple of positional arguments, not {type(args).__name__}: write (x,)")
    if kwargs is not None and not (isinstance(kwargs, Mapping) and all(isinstance(name, str) for name in kwargs)):
        raise refused(f"kwargs must be a mapping of arguments by name, not {kwargs!r:.60}: write {{'mask': mask}}")


def _numbered(args: Arguments, kwargs: NamedArguments) -> tuple[Arguments, NamedArguments]:
    """With the example's number for every size that a tracer gave a symbol: asking that tracer would tell it."""

    def number(value: object) -> object:
        return value.node.hint if isinstance(value, torch.SymInt) else value

    numbered: tuple[Arguments, NamedArguments] = pytree.tree_map(number, (args, kwargs))
    return numbered


def _holds_parameters(value: object) -> bool:
    tensors = [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]
    parameters = [t for t in tensors if isinstance(t, nn.Parameter)]
    if parameters and len(parameters) < len(tensors):
        raise CaptureError(
            "an argument holds Parameters beside other tensors, so that it is unclear which call the smaller model "
            "takes: pass Parameters as arguments of their own"
        )
    return bool(parameters)


class LiftedParameters(nn.Module):
    """A module with parameters that another one takes as arguments."""

    def __init__(self, model: nn.Module, lifted: Mapping[int | str, object]) -> None:
        super().__init__()
        for target, source in ((self._parameters, model._parameters), (self._buffers, model._buffers)):
            target.update(source)  # type: ignore[arg-type]
        self._modules.update(model._modules)
        self.training = model.training
        signature = inspect.signature(model.forward)
        names = list(signature.parameters)
        rest = [
            i for i, name in enumerate(names) if signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL
        ]
        trees = {}
        for place, value in lifted.items():
            name = place if isinstance(place, str) else names[min(place, *rest or [place])]
            spread = isinstance(place, int) and signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL
            leaves, structure = pytree.tree_flatten_with_path(value)
            paths = [".".join([name, *([str(place)] if spread else []), *map(_key_name, way)]) for way, _ in leaves]
            trees[place] = (
                [self._hold(*entry) for entry in zip(paths, (leaf for _, leaf in leaves), strict=True)],
                structure,
            )

        def forward(*args: object, **kwargs: object) -> Tree:
            # by name, because the exporter puts other tensors in their places
            values = {
                p: pytree.tree_unflatten([find() for find in finders], spec) for p, (finders, spec) in trees.items()
            }
            rest, count = iter(args), len(args) + sum(isinstance(place, int) for place in values)
            everything = [values[i] if i in values else next(rest) for i in range(count)]
            return model.forward(*everything, **kwargs, **{n: v for n, v in values.items() if isinstance(n, str)})

        bound = {name for i, name in enumerate(names) if i in lifted or name in lifted}
        kept = [p for name, p in signature.parameters.items() if name not in bound or p.kind is p.VAR_POSITIONAL]
        forward.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
        self.__dict__["forward"] = forward

    def _hold(self, path: str, value: object) -> Callable[[], object]:
        """Register a leaf of an argument. Returns what finds it again."""
        if not isinstance(value, nn.Parameter):
            return lambda: value
        owner, _, name = path.rpartition(".")
        module: nn.Module = self
        for part in owner.split(".") if owner else ():
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(name, value)
        return partial(self.get_parameter, path)


def _key_name(key: object) -> str:
    return str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))))
