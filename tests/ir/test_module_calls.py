"""Calls of modules that leave little in the graph: a kept tensor, a result that nobody reads, a number far inside."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, fx, nn

import ecospa_fx as eco
from ecospa_fx.ir.build import sync_users
from ecospa_fx.ir.module_stacks import KEY, arrange_stacks, stack_between
from ecospa_fx.verify import masked_error


class Ffn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def core(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.down(torch.relu(self.up(x)))
        return result


class Table(nn.Module):
    """Keeps what it made at its first call as a plain attribute."""

    def __init__(self, computes: bool = False) -> None:
        super().__init__()
        self.table: Tensor | None = None
        self.computes = computes

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.arange(float(x.shape[1]), dtype=x.dtype)[None, :, None]
        return self.table * 2 if self.computes else self.table


class Tables(Ffn):
    """Tables in lists and dicts, deep down, and one that its module computes with."""

    def __init__(self) -> None:
        super().__init__()
        self.listed = nn.ModuleList([Table(), Table(computes=True)])
        self.named = nn.ModuleDict({"inner": nn.ModuleList([Table()])})

    def forward(self, x: Tensor) -> Tensor:
        inner: Tensor = self.named["inner"][0](x)  # type: ignore[index]
        return self.core(x + self.listed[0](x) + self.listed[1](x) + inner)


class Places(nn.Module):
    """Makes something on the device of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.scale(torch.arange(x.shape[1], device=x.device, dtype=x.dtype)[None, :, None])
        return result


class Levels(Ffn):
    """Calls a module, which calls another, for every level, and reads some of what they say."""

    def __init__(self, read: Sequence[int]) -> None:
        super().__init__()
        self.read, self.places = read, nn.Sequential(nn.Sequential(Places(), nn.Tanh()), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        levels = [x, x[:, ::2], x[:, ::3]]
        places = [self.places(level) for level in levels]
        return sum((self.core(levels[i] + places[i]).mean(1) for i in self.read), x.new_zeros(()))


def exact(model: nn.Module, shape: Sequence[int]) -> nn.Module:
    """The model shrunk by half, equal to the masked one."""
    model, args = model.double().eval(), (torch.randn(*shape, dtype=torch.float64),)
    model(*args)
    plan = eco.plan(eco.detect(model, args), ratio=0.5, scores="random")
    small = eco.shrink(model, plan, args)
    assert masked_error(model, small, plan, args) < 1e-12
    return small


def test_tables_that_modules_keep_are_copied() -> None:
    model = Tables()
    small = exact(model, (2, 5, 8))
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    want = small(x)
    for twin in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert torch.equal(twin(x), want)
    assert set(small.state_dict()) == set(model.state_dict())
    model.listed[0].table.zero_()  # type: ignore[operator]
    assert torch.equal(small(x), want)
    assert small.to("meta")(x.to("meta")).is_meta


@pytest.mark.slow
@pytest.mark.parametrize("read", [(1,), (2,), (0, 2)])
def test_calls_whose_results_are_not_read(read: Sequence[int]) -> None:
    small = exact(Levels(read), (2, 6, 8))
    assert small.train()(torch.randn(2, 6, 8, dtype=torch.float64)).isfinite().all()
    assert [name for name, _ in small.named_parameters() if "@" in name] == []
    assert small.to("meta")(torch.randn(2, 6, 8, dtype=torch.float64, device="meta")).is_meta


class Scaled(nn.Module):
    """Multiplies by a number that the caller gives."""

    def forward(self, x: Tensor, by: float) -> Tensor:
        return x * by


class Wrapped(nn.Module):
    """Does nothing by itself."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.inside: nn.Module = Wrapped(depth - 1) if depth else Scaled()

    def forward(self, x: Tensor, by: float) -> Tensor:
        result: Tensor = self.inside(x, by)
        return result


class Thrice(Ffn):
    """Calls a module with other numbers each time, which matter far inside only."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.scaled = Wrapped(depth)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.scaled(self.core(self.scaled(self.scaled(x, 2.0), 3.0)), 2.0)
        return result


@pytest.mark.parametrize("depth", [0, 2])
def test_calls_that_differ_far_inside_stay_apart(depth: int) -> None:
    exact(Thrice(depth), (2, 8))


def _graph(calls: Sequence[str]) -> fx.Graph:
    """One node after another, each in a call such as "a@1/b"."""
    graph = fx.Graph()
    node = graph.placeholder("x")
    for call in calls:
        node = graph.call_function(torch.relu, (node,))
        parts, stack = call.split("/") if call else [], {"L": ("", "Root")}
        for i, part in enumerate(parts):
            path = ".".join(p.partition("@")[0] for p in parts[: i + 1])
            stack[f"L__{path}@{part.partition('@')[2]}".removesuffix("@")] = (path, "Module")
        node.meta[KEY] = stack
    graph.output(node)
    return graph


def _calls(graph: fx.Graph) -> list[str]:
    stacks = [node.meta[KEY] for node in graph.nodes if node.op == "call_function"]
    return ["/".join(key.removeprefix("L__") for key in list(stack)[1:]) for stack in stacks]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (["a", "", "a@1"], ["a", "", "a@1"]),
        (["a@2", "", "a@5"], ["a", "", "a@1"]),  # the others are gone
        (["b/c@1", "b@1/c@3"], ["b/b.c", "b@1/b.c@1"]),
        (["a", "b", "a", "b"], ["a", "b", "b", "b"]),  # the second visit of a lies between two nodes of b
        (["a/x", "a/y", "a/x", "a/z"], ["a/a.x", "a/a.y", "a", "a/a.z"]),
        (["a", "", "a"], ["a", "", ""]),
    ],
)
def test_calls_are_nested_and_numbered(before: list[str], after: list[str]) -> None:
    graph = _graph(before)
    arrange_stacks(graph, {"", "a", "b", "b.c", "a.x", "a.y", "a.z"})
    assert _calls(graph) == after


def test_what_is_put_between_two_calls_enters_neither_anew() -> None:
    a, b, c = (n for n in _graph(["a/x", "a/y", "c"]).nodes if n.op == "call_function")
    assert stack_between(a, b, a.meta[KEY]) == a.meta[KEY]
    assert stack_between(b, c, a.meta[KEY]) == {"L": ("", "Root")}
    assert list(stack_between(a, b, c.meta[KEY])) == ["L", "L__a"]
    assert stack_between(None, None, c.meta[KEY]) == {}


def test_users_that_a_pass_left_behind_are_counted_anew() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(torch.relu, (x,))
    z = graph.call_function(torch.add, (y, x))
    graph.output(z)
    assert not sync_users(graph)
    y.users.pop(z)
    x.users.setdefault(graph.call_function(torch.rand, (2,)))
    assert sync_users(graph)
    assert list(y.users) == [z]
    assert set(x.users) == {y, z}
    z.args = (x, x)
    graph.erase_node(y)
    graph.lint()
