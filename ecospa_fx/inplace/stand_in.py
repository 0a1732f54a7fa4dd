"""A small model of the same code for trials of what a module can carry: few layers, rows and positions, and numbers.

A trial shows how a module's code follows narrower weights. For that two layers of each sort do as well as all, a few
rows do for a table of as many rows as a vocabulary has, and a few tokens for a long text; weights on ``meta`` are drawn
anew. Nothing is known by name: whatever is left out, the model has to take its call without it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations, islice
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ecospa_fx.coupling.couplings import parameter_shapes
from ecospa_fx.coupling.types import Coupling
from ecospa_fx.errors import PlanError
from ecospa_fx.inplace.calls import TrialCall
from ecospa_fx.inplace.configuration import built_shapes, config_attributes, reloaded
from ecospa_fx.inplace.equivalence import output_tensors
from ecospa_fx.inplace.groups import is_under, role_of
from ecospa_fx.ir.pytrees import closed, opened

LAYERS_OF_A_SORT = 2
"""How many alike layers are kept: two, so that they can have two widths."""

MANY_ROWS, FEW_ROWS = 4096, 128
"""Tables of at least so many rows, which no chosen coupling removes, keep the first few."""

MANY_PARAMETERS = 30_000_000
"""Models of more are built anew, thinner, where their configuration can say so."""

THINNER, LEAST_WIDTH = 16, 64
"""How much thinner, and how wide at least."""

MAX_WAYS = 32
"""How many sets of so many fields of a configuration are tried."""

LONG, SHORT = 32, 16
"""Sizes of whole-number inputs from which on they are cut, and to what."""

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class StandIn:
    """A small model for trials, its example call, and the couplings that it has."""

    model: nn.Module
    """With weights, on the CPU where those of the original are on ``meta``."""
    call: TrialCall
    """The example, for the small model."""
    deep: Callable[[], nn.Module]
    """Makes a model of all layers that takes the same call; not where the weights are on ``meta``."""
    couplings: tuple[Coupling, ...]
    """Those of the chosen ones that are in it; they have the same names and members."""


@dataclass(frozen=True, slots=True, eq=False)
class _Cut:
    """What is left out of a model."""

    layers: Mapping[str, tuple[str, ...]]
    """Names of the entries that go, by path of the stack of layers."""
    rows: Mapping[str, int]
    """How many rows are kept, by first name of a parameter."""
    sizes: Mapping[int, int]
    """New sizes of input axes by old ones."""


def stand_in(
    model: nn.Module, args: Sequence[object], kwargs: Mapping[str, object], chosen: Sequence[Coupling]
) -> StandIn | None:
    """The smallest model that takes the call, None where nothing can be left out.

    Raises PlanError where weights are on ``meta`` and no model with weights that are drawn takes the call.
    """
    example, meta = TrialCall(tuple(args), dict(kwargs)), any(p.is_meta for p in model.parameters())
    layers, rows, sizes = _alike_layers(model, chosen), _tables(model, chosen), _long_sizes(example)
    for with_layers in (True, False):
        for with_rows in (True, False):
            cut = _Cut(layers if with_layers else {}, rows if with_rows else {}, sizes)
            for attempt in (cut, _Cut(cut.layers, cut.rows, {})):
                if not meta and not (attempt.layers or attempt.rows or attempt.sizes):
                    return None
                small = _small(model, example, chosen, attempt)
                if small is not None:
                    return small
    raise PlanError(
        f"the weights of {type(model).__name__} are on meta, and with weights that are drawn it does not take the "
        "example, so that no edit can be tried: load its weights first"
    )


def _small(model: nn.Module, example: TrialCall, chosen: Sequence[Coupling], cut: _Cut) -> StandIn | None:
    """The model with something left out, None where it does not take the call then."""
    try:
        call, outline = _smaller_call(example, cut), _without(model, cut, drawn=False)
        _let_configuration_follow(model, outline, cut)
        small = _thinner(outline, call, chosen)
        if small is None:
            small = _without(model, cut) if any(p.is_meta for p in outline.parameters()) else outline
            _let_configuration_follow(model, small, cut)
            output_tensors(small, call)
    except Exception:  # whatever the model's code raises says that something is missing
        return None
    names = dict(small.named_parameters())
    deep = partial(_without, model, _Cut({}, cut.rows, {}))
    return StandIn(small, call, deep, tuple(c for c in chosen if all(m.parameter in names for m in c.members)))


# -- layers ------------------------------------------------------------------------------------------------------


def _alike_layers(model: nn.Module, chosen: Sequence[Coupling]) -> dict[str, tuple[str, ...]]:
    """The entries that may go, by path of the outermost modules that hold numbered layers.

    None where a coupling lies in several layers, whose members would be missing.
    """
    dropped: dict[str, tuple[str, ...]] = {}
    for path, module in model.named_modules():
        names = list(module._modules)
        numbered = names == [str(i) for i in range(len(names))] and len(names) > LAYERS_OF_A_SORT
        if not numbered or any(is_under(path, other) for other in dropped):
            continue
        sorts: dict[Hashable, list[str]] = {}
        for name in names:
            layer = f"{path}.{name}" if path else name
            sorts.setdefault(_sort(model, layer, chosen), []).append(name)
        going = tuple(name for alike in sorts.values() for name in alike[LAYERS_OF_A_SORT:])
        if going:
            dropped[path] = going
    paths = [f"{path}.{name}" if path else name for path, names in dropped.items() for name in names]
    for coupling in chosen:
        holders = {next((p for p in paths if is_under(m.parameter, p)), "") for m in coupling.members}
        if len(holders) > 1:
            return {}
    return dropped


def _sort(model: nn.Module, layer: str, chosen: Sequence[Coupling]) -> Hashable:
    """What a layer is, but for its sizes and numbers: classes and settings of its parts, and roles of its couplings."""
    parts = []
    for path, module in model.get_submodule(layer).named_modules():
        settings = sorted((n, v) for n, v in vars(module).items() if isinstance(v, bool | str | None))
        parts.append((path, type(module), tuple(settings)))
    roles = [
        (c.kind, *(role_of(m.parameter.rpartition(".")[0], model)[:2] for m in c.members))
        for c in chosen
        if any(is_under(m.parameter, layer) for m in c.members)
    ]
    return tuple(parts), tuple(roles)


# -- tables and inputs -------------------------------------------------------------------------------------------


def _tables(model: nn.Module, chosen: Sequence[Coupling]) -> dict[str, int]:
    """The parameters that may hold a vocabulary: of many rows, which nothing sums over and no coupling removes.

    None on an accelerator, where a wrong index ends the process.
    """
    shapes = parameter_shapes(model)
    axes = {(m.parameter, axis) for c in chosen for m in c.members for axis in (m.axis, m.carrier_axis)}
    others = {size for shape in shapes.values() for size in shape[1:]} | {
        shapes[n][a] for n, a in axes if a is not None
    }
    on_cpu = all(p.device.type in ("cpu", "meta") for p in model.parameters())
    return {n: FEW_ROWS for n, shape in shapes.items() if on_cpu and shape and MANY_ROWS <= shape[0] not in others}


def _long_sizes(example: TrialCall) -> dict[int, int]:
    """Shorter sizes for the long axes of whole-number inputs, such as positions of tokens: all different."""
    tensors = [t for t in pytree.tree_leaves(opened((example.args, example.kwargs))) if isinstance(t, Tensor)]
    whole = {size for t in tensors if not t.is_floating_point() for size in t.shape if size > LONG}
    return {size: SHORT + number for number, size in enumerate(sorted(whole))}


def _smaller_call(example: TrialCall, cut: _Cut) -> TrialCall:
    parts = pytree.tree_map(lambda leaf: _smaller_input(leaf, cut), opened((example.args, example.kwargs)))
    args, kwargs = closed(parts)[0]
    return TrialCall(args, kwargs)


def _smaller_input(leaf: object, cut: _Cut) -> object:
    if not isinstance(leaf, Tensor):
        return leaf
    for axis, size in enumerate(leaf.shape):
        if size in cut.sizes:
            leaf = leaf.narrow(axis, 0, cut.sizes[size])
    if leaf.is_meta:
        leaf = _drawn(leaf, torch.Generator().manual_seed(0), 1)
    if cut.rows and not leaf.is_floating_point() and not leaf.is_complex() and leaf.dtype is not torch.bool:
        leaf = torch.where(leaf < FEW_ROWS, leaf, leaf % FEW_ROWS)
    return leaf


# -- copies ------------------------------------------------------------------------------------------------------


def _without(model: nn.Module, cut: _Cut, *, drawn: bool = True) -> nn.Module:
    """A copy of a model without what is cut; that is never copied. drawn: whether weights on ``meta`` are drawn."""
    memo: dict[int, Any] = {}
    for path, names in cut.layers.items():
        memo |= {id(model.get_submodule(path)._modules[name]): nn.Identity() for name in names}
    source = torch.Generator().manual_seed(0)
    for name, parameter in _tensors_outside(model, cut.layers):
        part = parameter[: cut.rows[name]] if name in cut.rows else parameter
        if parameter.is_meta and drawn:
            part = _drawn(part, source)
        if part is not parameter:
            with torch.no_grad():
                data = part.detach().clone()
            kept = nn.Parameter(data, parameter.requires_grad) if isinstance(parameter, nn.Parameter) else data
            memo[id(parameter)] = kept
    small = copy.deepcopy(model, memo).eval()
    for path, names in cut.layers.items():
        for name in names:
            del small.get_submodule(path)._modules[name]
    return small


def _tensors_outside(model: nn.Module, layers: Mapping[str, tuple[str, ...]]) -> Iterator[tuple[str, Tensor]]:
    """The parameters and buffers of a model that are not in some layers."""
    left_out = [f"{path}.{name}" if path else name for path, names in layers.items() for name in names]
    tensors: Iterable[tuple[str, Tensor]] = (*model.named_parameters(), *model.named_buffers())
    return ((name, tensor) for name, tensor in tensors if not any(is_under(name, path) for path in left_out))


def _drawn(tensor: Tensor, source: torch.Generator, whole: int = 0) -> Tensor:
    """Numbers for a tensor on ``meta``: vectors around 1, matrices as layers of their width begin.

    whole: what tensors of whole numbers are filled with; those of truth values with True.
    """
    if not tensor.is_floating_point():
        return torch.full(tensor.shape, True if tensor.dtype is torch.bool else whole, dtype=tensor.dtype)
    numbers = torch.randn(tensor.shape, generator=source)
    numbers = 1 + 0.5 * numbers if tensor.dim() < 2 else numbers * tensor.shape[-1] ** -0.5
    return numbers.to(tensor.dtype)


# -- thinner models ----------------------------------------------------------------------------------------------


def _thinner(small: nn.Module, call: TrialCall, chosen: Sequence[Coupling]) -> nn.Module | None:
    """A model built from the configuration of a large one with fewer of what no chosen coupling counts.

    None where it is not large, where no configuration describes it, or where what is built does not take the call.
    """
    if sum(p.numel() for p in small.parameters()) <= MANY_PARAMETERS:
        return None
    shapes = parameter_shapes(small)
    axes = {(m.parameter, axis) for c in chosen for m in c.members for axis in (m.axis, m.carrier_axis)}
    fixed = {(n, axis): shapes[n][axis] for n, axis in axes if axis is not None and n in shapes}
    for name in config_attributes(small):
        config = cast(dict[str, object], vars(vars(small)[name]))
        for field, value in list(config.items()):
            if type(value) is int and value >= LEAST_WIDTH * THINNER and value % THINNER == 0:
                config[field] = value // THINNER
                built = built_shapes(small, vars(small)[name])
                if built is None or any(built.get(n, ())[axis : axis + 1] != (k,) for (n, axis), k in fixed.items()):
                    config[field] = value
        try:
            with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                thin = type(small)(reloaded(vars(small)[name]))
            thin = thin.to(next(small.parameters()).dtype).eval()
            output_tensors(thin, call)
        except Exception:  # the constructor or the call refuses, in whatever way
            return None
        return thin
    return None


# -- configurations ----------------------------------------------------------------------------------------------


def _let_configuration_follow(model: nn.Module, small: nn.Module, cut: _Cut) -> None:
    """Write what was left out into the configurations that describe the model, where they then describe the small one.

    The numbers of layers and of rows are looked for among the integers at the top of a configuration, the most of them
    that fit, and lists of one entry per layer keep the entries of the layers that are kept.
    """
    for name in config_attributes(model):
        config = cast(dict[str, object], vars(vars(small)[name]))
        before, changes = dict(config), _follow_ups(model, config, cut)
        for count in range(len(changes), -1, -1):
            for fields in islice(combinations(changes, count), MAX_WAYS):
                config.update({**before, **{field: changes[field] for field in fields}})
                if built_shapes(small, vars(small)[name]) == parameter_shapes(small):
                    return
        config.update(before)


def _follow_ups(model: nn.Module, config: Mapping[str, object], cut: _Cut) -> dict[str, object]:
    """What the fields of a configuration may become that say as much as was left out."""
    rows = {model.get_parameter(name).shape[0]: kept for name, kept in cut.rows.items()}
    depths = {len(model.get_submodule(path)._modules): names for path, names in cut.layers.items()}
    changes: dict[str, object] = {}
    for field, value in config.items():
        if isinstance(value, list | tuple) and len(value) in depths:
            left_out = {int(name) for name in depths[len(value)]}
            changes[field] = type(value)(entry for i, entry in enumerate(value) if i not in left_out)
        elif type(value) is int and value in depths:
            changes[field] = value - len(depths[value])
        elif type(value) is int and value in rows:
            changes[field] = rows[value]
    return changes
