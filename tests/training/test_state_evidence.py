"""States beside square weights: cut where they are known to be elementwise, else refused before anything changes."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ecospa_fx.errors import TrainingError
from ecospa_fx.training.optimizer_surgery import check_states, cut_all
from tests.training.test_surgery import rows

State = Mapping[str, Any]
Moments = namedtuple("Moments", ["first", "second"])


class Keeps(Optimizer):
    """Keeps what a function of a parameter and its gradient returns."""

    def __init__(self, parameters: Any, made: Callable[[Tensor, Tensor], State]) -> None:
        super().__init__(parameters, {"lr": 0.1})
        self.made = made

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].update(self.made(p, p.grad))


def square(g: Tensor) -> bool:
    return g.dim() == 2 and g.shape[0] == g.shape[1]


def lion(p: Tensor, g: Tensor) -> State:
    return {"exp_avg": g.clone()}


def in_a_tuple(p: Tensor, g: Tensor) -> State:
    return {"moments": Moments(g.clone(), g.square()), "step": torch.tensor(3)}


def still(p: Tensor, g: Tensor) -> State:
    return {"exp_avg": torch.zeros_like(g)}


def left(p: Tensor, g: Tensor) -> State:
    return {"exp_avg": g @ g.mT if square(g) else g.clone()}


def left_alone(p: Tensor, g: Tensor) -> State:
    return {"left": g @ g.mT} if square(g) else {}


def factors(p: Tensor, g: Tensor) -> State:
    return {"factors": [g @ g.mT, g.mT @ g]} if g.dim() == 2 else {}


def basis(p: Tensor, g: Tensor) -> State:
    return {"exp_avg": torch.linalg.qr(g)[0] * 3 if square(g) else g.clone()}


def triangle(p: Tensor, g: Tensor) -> State:
    return {"exp_avg": torch.linalg.qr(g)[1] if square(g) else g.clone()}


def odd_for_others(p: Tensor, g: Tensor) -> State:
    return {"q": torch.randn(p.shape[0], p.shape[0]) if g.dim() == 2 else g.clone()}


def one_matrix(p: Tensor, g: Tensor) -> State:
    return {"weight": torch.randn(g.shape)} if square(g) else {}


def gradients(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for p in model.parameters():
        p.grad = torch.randn(p.shape)
    return model


def uneven() -> nn.Module:
    return gradients(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4), nn.Linear(4, 6)))


def even() -> nn.Module:
    return gradients(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))


def bare() -> nn.Module:
    return gradients(nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)))


def checked(model: nn.Module, optimizer: Optimizer) -> None:
    """One step, then two of four rows of the square weight go."""
    optimizer.step()
    tensors = dict(model.named_parameters())
    cut = {"1.weight": rows("1.weight", tensors["1.weight"], 2)}
    check_states([optimizer], tensors, cut)
    cut_all([optimizer], tensors, cut)


@pytest.mark.parametrize("build", [uneven, even])
@pytest.mark.parametrize("made", [lion, in_a_tuple], ids=lambda f: f.__name__)
def test_moments_are_cut(build: Callable[[], nn.Module], made: Callable[[Tensor, Tensor], State]) -> None:
    model = build()
    optimizer = Keeps(model.parameters(), made)
    optimizer.step()
    weight = model.get_parameter("1.weight")
    whole = weight.grad
    assert whole is not None
    checked(model, optimizer)
    state = optimizer.state[weight]
    first = state["exp_avg"] if made is lion else state["moments"].first
    assert torch.equal(first, whole[:2])


@pytest.mark.parametrize("build", [uneven, even, bare])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adagrad, torch.optim.RMSprop])
def test_optimizers_of_torch_are_elementwise_on_squares_alone(build: Callable[[], nn.Module], kind: Any) -> None:
    model = build()
    optimizer = kind(model.parameters(), lr=0.1)
    for p in model.parameters():
        p.grad = torch.ones_like(p)  # symmetric, as a preconditioner is
    checked(model, optimizer)
    weight = model.get_parameter("1.weight")
    assert all(t.shape == (2, 4) for t in optimizer.state[weight].values() if t.numel() > 1)


def test_moments_that_are_still_zero_are_cut_beside_others_of_their_kind() -> None:
    model = uneven()
    checked(model, Keeps(model.parameters(), still))


@pytest.mark.parametrize(
    ("build", "made"),
    [
        (uneven, left), (uneven, left_alone), (uneven, factors), (uneven, basis), (uneven, triangle),
        (uneven, odd_for_others), (uneven, one_matrix), (even, left), (even, left_alone), (even, factors),
        (even, basis), (even, triangle), (even, still), (bare, lion), (bare, one_matrix),
    ],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_what_may_be_a_matrix_is_refused(
    build: Callable[[], nn.Module], made: Callable[[Tensor, Tensor], State]
) -> None:
    model = build()
    optimizer = Keeps(model.parameters(), made)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(TrainingError, match=r"Keeps keeps '\w+'.* beside parameter '1.weight' of shape \(4, 4\), and"):
        checked(model, optimizer)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def in_three(state: Callable[[Tensor], Tensor], *, alone: bool = False) -> None:
    """A stack of square matrices, of which two of four rows go in each."""
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(3, 4, 4)), nn.Parameter(torch.randn(3, 5, 4))][: 1 if alone else 2]
    optimizer = Keeps(parameters, lambda p, g: {"s": state(p)})
    optimizer.step()
    cut = rows("w", parameters[0], 2)
    check_states([optimizer], {"w": parameters[0]}, {"w": cut})


def test_stacks_of_matrices() -> None:
    in_three(lambda p: torch.randn(p.shape))
    refused: list[Callable[[], None]] = [
        lambda: in_three(lambda p: torch.randn(p.shape), alone=True),
        lambda: in_three(lambda p: p.detach() @ p.detach().mT),
        lambda: in_three(lambda p: torch.randn(p.shape[1:]), alone=True),
        lambda: in_three(lambda p: torch.linalg.qr(p.detach())[0] if p.shape[1] == 4 else torch.randn(p.shape)),
    ]
    for case in refused:
        with pytest.raises(TrainingError, match="'s'"):
            case()


def test_one_memory_for_several_parameters_is_refused() -> None:
    model, common = uneven(), torch.randn(4)
    optimizer = Keeps(model.parameters(), lambda p, g: {"m": common if p.shape == (4,) else g.clone()})
    optimizer.step()
    tensors = dict(model.named_parameters())
    cut = {"1.bias": rows("1.bias", tensors["1.bias"], 2)}
    with pytest.raises(TrainingError, match="another parameter's lies in the same memory"):
        check_states([optimizer], tensors, cut)
    flat = torch.randn(8)
    for p, part in ((tensors["0.bias"], flat[:4]), (tensors["1.bias"], flat[4:])):
        optimizer.state[p]["m"] = part  # parts of one buffer are apart
    check_states([optimizer], tensors, cut)


def test_tensors_on_parameters_follow_or_are_refused() -> None:
    model = uneven()
    tensors: dict[str, Any] = dict(model.named_parameters())
    cut = {"1.weight": rows("1.weight", tensors["1.weight"], 2)}
    for p in tensors.values():
        p.main_grad = torch.randn(p.shape)
    wanted = tensors["1.weight"].main_grad[:2]
    check_states([], tensors, cut)
    tensors["1.weight"].hessian = torch.eye(4)
    with pytest.raises(TrainingError, match="the model's code keeps 'hessian' of shape"):
        check_states([], tensors, cut)
    del tensors["1.weight"].hessian
    cut_all([], tensors, cut)
    assert torch.equal(tensors["1.weight"].main_grad, wanted)


def test_eight_bit_and_sparse_states_are_refused() -> None:
    for odd in (torch.zeros(4, 4).to(torch.float8_e4m3fn), torch.eye(4).to_sparse()):
        model = uneven()
        optimizer = Keeps(model.parameters(), lambda p, g, odd=odd: {"s": odd} if square(g) else {})  # type: ignore[misc]
        with pytest.raises(TrainingError, match="how it follows cannot be told"):
            checked(model, optimizer)
