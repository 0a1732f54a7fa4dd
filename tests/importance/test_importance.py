"""Scores against plain loops, against gates inserted by hand, and every refusal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ecospa_fx.coupling.couplings import Couplings
from ecospa_fx.coupling.types import Coupling, Member
from ecospa_fx.errors import ScoreError
from ecospa_fx.importance.methods import Method, method_named, register
from ecospa_fx.importance.score import magnitudes, score
from tests.support.tiny import HIDDEN, Tiny, batches, loss, samples, tiny, tiny_couplings

METHODS = ["taylor", "fisher", "gate-fisher"]
BLOCKS = {"qk": "attention", "vo": "attention", "ffn": "ffn", "experts": "experts"}


def elements(values: Tensor, member: Member, carrier: int, unit: int) -> Tensor:
    """The elements of one unit, picked one position at a time."""
    if member.carrier_axis is not None:
        values = values.select(member.carrier_axis, carrier)
        axis = member.axis - (member.carrier_axis < member.axis)
    else:
        axis = member.axis
    return torch.cat([values.select(axis, int(p)).flatten() for p in member.indices[carrier, unit]])


def gradients(model: nn.Module) -> list[dict[str, Tensor]]:
    """Of every parameter, per sample, the ordinary way."""
    found, parameters = [], dict(model.named_parameters())
    for args, kwargs in samples():
        taken = torch.autograd.grad(loss(model(*args, **kwargs), args, kwargs), list(parameters.values()))
        found.append(dict(zip(parameters, taken, strict=True)))
    return found


def by_loop(model: nn.Module, coupling: Coupling, method: str) -> Tensor:
    """The formulas of the methods, written out unit by unit."""
    parameters, per_sample = dict(model.named_parameters()), gradients(model)
    found = torch.zeros(coupling.carriers, coupling.size, dtype=torch.float64)
    for c in range(coupling.carriers):
        for u in range(coupling.size):
            products = [
                torch.cat([elements(g[m.parameter] * parameters[m.parameter], m, c, u) for m in coupling.members])
                for g in per_sample
            ]
            mean = torch.stack([p.square().sum() for p in products]).mean()
            found[c, u] = mean if method == "fisher" else torch.stack(products).mean(0).sum().abs()
    return found


@pytest.mark.parametrize("method", ["taylor", "fisher"])
def test_agrees_with_a_plain_loop_over_units(method: str) -> None:
    model = tiny()
    couplings = tiny_couplings(model)
    scores = score(model, couplings, batches(), loss=loss, method=method)
    model.eval()
    assert set(scores.values) == {c.name for c in couplings.offered}
    for coupling in couplings.offered:
        torch.testing.assert_close(scores[coupling.name], by_loop(model, coupling, method), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("kind", list(BLOCKS))
def test_gate_fisher_is_the_squared_derivative_by_a_real_gate(kind: str) -> None:
    model = tiny()
    couplings = tiny_couplings(model)
    scores = score(model, couplings, batches(), loss=loss, method="gate-fisher")
    model.eval()
    for i in range(2):
        coupling = couplings[f"layers.{i}.{BLOCKS[kind]}:{kind}"]
        gate = torch.ones(coupling.carriers, coupling.size, dtype=torch.float64, requires_grad=True)
        block = model.get_submodule(f"layers.{i}.{BLOCKS[kind]}")
        assert isinstance(block.gates, dict)
        block.gates[kind] = gate
        squares = [torch.autograd.grad(loss(model(*a), a, k), gate)[0].square() for a, k in samples()]
        block.gates.clear()
        assert squares[0].max() > 0
        torch.testing.assert_close(scores[coupling.name], torch.stack(squares).mean(0), rtol=1e-9, atol=1e-15)


def test_gate_fisher_needs_no_consumer() -> None:
    """Half of the sum over both sides of a product is the derivative that the consumer's side alone gives."""
    model = tiny()
    couplings = tiny_couplings(model)
    both = Couplings([_all_producers(c) for c in couplings if c.kind == "qk"], model)
    named = score(model, couplings, batches(), loss=loss)
    for coupling in both:
        found = score(model, both, batches(), loss=loss)[coupling.name]
        torch.testing.assert_close(found, named[coupling.name], rtol=1e-9, atol=1e-15)


def _all_producers(c: Coupling) -> Coupling:
    members = tuple(Member(m.parameter, m.axis, "producer", None, m.boxes, m.carriers, m.units) for m in c.members)
    return Coupling(c.name, c.kind, c.layer, c.size, c.carriers, c.symmetry, members, c.parameters)


