"""Verbs leave a model as it was: its hooks, tables, attributes, classes, tensors, and the random numbers to come."""

from __future__ import annotations

import builtins
import functools
import logging
import math
import queue
import random
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable
from copy import deepcopy
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import pytest
import torch
from torch import Tensor, nn

import ecospa_fx as eco
from ecospa_fx.errors import CaptureError
from ecospa_fx.holders import is_empty
from ecospa_fx.snapshot import Snapshot, exchange, others_run, untouched
from ecospa_fx.verify import masked, masked_error
from tests.support.outline import outline

X = torch.randn(2, 5, 6)
AROUND: dict[Any, Any] = {}
"""A table of this Python module."""


@functools.lru_cache
def remembered(size: int) -> Tensor:
    return torch.full((1, size, 1), 0.5)


class Helper:
    """An object that is no module and has a table."""

    def __init__(self) -> None:
        self.table: dict[Any, Any] = {}


class Slotted:
    """One without a dictionary of attributes."""

    __slots__ = ("table",)


class Keeps(nn.Module):
    """An FFN that keeps what it computes in every place that Python has."""

    shared: ClassVar[dict[Any, Any]] = {}
    last: ClassVar[Any] = None
    calls: ClassVar[int] = 0

    def __init__(self, keep: Callable[[Any, int], None]) -> None:
        super().__init__()
        self.up, self.down, self.keep = nn.Linear(6, 12), nn.Linear(12, 6), keep
        self.tables: dict[Any, Any] = {}
        self.deep: Any = {"a": [{}, set(), deque([1])]}
        self.helper, self.slotted, self.space = Helper(), Slotted(), SimpleNamespace(n=0)
        self.count = torch.zeros(())
        self.function = functools.partial(_closure(), 1.0)

    def forward(self, x: Tensor, noted: Any = ([],)) -> Tensor:
        self.keep(self, int(x.shape[1]))
        noted[0].append(x) if self.deep.get("noted") else None
        out: Tensor = self.down(torch.relu(self.up(x)))
        return out


def _closure() -> Callable[[float, int], None]:
    table, calls = {}, 0

    def function(value: float, size: int) -> None:
        nonlocal calls
        calls += 1
        table[size] = torch.full((size,), value)

    return function


def table(n: int) -> Tensor:
    return torch.full((1, n, 1), 0.5)


def grows(model: Any, n: int) -> None:
    model.late = nn.Linear(2, 2)
    model.register_buffer("more", table(n))
    model.up.register_forward_hook(lambda *_: None)
    model.up.__class__ = type("Other", (nn.Linear,), {})


PLACES: dict[str, Callable[[Any, int], object]] = {
    "dict": lambda m, n: m.tables.setdefault(n, table(n)),
    "list": lambda m, n: m.deep["a"].append(table(n)),
    "nested": lambda m, n: (m.deep["a"][0].update({n: table(n)}), m.deep["a"][1].add(table(n)), m.deep["a"][2].pop()),
    "by device and type": lambda m, n: m.tables.setdefault((table(n).device, table(n).dtype), [table(n)]),
    "helper": lambda m, n: (m.helper.table.update({n: table(n)}), vars(m.helper).update(new=table(n))),
    "slots": lambda m, n: setattr(m.slotted, "table", table(n)),
    "namespace": lambda m, n: setattr(m.space, "n", table(n)),
    "submodule": lambda m, n: setattr(m.up, "table", table(n)),
    "closure": lambda m, n: m.function(n),
    "class table": lambda m, n: type(m).shared.setdefault(n, table(n)),
    "class attribute": lambda m, n: setattr(Keeps, "last", table(n)),
    "class counter": lambda m, n: setattr(Keeps, "calls", Keeps.calls + 1),
    "module table": lambda m, n: AROUND.setdefault(n, table(n)),
    "lru_cache": lambda m, n: remembered(n),
    "plain tensor": lambda m, n: m.count.add_(1),
    "hooks, parts, buffers, classes": grows,
    "mode and flags": lambda m, n: (m.up.eval(), m.down.weight.requires_grad_(False)),
    "default of an argument": lambda m, n: m.deep.update(noted=True),
}


