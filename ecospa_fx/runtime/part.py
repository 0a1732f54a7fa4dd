"""Parts of a model: modules inside it that are captured by themselves, with the inputs that the model gives them.

A model that cannot be exported as a whole, because how it treats an image or routes a token depends on the data, mostly
has parts that can. The whole runs on the example, and what it gives to a part is the example of that part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ecospa_fx.errors import CaptureError, InputError
from ecospa_fx.ir.pytrees import Arguments, NamedArguments, closed, copied, opened
from ecospa_fx.ir.tracing import quiet, random_state_restored
from ecospa_fx.module_modes import set_mode
from ecospa_fx.snapshot import untouched

Call = tuple[Arguments, NamedArguments]
"""The arguments of one call, by position and by name."""


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """A module inside a model, or the model itself under "", and what is done with it on an example."""

    whole: nn.Module
    """The model."""
    path: str
    """Where the module is in it."""
    calls: tuple[Call, ...]
    """What the model gives it in one call of its own, in order; at least one call."""
    outside: frozenset[str] = frozenset()
    """Names of its parameters that the model reads outside of these calls, or has in other places too."""

    @property
    def module(self) -> nn.Module:
        """The part itself."""
        return self.whole.get_submodule(self.path)

    @property
    def args(self) -> Arguments:
        """Its example inputs by position: those of its first call."""
        return self.calls[0][0]

    @property
    def kwargs(self) -> NamedArguments:
        """Its example inputs by name."""
        return self.calls[0][1]

    @property
    def names(self) -> frozenset[str]:
        """What its parameters are called in the whole, each by its first name."""
        inside = {id(p) for p in self.module.parameters()}
        return frozenset(name for name, p in self.whole.named_parameters() if id(p) in inside)


def parts_of(
    whole: nn.Module, part: str | Iterable[str], args: Sequence[object], kwargs: Mapping[str, object]
) -> tuple[Part, ...]:
    """The parts of some paths, with the inputs that the model, called once with an example, gives them.

    The model runs in evaluation mode, and is as before afterwards. Raises InputError for a path of no module or inside
    another one's, CaptureError where the model cannot be run or does not call the module at a path.
    """
    paths = checked_paths(whole, part)
    recording = record(whole, paths, args, kwargs)
    for path in paths:
        if not recording.calls[path]:
            raise CaptureError(
                f"{type(whole).__name__} does not call its part {path!r} ({type(whole.get_submodule(path)).__name__}) "
                "on the example: name a module that it calls"
            )
    return tuple(Part(whole, path, tuple(recording.calls[path]), recording.outside) for path in paths)


def checked_paths(whole: nn.Module, part: object) -> tuple[str, ...]:
    """The paths that ``part=`` names. Raises InputError for what are no paths of modules apart from each other."""
    paths = (part,) if isinstance(part, str) else tuple(part) if isinstance(part, Iterable) else (part,)
    every = [path for path, _ in whole.named_modules(remove_duplicate=False) if path]
    for path in paths:
        if path not in every:
            near = get_close_matches(str(path), every, 3, 0.4) or every[:3]
            raise InputError(
                f"part={path!r:.80} is no module of {type(whole).__name__}: name one by its path, such as "
                f"{', '.join(map(repr, near)) or 'none, as it has none'}"
            )
    if not paths:
        raise InputError("part=() names no module: leave it out for the whole model")
    for path in paths:
        around = next((other for other in paths if path != other and path.startswith(f"{other}.")), None)
        if around is not None or paths.count(path) > 1:
            raise InputError(f"part {path!r} is inside of {around or path!r}, which is named too: name one of them")
    return paths


@dataclass(frozen=True, slots=True)
class Recording:
    """What a model did with some modules inside it in one call."""

    calls: dict[str, list[Call]]
    """By path the arguments of every call, as copies."""
    outside: frozenset[str] = frozenset()
    """First names of the modules' parameters that the model read while none of the modules ran, or has elsewhere."""


def record(whole: nn.Module, paths: Sequence[str], args: Sequence[object], kwargs: Mapping[str, object]) -> Recording:
    """What a call of a model does with the modules at some paths. Raises CaptureError where it cannot be run."""
    recording = Recording({path: [] for path in paths})
    modules = {path: whole.get_submodule(path) for path in paths}
    reads = ReadsOutside(modules.values())
    with untouched(whole), random_state_restored(), torch.no_grad():
        set_mode(False, whole)
        for path, module in modules.items():

            def noted(_: nn.Module, args: Arguments, kwargs: NamedArguments, path: str = path) -> None:
                recording.calls[path].append(as_data(args, kwargs))

            reads.watch(module)
            module.register_forward_pre_hook(noted, prepend=True, with_kwargs=True)
        own_args, own_kwargs = copied((tuple(args), dict(kwargs)))
        try:
            with quiet(), torch.compiler.set_stance("force_eager"), reads:
                whole(*own_args, **own_kwargs)
        except Exception as error:  # whatever the model's own code raises
            first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise CaptureError(
                f"{type(whole).__name__} has to run on the example, so that what it gives to its parts is seen, and "
                f"does not: {first.rstrip('.')}; pass inputs that it takes, and load its weights if they are on meta"
            ) from error
    return replace(recording, outside=frozenset(reads.names(whole, paths)))


def as_data(args: Sequence[object], kwargs: Mapping[str, object]) -> Call:
    """Arguments in new objects, with copies of tensors that have no history and are no parameters."""
    parts = pytree.tree_map(
        lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, opened((tuple(args), dict(kwargs)))
    )
    call: Call = closed(parts)[0]
    return call


class ReadsOutside(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch annotates no modes
    """Notes which parameters of some modules operators read while none of the modules runs."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._watched = {id(p) for module in modules for p in module.parameters()}
        self._running = 0
        self._read: set[int] = set()

    def watch(self, module: nn.Module) -> None:
        """Take notice of when a module runs."""

        def entered(_: nn.Module, __: object) -> None:
            self._running += 1

        def left(_: nn.Module, __: object, ___: object) -> None:
            self._running -= 1

        module.register_forward_pre_hook(entered, prepend=True)
        module.register_forward_hook(left, always_call=True)

    def names(self, whole: nn.Module, paths: Sequence[str]) -> Iterator[str]:
        """First names of what was read, and of what is a parameter of something else, too."""
        prefixes = tuple(f"{path}." for path in paths)
        first = {id(p): name for name, p in reversed(list(whole.named_parameters(remove_duplicate=False)))}
        for name, p in whole.named_parameters(remove_duplicate=False):
            if id(p) in self._watched and (id(p) in self._read or not name.startswith(prefixes)):
                yield first[id(p)]

    def __torch_dispatch__(
        self, func: Callable[..., object], types: object, args: Arguments = (), kwargs: NamedArguments | None = None
    ) -> object:
        """What the operator returns."""
        if not self._running:
            leaves = pytree.tree_leaves((args, kwargs or {}))
            self._read |= {id(leaf) for leaf in leaves if isinstance(leaf, Tensor)} & self._watched
        return func(*args, **(kwargs or {}))