def test_magnitude_is_the_product_of_the_two_sides_norms_relative_to_the_mean() -> None:
    model = tiny()
    couplings = tiny_couplings(model)
    parameters, scores = dict(model.named_parameters()), magnitudes(couplings)
    for coupling in couplings.offered:
        product = torch.ones(coupling.carriers, coupling.size, dtype=torch.float64)
        for c in range(coupling.carriers):
            for u in range(coupling.size):
                for role in ("producer", "consumer"):
                    side = [m for m in coupling.members if m.role == role]
                    product[c, u] *= torch.cat([elements(parameters[m.parameter], m, c, u) for m in side]).norm().item()
        want = product / product.sum() * coupling.parameters
        torch.testing.assert_close(scores[coupling.name], want, rtol=1e-9, atol=0.0)


def test_magnitude_ignores_the_scale_of_a_side_and_survives_zeros() -> None:
    model = tiny()
    couplings = tiny_couplings(model)
    name = "layers.0.ffn:ffn"
    before = magnitudes(couplings)[name]
    with torch.no_grad():
        model.layers[0].get_parameter("ffn.down.weight").mul_(7)
        torch.testing.assert_close(magnitudes(couplings)[name], before)
        model.layers[0].get_parameter("ffn.down.weight").zero_()
    flat = magnitudes(couplings)[name]
    assert flat.isfinite().all()
    assert flat.eq(flat[0, 0]).all()


@pytest.mark.parametrize("method", METHODS)
def test_leaves_modes_gradients_flags_and_hooks_alone(method: str) -> None:
    model = tiny()
    model.layers[1].eval()
    frozen = model.get_parameter("layers.0.ffn.down.weight").requires_grad_(False)
    kept = torch.full_like(frozen, 3.0)
    frozen.grad = kept
    modes = [m.training for m in model.modules()]
    scores = score(model, tiny_couplings(model), batches(), loss=loss, method=method)
    assert scores["layers.0.ffn:ffn"].max() > 0
    assert [m.training for m in model.modules()] == modes
    assert frozen.grad is kept
    assert kept.eq(3).all()
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["layers.0.ffn.down.weight"]
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["layers.0.ffn.down.weight"]
    assert not any(p._backward_hooks for p in model.parameters())


def test_is_as_before_after_an_error_too() -> None:
    model = tiny()

    def fails(*_: object) -> Tensor:
        raise RuntimeError("of the user's own")

    with pytest.raises(RuntimeError, match="of the user's own"):
        score(model, tiny_couplings(model), batches(), loss=fails)
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad and not p._backward_hooks for p in model.parameters())


def test_scores_are_deterministic_and_work_under_no_grad() -> None:
    model = tiny()
    couplings = tiny_couplings(model)
    with torch.no_grad():
        first = score(model, couplings, batches(), loss=loss)
    with torch.inference_mode():
        second = score(model, couplings, iter(batches()), loss=loss)
    assert all(torch.equal(first[c.name], second[c.name]) for c in couplings.offered)
    assert all(v.dtype is torch.float64 and v.device.type == "cpu" for v in first.values.values())


def test_half_precision_weights_are_scored_in_float32() -> None:
    model = tiny().to(torch.bfloat16)
    couplings = tiny_couplings(model)
    scores = score(model, couplings, batches(), loss=loss, method="fisher")
    assert all(scores[c.name].isfinite().all() and scores[c.name].max() > 0 for c in couplings.offered)


# -- refusals ------------------------------------------------------------------------------------------------------


def refused(model: Tiny, data: Any, **options: Any) -> str:
    """The text of the refusal; the model is as before."""
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(ScoreError) as error:
        score(model, tiny_couplings(model), data, **{"loss": loss, **options})
    after = dict(model.named_parameters())
    assert all(torch.equal(v.nan_to_num(), after[n].nan_to_num()) for n, v in before.items())
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    return str(error.value)


def generated() -> Iterator[Any]:
    yield from ()


@pytest.mark.parametrize("data", [[], (), generated()])
def test_refuses_empty_batches(data: Any) -> None:
    assert refused(tiny(), data) == (
        "there are no batches to score with 'gate-fisher': pass at least one (args, kwargs)"
    )


@pytest.mark.parametrize(
    "batch", [torch.zeros(2, 5), (torch.zeros(2, 5),), (torch.zeros(2, 5), {}), ((1,), None), ((), {}, {}), "ab"]
)
def test_refuses_a_batch_that_is_no_pair(batch: Any) -> None:
    text = "batch 1 is not a pair (args, kwargs): pass for example ((ids,), {})"
    assert refused(tiny(), [*batches(1), batch]) == text


