"""Cutting parameters with what hangs on them: the next step equals that of the masked dense model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

import ecospa_fx as eco
from ecospa_fx.errors import TrainingError
from ecospa_fx.training import optimizer_surgery
from ecospa_fx.training.optimizer_surgery import check_optimizers, check_states, cut_all, optimizer_bytes
from ecospa_fx.training.tensor_cuts import TensorCut, cuts_between
from tests.support.tiny import Tiny, tiny, tiny_couplings

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "adamw amsgrad": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, amsgrad=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, fused=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, foreach=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "rmsprop centered": lambda p: torch.optim.RMSprop(p, lr=0.1, centered=True, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=0.1),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.1),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
}


def plans(model: Tiny) -> tuple[eco.Plan, eco.Plan]:
    """Two plans, the second keeping a part of what the first keeps."""
    couplings = tiny_couplings(model, heads=False)
    scores = eco.score(model, couplings, method="magnitude")
    return eco.plan(couplings, 0.3, scores), eco.plan(couplings, 0.6, scores)


def gradients(model: nn.Module, seed: int) -> Iterator[tuple[str, Tensor]]:
    source = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        yield name, torch.randn(weight.shape, generator=source, dtype=weight.dtype)


def cuts(model: Tiny, before: eco.Plan | None, after: eco.Plan) -> dict[str, TensorCut]:
    return cuts_between(dict(after.shapes), before.factors() if before else {}, after.factors())


def mask_all(model: nn.Module, optimizer: Optimizer, masks: dict[str, Tensor]) -> None:
    """Zero what goes, in weights, gradients and every state of the weight's shape."""
    for name, weight in model.named_parameters():
        if name not in masks:
            continue
        tensors = [weight.data, weight.grad, *optimizer.state[weight].values()]
        for tensor in tensors:
            if isinstance(tensor, Tensor) and tensor.shape == weight.shape:
                tensor.mul_(masks[name])


@pytest.mark.slow
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_step_after_a_shrink_is_the_masked_models(kind: str) -> None:
    dense, small = tiny(), tiny()
    optimizers = OPTIMIZERS[kind](dense.parameters()), OPTIMIZERS[kind](small.parameters())
    first, second = plans(dense)
    for seed in range(3):
        for model, optimizer in zip((dense, small), optimizers, strict=True):
            for name, gradient in gradients(model, seed):
                model.get_parameter(name).grad = gradient
            optimizer.step()
    masks: dict[str, Tensor] = {}
    for seed, (before, after) in enumerate([(None, first), (first, second)], 7):
        masks = after.masks(tiny())
        given = dict(gradients(dense, seed))
        for name, gradient in given.items():
            dense.get_parameter(name).grad = gradient.clone()
            earlier = before.masks(tiny()).get(name) if before else None
            shape = small.get_parameter(name).shape
            small.get_parameter(name).grad = (gradient if earlier is None else gradient[earlier]).reshape(shape)
        tensors = dict(small.named_parameters())
        check_states([optimizers[1]], tensors, cuts(dense, before, after))
        cut_all([optimizers[1]], tensors, cuts(dense, before, after))
        mask_all(dense, optimizers[0], masks)
        for optimizer in optimizers:
            optimizer.step()
        assert len(masks) > 12
        for name, weight in dense.named_parameters():
            mask = masks.get(name, torch.ones_like(weight, dtype=torch.bool))
            torch.testing.assert_close(weight[mask], small.get_parameter(name).flatten(), rtol=1e-13, atol=1e-14)
            if kind not in ("rprop", "asgd"):  # these move weights without a gradient, or average them
                assert not (weight * ~mask).any()


def test_the_cut_parameters_are_those_that_shrink_makes() -> None:
    model = tiny()
    first, second = plans(model)
    tensors = dict(model.named_parameters())
    whole = {name: weight.detach().clone() for name, weight in tensors.items()}
    for before, after in ((None, first), (first, second)):
        cut_all([], tensors, cuts(model, before, after))
        for name, mask in after.masks(tiny()).items():
            assert torch.equal(tensors[name].flatten(), whole[name][mask])
            assert tensors[name].is_contiguous()
    assert tensors["layers.0.experts.up"].shape == (2, 8, second["layers.0.experts:experts"].kept)


def test_the_next_backward_sees_the_new_shape_while_the_last_graph_is_alive() -> None:
    layer, seen = nn.Linear(4, 6), []
    weight: Any = layer.weight
    weight.register_hook(lambda g: seen.append(tuple(g.shape)))
    weight.register_post_accumulate_grad_hook(lambda p: seen.append(tuple(p.shape)))
    loss = layer(torch.randn(2, 4)).sum()
    loss.backward()
    cut_all([], dict(layer.named_parameters()), {n: rows(n, p, 3) for n, p in layer.named_parameters()})
    again = layer(torch.randn(2, 4)).sum()
    again.backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.shape == (3, 4)
    assert seen == [(6, 4), (6, 4), (3, 4), (3, 4)]
    assert loss.isfinite()


def rows(name: str, weight: Tensor, kept: int) -> TensorCut:
    """Keep the first rows."""
    keep = torch.arange(weight.shape[0]) < kept
    return cuts_between({name: tuple(weight.shape)}, {}, {name: {(0,): keep}})[name]


