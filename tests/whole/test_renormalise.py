"""What only a norm blocks, because what is removed is not 0 there: on request the norm runs over what is kept."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ecospa_fx as eco
from ecospa_fx.coupling.report import couplings_json, explain
from ecospa_fx.errors import InputError, PlanError
from ecospa_fx.importance.score import Batch
from ecospa_fx.origin import origin_of
from ecospa_fx.verify import masked_error

HIDDEN, WIDTH = 6, 12


class RootMeanSquare(nn.Module):
    """RMSNorm written out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * self.weight


class Normed(nn.Module):
    """A pair with a norm over its dim, which a number is added to before, and one without."""

    def __init__(self, norm: nn.Module, width: int = WIDTH, added: float = 1.0) -> None:
        super().__init__()
        self.added = added
        self.up, self.norm, self.down = nn.Linear(HIDDEN, width), norm, nn.Linear(width, HIDDEN)
        self.free, self.back = nn.Linear(HIDDEN, WIDTH), nn.Linear(WIDTH, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.norm(self.up(x) + self.added).relu()) + self.back(self.free(x).tanh())
        return out


NORMS = [nn.LayerNorm, nn.RMSNorm, RootMeanSquare]
ARGS = (torch.randn(3, 5, HIDDEN, dtype=torch.float64),)


def made(kind: Any, added: float = 1.0) -> Normed:
    torch.manual_seed(0)
    model = Normed(kind(WIDTH), added=added).double()
    for parameter in model.norm.parameters():
        nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("kind", NORMS)
def test_a_norm_blocks_and_says_which_option_lifts_it(kind: Any) -> None:
    couplings = eco.detect(made(kind), ARGS)
    assert [(c.size, {m.parameter.split(".")[0] for m in c.members}) for c in couplings.offered] == [
        (WIDTH, {"free", "back"})
    ]
    (blocked,) = [c for c in couplings.blocked if any(m.parameter == "up.bias" for m in c.members)]
    assert blocked.blocked is not None
    assert "allow='renormalise'" in blocked.blocked.message
    assert blocked.blocked.node
    assert __file__ in blocked.blocked.source or "torch/nn" in blocked.blocked.source


@pytest.mark.parametrize("kind", NORMS)
def test_allowed_it_is_offered_and_marked_everywhere(kind: Any) -> None:
    couplings = eco.detect(made(kind), ARGS, allow="renormalise")
    inexact = [c for c in couplings.offered if c.inexact is not None]
    assert [c.size for c in inexact] == [WIDTH]
    assert len(couplings.offered) == 2
    assert "offered, inexact" in str(couplings)
    assert "inexact: " in explain(inexact[0])
    assert '"inexact": {' in couplings_json(couplings)
    plan = eco.plan(couplings, ratio=0.5, scores="random")
    assert "(inexact)" in str(plan)
    assert plan.allow == ("renormalise",)
    assert eco.Plan.from_json(plan.to_json()) == plan


@pytest.mark.slow
@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize(("seed", "added"), [(0, 1.0), (1, 0.0)])
def test_the_norm_runs_over_what_is_kept(kind: Any, seed: int, added: float) -> None:
    """Also where nothing is added, so that the norm over all could stay."""
    model = made(kind, added)
    couplings = eco.detect(model, ARGS, allow="renormalise")
    plan = eco.plan(couplings, ratio=0.5, scores="random", seed=seed)
    small = eco.shrink(model, plan, ARGS)
    (selection,) = [s for s in plan if s.inexact]
    kept = list(selection.keep[0])
    narrow = Normed(kind(len(kept)), len(kept), added).double()
    weights = dict(model.state_dict())
    for name, value in small.state_dict().items():
        want = weights[name]
        for axis in (a for a, n in enumerate(want.shape) if n == WIDTH and not name.startswith(("free", "back"))):
            want = want.index_select(axis, torch.tensor(kept))
        assert name.startswith(("free", "back")) or torch.equal(value, want)
    (other,) = [s for s in plan if not s.inexact]
    narrow.free, narrow.back = nn.Linear(HIDDEN, other.kept), nn.Linear(other.kept, HIDDEN)
    narrow.double().load_state_dict(small.state_dict())
    assert torch.allclose(small(*ARGS), narrow(*ARGS), rtol=1e-9, atol=1e-12)


def test_what_is_exact_stays_exact() -> None:
    model = made(nn.LayerNorm)
    couplings = eco.detect(model, ARGS, allow="renormalise")
    (exact,) = [c for c in couplings.offered if c.inexact is None]
    plan = eco.plan(couplings, ratio=0.4, scores="random", kinds=[exact.kind])
    only = eco.Plan(tuple(s for s in plan if s.name == exact.name), plan.shapes)
    assert masked_error(model, eco.shrink(model, only, ARGS), only, ARGS) <= 1e-9


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_a_plan_that_lost_its_mark_is_refused(kind: Any) -> None:
    """Without the mark the graph offers no such coupling, whatever the plan says."""
    model = made(kind)
    plan = eco.plan(eco.detect(model, ARGS, allow="renormalise"), ratio=0.5, scores="random")
    assert any(selection.inexact for selection in plan)
    unmarked = replace(plan, selections=tuple(replace(selection, inexact="") for selection in plan))
    with pytest.raises(PlanError, match=r"cannot be shrunk in this graph: .*norm"):
        eco.shrink(model, unmarked, ARGS)


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(InputError, match="allow='anything' is unknown: give one of renormalise, cache"):
        eco.detect(made(nn.LayerNorm), ARGS, allow="anything")


@pytest.mark.parametrize("norm", NORMS)
def test_no_basis_changes_under_a_norm(norm: Any) -> None:
    """What a norm runs over is no linear coupling, also where nothing else is between its matrices."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(HIDDEN, WIDTH), norm(WIDTH), nn.Linear(WIDTH, HIDDEN)).double().eval()
    batches: list[Batch] = [((torch.randn(8, HIDDEN, dtype=torch.float64),), {}) for _ in range(4)]
    (coupling,) = eco.detect(model, batches[0][0], allow="renormalise").offered
    assert coupling.inexact is not None
    assert coupling.symmetry == "permutation"

    def loss(y: Tensor, args: Any, kwargs: Any) -> Tensor:
        return y.square().mean()

    options: dict[str, Any] = {"batches": batches, "loss": loss, "allow": "renormalise", "distillation": 0}
    small = eco.compress(model, batches[0][0], ratio=0.5, least_squares=False, **options)
    only_removed = eco.shrink(model, origin_of(small).plan, batches[0][0])
    torch.testing.assert_close(small(*batches[0][0]), only_removed(*batches[0][0]))
