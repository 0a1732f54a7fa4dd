"""What models return: classes of every make come back as they were, and their own code is never run without tensors."""

from __future__ import annotations

import types
from collections import OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import ecospa_fx as eco
from ecospa_fx.ir.pytrees import copied, difference, opened, put_together
from ecospa_fx.verify import masked, masked_error

T = TypeVar("T")


@dataclass
class Plain:
    y: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Fixed:
    y: Tensor
    other: Tensor | None


@dataclass
class Validated:
    """Refuses what is no matrix, and computes a field that its constructor does not take."""

    y: Tensor
    doubled: Tensor = field(init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.y, Tensor) or self.y.dim() != 2:
            raise TypeError("y must be a matrix")
        self.doubled = self.y * 2


@dataclass
class Generic_(Generic[T]):
    y: T
    plain: list[Plain]


class Pair(NamedTuple):
    y: Tensor
    z: Tensor


class CheckedPair(namedtuple("CheckedPair", "y z")):
    __slots__ = ()

    def __new__(cls, y: Tensor, z: Tensor) -> CheckedPair:
        assert isinstance(y, Tensor)
        return super().__new__(cls, y, z)


class Ordered(OrderedDict):  # type: ignore[type-arg]
    """No container to the exporter, as its class is another."""


class Own(dict):  # type: ignore[type-arg]
    def __init__(self, y: Tensor) -> None:
        super().__init__(y=y)
        self.beside = y * 2


class Listed(list):  # type: ignore[type-arg]
    pass


class Guarded:
    """Takes no attribute, and shows one by a property."""

    def __init__(self, y: Tensor) -> None:
        object.__setattr__(self, "_y", y)

    def __setattr__(self, name: str, value: Any) -> None:
        raise TypeError(name)

    @property
    def y(self) -> Tensor:
        return self.__dict__["_y"]  # type: ignore[no-any-return]


class Private:
    """Keeps its tensor in a slot of a mangled name."""

    __slots__ = ("__weakref__", "__y")

    def __init__(self, y: Tensor) -> None:
        self.__y = y

    def value(self) -> Tensor:
        return self.__y