def test_one_parameter_is_cut_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """So no more than one exists twice: memory falls with each, by no more than one holds with all beside it."""
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))
    optimizer = torch.optim.AdamW(model.parameters())
    torch.autograd.backward(model(torch.randn(2, 64)).sum())
    optimizer.step()
    held = [own_bytes(model, optimizer)]
    original = optimizer_surgery.cut_tensor

    def watched(tensor: Tensor, cut: TensorCut) -> None:
        original(tensor, cut)
        held.append(own_bytes(model, optimizer))

    monkeypatch.setattr(optimizer_surgery, "cut_tensor", watched)
    cut_all([optimizer], dict(model.named_parameters()), {n: rows(n, p, 32) for n, p in model.named_parameters()})
    falls = [before - after for before, after in pairwise(held)]
    assert falls == [4 * 4 * 64 * 32, 4 * 4 * 32] * 8


def own_bytes(model: nn.Module, optimizer: Optimizer) -> int:
    """Of parameters, gradients and states."""
    tensors = [t for p in model.parameters() for t in (p, p.grad) if t is not None]
    return sum(t.numel() * t.element_size() for t in tensors) + optimizer_bytes([optimizer])


def test_groups_schedules_and_steps_survive_and_memory_falls() -> None:
    model = nn.Linear(8, 8)
    optimizer = torch.optim.AdamW([{"params": [model.weight], "lr": 0.5}, {"params": [model.bias], "lr": 0.1}])
    schedule = lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    model(torch.randn(2, 8)).sum().backward()
    optimizer.step()
    schedule.step()
    groups, before = [id(g) for g in optimizer.param_groups], optimizer_bytes([optimizer])
    cut_all([optimizer], dict(model.named_parameters()), {n: rows(n, p, 4) for n, p in model.named_parameters()})
    assert [id(g) for g in optimizer.param_groups] == groups
    assert optimizer.state[model.weight]["step"] == 1
    assert optimizer_bytes([optimizer]) - 2 * 4 == (before - 2 * 4) // 2
    schedule.step()
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.125
    assert optimizer.state[model.weight]["step"] == 2


def test_reduced_states_are_cut_where_they_match_in_one_way() -> None:
    weight = nn.Parameter(torch.randn(6, 4))
    optimizer: Any = torch.optim.Adafactor([weight], lr=0.1)
    weight.grad = torch.randn(6, 4)
    optimizer.step()
    row = optimizer.state[weight]["row_var"].clone()
    cut = rows("w", weight, 3)
    check_states([optimizer], {"w": weight}, {"w": cut})
    cut_all([optimizer], {"w": weight}, {"w": cut})
    assert torch.equal(optimizer.state[weight]["row_var"], row[:3])
    assert optimizer.state[weight]["col_var"].shape == (1, 4)
    optimizer.step()
    flat = cut.beside(torch.arange(6.0))
    assert flat is not None
    assert flat.tolist() == [0, 1, 2]


def test_a_state_that_cannot_follow_is_refused_before_anything_changes() -> None:
    weight = nn.Parameter(torch.randn(6, 6))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    cut = {"w": rows("w", weight, 3)}
    for value in (torch.zeros(6), torch.zeros(9), torch.zeros(6, 6, dtype=torch.uint8), [torch.zeros(36)]):
        optimizer.state[weight]["odd"] = value
        with pytest.raises(TrainingError, match="'odd' of shape"):
            check_states([optimizer], {"w": weight}, cut)
    optimizer.state[weight]["odd"] = {"fine": torch.zeros(6, 6), "step": torch.zeros(()), "none": None}
    check_states([optimizer], {"w": weight}, cut)
    cut_all([optimizer], {"w": weight}, cut)
    assert optimizer.state[weight]["odd"]["fine"].shape == weight.shape == (3, 6)


def test_an_optimizer_of_another_model_is_refused() -> None:
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    check_optimizers([torch.optim.SGD([model.weight])], model.parameters())
    with pytest.raises(TrainingError, match=r"SGD holds 2 of 2 parameters that are not this model's"):
        check_optimizers([torch.optim.SGD(other.parameters())], model.parameters())


def test_a_state_reduced_over_the_axis_along_which_the_choice_differs_cannot_follow() -> None:
    """Each of three slices keeps other rows: a mean over slices has no part that is the smaller one's."""
    keep = torch.zeros(3, 6, dtype=torch.bool)
    for i, kept in enumerate(([0, 1], [2, 4], [1, 5])):
        keep[i, kept] = True
    cut = cuts_between({"w": (3, 6, 5)}, {}, {"w": {(0, 1): keep}})["w"]
    assert cut.beside(torch.randn(1, 6, 5)) is None
    assert cut.beside(torch.randn(6, 5)) is None
    over_columns, over_rows = torch.randn(3, 6, 1), torch.randn(3, 1, 5)
    kept_columns, kept_rows = cut.beside(over_columns), cut.beside(over_rows)
    assert kept_columns is not None
    assert torch.equal(kept_columns.flatten(), over_columns[..., 0][keep])
    assert kept_rows is not None
    assert torch.equal(kept_rows, over_rows)
