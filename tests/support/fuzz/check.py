"""What must hold for every program: found, exact, disjoint or nested, and planted couplings among what is offered."""

from __future__ import annotations

import copy
import random
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.utils import _pytree as pytree

import ecospa_fx as eco
from ecospa_fx.budget.allocate import may_be_ragged
from ecospa_fx.capture.export import capture
from ecospa_fx.coupling.couplings import Couplings
from ecospa_fx.coupling.detection import detected as couplings_of
from ecospa_fx.coupling.types import Coupling
from ecospa_fx.errors import PlanError
from ecospa_fx.ir.program import ExportedForm
from ecospa_fx.passes.shrink.shrink_couplings import shrink_program
from ecospa_fx.plan import Plan, Selection
from ecospa_fx.verify import masked, masked_error
from tests.support.fuzz.program import Program, Unit

EXACT = 1e-9


class Failure(AssertionError):
    """A promise that a program shows to be broken; `kind` says which."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail = kind, detail


@dataclass
class Outcome:
    """What was seen of one program that broke no promise."""

    offered: Counter[str] = field(default_factory=Counter)
    blocked: int = 0
    planted: Counter[str] = field(default_factory=Counter)
    plans: int = 0
    removed: int = 0
    whole: str = "not tried"
    """What became of the plan that went through `eco.shrink`."""


def check(program: Program, *, whole: bool = True, most: int = 6) -> Outcome:
    """Check one program by at most so many plans. Raises Failure.

    whole: one of the plans also goes through `eco.shrink`, with a symbolic batch, and is run at another batch size;
    that takes ten times as long as the others, which rewrite the graph of the example's sizes.
    """
    model, args = program.build(), program.example(2)
    graph, couplings = _guarded("detect", lambda: detected(model, args))
    outcome = Outcome(Counter(c.kind for c in couplings.offered), len(couplings.blocked))
    check_reasons(couplings)
    check_planted(program, couplings, outcome)
    check_overlaps(couplings)
    plans = list(islice(plans_of(couplings, random.Random(program.seed)), most))
    for plan in plans:
        check_static(graph, model, plan, args)
        outcome.plans += 1
        outcome.removed += plan.removed_parameters
    if whole and plans:
        outcome.whole = "shrunk" if check_shrink(program, model, plans[0], args) else "one batch only"
    return outcome


def detected(model: nn.Module, args: Sequence[Tensor]) -> tuple[ExportedForm, Couplings]:
    """What `eco.detect` does, with the graph that it looked at."""
    graph = capture(model, args, None, dynamic=False)
    return graph, couplings_of(graph, model)


def _told(error: BaseException) -> str:
    at = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({at.filename.rpartition('/')[2]}:{at.lineno})"


def _guarded(kind: str, action: Any) -> Any:
    try:
        return action()
    except Exception as error:
        raise Failure(kind, _told(error)) from error


# -- what detection says -------------------------------------------------------------------------------------------


def units_of(coupling: Coupling) -> Iterator[Unit]:
    """The elements of every unit of every carrier."""
    members = [(m, m.indices.tolist()) for m in coupling.members]
    for c in range(coupling.carriers):
        for u in range(coupling.size):
            unit = set()
            for m, indices in members:
                place = (-1, -1) if m.carrier_axis is None else (m.carrier_axis, c)
                unit |= {(m.parameter, m.axis, p, *place) for p in indices[c if len(indices) > 1 else 0][u]}
            yield frozenset(unit)


def check_reasons(couplings: Couplings) -> None:
    """Every refusal says why and where."""
    for c in couplings.blocked:
        if c.blocked is None or not c.blocked.message.strip() or not c.blocked.node:
            raise Failure("reason", f"{c.name} is blocked without a reason")


def check_planted(program: Program, couplings: Couplings, outcome: Outcome) -> None:
    """Every planted unit is offered as that very set, or within a union of such sets where it may be coarse."""
    units = {unit for c in couplings.offered for unit in units_of(c)}
    for planted in program.planted:
        unions = [u for u in units if u == frozenset().union(*(one for one in planted.units if one <= u))]
        whole = frozenset().union(*unions) if planted.coarse else frozenset()
        missing = [u for u in planted.units if u not in units and not u <= whole]
        if missing:
            blocked = [c.blocked.message for c in couplings.blocked if c.blocked and
                       {(m.parameter, m.axis) for m in c.members} & {e[:2] for e in missing[0]}]  # fmt: skip
            raise Failure("planted", f"{planted.kind}: {len(missing)} of {len(planted.units)} units are not offered, "
                                     f"such as {sorted(missing[0])}; blocked there: {blocked}")  # fmt: skip
        outcome.planted[planted.kind] += 1


def check_overlaps(couplings: Couplings) -> None:
    """Units of one coupling share nothing; units of two are disjoint, nested, or cross like rows and columns."""
    per_coupling = [(c, list(units_of(c))) for c in couplings.offered]
    for c, units in per_coupling:
        count = Counter(element for unit in units for element in unit)
        if count and max(count.values()) > 1:
            raise Failure("overlap", f"units of {c.name} share {max(count, key=count.__getitem__)}")
    for i, (c, units) in enumerate(per_coupling):
        for d, others in per_coupling[:i]:
            _check_pair(c, units, d, others)


def _check_pair(c: Coupling, units: Sequence[Unit], d: Coupling, others: Sequence[Unit]) -> None:
    """Two dims of one product: every unit of one meets all units of the other alike, or lies in one of them."""
    shared = frozenset().union(*units) & frozenset().union(*others)
    axes = {element[:2] for element in shared}
    for axis in axes:
        mine, theirs = ([{e for e in u if e[:2] == axis} for u in side] for side in (units, others))
        crossing = {len(a & b) for a in mine for b in theirs}
        inside = all(any(a <= b for b in theirs) or not any(a & b for b in theirs) for a in mine)
        around = all(any(b <= a for a in mine) or not any(a & b for a in mine) for b in theirs)
        if not (inside or around or len(crossing - {0}) <= 1):
            raise Failure("overlap", f"{c.name} and {d.name} overlap on {axis} without nesting")


# -- plans ---------------------------------------------------------------------------------------------------------


def plans_of(couplings: Couplings, chance: random.Random) -> Iterator[Plan]:
    """Random plans over all couplings, over single ones, with one unit left, ragged, and one that is allocated."""
    offered = couplings.offered
    if not offered:
        return
    yield _plan(couplings, offered, chance, chance.choice([0.3, 0.5, 0.8]))
    yield _plan(couplings, offered, chance, 1.0)
    yield _plan(couplings, [chance.choice(offered)], chance, chance.random())
    with suppress(PlanError):  # tiny couplings cannot lose so much
        yield eco.plan(couplings, ratio=chance.choice([0.2, 0.4, 0.6]), scores="random", seed=chance.randint(0, 99))
    yield _plan(couplings, offered, chance, chance.choice([0.3, 0.6]), ragged=True)
    yield _plan(couplings, [chance.choice(offered)], chance, chance.random())


def _plan(
    couplings: Couplings, chosen: Sequence[Coupling], chance: random.Random, ratio: float, *, ragged: bool = False
) -> Plan:
    """Each unit goes with probability `ratio`, alike in number along carriers unless ragged; at least one stays."""
    selections = []
    for c in chosen:
        kept = [max(1, sum(chance.random() > ratio for _ in range(c.size)))] * c.carriers
        if ragged and may_be_ragged(c):
            kept = [chance.randint(0, c.size) for _ in range(c.carriers - 1)] + kept[:1]
        keep = tuple(tuple(sorted(chance.sample(range(c.size), n))) for n in kept)
        selections.append(Selection(c.name, c.kind, c.layer, c.size, c.carriers, c.members, keep))
    return Plan(tuple(selections), tuple(couplings.shapes.items()))


# -- exactness -----------------------------------------------------------------------------------------------------


def check_static(graph: ExportedForm, model: nn.Module, plan: Plan, args: Sequence[Tensor]) -> None:
    """The rewritten graph gives what the masked model gives."""
    form = _guarded("copy", lambda: copied(graph, model))
    _guarded("shrink", lambda: shrink_program(form, plan))
    with torch.no_grad():
        got = _guarded("run", lambda: run(form, args))
        with masked(model, plan):
            want = pytree.tree_leaves(model(*args))
    _compare(got, want, plan, "static")
    _check_counts({name: p.numel() for name, p in form.values.items()}, model, plan)


def copied(graph: ExportedForm, model: nn.Module) -> ExportedForm:
    """The same program, to be rewritten."""
    exported = copy.copy(graph.exported)
    exported._graph_module = copy.deepcopy(graph.exported.graph_module)
    exported._graph_signature = copy.deepcopy(graph.exported.graph_signature)
    exported._constants = dict(graph.exported.constants)
    return ExportedForm(exported, model)


def run(form: ExportedForm, args: Sequence[Tensor]) -> list[Any]:
    """Interpret the graph of a program."""
    exported, signature = form.exported, form.exported.graph_signature
    constants = {**dict(exported.named_buffers()), **exported.constants}
    targets = {spec.arg.name: spec.target for spec in signature.input_specs if hasattr(spec.arg, "name")}
    given = iter(args)
    inputs: list[Any] = []
    for node in form.graph.nodes:
        if node.op != "placeholder":
            continue
        target = targets.get(node.name)
        if node in form.parameters:
            inputs.append(form.values[form.parameters[node]])
        else:
            inputs.append(constants[target] if target is not None else next(given))
    result = fx.Interpreter(form.exported.graph_module).run(*inputs, enable_io_processing=False)
    return list(pytree.tree_leaves(result))


def _compare(got: Sequence[Any], want: Sequence[Any], plan: Plan, where: str) -> None:
    if len(got) != len(want):
        raise Failure("outputs", f"{len(got)} outputs where {len(want)} were expected ({where})")
    for a, b in zip(got, want, strict=True):
        if a.shape != b.shape:
            raise Failure("shape", f"{tuple(a.shape)} where {tuple(b.shape)} was expected ({where})")
        error = _difference(a, b)
        if not error <= EXACT:
            names = [f"{s.name} {s.kept}/{s.size}×{s.carriers}" for s in plan]
            raise Failure("inexact", f"error {error:.2e} ({where}) after cutting {names}")


def _difference(got: Tensor, want: Tensor) -> float:
    if not torch.equal(got.isfinite(), want.isfinite()):
        return float("inf")
    finite = want.isfinite()
    if not bool(finite.any()):
        return 0.0
    return float((got[finite] - want[finite]).abs().max() / want[finite].abs().max().clamp(min=1e-12))


def _check_counts(sizes: dict[str, int], model: nn.Module, plan: Plan) -> None:
    masks = plan.masks(model)
    for name, p in model.named_parameters():
        kept = int(masks[name].sum()) if name in masks else p.numel()
        if name in sizes and sizes[name] != kept:
            raise Failure("count", f"{name} has {sizes[name]} elements where the mask keeps {kept}")


def check_shrink(program: Program, model: nn.Module, plan: Plan, args: Sequence[Tensor]) -> bool:
    """The whole way, with a symbolic batch: the example's batch and another one.

    False where the plan only holds at the example's batch, and is refused for that.
    """
    plan = Plan.from_json(plan.to_json())
    try:
        small = eco.shrink(model, plan, args)
    except Exception as problem:
        if isinstance(problem, PlanError) and _by_accident(program, model, plan):
            return False
        raise Failure("shrink", _told(problem)) from problem
    for batch in (2, 3):
        example = program.example(batch)
        try:
            error = masked_error(model, small, plan, example)
        except Exception as failure:
            if batch != 2 and (_one_batch_only(model, args) or _by_accident(program, model, plan)):
                return False  # refused, as it must be
            raise Failure(f"batch {batch}", _told(failure)) from failure
        if not error <= EXACT:
            raise Failure("inexact", f"error {error:.2e} at batch {batch} through eco.shrink\n{plan}")
    _check_counts({name: p.numel() for name, p in small.named_parameters()}, model, plan)
    return True


def _by_accident(program: Program, model: nn.Module, plan: Plan) -> bool:
    """Whether a coupling of the plan is no more there at another batch size, as the refusal says."""
    others = {frozenset(m.boxes for m in c.members) for c in eco.detect(model, program.example(7)).offered}
    return any(frozenset(m.boxes for m in s.members) not in others for s in plan)


def _one_batch_only(model: nn.Module, args: Sequence[Tensor]) -> bool:
    """Whether torch.export itself ties the dense model to the batch of the example."""
    graph = capture(model, args, None, dynamic=True).graph
    inputs = [n for n in graph.nodes if n.op == "placeholder" and n.name.startswith("v")]
    return any(is_concrete_int(n.meta["val"].shape[0]) for n in inputs)


# -- smaller programs ----------------------------------------------------------------------------------------------


def failure_of(program: Program, *, whole: bool = True, most: int = 6) -> Failure | None:
    """What is wrong with a program; None where nothing is."""
    try:
        check(program, whole=whole, most=most)
    except Failure as failure:
        return failure
    return None


def runs(program: Program) -> bool:
    """Whether the model itself computes something at several batch sizes."""
    try:
        model = program.build()
        with torch.no_grad():
            leaves = [t for batch in (2, 3) for t in pytree.tree_leaves(model(*program.example(batch)))]
        return all(bool(t.isfinite().all()) for t in leaves)
    except Exception:
        return False


def reduced(program: Program, failure: Failure, *, whole: bool = True) -> tuple[Program, Failure]:
    """A smaller program that fails in the same way; seeds of plans and weights stay."""
    again = True
    while again:
        again = False
        for simpler in program.simplifications():
            if len(simpler.source) >= len(program.source) or not runs(simpler):
                continue
            found = failure_of(simpler, whole=whole)
            if found is not None and found.kind == failure.kind:
                program, failure, again = simpler, found, True
                break
    return program, failure
