"""Which couplings a user means: by kind, by name, by shell patterns on the paths of modules; and why none is left.

A pattern is matched, letter by letter and case by case as in a shell, with the name of every parameter that a coupling
holds and with the path of every module above it. So ``"lm_head"`` is the module of that path with everything under it,
``"model.layers.0"`` and ``"model.layers.0.*"`` are one layer, ``"*.mlp"`` is every MLP; ``*`` also stands for dots, so
that ``"layers.1*"`` is layer 1 and layers 10 to 19. A tied parameter has every one of its names.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import translate
from typing import TYPE_CHECKING, TypedDict

from torch import nn

from ecospa_fx.coupling.types import ASKED_FOR, BLOCK, RESIDUAL
from ecospa_fx.errors import EcospaError, PlanError

if TYPE_CHECKING:
    from ecospa_fx.coupling.couplings import Couplings
    from ecospa_fx.coupling.types import Coupling

Refused = type[EcospaError]
"""What a verb raises for a choice that makes no sense."""

SHOWN = 4
"""How many names a message lists."""


class ChoiceOptions(TypedDict, total=False):
    """Which couplings may lose units, and how many at most: options of `plan`, `compress` and `SparseTraining`."""

    kinds: str | Sequence[str] | None
    """None by default: all that are offered but for residual widths and whole blocks, heads only where what is in them
    is not. Only couplings of these kinds; "block" for the verb `plan` alone."""
    exclude: str | Sequence[str]
    """() by default. Shell patterns on module paths whose parameters stay whole, see `ecospa_fx.coupling.choice`. The
    ratio counts what may go."""
    limits: Mapping[str, float] | None
    """None by default. Largest share, 0 to 1, that each coupling of a kind or under a pattern may lose; of several the
    least counts."""
    floor: float
    """0.05 by default. Least share of its units that a coupling keeps, 0 to below 1, and at least one unit."""


@dataclass(frozen=True, slots=True, eq=False)
class ModulePaths:
    """What patterns on module paths are matched with."""

    parameters: Mapping[str, tuple[str, ...]]
    """By first name of a parameter, all its names and the paths of all modules above."""
    every: tuple[str, ...]
    """Every path of a module and every name of a parameter."""

    @classmethod
    def of(cls, model: nn.Module) -> ModulePaths:
        """Every name of every parameter of a model."""
        first = {id(p): name for name, p in model.named_parameters()}
        above: dict[str, dict[str, None]] = {name: {} for name in first.values()}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            parts = name.split(".")
            above[first[id(parameter)]].update({".".join(parts[:n]): None for n in range(1, len(parts) + 1)})
        modules = (path for path, _ in model.named_modules(remove_duplicate=False) if path)
        every = dict.fromkeys([*modules, *(name for names in above.values() for name in names)])
        return cls({name: tuple(names) for name, names in above.items()}, tuple(every))

    def matched(self, pattern: str) -> frozenset[str] | None:
        """First names of the parameters that a pattern matches; None where it matches nothing of the model."""
        matches = re.compile(translate(pattern)).match
        if not any(matches(path) for path in self.every):
            return None
        return frozenset(name for name, paths in self.parameters.items() if any(matches(p) for p in paths))

    def near(self, pattern: str) -> str:
        """Paths that a pattern which matches nothing may have meant: deeper ones first, then those spelt alike."""
        deeper = re.compile(translate(f"*.{pattern}")).match
        near = [path for path in self.every if deeper(path)] or get_close_matches(pattern, self.every, SHOWN, 0.5)
        last = {path: path.rpartition(".")[2] for path in self.every}
        alike = get_close_matches(pattern.rpartition(".")[2], set(last.values()), SHOWN, 0.6)
        near = near or [path for name in alike for path in self.every if last[path] == name]
        return ", ".join(map(repr, near[:SHOWN] or self.every[:SHOWN]))


def holding(couplings: Iterable[Coupling], parameters: frozenset[str]) -> frozenset[str]:
    """Names of the couplings that hold any of some parameters."""
    return frozenset(c.name for c in couplings if any(m.parameter in parameters for m in c.members))


def under(couplings: Couplings, option: str, patterns: Sequence[str], refused: Refused = PlanError) -> frozenset[str]:
    """Names of the couplings that any of some patterns matches. Raises `refused` for one that matches no module."""
    names: frozenset[str] = frozenset()
    for pattern in patterns:
        parameters = couplings.paths.matched(pattern)
        if parameters is None:
            raise refused(
                f"{option}={pattern!r} matches no module and no parameter of the model: near it are "
                f"{couplings.paths.near(pattern)}"
            )
        names |= holding(couplings, parameters)
    return names


def texts(option: str, value: object, refused: Refused = PlanError) -> list[str]:
    """A text, or several, as a list. Raises `refused` for anything else, and for an empty text."""
    entries: list[object] = list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [value]
    names = [entry for entry in entries if isinstance(entry, str) and entry]
    if len(names) < len(entries):
        raise refused(f"{option}={value!r:.60} is no name and no list of names: give texts, like {option}=['…']")
    return names


def listed(names: Iterable[str]) -> str:
    """Names in one line."""
    return ", ".join(names) or "none"


def choosable(
    couplings: Couplings, kinds: str | Sequence[str] | None = None, exclude: str | Sequence[str] = (),
    refused: Refused = PlanError, verb: str = "remove",
) -> list[Coupling]:  # fmt: skip
    """The offered couplings that can lose a unit, of some kinds, without those that patterns leave out.

    Raises `refused`, in one sentence, for a kind or a pattern that is not there, and where nothing is left to choose;
    verb: what there is then nothing to do. Without `kinds`, residual widths and blocks are left out.
    """
    offered = [c for c in couplings.offered if c.size > 1 or c.kind == BLOCK]
    if not offered:
        raise refused(nothing_offered(couplings, verb))
    if kinds is None:
        offered = [c for c in offered if c.kind not in ASKED_FOR]
        if not offered:
            raise refused(
                f"there is nothing to {verb} because only the residual width is offered, which has to be asked for: "
                f"say kinds={RESIDUAL!r}"
            )
    else:
        wanted, offered_kinds = texts("kinds", kinds, refused), sorted({c.kind for c in offered})
        unknown = [kind for kind in wanted if kind not in offered_kinds]
        if unknown:
            raise refused(f"no offered coupling is of kind {unknown[0]!r}: use some of {listed(offered_kinds)}")
        if not wanted:
            raise refused(f"kinds={kinds!r} names no kind: use some of {listed(offered_kinds)}, or leave it out")
        offered = [c for c in offered if c.kind in wanted]
    outside = under(couplings, "exclude", texts("exclude", exclude, refused), refused)
    left = [c for c in offered if c.name not in outside]
    if not left:
        raise refused(
            f"there is nothing to {verb} because exclude={exclude!r:.200} matches all {len(offered)} couplings that "
            "are offered: leave out less"
        )
    return left


def nothing_offered(couplings: Couplings, verb: str = "remove") -> str:
    """Why there is nothing to remove, in one sentence: the most common reasons come first."""
    begin = f"there is nothing to {verb} because"
    if couplings.offered:
        return f"{begin} each of the {len(couplings.offered)} offered couplings has one unit, which has to stay"
    if couplings.whole is not None and any(c.blocked is None for c in couplings.whole):
        return f"{begin} no coupling that is offered is among the {len(couplings)} selected: select others"
    reasons = Counter(c.blocked.message for c in couplings if c.blocked is not None).most_common(2)
    if not reasons:
        kind = type(couplings.model).__name__
        return f"{begin} no coupling was found: no two weights of this {kind} meet in a way that detection knows"
    counted = "; and ".join(f"{message} ({count} of {len(couplings)} couplings)" for message, count in reasons)
    return f"{begin} no coupling is offered: {counted}; print(couplings) shows every reason"


def shares(
    couplings: Couplings, chosen: Sequence[Coupling], limits: Mapping[str, float] | None, refused: Refused = PlanError
) -> dict[str, float]:
    """By name of chosen coupling the largest share of its units that it may lose, where there is a limit.

    limits: by kind, or by pattern; of several that reach a coupling the least counts. Raises `refused` for what is no
    share, for a key that reaches no kind that is chosen and no module, and for one that could mean either.
    """
    result: dict[str, float] = {}
    for key, limit in checked_limits(limits, refused).items():
        for name in _reached(couplings, chosen, key, refused):
            result[name] = min(limit, result.get(name, 1.0))
    return result


def checked_limits(limits: object, refused: Refused = PlanError) -> Mapping[str, float]:
    """The same limits, none for None. Raises `refused` for what is no mapping from texts to shares."""
    if limits is None:
        return {}
    if not isinstance(limits, Mapping):
        raise refused(
            f"limits={limits!r:.60} is no mapping: give a share per kind or module, like {{'ffn': 0.5, 'lm_head': 0}}"
        )
    for key, limit in limits.items():
        if not isinstance(key, str) or not key:
            raise refused(f"limits names {key!r:.60}, which is no text: give kinds or patterns on module paths")
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 <= limit <= 1:
            raise refused(
                f"limits[{key!r}]={limit!r:.60} is not a share of units to remove at most: give a number from 0 to 1"
            )
    return limits


def _reached(couplings: Couplings, chosen: Sequence[Coupling], key: str, refused: Refused) -> frozenset[str]:
    """The chosen couplings that a key of limits means."""
    kinds, parameters = sorted({c.kind for c in chosen}), couplings.paths.matched(key)
    of_kind = frozenset(c.name for c in chosen if c.kind == key)
    if parameters is not None:
        below = holding(chosen, parameters)
        if of_kind and below != of_kind:
            raise refused(
                f"limits names {key!r}, which is both a kind and a module: write {key + '.*'!r} for the module, or the "
                "modules of that kind"
            )
        return below
    if of_kind:
        return of_kind
    if any(c.kind == key for c in couplings):
        raise refused(f"limits names kind {key!r}, of which nothing is chosen: use some of {listed(kinds)}")
    raise refused(
        f"limits names {key!r}, which is no kind that is chosen ({listed(kinds)}) and matches no module: near it are "
        f"{couplings.paths.near(key)}"
    )


def selected(
    couplings: Couplings, kinds: str | Sequence[str] | None, names: str | Sequence[str] | None,
    modules: str | Sequence[str] | None, exclude: str | Sequence[str], predicate: Callable[[Coupling], object] | None,
) -> list[Coupling]:  # fmt: skip
    """The couplings, refusals included, that meet all conditions; see `Couplings.select`."""
    result = list(couplings)
    if kinds is not None:
        wanted, present_kinds = texts("kinds", kinds), sorted({c.kind for c in result})
        for kind in wanted:
            if kind not in present_kinds:
                raise PlanError(f"no coupling is of kind {kind!r}: use some of {listed(present_kinds)}")
        result = [c for c in result if c.kind in wanted]
    if names is not None:
        accepted = frozenset().union(*(named(couplings, "names", name) for name in texts("names", names)))
        result = [c for c in result if c.name in accepted]
    if modules is not None:
        inside = under(couplings, "modules", texts("modules", modules))
        result = [c for c in result if c.name in inside]
    outside = under(couplings, "exclude", texts("exclude", exclude))
    if predicate is not None and not callable(predicate):
        raise PlanError(f"predicate={predicate!r:.60} cannot be called: give a function of a coupling")
    return [c for c in result if c.name not in outside and (predicate is None or predicate(c))]


def named(couplings: Couplings, option: str, key: object) -> frozenset[str]:
    """Names of the couplings that a name, or a shell pattern on names, means. Raises PlanError for none."""
    every = [c.name for c in couplings]
    if key in every:
        return frozenset([str(key)])
    matches = re.compile(translate(key)).match if isinstance(key, str) else None
    matching = frozenset(name for name in every if matches is not None and matches(name))
    if not matching:
        raise PlanError(f"{option} names {key!r:.80}, and no coupling is called that: {near_names(couplings, key)}")
    return matching


def near_names(couplings: Couplings, key: object) -> str:
    """What a name of a coupling may have been meant to be."""
    every = [c.name for c in sorted(couplings, key=lambda c: c.blocked is not None)]
    near = get_close_matches(key, every, 3, 0.4) if isinstance(key, str) else []
    return f"near it are {listed(near)}" if near else f"the first are {listed(every[:3])}"
