"""What detection returns: couplings, their members, and refusals.

A coupling is a prunable dim with everything that shrinks with it. Its units are numbered per carrier;
carrier ``c`` and unit ``u`` name one removable set of parameter elements, the same in every member.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from ecospa_fx.coupling.choice import ModulePaths, near_names, selected
from ecospa_fx.errors import EcospaError

if TYPE_CHECKING:
    from ecospa_fx.budget.graph_cost import Work

Role = Literal["producer", "consumer"]
Symmetry = Literal["permutation", "rotary", "linear"]


@dataclass(frozen=True, slots=True)
class Box:
    """Positions ``offset + Σ index · stride`` along one parameter axis.

    carriers, width: (size, stride) pairs, row-major; unit: the stride between neighbouring units.
    """

    offset: int
    carriers: tuple[tuple[int, int], ...]
    unit: int
    width: tuple[tuple[int, int], ...]

    def indices(self, carriers: int, units: int) -> Tensor:
        """LongTensor [carriers, units, width] of positions; carriers absent here are broadcast."""

        def grid(pairs: Iterable[tuple[int, int]]) -> Tensor:
            total = torch.zeros(1, dtype=torch.long)
            for size, stride in pairs:
                total = (total[:, None] + torch.arange(size)[None] * stride).flatten()
            return total

        per_carrier = grid(self.carriers).expand(carriers) if not self.carriers else grid(self.carriers)
        unit = torch.arange(units) * self.unit
        return self.offset + per_carrier[:, None, None] + unit[None, :, None] + grid(self.width)[None, None, :]


@dataclass(frozen=True, slots=True)
class Member:
    """One parameter axis of a coupling.

    parameter: name in ``model.named_parameters()``; axis: its axis; carrier_axis: None, or the axis that is
    the carrier itself (packed experts), and then ``indices[c]`` are positions inside slice ``c`` of that axis.
    """

    parameter: str
    axis: int
    role: Role
    carrier_axis: int | None
    boxes: tuple[Box, ...]
    carriers: int
    units: int

    @property
    def indices(self) -> Tensor:
        """LongTensor [carriers, units, width]: positions along ``axis``, materialised on each call."""
        return torch.cat([box.indices(self.carriers, self.units) for box in self.boxes], dim=2)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a dim cannot be removed.

    message: one sentence, reason and remedy; node, operator: what refused it; source: the user's own line; remedy: the
    part of the message that says what to change, or which option lifts it, or that nothing does.
    """

    message: str
    node: str
    operator: str
    source: str = ""
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Step:
    """One node on the evidence path of a coupling: what the operator does to the dim there."""

    node: str
    operator: str
    action: str
    source: str = ""
    module: str = ""


@dataclass(frozen=True, slots=True)
class Coupling:
    """A prunable dim, or a refusal (``blocked`` is set).

    size: units per carrier; carriers: how many times the choice may differ (every carrier keeps the same
    number of units); parameters: elements that go when the whole dim goes; contains: names of the couplings
    whose elements this one holds as whole blocks (a head holds its head dimensions); inexact: None, or why removing
    units differs from masking them, which the caller of ``detect`` allowed; resized: None, or which input or output
    gets narrower, which was allowed too.
    """

    name: str
    kind: str
    layer: str
    size: int
    carriers: int
    symmetry: Symmetry
    members: tuple[Member, ...]
    parameters: int
    blocked: Refusal | None = None
    inexact: Refusal | None = None
    resized: Refusal | None = None
    contains: tuple[str, ...] = ()
    path: tuple[Step, ...] = field(default=(), repr=False)


class Couplings(Sequence[Coupling]):
    """The list that ``detect`` returns; printing it shows a table, indexing takes a position or a name."""

    def __init__(
        self,
        couplings: Iterable[Coupling],
        model: nn.Module,
        work: Work | None = None,
        example: tuple[Any, Any] | None = None,
        whole: Couplings | None = None,
    ) -> None:
        self._couplings = tuple(couplings)
        self._by_name = {c.name: c for c in self._couplings}
        self.model = model
        """The module that was inspected; scores that need no data read its weights. Never changed."""
        self.example = example
        """(args, kwargs) that the model was inspected with, where that is known."""
        self.shapes = parameter_shapes(model)
        """Dense shape of every parameter, by its first name in ``named_parameters()``."""
        self.work = work
        """The graph's calls that couplings narrow, for budgets in FLOPs or seconds; None where no graph is known."""
        self.whole = whole
        """All couplings of the model, where these are a selection of them."""

    @overload
    def __getitem__(self, key: int | str) -> Coupling: ...
    @overload
    def __getitem__(self, key: slice) -> tuple[Coupling, ...]: ...
    def __getitem__(self, key: int | str | slice) -> Coupling | tuple[Coupling, ...]:
        if isinstance(key, str):
            if key not in self._by_name:
                raise KeyError(f"no coupling {key!r}; {near_names(self, key)}")
            return self._by_name[key]
        return self._couplings[key]

    def __len__(self) -> int:
        return len(self._couplings)

    def __iter__(self) -> Iterator[Coupling]:
        return iter(self._couplings)

    @property
    def offered(self) -> tuple[Coupling, ...]:
        """The couplings that can be shrunk."""
        return tuple(c for c in self._couplings if c.blocked is None)

    @property
    def blocked(self) -> tuple[Coupling, ...]:
        """The refusals."""
        return tuple(c for c in self._couplings if c.blocked is not None)

    @cached_property
    def paths(self) -> ModulePaths:
        """What patterns on module paths are matched with."""
        return ModulePaths.of(self.model)

    def select(
        self,
        kinds: str | Sequence[str] | None = None,
        names: str | Sequence[str] | None = None,
        modules: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] = (),
        predicate: Callable[[Coupling], object] | None = None,
    ) -> Couplings:
        """Those that meet every condition, refusals included, in their order: every verb takes them like the whole.

        kinds: of any of these; names: of any of these names, or shell patterns on names; modules, exclude: holding
        parameters that any of these shell patterns on module paths matches, or none of them (see
        `ecospa_fx.coupling.choice`); predicate: for which this is true. Raises PlanError for what is not there.

        Example:
            >>> import torch, ecospa_fx as eco
            >>> layers = [torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 16), torch.nn.GELU()]
            >>> mlp = torch.nn.Sequential(*layers, torch.nn.Linear(16, 8))
            >>> [c.size for c in eco.detect(mlp, (torch.randn(2, 8),)).select(kinds="ffn", exclude=["4"])]
            [32]
        """
        found = selected(self, kinds, names, modules, exclude, predicate)
        return Couplings(found, self.model, self.work, self.example, self.whole or self)

    def __str__(self) -> str:
        from ecospa_fx.coupling.report import coupling_table

        return coupling_table(self)


def check_couplings(couplings: object, refused: type[EcospaError]) -> None:
    """Raise `refused` for what `detect` did not return: only its result knows the model that couplings belong to."""
    if not isinstance(couplings, Couplings):
        raise refused(
            f"couplings is a {type(couplings).__name__}: pass what detect() returned, or a part of it that "
            "couplings.select(…) gives"
        )


def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter by its first name; tied parameters count once."""
    return {name: tuple(p.shape) for name, p in model.named_parameters()}
