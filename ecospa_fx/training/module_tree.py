"""Trees of modules in graph form: other graphs for the modules that are there, and two graphs for two modes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ecospa_fx.runtime.layer import GraphLayer
from ecospa_fx.runtime.restore import GraphModel

_OWN = ("_modules", "_parameters", "_buffers", "training", "_compiled_call_impl", "in_eval")
"""What a module keeps when it gets another graph, besides its hooks."""


class TwoModes(GraphModel):
    """The root of a tree that computes another graph in eval mode: that of a second tree on the same parameters.

    The second tree is no submodule, so that every parameter keeps its one name. It follows the mode of the root alone.
    """

    in_eval: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the graph of the mode computes."""
        in_training: Any = super().forward
        return in_training(*args, **kwargs) if self.training else self.in_eval(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        convert: list[Any] = [super()._apply, self.in_eval._apply]
        for own in convert:
            own(fn, recurse)
        share(self, self.in_eval, "_parameters", "_buffers")
        return self


def add_eval_mode(tree: nn.Module, in_eval: nn.Module) -> None:
    """Let the root of a tree compute another one in eval mode."""
    if not isinstance(tree, GraphModel):
        raise TypeError(f"{type(tree).__name__} is no root of a restored tree")
    tree.__class__ = _in_two_modes(type(tree))
    tree.__dict__["in_eval"] = in_eval.eval()
    share(tree, in_eval, "_parameters", "_buffers")


def named(tree: nn.Module) -> nn.Module:
    """Note on every module of a fresh tree which one it is, whatever others will put around it. Returns the tree."""
    for path, module in tree.named_modules():
        module.__dict__[_PATH] = path
    return tree


def by_path(tree: nn.Module) -> dict[str, nn.Module]:
    """The modules of a tree that was `named`, or of a copy; wrappers around some of them are passed over."""
    return {module.__dict__[_PATH]: module for module in tree.modules() if _PATH in module.__dict__}


def tensors_by_path(tree: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a tree that was `named`, by their names; of another module, as it calls them."""
    return {
        f"{path}.{name}" if path else name: tensor
        for path, module in modules_by_path(tree).items()
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
    }


def modules_by_path(tree: nn.Module) -> dict[str, nn.Module]:
    """The modules of a tree that was `named`, or of a copy; of another module, as it calls them."""
    return by_path(tree) if _PATH in tree.__dict__ else dict(tree.named_modules())


_PATH = "ecospa_path"


def share(tree: nn.Module, other: nn.Module, *kinds: str) -> None:
    """Give another tree the very tensors of a tree, those that both have. kinds: "_parameters", "_buffers"."""
    modules = by_path(tree)
    for path, module in by_path(other).items():
        for kind in kinds if path in modules else ():
            known, held = modules[path].__dict__[kind], module.__dict__[kind]
            held.update({name: known[name] for name in held if name in known and not name.startswith(KEPT)})


KEPT = "kept_positions_"
"""How names of buffers begin that came with a rewritten graph."""


def transplant(fresh: nn.Module, tree: nn.Module, made: Mapping[str, Tensor]) -> int:
    """Give the modules of a tree the graphs of a fresh one. made: buffers that came with these graphs, by name."""
    modules, changed = by_path(tree), 0
    for path, new in by_path(fresh).items():
        old = modules.get(path)
        if old is None:
            parent, _, name = path.rpartition(".")
            modules[parent].add_module(name, new)
            modules[path] = new
            continue
        prefix = f"{path}." if path else ""
        for name in [n for n in old._buffers if n.startswith(KEPT)]:
            del old._buffers[name]
        for name, buffer in new._buffers.items():
            if prefix + name in made:
                old.register_buffer(name, buffer, persistent=False)
        if _key(old) != _key(new):
            _take_over(old, new)
            changed += 1
    return changed


def _in_two_modes(kind: type[GraphModel]) -> type[GraphModel]:
    return type(kind.__name__, (TwoModes, kind), {})


def _take_over(old: nn.Module, new: nn.Module) -> None:
    kind = type(new)
    old.__class__ = _in_two_modes(kind) if isinstance(old, TwoModes) and issubclass(kind, GraphModel) else kind
    for name, value in new.__dict__.items():
        if name not in _OWN and not name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
            old.__dict__[name] = value


def _key(module: nn.Module) -> str:
    return module._graph_key if isinstance(module, GraphLayer) else ""
