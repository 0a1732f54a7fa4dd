"""Norms over fewer units equal masking: in every form, twice, with a large mean, compiled, and in training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import ecospa_fx as eco
from ecospa_fx.errors import PlanError
from ecospa_fx.plan import Plan
from ecospa_fx.verify import masked, masked_error

WIDTH = 12


class Spelled(nn.Module):
    """A layer norm or an RMSNorm, written out."""

    def __init__(self, width: int, centred: bool) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(width) + 0.5), nn.Parameter(torch.rand(width))
        self.centred = centred

    def forward(self, x: Tensor) -> Tensor:
        if not self.centred:
            return self.weight * (x * (x.pow(2).mean(-1, keepdim=True) + 1e-3).rsqrt())
        variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
        return (x - mean) / (variance + 1e-3).sqrt() * self.weight + self.bias


class Response(nn.Module):
    """Each channel's norm over time against the mean of all."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.rand(width)), nn.Parameter(torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        size = x.norm(dim=1, keepdim=True)
        out: Tensor = self.gamma * (x * (size / (size.mean(-1, keepdim=True) + 1e-6))) + self.beta + x
        return out


class Normed(nn.Module):
    """A feed-forward layer with a norm inside."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, WIDTH), norm, nn.Linear(WIDTH, 6)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(self.norm(F.gelu(self.up(x))))
        return result


NORMS: dict[str, Callable[[], nn.Module]] = {
    "rms": lambda: nn.RMSNorm(WIDTH, eps=1e-3),
    "rms, default epsilon": lambda: nn.RMSNorm(WIDTH),
    "rms, bare": lambda: nn.RMSNorm(WIDTH, elementwise_affine=False),
    "layer": lambda: nn.LayerNorm(WIDTH),
    "layer, no bias": lambda: nn.LayerNorm(WIDTH, bias=False),
    "layer, bare": lambda: nn.LayerNorm(WIDTH, elementwise_affine=False),
    "rms, spelled out": lambda: Spelled(WIDTH, centred=False),
    "layer, spelled out": lambda: Spelled(WIDTH, centred=True),
    "response": lambda: Response(WIDTH),
}


def made(name: str, dtype: torch.dtype = torch.float64) -> tuple[Normed, tuple[Tensor], Plan]:
    torch.manual_seed(0)
    model = Normed(NORMS[name]()).to(dtype).eval()
    for parameter in model.norm.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    args = (torch.randn(2, 5, 6, dtype=dtype),)
    return model, args, planned(model, args)


def planned(model: nn.Module, args: tuple[Tensor]) -> Plan:
    """A plan that removes two of three units, drawn at random."""
    couplings = eco.detect(model, args)
    (coupling,) = couplings.offered
    assert (coupling.kind, coupling.symmetry) == ("ffn", "permutation")
    return eco.plan(couplings, scores="random", widths={coupling.name: coupling.size // 3})


def nodes(module: nn.Module) -> int:
    """Calls in the graphs of a restored module."""
    graphs = (graph for m in module.modules() if isinstance(graph := getattr(m, "graph", None), fx.Graph))
    return sum(node.op == "call_function" for graph in graphs for node in graph.nodes)


@pytest.mark.parametrize(
    "name", [n if n in {"rms", "layer"} else pytest.param(n, marks=pytest.mark.slow) for n in NORMS]
)
def test_once_and_twice(name: str, tmp_path: Path) -> None:
    """The second shrink starts from what the first one left: the number of units is still the first one."""
    model, args, plan = made(name)
    small = eco.shrink(model, plan, args)
    assert masked_error(model, small, plan, args) < 1e-12
    if name.startswith("rms"):
        assert nodes(small) <= nodes(eco.shrink(model, Plan((), plan.shapes), args)) + (name != "rms")
    again = planned(small, args)
    smaller = eco.shrink(small, again, args)
    assert masked_error(small, smaller, again, args) < 1e-12
    assert [tuple(p.shape) for n, p in smaller.named_parameters() if n.startswith("up")] == [(1, 6), (1,)]
    if name in {"rms", "layer"}:
        eco.save(small, tmp_path / "small")
        assert torch.equal(eco.load(tmp_path / "small", model=lambda: model)(*args), small(*args))


@pytest.mark.parametrize("name", ["rms", "layer", "layer, spelled out"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_mean(name: str, dtype: torch.dtype) -> None:
    """No worse than the original: the error against float64 is at most a little more than that of the masked model."""
    model, args, plan = made(name, dtype)
    with torch.no_grad():
        model.up.bias.add_(300.0)
    exact, small = copy.deepcopy(model).double(), eco.shrink(model, plan, args)
    with torch.no_grad(), masked(exact, plan), masked(model, plan):
        want, ours, theirs = exact(args[0].double()), small(*args), model(*args)
    step = torch.finfo(dtype).eps * want.abs().max()
    assert (ours - want).abs().max() <= 2 * (theirs - want).abs().max() + 2 * step


@pytest.mark.parametrize("name", ["rms", "layer", "response", "rms, bare"])
def test_gradients_are_those_of_masking(name: str) -> None:
    model, args, plan = made(name)
    small, cuts = eco.shrink(model, plan, args), plan.masks(model)
    with masked(model, plan):
        model(*args).square().sum().backward()
    small(*args).square().sum().backward()
    for path, parameter in small.named_parameters():
        dense = model.get_parameter(path)
        assert dense.grad is not None
        assert parameter.grad is not None
        mask = cuts.get(path, torch.ones_like(dense, dtype=torch.bool))
        want = dense.grad[mask].view(parameter.shape)
        if (name, path) == ("rms", "norm.weight"):  # it holds its product with a number
            factor = 3**0.5
            torch.testing.assert_close(parameter, factor * dense[mask], rtol=1e-12, atol=0)
            want = want / factor
        torch.testing.assert_close(parameter.grad, want, rtol=1e-9, atol=1e-12)


def test_sparse_training_has_the_weights_of_the_dense_model() -> None:
    """While it is trained the factor stands in the graph: weights and gradients are those of masking."""
    model, args, plan = made("rms")
    dense = copy.deepcopy(model)
    scale = dense.get_parameter("norm.weight")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    schedule = eco.OneShot(1)
    sparse = eco.SparseTraining(model, args, optimizer=optimizer, schedule=schedule, target=0.6, scores="taylor")
    sparse.model(*args).square().sum().backward()
    sparse.step()
    plan = sparse.plan
    assert plan["ffn"].kept < WIDTH
    mask = plan.masks(dense)["norm.weight"]
    weight = sparse.model.get_parameter("norm.weight")
    assert torch.equal(weight, scale[mask])
    sparse.model.zero_grad()
    sparse.model(*args).square().sum().backward()
    with masked(dense, plan):
        dense(*args).square().sum().backward()
    assert scale.grad is not None
    torch.testing.assert_close(weight.grad, scale.grad[mask], rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_compiled() -> None:
    model, args, plan = made("layer", torch.float32)
    small = eco.shrink(model, plan, args)
    compiled: Any = torch.compile(small, fullgraph=True)
    torch.testing.assert_close(compiled(*args), small(*args), rtol=1e-5, atol=1e-5)


class Shifted(nn.Module):
    """A norm of what is not 0 where units are removed."""

    def __init__(self, norm: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 6), norm

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(self.norm(self.up(x).sigmoid()))
        return result


@pytest.mark.parametrize(
    "norm",
    [
        lambda h: F.rms_norm(h, (WIDTH,)), lambda h: F.layer_norm(h, (WIDTH,)), lambda h: F.normalize(h, dim=-1),
        lambda h: h / h.std(-1, keepdim=True), lambda h: h / (1 + h.mean(-1, keepdim=True)),
    ],
)  # fmt: skip
def test_what_is_not_zero_counts(norm: Callable[[Tensor], Tensor]) -> None:
    """The refusal is true: with units masked the norm is another than with 0 in their places."""
    torch.manual_seed(0)
    model, x = Shifted(norm).double(), torch.randn(4, 6).double()
    (refusal,) = {c.blocked.message for c in eco.detect(model, (x,)) if c.size == WIDTH and c.blocked}
    assert "although removed elements are not zero there" in refusal
    with torch.no_grad():
        model.up.weight[::2], model.up.bias[::2], model.down.weight[:, ::2] = 0, 0, 0
        hidden = model.up(x).sigmoid()
        as_if = norm(hidden * torch.tensor([0.0, 1.0]).repeat(WIDTH // 2)) @ model.down.weight.mT + model.down.bias
        assert (as_if - model(x)).abs().max() > 1e-3


class Stream(nn.Module):
    """Blocks that read a stream through norms and add to it."""

    def __init__(self, norm: type[nn.Module], after: bool) -> None:
        super().__init__()
        self.table, self.after = nn.Embedding(20, 8), after
        self.norms = nn.ModuleList(norm(8) for _ in range(2))
        self.up, self.down = nn.Linear(8, 6), nn.Linear(6, 8)
        self.head = nn.Linear(8, 20, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for norm in self.norms:
            x = norm(x + self.down(self.up(x).relu())) if self.after else x + self.down(self.up(norm(x)).relu())
        result: Tensor = self.head(x)
        return result


@pytest.mark.parametrize(("norm", "after"), [(nn.LayerNorm, True), (nn.RMSNorm, False)])
def test_the_width_of_the_stream_is_taken_on_request_alone(norm: type[nn.Module], after: bool) -> None:
    torch.manual_seed(0)
    model, args = Stream(norm, after).double(), (torch.arange(10).view(2, 5),)
    couplings = eco.detect(model, args)
    kinds = {c.kind: c for c in couplings.offered}
    assert sorted(kinds) == ["ffn", "residual"]
    assert {m.parameter for m in kinds["residual"].members} >= {"table.weight", "head.weight", "norms.1.weight"}
    assert {s.kind for s in eco.plan(couplings, ratio=0.4, scores="random")} == {"ffn"}
    requests: list[dict[str, Any]] = [{"kinds": "residual", "ratio": 0.5}, {"widths": {kinds["residual"].name: 3}}]
    for options in requests:
        plan = eco.plan(couplings, scores="random", **options)
        assert [s.kind for s in plan] == ["residual"]
        assert masked_error(model, eco.shrink(model, plan, args), plan, args) < 1e-12
    only = couplings.select(kinds="residual")
    with pytest.raises(PlanError, match=r"^there is nothing to remove because only the residual width is offered"):
        eco.plan(only, ratio=0.5, scores="random")


class Looped(nn.Module):
    """The same block again and again, with a norm inside and no stream."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 6)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = self.down(self.norm(self.up(x).relu()))
        return x


