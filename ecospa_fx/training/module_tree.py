"""Replaces the graphs of a model's modules in place, and gives it one graph for training and one for eval mode."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

from torch import Tensor, nn

from ecospa_fx.runtime.layer import GraphLayer
from ecospa_fx.runtime.restore import GraphModel

_PRESERVED = ("_modules", "_parameters", "_buffers", "training", "_compiled_call_impl", "in_eval")
"""What a module keeps when it gets another graph, besides its hooks."""


class TwoModes(GraphModel):
    """The root of a tree that computes another graph in eval mode: that of a second tree on the same parameters.

    The second tree is no submodule, so that every parameter keeps its one name. It follows the mode of the root alone.
    """

    in_eval: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the graph of the mode computes."""
        return super().forward(*args, **kwargs) if self.training else self.in_eval(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.in_eval._apply(fn, recurse)  # type: ignore[no-untyped-call]
        share_tensors(self, self.in_eval, "_parameters", "_buffers")
        return self


def add_eval_mode(tree: nn.Module, in_eval: nn.Module) -> None:
    """Let the root of a tree compute another one in eval mode."""
    if not isinstance(tree, GraphModel):
        raise TypeError(f"{type(tree).__name__} is no root of a restored tree")
    tree.__class__ = _in_two_modes(type(tree))
    tree.__dict__["in_eval"] = in_eval.eval()
    share_tensors(tree, in_eval, "_parameters", "_buffers")


def record_paths(tree: nn.Module) -> nn.Module:
    """Note on every module of a fresh tree which one it is, whatever others will put around it. Returns the tree."""
    for path, module in tree.named_modules():
        module.__dict__[_PATH] = path
    return tree


def by_path(tree: nn.Module) -> dict[str, nn.Module]:
    """The modules of a tree whose paths were recorded, or of a copy; wrappers around some of them are passed over."""
    return {module.__dict__[_PATH]: module for module in tree.modules() if _PATH in module.__dict__}


def tensors_by_path(tree: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a tree whose paths were recorded, by name; of another module, as it calls them."""
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


def share_tensors(tree: nn.Module, other: nn.Module, *kinds: str) -> None:
    """Give another tree the very tensors of a tree, those that both have. kinds: "_parameters", "_buffers"."""
    modules = by_path(tree)
    for path, module in by_path(other).items():
        for kind in kinds if path in modules else ():
            source, target = modules[path].__dict__[kind], module.__dict__[kind]
            target.update({name: source[name] for name in target if name in source and not name.startswith(KEPT)})


KEPT = "kept_positions_"
"""How names of buffers begin that came with a rewritten graph."""


def adopt_graphs(fresh: nn.Module, tree: nn.Module, buffers: Mapping[str, Tensor]) -> int:
    """Give the modules of a tree the graphs of a fresh one. buffers: those that came with these graphs, by name."""
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
            if prefix + name in buffers:
                old.register_buffer(name, buffer, persistent=False)
        if _graph_key(old) != _graph_key(new):
            _replace_graph(old, new)
            changed += 1
    return changed


def _in_two_modes(kind: type[GraphModel]) -> type[GraphModel]:
    return type(kind.__name__, (TwoModes, kind), {})


def _replace_graph(old: nn.Module, new: nn.Module) -> None:
    kind = type(new)
    old.__class__ = _in_two_modes(kind) if isinstance(old, TwoModes) and issubclass(kind, GraphModel) else kind
    for name, value in new.__dict__.items():
        if name not in _PRESERVED and not name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
            old.__dict__[name] = value


def _graph_key(module: nn.Module) -> str:
    return module._graph_key if isinstance(module, GraphLayer) else ""
