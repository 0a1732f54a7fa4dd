"""What detection returns: a sequence of couplings that prints as a table, and the analysis that they come from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, overload

from torch import nn

from ecospa_fx.axes.flow import AxisFlow
from ecospa_fx.coupling.blocks import find_blocks
from ecospa_fx.coupling.choice import ModulePaths, near_names, selected
from ecospa_fx.coupling.report import coupling_table, coupling_table_html
from ecospa_fx.coupling.types import BLOCK, Coupling, LocatedCoupling
from ecospa_fx.errors import EcospaError
from ecospa_fx.ir.schema import Sizes


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Analysis:
    """What couplings were detected from."""

    flow: AxisFlow
    """The axes of the graph's tensors."""
    located: tuple[LocatedCoupling, ...]
    """The couplings and their dims."""
    sizes: Sizes
    """From a size of the graph, an int or a symbol, to its number in the example."""


class Couplings(Sequence[Coupling]):
    """The list that ``detect`` returns; printing it shows a table, indexing takes a position or a name."""

    def __init__(
        self,
        couplings: Iterable[Coupling],
        model: nn.Module,
        analysis: Analysis | None = None,
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
        self.analysis = analysis
        """What they were detected from, for budgets in FLOPs or seconds; None where no graph is known."""
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
    def blocks(self) -> tuple[Coupling, ...]:
        """Whole branches that can leave the graph, of kind "block": no part of the sequence until `kinds` names them.

        See `ecospa_fx.coupling.blocks`.
        """
        analysis = self.analysis
        return () if analysis is None else tuple(b.coupling for b in find_blocks(analysis.flow, self.shapes))

    def asked(self, kinds: object) -> Couplings:
        """These, and the blocks where some kinds name them."""
        named = kinds == BLOCK or (isinstance(kinds, list | tuple | set | frozenset) and BLOCK in kinds)
        if not named or any(c.kind == BLOCK for c in self):
            return self
        return Couplings(
            (*self, *self.blocks), self.model, self.analysis, self.example, self.whole and self.whole.asked(kinds)
        )

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
        every = self.asked(kinds)
        couplings = selected(every, kinds, names, modules, exclude, predicate)
        return Couplings(couplings, self.model, self.analysis, self.example, self.whole or every)

    def __repr__(self) -> str:
        offered, blocked = len(self.offered), len(self.blocked)
        return f"Couplings({type(self.model).__name__}, {offered:,} offered, {blocked:,} blocked)"

    def _repr_html_(self) -> str:
        return coupling_table_html(self)

    def __str__(self) -> str:
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