def test_refuses_weights_that_are_not_finite() -> None:
    model = tiny()
    with torch.no_grad():
        model.get_parameter("layers.1.attention.k.bias")[3] = torch.nan
    text = "parameter 'layers.1.attention.k.bias' holds values that are not finite: repair the weights first"
    assert refused(model, batches()) == text
    assert refused(model, [], method="magnitude") == text


def test_refuses_gradients_that_are_not_finite() -> None:
    class Spoiled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradient: Tensor) -> Tensor:
            return gradient[0] * torch.nan

    calls = iter(range(9))

    def spoiled(output: Tensor, args: Any, kwargs: Any) -> Tensor:
        value: Tensor = loss(output, args, kwargs)
        return Spoiled.apply(value) if next(calls) == 1 else value  # type: ignore[no-untyped-call]  # torch has no types here

    text = refused(tiny(), samples(), loss=spoiled)
    assert text.startswith("the gradient of parameter 'layers.")
    assert text.endswith("is not finite in batch 1: leave it out")


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (lambda o, a, k: o, "the loss of batch 0 is not a scalar but of shape (2, 5, 11): return its mean or sum"),
        (lambda o, a, k: 1.0, "the loss of batch 0 is not a scalar but of type float: return its mean or sum"),
        (
            lambda o, a, k: o.detach().mean(),
            "the loss of batch 0 does not depend on the model: return the loss of the model's output, without "
            "detach(), item() or no_grad()",
        ),
        (
            lambda o, a, k: o.argmax(-1).sum(),
            "the loss of batch 0 is of type torch.int64, which has no gradient: return a floating one",
        ),
        (lambda o, a, k: None, "the loss of batch 0 is not a scalar but of type NoneType: return its mean or sum"),
        (3.0, "loss=3.0 cannot be called: give a function (output, args, kwargs) -> scalar"),
        (
            lambda o, a, k: o.mean() * torch.nan,
            "the loss of batch 0 is nan: leave the batch out or repair the weights",
        ),
        (
            lambda o, a, k: o.mean() * torch.inf,
            "the loss of batch 0 is inf: leave the batch out or repair the weights",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:every batch counts as one sample")  # the refusal comes after it
def test_refuses_losses(bad: Any, text: str) -> None:
    assert refused(tiny(), batches(), loss=bad).replace("-inf", "inf") == text


@pytest.mark.filterwarnings("ignore:every batch counts as one sample")  # the refusal comes after it
def test_refuses_a_loss_of_other_parameters_only() -> None:
    model = tiny()
    spare = torch.ones((), requires_grad=True)
    text = refused(model, batches(), loss=lambda o, a, k: spare * 2)
    assert text == (
        "the loss of batch 0 does not depend on any coupled parameter: return the loss of the model's output"
    )


def test_refuses_unknown_methods_other_models_and_meta() -> None:
    model = tiny()
    assert refused(model, batches(), method="size") == (
        "no scoring method is called 'size': use one of fisher, gate-fisher, magnitude, taylor"
    )
    with pytest.raises(ScoreError, match=r"^parameter 'layers\.1\.\S+' is not the one the couplings were detected on"):
        score(tiny(1), tiny_couplings(model), batches(), loss=loss)
    with pytest.raises(ScoreError, match=r"is on meta and has no values to score: load the weights first$"):
        score(tiny().to("meta"), tiny_couplings(model), batches(), loss=loss)
    nothing = Couplings([c for c in tiny_couplings(model) if c.blocked], model)
    with pytest.raises(ScoreError, match=r"^there is nothing to score because no coupling is offered"):
        score(model, nothing, batches(), loss=loss)


def test_methods_register_once() -> None:
    with pytest.raises(ScoreError, match=r"^scoring method 'fisher' is registered already: choose another name$"):
        register(method_named("fisher"))
    with pytest.raises(ScoreError, match=r"^scoring method 'empty' must score from weights or from batches"):
        register(Method("empty"))


# -- progress ------------------------------------------------------------------------------------------------------


def test_progress_shows_count_and_total(capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny()
    plain = score(model, tiny_couplings(model), batches(), loss=loss)
    assert capsys.readouterr().err == ""
    shown = score(model, tiny_couplings(model), batches(), loss=loss, progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("gate-fisher:   0%|")
    assert "| 3/3 [" in captured.err
    assert torch.equal(shown["layers.0.ffn:ffn"], plain["layers.0.ffn:ffn"])


def test_the_hidden_width_is_refused_in_the_test_model() -> None:
    assert tiny_couplings(tiny())[":hidden"].size == HIDDEN
