"""Structured pruning during training: removes units at scheduled steps while the user's own loop trains the model."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ecospa_fx.checks import check_options
from ecospa_fx.coupling.choice import shares
from ecospa_fx.coupling.couplings import Couplings
from ecospa_fx.coupling.types import Coupling
from ecospa_fx.coupling.unit_elements import Factors, coupled_elements
from ecospa_fx.errors import TrainingError
from ecospa_fx.importance.score import score
from ecospa_fx.importance.scores import Scores, given_scores
from ecospa_fx.importance.second_order import SECOND_ORDER
from ecospa_fx.origin import origin
from ecospa_fx.passes.lossy.measurement import Measurement
from ecospa_fx.plan import Plan, Selection
from ecospa_fx.training import history
from ecospa_fx.training.allocation import allocate, bounds, uniform_share
from ecospa_fx.training.checkpoint import pack_state, unpack_state
from ecospa_fx.training.compensate import Compensation, calibration_batches
from ecospa_fx.training.distributed import all_agree, averaged, check_same
from ecospa_fx.training.graph_model import ShrinkableGraph
from ecospa_fx.training.moving_scores import MovingScores
from ecospa_fx.training.optimizer_surgery import optimizer_bytes
from ecospa_fx.training.remaining_couplings import narrowed
from ecospa_fx.training.schedule import AtStart, Schedule, check_schedule, default_schedule
from ecospa_fx.training.second_order import SecondOrder, second_order
from ecospa_fx.training.settings import (
    Settings,
    TrainingOptions,
    check_arguments,
    check_reach,
    check_unshared,
    choose_couplings,
    optimizers_of,
    other_owners,
)
from ecospa_fx.training.sharded import full_tensor
from ecospa_fx.training.tensor_cuts import cuts_between
from ecospa_fx.training.tracked_model import TrackedModel
from ecospa_fx.wrappers import unwrapped

log = logging.getLogger(__name__)


class SparseTraining:
    """Makes a model physically smaller, again and again, while the user's own loop trains it.

    The module that is passed is taken over: `SparseTraining.model` computes the same with the same Parameter objects,
    and takes its place in the loop. The module itself no longer works after the first shrink. At each shrink the
    optimizers' states, gradients and followed copies are cut along.

    Args:
        model: the ``nn.Module`` to train, whose parameters no other module holds.
        args: tuple of positional example inputs, by default ().
        kwargs: mapping of example inputs by name, by default none.
        optimizer: one optimizer or several that hold parameters of the model; by default None, to follow with `attach`.
        target: share of the couplings' parameters that is removed by the end, above 0 and below 1; 0.5 by default.
        schedule: when it shrinks and by how much, such as ``eco.Cubic(start, end, every)`` in steps. By default late
            in ``total_steps``, see `ecospa_fx.training.schedule.default_schedule`.
        scores: what decides which units are removed. "second-order", the default where batches and a loss are given,
            is measured on these at each shrink, in bases of linear couplings (V with O, Q with K) that suit removal:
            see `ecospa_fx.training.second_order`. "gate-fisher", the default elsewhere, "fisher" and "taylor" are taken
            from the gradients of training, where a step counts as one sample. `Scores`, or tensors [carriers, units] by
            name of coupling, are taken where the schedule shrinks at the start.
        state: what `state_dict` returned, to resume from; by default None. A schedule that shrinks at the start needs
            it here, others take it with `load_state_dict` too.
        **options: see `ecospa_fx.training.settings.TrainingOptions`.

    Raises:
        TrainingError: nothing can be removed; the optimizer is of another model; the schedule outlasts training; the
            target is out of reach; another model holds a parameter too; second-order scores have no data.
        OptionError: an option is unknown.
        CaptureError: the model cannot be traced.

    Examples:
        >>> import torch, ecospa_fx as eco
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 8))
        >>> x, optimizer = torch.randn(2, 8), torch.optim.AdamW(mlp.parameters())
        >>> sparse = eco.SparseTraining(mlp, (x,), optimizer=optimizer, target=0.5, schedule=eco.OneShot(3))
        >>> for _ in range(4):
        ...     sparse.model(x).square().mean().backward()
        ...     sparse.step()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> tuple(sparse.model.get_parameter("0.weight").shape)
        (16, 8)

        With calibration data, what is kept makes up for what is removed at each shrink:

        >>> sparse = eco.SparseTraining(
        ...     model, (ids,), optimizer=optimizer, total_steps=10_000, batches=batches, loss=loss
        ... )  # doctest: +SKIP

        Resumed, before the states of model and optimizer are loaded:

        >>> sparse.load_state_dict(torch.load("sparse.pt"))  # doctest: +SKIP
        >>> sparse.model.load_state_dict(torch.load("model.pt"))  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        target: float = 0.5,
        schedule: Schedule | None = None,
        scores: str | Scores | Mapping[str, Tensor] | None = None,
        state: Mapping[str, Any] | None = None,
        **options: Unpack[TrainingOptions],
    ) -> None:
        check_options("SparseTraining", options, TrainingOptions, SparseTraining)
        check_arguments(model, args, kwargs, target, state)
        self._settings, self._target, optimizers = Settings(**options), target, optimizers_of(optimizer)
        method = self._configure(schedule, scores)
        self._batches = calibration_batches(self._settings.batches)
        self._second_order, self._compensation = self._measuring(), self._compensating()
        model = unwrapped(model, resizing=TrainingError)
        owners = other_owners(model)
        choose = partial(choose_couplings, settings=self._settings, method=method, model=model)
        self._form = ShrinkableGraph(model, args, dict(kwargs or {}), self._settings.allow, choose)
        self._chosen = self._now = self._form.chosen
        check_unshared(self._chosen, owners)
        self._dense_elements = _coupled_elements(self._form.shapes, self._chosen)
        self._keep = {c.name: torch.ones(c.carriers, c.size, dtype=torch.bool) for c in self._chosen}
        self._factors: Mapping[str, Factors] = {}
        self._step, self._pending, self._warned, self.history = 0, False, False, list[history.Shrink]()
        self._limits = shares(self.couplings, self._chosen, self._settings.limits, TrainingError)
        check_reach(self._chosen, self._settings, target, self._limits, self._form)
        self._model = TrackedModel(self._form, self._settings.wrap)
        self._origin = origin(model, self.plan, args, kwargs)
        self._begin(optimizers, state)

    def _configure(self, schedule: Schedule | None, scores: object) -> str | None:
        """Set when to shrink and by which scores. Returns the method's name, None for the user's own scores."""
        self._user_scores = scores if isinstance(scores, Scores | Mapping) else None
        method = self._settings.method(scores)
        self._measures = method == SECOND_ORDER
        self._schedule = schedule or default_schedule(self._settings.total_steps, self._measures)
        check_schedule(self._schedule, self._settings.total_steps, own_scores=method is None)
        self._steps = frozenset(self._schedule.steps)
        gathered = "gate-fisher" if method is None or self._measures else method
        self._running = MovingScores(gathered, self._settings.window)
        return method

    def _begin(self, optimizers: Sequence[Optimizer], state: Mapping[str, Any] | None) -> None:
        self._running.follow(self._chosen, self._form.parameters, {})
        self._model.remember(self._origin)
        self._model.count_backwards(self._running.names)
        if optimizers:
            self.attach(optimizers)
        if state is not None:
            self.load_state_dict(state)
        elif isinstance(self._schedule, AtStart):
            self._shrink_at_start()

    # -- what the loop uses ------------------------------------------------------------------------------------

    @property
    def model(self) -> nn.Module:
        """The model to train, the same object for the whole run unless `wrap` is given: then ask for it each time."""
        return self._model.model

    @property
    def couplings(self) -> Couplings:
        """The couplings of the dense model, refusals included."""
        return self._form.couplings

    @property
    def plan(self) -> Plan:
        """What is left of every coupling that training shrinks, in terms of the dense model."""
        return self._plan(self._keep)

    @property
    def removed(self) -> float:
        """The share of the couplings' dense parameters that is gone."""
        return 1 - _coupled_elements(self._form.sizes, self._now) / self._dense_elements

    @property
    def finished(self) -> bool:
        """Whether no shrink is to come: the sizes are final."""
        return not self._pending and self._step >= max(self._steps, default=0)

    def attach(self, optimizer: Optimizer | Sequence[Optimizer]) -> None:
        """Name the optimizers whose states are to be cut. Raises TrainingError for parameters of another model."""
        self._model.attach(optimizers_of(optimizer))

    def follow(self, copy: nn.Module | Mapping[str, Tensor]) -> None:
        """Cut a copy of the parameters along with them: an average, master weights.

        copy: tensors by parameter name; or a module with parameters of the same names. A ``copy.deepcopy`` of `model`
        gets its rewritten graph too. Raises TrainingError where a tensor has another shape than its parameter.
        """
        self._model.follow(copy)

    def step(self) -> None:
        """Call once per step of the optimizer, between ``backward()`` and ``optimizer.step()``.

        Gathers scores where a shrink is near, and shrinks where one is due. A call without a backward pass since the
        last one is ignored, with a warning. A shrink that finds gradients missing or not finite waits for the next
        step, with a warning.
        """
        if not self._model.backwards:
            if not self._warned:
                log.warning("step() is ignored: no backward pass reached the model since its last call")
            self._warned = True
            return
        self._model.backwards, self._step = 0, self._step + 1
        due = self._pending or self._step in self._steps
        if not due and not self._near():
            return
        self._running.gather()
        if not due:
            return
        group, flat = self._settings.group, self._running.flat()
        self._pending = not all_agree(self._running.usable, flat.device, group)
        if self._pending:
            log.warning("the shrink of step %s waits: gradients are missing, zero or not finite", self._step)
        else:
            averaged(flat, group)
            self._shrink(self._running.scores(), self._schedule.share(self._step))

    def state_dict(self) -> dict[str, Any]:
        """Everything to resume from, besides the states of `model` and the optimizers; ``weights_only`` can load it."""
        progress, values = (self._step, self._pending), self._running.values()
        return pack_state(progress, self._form.shapes, self._keep, values, self.history)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken: before the states of `model` and the optimizers are loaded.

        The model is brought to the sizes of that moment, so that they fit. Raises TrainingError for the state of
        another model, and where this model is smaller than that one was; nothing has changed then.
        """
        step, pending, keep, values, records = unpack_state(state, self._form.shapes, self._keep)
        self._apply(keep, {})
        self._running.follow(self._now, self._form.parameters, values)
        self._step, self._pending, self.history = step, pending, records

    # -- what happened -----------------------------------------------------------------------------------------

    def report(self) -> str:
        """A table of all shrinks."""
        return history.table(self.history, self._dense(), self._summary())

    def __repr__(self) -> str:
        return f"SparseTraining({self._summary()})"

    def _repr_html_(self) -> str:
        return history.table_html(self.history, self._dense(), self._summary())

    def plot(self, path: str | Path) -> None:
        """Draw widths over steps into a PNG, SVG or PDF. Needs the extra ``report``."""
        history.plot(self.history, self._dense(), self._step, path)

    def _dense(self) -> dict[str, tuple[str, int]]:
        return {c.name: (c.kind, c.size) for c in self._chosen}

    def _summary(self) -> str:
        shrinks, most = len(self.history), len(self._steps) + isinstance(self._schedule, AtStart)
        parameters = sum(p.numel() for p in self._form.module.parameters())
        return (
            f"step {self._step:,}: {shrinks} of at most {most} shrinks done, {self.removed:.1%} of the couplings' "
            f"parameters removed (target {self._target:.1%}), {parameters:,} parameters left, "
            f"{_compiled():,} graphs compiled"
        )

    # -- shrinking ---------------------------------------------------------------------------------------------

    def _near(self) -> bool:
        """Whether a shrink is due within the window."""
        return not self._measures and any(0 < s - self._step <= self._settings.window for s in self._steps)

    def _shrink(self, scores: Mapping[str, Tensor], share: float) -> None:
        begin = time.perf_counter()
        if not self._model.optimizers and not isinstance(self._schedule, AtStart):
            raise TrainingError("a shrink is due and no optimizer is known, whose state would not follow: attach() it")
        keep, changes = self._decided(scores, share)
        same = all(torch.equal(keep[name], before) for name, before in self._keep.items())
        modules = 0 if same else self._compensated(keep, changes)
        self._record(modules, time.perf_counter() - begin)

    def _decided(
        self, scores: Mapping[str, Tensor], share: float
    ) -> tuple[dict[str, Tensor], Mapping[str, Tensor] | None]:
        """The units to keep, the same in all processes, and the compensation to add to parameters, if known."""
        second, measurement = self._second_order, self._measured()
        if second is not None and measurement is not None:
            scores = second.scores(measurement)
        keep = self._units(scores, share)
        check_same(keep, self._running.flat().device, self._settings.group)
        # Where a norm runs over what is kept, its inputs before the shrink are not those after it.
        exact = not any(c.inexact for c in self._now)
        if second is None or measurement is None or self._compensation is None or not exact:
            return keep, None
        left = {c.name: keep[c.name][self._keep[c.name]].view(c.carriers, c.size) for c in self._now}
        return keep, second.changes(measurement, left)

    def _measured(self) -> Measurement | None:
        """What second-order scores need of the units that are there. Linear couplings have been turned then."""
        if self._second_order is None:
            return None
        values = {name: full_tensor(p) for name, p in self._form.parameters.items()}
        evaluator = self._form.evaluator(self.plan, values)
        return self._second_order.measured(evaluator, self._now, self._model)

    def _units(self, scores: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
        """What stays at a share of the target, in terms of the dense model."""
        options, left, shapes = self._settings, 1 - self._target * share, self._form.sizes
        dense = {c.name: c.size for c in self._chosen}
        steps = options.multiples(self._chosen, self._form.parameters)
        uniform = uniform_share(self._chosen, self._limits, 1 - left)
        limits = {
            c.name: bounds(dense[c.name], c.size, uniform, options.shares, steps[c.name], self._limits.get(c.name, 1.0))
            for c in self._now
        }
        for name in [n for n in limits if not scores[n].any()]:
            log.warning("coupling %s keeps its units at step %s: no gradient reached them lately", name, self._step)
            limits[name] = (self._keep[name].shape[1],) * 2
        goal = _coupled_elements(shapes, self._now) - round(self._dense_elements * left)
        even = dense if options.allocation == "uniform" else None
        kept = allocate(self._now, shapes, scores, limits, goal, round_to=steps, dense=even)
        result = {}
        for name, before in self._keep.items():
            result[name] = before.clone()
            result[name][before] = kept[name].flatten()
        return result

    def _compensated(self, keep: Mapping[str, Tensor], changes: Mapping[str, Tensor] | None) -> int:
        """`_apply`, with the remaining weights updated to compensate if that is wanted: by the changes, if known."""
        if self._compensation is None or changes is not None:
            return self._apply(keep, changes or {})
        before = self.plan, {n: full_tensor(p) for n, p in self._form.parameters.items()}  # cutting makes new memory
        modules = self._apply(keep, {})
        after = self.plan, {name: full_tensor(p) for name, p in self._form.parameters.items()}
        self._model.add(self._compensation.changes(self._form.evaluator, before, after))
        return modules

    @property
    def _compensates(self) -> bool:
        wanted = self._settings.compensate
        return self._measures if wanted is None else wanted

    def _compensating(self) -> Compensation | None:
        return Compensation(self._batches, self._settings.group) if self._compensates else None

    def _measuring(self) -> SecondOrder | None:
        if not self._measures:
            return None
        return second_order(self._batches, self._settings.loss, self._settings.group, solves=self._compensates)

    def _apply(self, keep: Mapping[str, Tensor], changes: Mapping[str, Tensor]) -> int:
        """Cut down to what stays. Everything that can fail comes first. Returns how many modules got other code.

        changes: what to add to parameters, by name, of which what goes is left out.
        """
        plan, form = self._plan(keep), self._form
        factors = plan.factors()
        cuts, programs = cuts_between(form.shapes, self._factors, factors), form.rewrite(plan)
        values = self._running.values()
        kept = {n: v[keep[n][self._keep[n]].view(v.shape)].view(len(v), -1) for n, v in values.items()}
        modules = self._model.cut(programs, cuts)
        self._model.add({name: cuts[name](change) if name in cuts else change for name, change in changes.items()})
        self._model.remember(replace(self._origin, plan=plan))
        self._keep, self._factors = dict(keep), factors
        self._now = narrowed(self._chosen, self._keep, factors, form.sizes)
        self._running.follow(self._now, form.parameters, kept)
        return modules

    def _record(self, modules: int, seconds: float) -> None:
        shrink = history.Shrink(
            step=self._step,
            removed=self.removed,
            parameters=sum(p.numel() for p in self._form.module.parameters()),
            optimizer_bytes=optimizer_bytes(self._model.optimizers),
            modules=modules,
            compiled=_compiled(),
            seconds=seconds,
            widths={c.name: c.size for c in self._now},
        )
        self.history.append(shrink)
        log.info("step %s: %.1f %% removed, %s parameters left", shrink.step, 100 * shrink.removed, shrink.parameters)

    def _shrink_at_start(self) -> None:
        if self._user_scores is not None:
            self._shrink(given_scores(self.couplings, self._chosen, self._user_scores, TrainingError), 1.0)
            return
        loss, batches = self._settings.loss, self._batches
        if not batches or loss is None:
            raise TrainingError("shrinking at the start needs data: give batches= and loss=, as eco.score takes them")
        values: Mapping[str, Tensor] = {}
        if self._second_order is None:
            if self._model.sharded:
                raise TrainingError(
                    f"scores={self._running.method!r} cannot be taken of sharded parameters before the first step: "
                    f"use scores={SECOND_ORDER!r}, or shrink later"
                )
            couplings = Couplings(self._chosen, self._form.module, whole=self.couplings)
            values = score(self._form.module, couplings, batches, loss=loss, method=self._running.method).values
            device, group = self._running.flat().device, self._settings.group
            values = {name: averaged(value.to(device), group).cpu() for name, value in values.items()}
        self._shrink(values, 1.0)

    def _plan(self, keep: Mapping[str, Tensor]) -> Plan:
        return Plan(tuple(Selection.of(c, keep[c.name]) for c in self._chosen), tuple(self._form.shapes.items()))


def _coupled_elements(shapes: Mapping[str, tuple[int, ...]], couplings: Sequence[Coupling]) -> int:
    """Elements that couplings hold, each counted once."""
    return coupled_elements(shapes, (c.members for c in couplings))


def _compiled() -> int:
    """Graphs that torch.compile made in this process."""
    if "torch._dynamo.utils" not in sys.modules:
        return 0
    return int(sys.modules["torch._dynamo.utils"].counters["stats"]["unique_graphs"])