@pytest.mark.parametrize("keep", PLACES.values(), ids=PLACES)
def test_nothing_without_content_stays_where_code_keeps_it(keep: Callable[[Any, int], None]) -> None:
    for held in (Keeps.shared, AROUND):
        held.clear()
    Keeps.last = None
    remembered.cache_clear()
    model = Keeps(keep)
    before, noted = outline(model), Snapshot([model], traced=True)
    eco.detect(model, (X,))
    assert outline(model) == before
    assert noted.changes() == []
    assert not is_empty((Keeps.shared, Keeps.last, AROUND, Keeps.forward.__defaults__), 6)
    assert type(remembered(5)) is Tensor
    assert type(model(X)) is Tensor


def test_what_a_failed_capture_leaves_goes_too() -> None:
    def keep(model: Any, n: int) -> None:
        grows(model, n)
        model.tables[n] = table(n)
        if table(n).sum() > 0:
            raise ValueError("no")

    model = Keeps(keep)
    before = outline(model)
    with pytest.raises(CaptureError):
        eco.detect(model, (X,))
    assert outline(model) == before


def test_what_others_hold_keeps_what_has_content() -> None:
    model = Keeps(lambda m, n: AROUND.update({n: table(n), 1: table(1)}))
    AROUND.clear()
    AROUND[1] = real = torch.ones(1)
    with untouched(model, traced=True):
        AROUND["of another thread"] = torch.ones(2)
        torch.export.export(model, (X,), strict=False)
    assert AROUND.keys() == {1, "of another thread"}
    assert AROUND[1] is real


def test_parameters_that_code_writes_into_keep_what_it_notes_about_that() -> None:
    model = nn.Linear(2, 2)
    with untouched(model), torch.no_grad():
        model.weight.mul_(2)
        model.done = True  # type: ignore[assignment]  # any attribute
    assert model.done


def test_a_snapshot_tells_what_changed() -> None:
    model = Keeps(lambda m, n: None)
    noted = Snapshot([model])
    model.tables[1] = 2
    model.up.weight.requires_grad_(False)
    model.count.add_(1)
    told = " ".join(noted.changes())
    assert all(name in told for name in ("tables", "weight.requires_grad", "what is in .count"))
    noted.restore()
    assert model.tables == {}
    assert model.up.weight.requires_grad
    assert model.count == 0


# -- verbs that call the model -----------------------------------------------------------------------------------