def test_an_inner_width_is_no_stream() -> None:
    (coupling,) = (c for c in eco.detect(Looped(), (torch.randn(2, 6),)).offered if c.size == WIDTH)
    assert coupling.kind == "ffn"


class Cast(nn.Module):
    """A norm that is computed in a type of its own, as models of transformers do, over the hidden units of an MLP."""

    def __init__(self, dtype: torch.dtype, statistic: str) -> None:
        super().__init__()
        self.up, self.down, self.dtype, self.statistic = nn.Linear(6, 48), nn.Linear(48, 6), dtype, statistic

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x).relu()
        short = hidden.to(self.dtype)
        square = short.pow(2).mean(-1, True) if self.statistic == "mean" else short.pow(2).sum(-1, True) / 48
        out: Tensor = self.down((short * (square + 1e-6).rsqrt()).to(hidden.dtype))
        return out


@pytest.mark.parametrize("statistic", ["mean", "sum"])
@pytest.mark.parametrize(
    ("weights", "statistics", "offered"),
    [
        (torch.float64, torch.float32, False),
        (torch.float32, torch.bfloat16, False),
        (torch.float32, torch.float32, True),
        (torch.bfloat16, torch.float32, True),
    ],
    ids=str,
)
def test_what_is_added_up_in_a_shorter_type_than_the_weights_is_refused(
    weights: torch.dtype, statistics: torch.dtype, offered: bool, statistic: str
) -> None:
    """It could not be proven: the sum of what is kept rounds otherwise than that of all, zeros included."""
    torch.manual_seed(0)
    model, x = Cast(statistics, statistic).to(weights), torch.randn(4, 6).to(weights)
    (ffn,) = [c for c in eco.detect(model, (x,)) if any(m.parameter == "up.weight" for m in c.members)][:1]
    if offered:
        assert ffn.blocked is None
    else:
        short, long = (str(d).removeprefix("torch.") for d in (statistics, weights))
        assert ffn.blocked is not None
        assert f"summed over in {short} while weights are {long}" in str(ffn.blocked)
        assert f"convert the model to {short} first" in str(ffn.blocked)


def test_sums_of_fewer_numbers_round_otherwise() -> None:
    """Why they are refused: the error is that of the shorter type, not that of the weights."""
    torch.manual_seed(0)
    numbers = torch.randn(64, 48)
    kept = torch.rand(48) > 0.5
    whole, fewer = (numbers * kept).pow(2).mean(-1), numbers[:, kept].pow(2).sum(-1) / 48
    assert 1e-9 < float((whole - fewer).abs().max()) < 1e-6


def test_a_plan_that_was_made_in_the_type_of_the_norm_is_carried_out_in_longer_ones() -> None:
    """Proofs run copies in float64; what differs there is what the norm rounds."""
    torch.manual_seed(0)
    model, x = Cast(torch.float32, "mean"), torch.randn(4, 6)
    plan = eco.plan(eco.detect(model, (x,)), ratio=0.5, scores="random")
    copy_, x = copy.deepcopy(model).double(), x.double()
    assert 0 < masked_error(copy_, eco.shrink(copy_, plan, (x,)), plan, (x,)) < 1e-6