class Ffn(nn.Module):
    """A residual FFN whose result some function wraps."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.up, self.down, self.wrap = nn.Linear(8, 16), nn.Linear(16, 8), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(x + self.down(torch.relu(self.up(x))))


def everything(y: Tensor) -> dict[str, Any]:
    """One of each class."""
    spread = types.SimpleNamespace(
        a=OrderedDict(y=y), b=deque([y]), c=defaultdict(list, y=[y]), d=frozenset({1}), e=Pair(y, y * 2), n=y.shape[0]
    )
    return {
        "plain": Plain(y),
        "fixed": Fixed(y=y, other=None),
        "validated": Validated(y),
        "generic": Generic_(Fixed(y=y, other=y * 3), [Plain(y), Plain(y * 2)]),
        "pair": Pair(y, y * 2),
        "checked": CheckedPair(y, y * 2),
        "ordered": Ordered(y=y, z=y * 2),
        "own": Own(y),
        "listed": Listed([y, y * 2]),
        "guarded": Guarded(y),
        "private": Private(y),
        "spread": spread,
    }


def shrunk(model: nn.Module, x: Tensor) -> tuple[nn.Module, eco.Plan]:
    """A model shrunk by half, and the plan."""
    plan = eco.plan(eco.detect(model, (x,)), ratio=0.5, scores="random")
    return eco.shrink(model, plan, (x,)), plan


def test_results_of_every_class_come_back() -> None:
    model, x = Ffn(everything).double().eval(), torch.randn(2, 8, dtype=torch.float64)
    small, plan = shrunk(model, x)
    longer = torch.randn(5, 8, dtype=torch.float64)
    assert masked_error(model, small, plan, (longer,)) < 1e-12
    with torch.no_grad(), masked(model, plan):
        want, got = model(longer), small(longer)
    assert {name: type(value) for name, value in got.items()} == {name: type(value) for name, value in want.items()}
    close = [
        (got["fixed"].y, want["fixed"].y), (got["validated"].doubled, want["validated"].doubled),
        (got["generic"].plain[1].y, want["generic"].plain[1].y), (got["checked"].z, want["checked"].z),
        (got["ordered"]["z"], want["ordered"]["z"]), (got["own"]["y"], want["own"]["y"]),
        (got["own"].beside, want["own"].beside), (got["listed"][1], want["listed"][1]),
        (got["guarded"].y, want["guarded"].y), (got["private"].value(), want["private"].value()),
        (got["spread"].a["y"], want["spread"].a["y"]), (got["spread"].e.z, want["spread"].e.z),
    ]  # fmt: skip
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in close)
    assert got["spread"].n == 5
    assert got["spread"].d == {1}
    assert got["fixed"].other is None


def test_output_classes_of_transformers_with_required_fields() -> None:
    generic = pytest.importorskip("transformers.utils.generic")

    @dataclass
    class Required(generic.ModelOutput):  # type: ignore[misc,name-defined]
        pooled: Tensor
        parts: tuple[Any, ...] | None = None

    @dataclass
    class Absent(generic.ModelOutput):  # type: ignore[misc,name-defined]
        """Its own constructor demands what the model leaves out."""

        first: Tensor | None
        second: Tensor | None = None

    def wrap(y: Tensor) -> tuple[Any, ...]:
        return Required(pooled=y), Absent(None, y * 2), Required(pooled=y, parts=(Plain(y * 3),))

    model, x = Ffn(wrap).double().eval(), torch.randn(2, 8, dtype=torch.float64)
    small, plan = shrunk(model, x)
    assert masked_error(model, small, plan, (x,)) < 1e-12
    required, absent, mixed = small(x)
    assert (type(required), type(absent), type(mixed)) == (Required, Absent, Required)
    assert list(absent) == ["second"]
    assert absent.first is None
    assert torch.equal(mixed.parts[0].y, 3 * mixed["pooled"])


@pytest.mark.parametrize("wrap", [Plain, lambda y: Fixed(y=y, other=None), lambda y: types.SimpleNamespace(y=y)])
def test_a_module_that_returns_an_object_is_edited_in_place(wrap: Callable[[Tensor], Any]) -> None:
    model, x = Ffn(wrap).eval(), torch.randn(3, 8)
    plan = eco.plan(eco.detect(model, (x,)), ratio=0.5, scores="magnitude")
    with torch.no_grad(), masked(model, plan):
        want = model(x).y
    eco.shrink_(model, plan, (x,))
    assert model.up.weight.shape == (8, 8)
    with torch.no_grad():
        assert torch.allclose(model(x).y, want, atol=1e-6)


def test_objects_are_compared_by_what_they_hold_as_containers() -> None:
    one, other = (opened(Own(torch.ones(n))).skeleton for n in (2, 3))
    assert one == other
    bare = opened(Ordered(y=1)).skeleton
    assert difference(bare, opened(Ordered(y=2)).skeleton) == "['y'] is 1 instead of 2"
    assert bare != opened(Ordered()).skeleton


def test_copies_of_containers_hold_their_items() -> None:
    tensor = torch.ones(2)
    for value in (Ordered(y=tensor), Listed([tensor]), CheckedPair(tensor, tensor)):
        twin = copied([value])[0]
        leaf = pytree.tree_leaves(opened([twin]))[0]
        assert type(twin) is type(value)
        assert len(twin) == len(value)
        assert leaf is not tensor
        assert torch.equal(leaf, tensor)


def test_a_structure_is_put_together_without_its_classes() -> None:
    tree = {"a": Pair(torch.ones(1), torch.zeros(1)), "b": [Validated(torch.ones(1, 1))]}
    leaves, spec = pytree.tree_flatten(opened(tree))
    pair, (parts,) = put_together(spec, list(range(len(leaves))))
    assert pair == [0, 1]
    assert parts.leaves == [2, 3]