class Counts(nn.Module):
    """A model that notes its calls in a buffer, a list and a hook, and draws a number."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.dropout = nn.Linear(6, 12), nn.Linear(12, 6), nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))
        self.seen: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        self.calls += 1
        random.random()
        if len(self.seen) == 1:
            self.down.register_forward_hook(lambda *_: None)
        out: Tensor = self.down(self.dropout(torch.relu(self.up(x))))
        return out


GIVEN: tuple[Any, ...] = (torch.randn(2, 6).double(),)
BATCHES: list[Any] = [((torch.randn(2, 6).double(),), {}) for _ in range(4)]


def loss(output: Tensor, args: Any, kwargs: Any) -> Tensor:
    return output.square().mean()


def shrinks(model: nn.Module) -> object:
    plan = eco.plan(eco.detect(model, GIVEN), 0.3, scores="magnitude")
    return masked_error(model, eco.shrink(model, plan, GIVEN), plan, GIVEN)


def trains(model: nn.Module) -> object:
    return eco.SparseTraining(model, GIVEN, target=0.3, schedule=eco.OneShot(1), window=1)


VERBS: dict[str, Callable[[nn.Module], object]] = {
    "detect, shrink, masked_error": shrinks,
    "score": lambda m: eco.score(m, eco.detect(m, GIVEN), BATCHES, loss=loss),
    "expressible": lambda m: eco.plan(eco.detect(m, GIVEN), 0.3, "magnitude", expressible_in="module"),
    "compress": lambda m: eco.compress(m, GIVEN, ratio=0.3, batches=BATCHES, loss=loss, distillation=2),
    "gate-fisher": lambda m: eco.compress(m, GIVEN, ratio=0.3, batches=BATCHES, loss=loss, method="gate-fisher"),
    "training": trains,
}


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
def test_verbs_leave_a_model_and_the_numbers_to_come_as_they_were(verb: Callable[[nn.Module], object]) -> None:
    torch.manual_seed(0)
    model = Counts().double()
    model.dropout.eval()
    model.down.bias.requires_grad_(False)
    before, chance = outline(model), (random.getstate(), torch.get_rng_state())
    versions = [(parameter, parameter._version) for parameter in model.parameters()]
    verb(model)
    after = outline(model)
    assert [(*part[:5], part[6:]) for part in after] == [(*part[:5], part[6:]) for part in before]
    assert all(parameter._version == version for parameter, version in versions)
    assert model.calls == 0
    assert (random.getstate(), torch.get_rng_state().tolist()) == (chance[0], chance[1].tolist())


def test_masking_writes_into_nothing() -> None:
    model = Counts().double().eval()
    model.tied = model.up
    plan = eco.plan(eco.detect(model, GIVEN), 0.5, scores="magnitude")
    pending, held = model(*GIVEN).square().sum(), dict(model.named_parameters())
    with masked(model, plan) as inside:
        assert inside is model
        masks = plan.masks(model)
        assert all((p[~masks[n]] == 0).all() for n, p in model.named_parameters() if n in masks)
        assert model.tied.weight is model.up.weight
        assert model.up.weight is not held["up.weight"]
    assert all(p is held[n] for n, p in model.named_parameters())
    pending.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("before", [False, True])
def test_gradients_inside_a_mask_are_those_of_the_parameters(before: bool) -> None:
    """They add to those that were there, and hooks of the parameters see them."""
    model = Counts().double().eval()
    plan, weight = eco.plan(eco.detect(model, GIVEN), 0.5, scores="magnitude"), model.up.weight
    parameters = list(model.parameters())
    gone = ~plan.masks(model)["up.weight"]
    other = deepcopy(model)
    with torch.no_grad():
        for name, mask in plan.masks(other).items():
            other.get_parameter(name)[~mask] = 0
    for p, q in zip(parameters, other.parameters(), strict=True):
        p.grad = torch.randn_like(p) if before else None
        q.grad = p.grad.clone() if p.grad is not None else None
    torch.autograd.backward(other(*GIVEN).square().sum())
    seen, hooked = list[Tensor](), cast(Any, weight)  # torch has no types there
    hooks = hooked.register_hook(seen.append), hooked.register_post_accumulate_grad_hook(lambda p: seen.append(p.data))
    versions = [p._version for p in parameters]
    with masked(model, plan):
        torch.autograd.backward(model(*GIVEN).square().sum())
    for p, q in zip(parameters, other.parameters(), strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12)
    assert [p._version for p in parameters] == versions
    assert len(seen) == len(hooks)
    assert (seen[1][gone] == 0).all()
    with masked(model, plan):
        model.zero_grad()
    assert all(p.grad is None for p in parameters)


def test_verbs_in_a_mask_leave_gradients_alone() -> None:
    model = Counts().double().eval()
    couplings = eco.detect(model, GIVEN)
    torch.autograd.backward(model(*GIVEN).square().sum())
    grads = [(p.grad, cast(Tensor, p.grad).clone()) for p in model.parameters()]
    batches: list[Any] = [(GIVEN, {}) for _ in range(2)]
    for method in ("gate-fisher", "taylor"):
        options: Any = {"method": method, "couplings": couplings, "batches": batches}
        eco.compress(model, GIVEN, ratio=0.5, loss=lambda y, a, k: y.square().mean(), **options)
    for p, (grad, values) in zip(model.parameters(), grads, strict=True):
        assert p.grad is grad
        assert grad is not None
        assert torch.equal(grad, values)


def test_masks_reach_parameters_wherever_a_model_holds_them() -> None:
    model = nn.LSTM(4, 6)  # it has a list of its weights
    own = model.get_parameter("weight_ih_l0")
    other = nn.Parameter(torch.zeros_like(own))
    exchange(model, {id(own): other})
    assert model._flat_weights[0] is other
    exchange(model, {id(other): own})
    assert model._flat_weights[0] is own


# -- threads -----------------------------------------------------------------------------------------------------


def test_threads_wait_for_each_other_and_print_what_they_print(capsys: pytest.CaptureFixture[str]) -> None:
    model, found, errors = Counts().double().eval(), list[float](), list[Exception]()

    def look(own: nn.Module) -> None:
        try:
            plan = eco.plan(eco.detect(own, GIVEN), 0.3)
            found.append(masked_error(own, eco.shrink(own, plan, GIVEN), plan, GIVEN))
        except Exception as error:  # looked at below
            errors.append(error)

    over = threading.Event()

    def runs() -> None:
        other = nn.Linear(3, 3)
        while not over.wait(0.01):
            other(torch.randn(2, 3)).sum().backward()
            sys.stdout.write("step")
            with torch.no_grad():
                warnings.warn("mine", stacklevel=1)

    threads = [threading.Thread(target=look, args=(own,)) for own in (model, model, Counts().double().eval())]
    beside = threading.Thread(target=runs)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for thread in (beside, *threads):
            thread.start()
        for thread in threads:
            thread.join()
        over.set()
        beside.join()
    assert not errors
    assert max(found) < 1e-9
    assert torch.is_grad_enabled()
    printed = capsys.readouterr().out.count("step")
    assert 0 < printed == sum(str(warning.message) == "mine" for warning in warned)


def test_threads_that_wait_change_nothing() -> None:
    """As those of a notebook: random numbers go on as if none had been drawn, whoever waits meanwhile."""
    over, tasks, model = threading.Event(), queue.Queue[None](), Counts().double()
    threads = [threading.Thread(target=over.wait), threading.Thread(target=tasks.get)]
    for thread in threads:
        thread.start()
    try:
        assert not others_run()
        before = random.getstate(), torch.get_rng_state().tolist()
        shrinks(model)
        assert (random.getstate(), torch.get_rng_state().tolist()) == before
    finally:
        over.set()
        tasks.put(None)
        for thread in threads:
            thread.join()


def test_a_thread_that_computes_is_one_that_runs() -> None:
    over = threading.Event()

    def compute() -> None:
        while not over.is_set():
            sum(range(1000))

    thread = threading.Thread(target=compute)
    thread.start()
    try:
        assert any(others_run() for _ in range(100))
    finally:
        over.set()
        thread.join()
    assert not others_run()


def process() -> list[Any]:
    """What is the whole process's and a verb may change."""
    loggers = [logging.getLogger(name) for name in ("torch.export", "torch._export", "torch._subclasses.fake_tensor")]
    return [
        list(warnings.filters), [logger.level for logger in loggers], sys.stdout, sys.stderr, builtins.max, math.pow,
        torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads(), torch.get_rng_state().tolist(),
        torch.backends.mha.get_fastpath_enabled(), torch.are_deterministic_algorithms_enabled(), random.getstate(),
    ]  # fmt: skip


def test_verbs_leave_the_process_as_it_was_whether_they_succeed_or_not() -> None:
    model, wrong = Counts().double(), torch.randn(2, 7).double()
    before = process()
    shrinks(model)
    with pytest.raises(CaptureError):
        eco.detect(model, (wrong,))
    assert process() == before
