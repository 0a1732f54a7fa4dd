"""Couplings after a shrink, allocation within bounds, running scores, schedules."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import ecospa_fx as eco
from ecospa_fx.coupling.couplings import parameter_shapes
from ecospa_fx.coupling.types import Coupling
from ecospa_fx.coupling.unit_elements import coupled_elements, removed_elements
from ecospa_fx.errors import TrainingError
from ecospa_fx.importance.unit_reduction import margin, margin_key, unit_sums
from ecospa_fx.training.allocation import allocate, bounds
from ecospa_fx.training.moving_scores import MovingScores, _unit_sums
from ecospa_fx.training.optimizer_surgery import cut_all
from ecospa_fx.training.remaining_couplings import disjoint, narrowed
from ecospa_fx.training.schedule import AtStart, Constant, Cubic, Linear, OneShot, check_schedule, default_schedule
from ecospa_fx.training.tensor_cuts import cuts_between
from tests.support.tiny import Tiny, batches, loss, samples, tiny, tiny_couplings


def shrunk(model: Tiny, seed: int) -> tuple[list[Coupling], dict[str, Tensor]]:
    """The model cut in place by a random plan; its couplings as they are now, and what they kept."""
    couplings = tiny_couplings(model, heads=False)
    plan = eco.plan(couplings, 0.4, "random", seed=seed)
    cut_all([], dict(model.named_parameters()), cuts_between(dict(plan.shapes), {}, plan.factors()))
    keep = {s.name: ~s.removed for s in plan}
    now = narrowed([couplings[s.name] for s in plan], keep, plan.factors(), parameter_shapes(model))
    return now, keep


@pytest.mark.parametrize("seed", range(4))
def test_what_is_left_of_a_coupling_is_a_coupling(seed: int) -> None:
    """Positions now hold what the dense positions held, unit by unit."""
    model, dense = tiny(), tiny()
    couplings = tiny_couplings(dense, heads=False)
    now, keep = shrunk(model, seed)
    for coupling in now:
        for old, new in zip(couplings[coupling.name].members, coupling.members, strict=True):
            weights = (m.get_parameter(old.parameter).detach() for m in (dense, model))
            key = margin_key(old)
            other = [a for a in range(2) if a not in key] if old.carrier_axis is None else []
            before, after = (w.movedim(key[-1], -1) if not other else w for w in weights)
            if old.carrier_axis is None and not other:
                kept = keep[coupling.name]
                rows = before[old.indices[:, :, :]][kept]
                assert torch.equal(rows, after[new.indices].flatten(0, 1))
        assert coupling.size == int(keep[coupling.name][0].sum())
    assert coupled_elements(parameter_shapes(model), (c.members for c in now)) == sum(c.parameters for c in now)


def test_strided_sums_are_the_indexed_ones() -> None:
    model = tiny()
    for coupling in [*tiny_couplings(tiny()).offered, *shrunk(model, 3)[0]]:
        source = model if coupling.size < 4 else tiny()
        for member in coupling.members:
            weight = source.get_parameter(member.parameter).detach()
            if member.indices.max() < weight.shape[member.axis]:
                sums = margin(weight, margin_key(member))
                torch.testing.assert_close(_unit_sums(sums, member), unit_sums(sums, member))


def test_of_overlapping_couplings_the_finest_remain() -> None:
    found = disjoint(tiny_couplings(tiny(), heads=True).offered)
    assert [c.kind for c in found] == ["qk", "vo", "ffn", "experts"] * 2


@pytest.mark.parametrize("method", ["gate-fisher", "fisher", "taylor"])
def test_running_scores_are_those_of_scoring_up_to_a_factor(method: str) -> None:
    """One step over one sample, in eval mode: the same sums of gradient times weight."""
    model = tiny().eval()
    couplings = tiny_couplings(model, heads=False)
    batch = samples(1)[0]
    want = eco.score(model, couplings, [batch], loss=loss, method=method)
    running = MovingScores(method, 10)
    running.follow(couplings.offered, dict(model.named_parameters()), {})
    assert not running.usable
    torch.autograd.backward(loss(model(*batch[0]), *batch))
    running.gather()
    assert running.usable
    found = running.scores()
    flat = [torch.cat([values[c.name].flatten() for c in couplings.offered]) for values in (found, want.values)]
    torch.testing.assert_close(flat[0] / flat[0].norm(), flat[1] / flat[1].norm(), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("method", ["gate-fisher", "fisher", "taylor"])
def test_what_scales_all_gradients_of_a_step_changes_nothing(method: str) -> None:
    model = tiny().eval()
    couplings = tiny_couplings(model, heads=False)
    results = []
    for scale in (1.0, 2.0**16):
        running = MovingScores(method, 10)
        running.follow(couplings.offered, dict(model.named_parameters()), {})
        for at, batch in enumerate(batches(3)):
            model.zero_grad()
            torch.autograd.backward(loss(model(*batch[0]), *batch) * (scale if at == 1 else 1))
            running.gather()
        results.append(running.flat())
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=0)


def test_steps_without_usable_gradients_count_for_nothing() -> None:
    model = tiny().eval()
    couplings = tiny_couplings(model, heads=False)
    running = MovingScores("gate-fisher", 10)
    running.follow(couplings.offered, dict(model.named_parameters()), {})
    running.gather()
    assert not running.usable
    batch = batches(1)[0]
    torch.autograd.backward(loss(model(*batch[0]), *batch))
    running.gather()
    before = running.flat().clone()
    weight = model.get_parameter("layers.0.ffn.down.weight")
    assert weight.grad is not None
    for value in (float("nan"), float("inf")):
        weight.grad[0, 0] = value
        running.gather()
        assert not running.usable
        assert torch.equal(running.flat(), before)


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("round_to", [1, 2])
def test_allocation_meets_the_goal_within_bounds(uniform: bool, round_to: int) -> None:
    model = tiny()
    couplings = tiny_couplings(model, heads=False)
    scores = eco.score(model, couplings, method="magnitude").values
    chosen = list(couplings.offered)
    goal = int(0.5 * sum(c.parameters for c in chosen))
    limits = {c.name: bounds(c.size, c.size, 0.5, (0.05, 0.5, 1.5), round_to) for c in chosen}
    dense, steps = {c.name: c.size for c in chosen}, dict.fromkeys(scores, round_to)
    keep = allocate(chosen, couplings.shapes, scores, limits, goal, round_to=steps, dense=dense if uniform else None)
    gone = removed_elements(couplings.shapes, [(c.members, keep[c.name]) for c in chosen])
    assert abs(gone - goal) <= 0.12 * goal
    for c in chosen:
        counts = keep[c.name].sum(1)
        assert (counts == counts[0]).all()
        assert limits[c.name][0] <= counts[0] <= limits[c.name][1]
        assert counts[0] % round_to == 0
        for kept, values in zip(keep[c.name], scores[c.name], strict=True):
            assert kept.all() or values[kept].min() >= values[~kept].max()
    if uniform:
        assert len({(c.kind, int(keep[c.name][0].sum())) for c in chosen}) == 4


def test_units_above_the_bounds_go_whatever_the_goal() -> None:
    couplings = tiny_couplings(tiny(), heads=False)
    chosen = [c for c in couplings.offered if c.kind == "ffn"]
    scores = {c.name: torch.arange(12.0)[None] for c in chosen}
    keep = allocate(chosen, couplings.shapes, scores, {c.name: (2, 7) for c in chosen}, 0)
    assert all(keep[c.name][0].nonzero().flatten().tolist() == list(range(5, 12)) for c in chosen)
    assert bounds(12, 12, 0.5, (0.05, 0.6, 1.6), 1) == (4, 9)
    assert bounds(12, 5, 0.5, (0.05, 0.6, 1.6), 8) == (5, 5)
    nothing = allocate(chosen, couplings.shapes, scores, {c.name: (12, 12) for c in chosen}, 99)
    assert all(kept.all() for kept in nothing.values())


def test_schedules_reach_the_target_and_never_give_back() -> None:
    for schedule in (OneShot(30), Linear(5, 31, 7), Cubic(5, 31, 7), Constant(7, 0.3), Constant(7, 1.0, 3), AtStart()):
        shares = [schedule.share(step) for step in range(40)]
        assert shares == sorted(shares)
        assert shares[-1] == 1
        rises = tuple(s for s in range(1, 40) if shares[s] > shares[s - 1])
        assert rises == schedule.steps
    assert default_schedule(1000) == Cubic(250, 750, 50)
    check_schedule(Cubic(250, 750, 50), 750)


def test_schedules_that_make_no_sense_are_refused() -> None:
    with pytest.raises(TrainingError, match="ends before it starts"):
        Cubic(start=10, end=5, every=1)
    with pytest.raises(TrainingError, match="every=0 of Linear is no step"):
        Linear(start=1, end=5, every=0)
    with pytest.raises(TrainingError, match="part above 0"):
        Constant(every=1, part=0.0)
    with pytest.raises(TrainingError, match="training ends at step 99"):
        check_schedule(OneShot(100), 99)
    with pytest.raises(TrainingError, match="total_steps="):
        default_schedule(None)
    known = "second-order, gate-fisher, fisher, taylor"
    with pytest.raises(
        TrainingError, match=rf"^scores='magnitude' cannot be taken while training: use one of {known}$"
    ):
        MovingScores("magnitude", 10)
